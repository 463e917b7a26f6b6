"""Videos through pack, import-checkpoint, extract and eval give the TACO authors' numbers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch

from featstore import open_store
from featstore.workspace import Workspace
from heads import import_taco_checkpoint, load_head
from heads.evaluation.next_steps import after_import
from heads.scoring.scores import fuse_views, percent, ranks
from pipeline.clip_encoder import load_encoder
from tests.support.golden.end_to_end import write_lossless
from tests.support.golden.taco import unpacked
from tests.support.processes.command_line import done, mote, refused

E2E = Path(__file__).parent / "data" / "golden_taco" / "e2e"
META = json.loads((E2E / "meta.json").read_text())
PLAIN = [name.partition(":")[0] for name in META["zs_classes"]]


def expected(name: str) -> dict[str, Any]:
    with np.load(E2E / f"run_{name}.npz") as data:
        return {key: data[key] for key in data.files}


def table(folder: Path, names: list[str], name: str = "names.csv") -> Path:
    lines = "".join(f'{i},"{text}"\n' for i, text in enumerate(names))
    (folder / name).write_text(f"id,name\n{lines}")
    return folder / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lossless videos packed with both class lists, and the last weights imported."""
    work = tmp_path_factory.mktemp("taco")
    videos = work / "videos"
    videos.mkdir()
    stems = [Path(name).stem for name in META["video_names"]]
    with np.load(E2E / "videos.npz") as data:
        for stem in stems:
            write_lossless(videos / f"{stem}.mkv", data[f"{stem}.mp4"])
    for which, classes in (("train", META["train_classes"]), ("zs", PLAIN)):
        lists = work / which
        lists.mkdir()
        pairs = zip(stems, META[f"{which}_labels"], strict=True)
        (lists / "val.txt").write_text("".join(f"{stem}.mkv {label}\n" for stem, label in pairs))
        done(
            *("pack", "--dataset", f"taco-{which}", "--videos", videos, "--root", work / "w"),
            *("--annotations", lists / "val.txt", "--class-names", table(lists, classes)),
        )
    done(
        *("import-checkpoint", unpacked(E2E, "last_model", work), "--name", "tiny"),
        *("--frames", "4", "--class-names", work / "train" / "names.csv", "--root", work / "w"),
    )
    return work / "w"


def extracted(root: Path, dataset: str, sampling: str, *more: str | Path) -> dict[str, Any]:
    return done(
        *("extract", "--dataset", dataset, "--encoder", "tiny", "--sampling", sampling),
        *("--precision", "fp32", "--workers", "1", "--root", root, *more),
    )


def test_what_an_import_makes(root: Path) -> None:
    imported = import_taco_checkpoint(root.parent / "last_model.pt")
    encoder = load_encoder("tiny", "fp32", encoders_dir=root / "encoders")
    state = encoder.model.state_dict()
    assert all(state[name].equal(value) for name, value in imported.encoder_state.items())
    head = load_head(root / "heads" / "tiny")
    assert head.origin is not None
    assert (head.origin.prompt_set, head.origin.frames) == ("taco", 4)
    assert head.origin.class_names == tuple(META["train_classes"])
    facts = done("inspect", root / "heads" / "tiny")["imported"]
    assert (facts["weights"], facts["epoch"], facts["clip"]) == ("last", 3, "the file's own")
    following = after_import(Workspace(root), "tiny")
    assert done(*shlex.split(following)[1:], "--dry-run")


