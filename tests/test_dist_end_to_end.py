"""Videos through pack, import-checkpoint, eval and predict give the DiST authors' numbers."""

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
from heads import load_head
from heads.evaluation.next_steps import after_import
from tests.support.golden.checks import worst
from tests.support.golden.dist import e2e_clip, e2e_state
from tests.support.golden.end_to_end import write_lossless
from tests.support.processes.command_line import done, refused

E2E = Path(__file__).parent / "data" / "golden_dist" / "e2e"
META = json.loads((E2E / "meta.json").read_text())
RUNS = {  # data set, options
    "k400_1x1": ("k400", ("--views", "1x1")),
    "k400_3x1": ("k400", ()),
    "k400_2x3": ("k400", ("--views", "2x3")),
    "zs_kstyle_3x1": ("zs", ("--ensemble", "0.5")),
}


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
        (("--sampling", "dist:6x3"), "takes 6 frames, the head tiny needs 8"),
        (("--frames", "4"), "rows a view are not what DiST made"),
    ):
        given = ("eval", "--closeset", "dist-k400", "--head", "tiny", "--root", root, *more)
        assert words in refused(2, *given)
    refused(2, "train-head", "--dataset", "dist-k400", "--head", "dist", "--root", root)
