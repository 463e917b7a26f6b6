"""Videos through pack, import-checkpoint, extract and eval give the TACO authors' numbers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
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
        # without the projection it is CLIP's mean of frames on the same features
        plain = done("eval", *place, "--head", "mean")
        scores = fuse_views(torch.from_numpy(wanted["cosines_without"]))
        right = percent(ranks(scores, torch.from_numpy(wanted["labels"])) < 1)
        assert plain["top1"] == pytest.approx(right, abs=1e-4)


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