def test_the_accuracies_of_known_classes_are_the_authors(root: Path) -> None:
    for name, sampling, crops in (("close_1x1", "uniform:4", "1"), ("close_3x2", "clips:4x2", "3")):
        made = extracted(root, "taco-train", sampling, "--prompts", "taco", "--crops", crops)
        place = ("--closeset", "taco-train", "--store", Path(made["store"]).name, "--root", root)
        result, wanted = done("eval", *place, "--head", "tiny"), expected(name)
        assert result["top1"] == pytest.approx(float(wanted["top1_with"]), abs=1e-4)
        assert result["top5"] == pytest.approx(float(wanted["top5_with"]), abs=1e-4)
        assert (result["prompt_set"], result["epoch"]) == ("taco", 3)
        assert (result["weights"], result["projection"]) == ("last", "on")
        # without the projection it is CLIP's mean of frames on the same features
        off = done("eval", *place, "--head", "tiny", "--projection", "off")
        plain = done("eval", *place, "--head", "mean")
        scores = fuse_views(torch.from_numpy(wanted["cosines_without"]))
        right = percent(ranks(scores, torch.from_numpy(wanted["labels"])) < 1)
        for found in (off, plain):
            assert found["top1"] == pytest.approx(right, abs=1e-4)
        assert (off["projection"], plain.get("projection")) == ("off", None)
        swept = done("eval", *place, "--head", "tiny", "--sweep", "projection=on,off")
        rows = {row["projection"]: (row["top1"], row["file"]) for row in swept["rows"]}
        of = {r["projection"]: (r["top1"], r["file"]) for r in (result, off)}
        assert rows == of
        compared = done("compare", result["file"], off["file"])
        assert compared["incomparable"] == ["projection"]
        # beside another kind of head it forbids nothing
        assert "projection" not in done("compare", result["file"], plain["file"])["incomparable"]


def test_for_new_classes_the_projection_is_left_out_unless_it_is_asked_for(root: Path) -> None:
    made = extracted(root, "taco-zs", "clips:4x2", "--prompts", "mote28")
    place = ("--zeroshot", "taco-zs", "--store", Path(made["store"]).name, "--root", root)
    tests = ("--prompts", "mote28", "--head")
    usual, on, mean = (
        done("eval", *place, *tests, head, *more)
        for head, *more in (("tiny",), ("tiny", "--projection", "on"), ("mean",))
    )
    assert (usual["projection"], on["projection"]) == ("off", "on")
    assert usual["top1"] == mean["top1"]
    shown = mote("eval", *place, *tests, "tiny", width=80).out
    assert "last weights" in " ".join(shown.split())
    assert "projection off" in " ".join(shown.split())


def test_prediction_takes_the_projection_for_the_classes_of_the_training(root: Path) -> None:
    video = next((root.parent / "videos").iterdir())
    known = META["train_classes"]
    asked = ("predict", video, "--head", "tiny", "--root", root, "--top", len(known))

    def scores(*more: str) -> dict[str, float]:
        (found,) = done(*asked, *more)["videos"]
        return {entry["class_name"]: entry["score"] for entry in found["predictions"]}

    usual, off = scores(), scores("--projection", "off")
    assert usual == scores("--projection", "on")
    assert usual != off
    new = ("--classes", ",".join([*known[1:], "something else"]), "--prompts", "taco")
    assert scores(*new) == scores(*new, "--projection", "off")
    assert scores(*new) != scores(*new, "--projection", "on")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--head", "tiny", "--projection", "yes"), "choose one of auto, on, off"),
        (("--head", "mean", "--projection", "off"), "which has no projection: leave it out"),
    ],
)
def test_a_projection_that_cannot_be_is_refused(
    root: Path, options: tuple[str, ...], said: str
) -> None:
    extracted(root, "taco-train", "uniform:4", "--prompts", "taco")
    video = next((root.parent / "videos").iterdir())
    for asked in (
        ("eval", "--closeset", "taco-train", "--sampling", "uniform:4"),
        ("predict", video, "--classes", "a,b", "--encoder", "tiny"),
    ):
        assert said in refused(2, *asked, *options, "--root", root)


