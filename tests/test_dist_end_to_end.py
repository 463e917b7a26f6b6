"""Videos through pack, import-checkpoint, eval and predict give the DiST authors' numbers."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from featstore import open_store
from featstore.workspace import Workspace
from heads import load_head
from heads.evaluation.next_steps import after_import
from heads.files.head_file import head_fingerprint
from pipeline.float_frames import evaluation_floats
from pipeline.sampling import dist_test_indices
from tests.support.golden.checks import worst
from tests.support.golden.dist.files import e2e_clip, e2e_state
from tests.support.golden.end_to_end import write_lossless
from tests.support.processes.command_line import done, mote, refused

E2E = Path(__file__).parent / "data" / "golden_dist" / "e2e"
META = json.loads((E2E / "meta.json").read_text())
RUNS = {  # data set, options
    "k400_1x1": ("k400", ("--views", "1x1")),
    "k400_3x1": ("k400", ()),
    "k400_2x3": ("k400", ("--views", "2x3")),
    "zs_kstyle_3x1": ("zs", ("--ensemble", "0.5")),
    "zs_hmdbstyle_3x1": ("zs", ("--ensemble", "0.5", "--crop-style", "center-fraction")),
}
CENTRE = "central square of 7/8 of the short side"


def expected(name: str) -> dict[str, Any]:
    with np.load(E2E / f"run_{name}.npz") as data:
        return {key: data[key] for key in data.files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lossless videos packed with both class lists, and the branch imported with its CLIP."""
    work = tmp_path_factory.mktemp("dist")
    videos = work / "videos"
    videos.mkdir()
    stems = [Path(name).stem for name in META["video_names"]]
    with np.load(E2E / "videos.npz") as data:
        for stem in stems:
            write_lossless(videos / f"{stem}.mkv", data[f"{stem}.mp4"])
    for which, run_name, classes in (
        ("k400", "k400_1x1", META["classes"]),
        ("zs", "zs_kstyle_3x1", META["zs_classes"]),
    ):
        lists = work / which
        lists.mkdir()
        labels = expected(run_name)["labels"].tolist()
        pairs = zip(stems, labels, strict=True)
        (lists / "val.txt").write_text("".join(f"{stem}.mkv {label}\n" for stem, label in pairs))
        names = "".join(f'{i},"{name}"\n' for i, name in enumerate(classes))
        (lists / "names.csv").write_text(f"id,name\n{names}")
        done(
            *("pack", "--dataset", f"dist-{which}", "--videos", videos, "--root", work / "w"),
            *("--annotations", lists / "val.txt", "--class-names", lists / "names.csv"),
        )
    torch.save(e2e_clip(E2E), work / "clip.pt")
    torch.save(e2e_state(E2E), work / "branch.pyth")
    file, names_file = work / "branch.pyth", work / "k400" / "names.csv"
    options = ("--name", "tiny", "--class-names", names_file, "--root", work / "w")
    missing = refused(2, "import-checkpoint", file, *options)
    assert "name the CLIP that it was trained with, with --clip SPEC" in missing
    assert not (work / "w" / "heads" / "tiny").exists()
    done("import-checkpoint", file, "--clip", work / "clip.pt", *options)
    return work / "w"


def test_the_command_after_the_import_makes_the_features_itself(root: Path) -> None:
    following = after_import(Workspace(root), "tiny")
    assert following.startswith("mote-cli eval --zeroshot dist-zs --head tiny")
    assert done(*shlex.split(following)[1:])["n_evaluated"] == 15