def test_rephrased_names_are_other_texts_and_never_compared_as_equals(root: Path) -> None:
    names = table(root.parent, META["zs_classes"], "reworded.csv")
    made = extracted(root, "taco-zs", "clips:4x3", "--prompts", "mote28", "--descriptions", names)
    store = open_store(made["store"])
    text = store.class_text("reworded")
    assert (text.rephrased, text.templates) == (True, ())
    assert not store.class_text("mote28").rephrased
    encoder = load_encoder("tiny", "fp32", encoders_dir=root / "encoders")
    wanted = encoder.class_embeddings(META["zs_classes"], "mote28").numpy()
    np.testing.assert_allclose(text.embeddings, wanted, atol=1e-6)
    files = []
    for prompts in ("mote28", str(names)):
        result = done(
            *("eval", "--zeroshot", "taco-zs", "--head", "mean", "--root", root),
            *("--store", Path(made["store"]).name, "--prompts", prompts),
        )
        files.append(result["file"])
        assert result.get("class_names_as") == (None if prompts == "mote28" else "rephrased")
    found = done("compare", *files)
    assert found["comparable"] is False
    assert "class_names_as" in found["incomparable"]
    shown = mote("compare", *files, width=80).out
    assert "plain" in shown
    assert "rephrased" in shown


def test_a_file_of_rephrased_names_must_have_the_classes(root: Path) -> None:
    fewer = table(root.parent, ["Fence: Two people fence", *META["zs_classes"][1:]], "fewer.csv")
    message = refused(
        *(2, "extract", "--dataset", "taco-zs", "--encoder", "tiny", "--root", root),
        *("--sampling", "clips:4x1", "--descriptions", fewer),
    )
    assert "it lacks 'brush hair', 1 of 14 classes" in message
    assert "it has 'Fence', which are no classes of the data set" in message


def test_the_export_is_the_file_that_was_imported(root: Path) -> None:
    out = root.parent / "out.pt"
    done("export", "tiny", "--format", "official", "--out", out, "--root", root)
    ours, theirs = (
        torch.load(file, weights_only=True) for file in (out, root.parent / "last_model.pt")
    )
    assert ours["epoch"] == theirs["epoch"]
    for part in ("model_state_dict", "fusion_model_state_dict"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(ours[part][name].equal(value) for name, value in theirs[part].items())


def test_for_new_classes_other_programs_take_the_encoders_folder(root: Path) -> None:
    """It is an ordinary CLIP, which open_clip loads, with the bits that were imported."""
    imported = import_taco_checkpoint(root.parent / "last_model.pt")
    state = open_clip.create_model(f"local-dir:{root / 'encoders' / 'tiny'}").state_dict()
    assert all(state[name].equal(value) for name, value in imported.encoder_state.items())


def test_for_known_classes_the_exported_head_gives_what_eval_gives(root: Path) -> None:
    made = extracted(root, "taco-train", "uniform:4", "--prompts", "taco")
    result = done("eval", "--closeset", "taco-train", "--sampling", "uniform:4", "--root", root)
    assert result["projection"] == "on"
    store, file = open_store(made["store"]), root.parent / "tiny.onnx"
    done("export", "tiny", "--format", "onnx", "--out", file, "--root", root)
    session = onnxruntime.InferenceSession(file)
    inputs = {
        "features": store.features(store.rows)[:, 0].astype(np.float32),
        "class_embeddings": store.class_text("taco").embeddings,
        "modulate": np.array(True),
    }
    (cosines,) = session.run(None, inputs)
    right = percent(ranks(torch.from_numpy(cosines), torch.tensor(store.labels).long()) < 1)
    assert result["top1"] == pytest.approx(right)


@pytest.mark.parametrize("option", ["--blend", "--clip", "--attention-heads"])
def test_settings_of_other_methods_are_refused(root: Path, option: str) -> None:
    value = {"--blend": "0.5", "--clip": "ViT-B-16/openai", "--attention-heads": "2"}[option]
    file = root.parent / "last_model.pt"
    message = refused(2, "import-checkpoint", file, "--name", "x", "--root", root, option, value)
    assert f"{option} means nothing for {file}, a checkpoint of TACO" in message
    assert not (root / "heads" / "x").exists()


def test_it_is_not_trained_by_the_commands(root: Path) -> None:
    store = Path(extracted(root, "taco-train", "uniform:4", "--prompts", "taco")["store"]).name
    shared = ("--dataset", "taco-train", "--split", "val", "--root", root)
    message = refused(2, "train-head", "--head", "taco", "--store", store, *shared)
    assert "TACO cannot be trained from a store" in message