@pytest.mark.parametrize("name", RUNS)
def test_the_accuracies_are_the_authors(root: Path, name: str) -> None:
    which, options = RUNS[name]
    kind = "--closeset" if which == "k400" else "--zeroshot"
    result = done("eval", kind, f"dist-{which}", "--head", "tiny", "--root", root, *options)
    wanted = expected(name)
    assert result["top1"] == pytest.approx(float(wanted["top1"]), abs=1e-4)
    assert result["top5"] == pytest.approx(float(wanted["top5"]), abs=1e-4)
    assert (result["n_evaluated"], result["n_failed"]) == (15, 0)
    assert any("softmax of logits" in note for note in result["notes"])
    assert (result["frames"], result["tower_frames"]) == (8, 4)
    assert (result["crop"] == CENTRE) == ("hmdb" in name)
    assert result["resize"].startswith(CENTRE if "hmdb" in name else "short side to 32")


def test_the_stored_vectors_are_the_authors(root: Path) -> None:
    """Made anew by no later evaluation, and as exact as float32."""
    (path,) = [p for p in Workspace(root).stores("dist-k400") if "2x3" not in p.name and
               "x3" in p.name]  # fmt: skip
    store, head = open_store(path), load_head(root / "heads" / "tiny")
    rows = np.array([store.row(key) for key in sorted(store.keys)], np.int64)
    features = torch.from_numpy(store.features(rows, None)).float()
    _, video, _ = head.view_vectors(features.flatten(0, 1))
    found = video.unflatten(0, features.shape[:2])
    assert worst(found, expected("k400_3x1")["video_embed_normalised"]) <= 1e-6
    made = path.stat().st_mtime_ns
    done("eval", "--closeset", "dist-k400", "--head", "tiny", "--root", root)
    assert path.stat().st_mtime_ns == made


def test_prediction_scores_are_the_published_ones(root: Path) -> None:
    video = root.parent / "videos" / "v00.mkv"
    (answer,) = done("predict", video, "--head", "tiny", "--root", root, "--top", "8")["videos"]
    scores = {entry["class_name"]: entry["score"] for entry in answer["predictions"]}
    wanted = expected("k400_1x1")["view_prob"][0, 0]
    for name, score in zip(META["classes"], wanted.tolist(), strict=True):
        assert scores[name] == pytest.approx(score, abs=2e-4)


def test_a_head_and_frames_that_do_not_belong_together_are_one_line(root: Path) -> None:
    for more, words in (
        (("--sampling", "dist:6x3"), "dist:6x3 takes 6 frames, the head needs 8"),
        (("--sampling", "dist:7x3"), "takes 7 frames, which alpha 2 does not divide, the head"),
        (("--sampling", "clips:8x3"), "clips:8x3 is not how the head tiny looks at videos: use"),
        (("--sampling", "dist:8x3", "--views", "2x1"), "contradict each other: give one"),
        (("--views", "3x5"), "5 crops are not supported by DiST: use 1 or 3"),
        (("--frames", "4"), "rows a view are not what DiST made"),
        (("--crop-style", "corner"), "crop style 'corner' is unknown: choose"),
        (("--crop-style", "center-fraction", "--views", "1x3"), "3 crops make no sense with"),
    ):
        given = ("eval", "--closeset", "dist-k400", "--head", "tiny", "--root", root, *more)
        before = files(root)
        assert words in refused(2, *given)
        assert files(root) == before
    video = root.parent / "videos" / "v00.mkv"
    words = refused(2, "predict", video, "--head", "tiny", "--frames", "7", "--root", root)
    assert "prediction takes 7 frames, which alpha 2 does not divide, the head needs 8" in words
    refused(2, "train-head", "--dataset", "dist-k400", "--head", "dist", "--root", root)


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def store(root: Path) -> Path:
    """The store of 3x1 views of the known classes."""
    result = done("eval", "--closeset", "dist-k400", "--head", "tiny", "--root", root)
    return root / "features" / "dist-k400" / result["store"]


def test_a_second_protocol_decodes_nothing(root: Path, store: Path) -> None:
    """The videos are gone, and every later number comes from what is kept of their views."""
    tars, away = root / "datasets" / "dist-k400" / "shards", root / "away"
    tars.rename(away)
    try:
        place = ("--head", "tiny", "--root", root)
        again = done("eval", "--closeset", "dist-k400", *place)
        assert again["top1"] == pytest.approx(float(expected("k400_3x1")["top1"]), abs=1e-4)
        both = done("eval", "--zeroshot", "dist-k400", "--ensemble", "0.5", *place)
        assert (both["n_evaluated"], both["ensemble"]) == (15, 0.5)
        swept = done("eval", "--closeset", "dist-k400", "--sweep", "ensemble=0,0.5,1", *place)
        assert len(swept["rows"]) == 3
    finally:
        away.rename(tars)


def test_the_store_is_kept_like_any_other(root: Path, store: Path) -> None:
    place = ("--root", root)
    assert done("verify", store, "--deep", "--reencode", "2", *place)["ok"]
    assert done("store", "add-texts", store, "--prompts", "video", *place)["added"]
    other = done("eval", "--closeset", "dist-k400", "--head", "tiny", "--prompts", "video", *place)
    assert other["prompt_set"] == "video"
    assert done("inspect", store)["provenance"]["preprocessing"]["style"] == "short-side"
    assert "tiny, dist:8x3, vectors of views" in mote("status", *place).out
    assert done("inspect", "tiny", *place)["kind"] in ("encoder", "run")
    steps = done("status", *place)["next"]
    assert not [step for step in steps if "extract" in (step["command"] or "")]


def test_damage_is_repaired_by_the_command_that_is_named(root: Path, store: Path) -> None:
    (features,) = [p for p in (store / "features" / "c").rglob("*") if p.is_file()]
    good = features.read_bytes()
    features.write_bytes(good[:-40] + bytes(40))
    found = done("verify", store, "--deep", "--root", root, code=1)
    assert found["repair"].startswith("mote-cli eval --zeroshot dist-k400 --head tiny --views 3x1")
    done(*shlex.split(found["repair"])[1:])
    assert done("verify", store, "--deep", "--root", root)["ok"]
    assert features.read_bytes() == good


def test_clip_alone_is_measured_on_the_same_frames(root: Path, store: Path) -> None:
    """What "mean" makes of the store is CLIP's share of the ensemble."""
    place = ("--closeset", "dist-k400", "--root", root)
    frames = ("--head", "mean", "--store", store.stem, "--prompts", "name", *place)
    mean = done("eval", *frames)
    clip = done("eval", "--head", "tiny", "--ensemble", "1", *place)
    assert mean["kind"] == "mean"
    assert mean["top1"] == clip["top1"]
    words = refused(2, "eval", *frames, "--frames", "4")
    assert "4 rows a view are not what DiST made" in words


def test_nothing_else_takes_the_store_for_frames(root: Path, store: Path, tmp_path: Path) -> None:
    place = ("--root", root)
    kept = "holds what one head made of every view, not the embeddings of frames"
    train = ("train-head", "--dataset", "dist-k400", *place)
    for given in (
        train,
        (*train, "--store", store.stem, "--split", "val"),
        ("eval", "--closeset", "dist-k400", "--head", "mean", *place),
        ("store", "quantize", store, "--out", tmp_path / "q.zarr", *place),
        ("store", "suspects", store, *place),
    ):
        assert kept in refused(2, *given)
    for kind in ("--fewshot", "--base-to-novel"):
        words = refused(2, "eval", kind, "dist-k400", "--head", "tiny", *place)
        assert "DiST cannot be trained from a store: name another run with --head, or" in words
    assert not (tmp_path / "q.zarr").exists()


def test_the_trade_off_has_a_row_for_every_share_of_clip(root: Path, store: Path) -> None:
    place = ("--root", root)
    sweep = ("--head", "tiny", "--sweep", "ensemble=0,0.5", *place)
    done("eval", "--closeset", "dist-k400", *sweep)
    zero = done("eval", "--zeroshot", "dist-zs", *sweep)["rows"]
    asked = ("tradeoff", "tiny", "--closeset", "dist-k400", "--zeroshot", "dist-zs", *place)
    found = done(*asked)
    rows = {row["setting"]: row for row in found["rows"]}
    assert {"off", "off, ensemble 0.5"} <= set(rows)
    shares = {result["ensemble"]: result["top1"] for result in zero}
    for share, words in ((0.0, "off, ensemble 0"), (0.5, "off, ensemble 0.5")):
        row = rows[words]
        assert row["zeroshot_top1"] == shares[share]
        both = row["closeset_top1"], row["zeroshot_top1"]
        assert row["tradeoff"] == pytest.approx(2 / (1 / both[0] + 1 / both[1]))
    for line in found["missing"]:  # of CLIP's own row
        done(*shlex.split(line.split("`")[1])[1:])
    (baseline,) = done(*asked)["baselines"]
    assert baseline["tradeoff"] is not None


def test_results_of_one_head_are_compared(root: Path, store: Path) -> None:
    place = ("--closeset", "dist-k400", "--head", "tiny", "--root", root)
    first, second = done("eval", *place), done("eval", *place, "--ensemble", "0.5")
    compared = done("compare", first["file"], second["file"])
    assert "ensemble" in str(compared)


@pytest.mark.slow
def test_the_exported_head_gives_the_authors_numbers(root: Path, tmp_path: Path) -> None:
    wanted, place = expected("k400_1x1"), ("--root", root)
    videos = np.load(E2E / "videos.npz")
    frames = torch.cat(
        [
            evaluation_floats(videos[name][dist_test_indices(len(videos[name]), 8, 1)[0]], 32)
            for name in META["video_names"]
        ]
    )
    done("export", "tiny", "--format", "onnx", "--out", tmp_path / "tiny.onnx", *place)
    session = onnxruntime.InferenceSession(tmp_path / "tiny.onnx")
    inputs = {"frames": frames.numpy(), "class_embeddings": wanted["text_features"]}
    (cosines,) = session.run(None, {**inputs, "ensemble": np.array(0, np.float32)})
    scale = float(load_head(root / "heads" / "tiny").logit_scale.exp())
    assert worst(torch.from_numpy(scale * cosines), wanted["logits"][:, 0]) <= 2e-5
    done(
        "export", "tiny", "--format", "safetensors", "--out", tmp_path / "tiny.safetensors", *place
    )
    head, own = load_head(tmp_path / "tiny.safetensors"), load_head(root / "heads" / "tiny")
    assert head.origin == own.origin
    assert all(value.equal(own.state_dict()[name]) for name, value in head.state_dict().items())


def test_an_official_export_is_imported_as_the_same_model(root: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "tiny.pyth", root.parent / "k400" / "names.csv"
    done("export", "tiny", "--format", "official", "--out", out, "--root", root)
    assert set(torch.load(out, weights_only=True)) == {"model_state"}
    done("import-checkpoint", out, "--name", "again", "--class-names", names, "--root", tmp_path)
    one, two = load_head(root / "heads" / "tiny"), load_head(tmp_path / "heads" / "again")
    assert head_fingerprint(one) == head_fingerprint(two)
    assert one.origin is not None
    assert two.origin is not None
    assert one.origin.encoder_fingerprint == two.origin.encoder_fingerprint


def test_two_heads_of_one_name_have_stores_of_their_own(root: Path, store: Path) -> None:
    """The first was removed, and another took its name: its features are not the old ones."""
    state = e2e_state(E2E)
    branch = "backbone.base_encoder.dist_net."
    state["model_state"][f"{branch}proj"] = state["model_state"][f"{branch}proj"].flip(1)
    torch.save(state, root.parent / "other.pyth")
    heads = [root / kind / "tiny" for kind in ("heads", "encoders")]
    for folder in heads:
        folder.rename(folder.with_name("kept"))
    try:
        done(
            *("import-checkpoint", root.parent / "other.pyth", "--name", "tiny"),
            *("--clip", root.parent / "clip.pt", "--root", root),
            *("--class-names", root.parent / "k400" / "names.csv"),
        )
        other = done("eval", "--closeset", "dist-k400", "--head", "tiny", "--root", root)
        assert other["store"] == f"{store.stem}-2.zarr"
        shutil.rmtree(root / "features" / "dist-k400" / other["store"])
    finally:
        for folder in heads:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name("kept").rename(folder)


def wrong_type(state: dict[str, Any]) -> dict[str, Any]:
    name = "backbone.base_encoder.dist_net.proj"
    return {"model_state": {**state["model_state"], name: torch.ones(64, 32, dtype=torch.int32)}}


BAD_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "integers": (wrong_type, "proj is not a tensor of numbers"),
    "a list": (lambda state: [1, 2], "holds a list, not a checkpoint: pass one of a method's"),
    "other entries": (
        lambda state: {"state_dict": {}},
        "for DiST it lacks an entry model_state with tensors backbone.base_encoder.dist_net.*",
    ),
    "no branch": (
        lambda state: {"model_state": {"backbone.visual": torch.ones(2)}},
        "for DiST it lacks tensors backbone.base_encoder.dist_net.* in model_state",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_of_the_wrong_kind_leaves_nothing(root: Path, tmp_path: Path, kind: str) -> None:
    change, words = BAD_FILES[kind]
    torch.save(change(e2e_state(E2E)), tmp_path / "bad.pyth")
    assert words in imported_badly(root, tmp_path / "bad.pyth")


def imported_badly(root: Path, file: Path, *more: str | Path) -> str:
    before = files(root)
    given = ("--name", "bad", "--clip", root.parent / "clip.pt", "--root", root, *more)
    words = refused(2, "import-checkpoint", file, *given)
    assert files(root) == before
    return words


def test_a_file_cut_off_anywhere_leaves_nothing(root: Path, tmp_path: Path) -> None:
    whole = (root.parent / "branch.pyth").read_bytes()
    for share in (0, 0.3, 0.9, 0.999):
        (tmp_path / "cut.pyth").write_bytes(whole[: int(share * len(whole))])
        words = imported_badly(root, tmp_path / "cut.pyth")
        assert "cannot be read as a checkpoint" in words or "is damaged" in words
    missing = imported_badly(root, tmp_path / "none.pyth")
    assert "such as MoTE_B16.pt or DIST_VIT_B16_K400_16+32f_84.4.pyth" in missing


def test_another_backbone_than_the_branchs_is_refused(root: Path, tmp_path: Path) -> None:
    branch = root.parent / "branch.pyth"
    clip = e2e_clip(E2E)
    wider = {n: v.repeat(1, 1, 2, 2) if n == "visual.conv1.weight" else v for n, v in clip.items()}
    torch.save(wider, tmp_path / "patch16.pt")
    words = imported_badly(root, branch, "--clip", tmp_path / "patch16.pt")
    assert "the CLIP has patch 16, the DiST branch was made for patch 8" in words
    for layers, wanted in (
        ("0,7", "selected layer 7 is out of range: the image tower has 2 blocks, 0 to 1"),
        ("0", "1 selected layers for a branch that reads 2 blocks: name 2, counted from 0"),
        ("1,0", "[1, 0] are no blocks of a tower"),
        ("0,x", "--selected-layers '0,x' is no list of blocks"),
    ):
        assert wanted in imported_badly(root, branch, "--selected-layers", layers)
    for option, value in (("--blend", "0.5"), ("--frames", "4"), ("--attention-heads", "1")):
        words = imported_badly(root, branch, option, value)
        assert f"{option} means nothing for" in words
        assert "a checkpoint of DiST: leave it out" in words


def test_a_closed_set_needs_the_heads_own_classes(root: Path) -> None:
    words = refused(2, "eval", "--closeset", "dist-zs", "--head", "tiny", "--root", root)
    assert "tiny was trained on 8 classes that are not the 6 of dist-zs" in words
    assert "evaluate it with --zeroshot dist-zs" in words
