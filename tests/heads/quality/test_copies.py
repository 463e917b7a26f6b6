"""Copies among real videos are found by pictures and embeddings, and lists of them are taken."""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featstore import open_store
from heads.quality.alignment import Trimming, compare, points_between, screen, trimmings
from heads.quality.copies import CopyGroup, Pair, Video, content_marks
from heads.quality.null import largest_ratio
from heads.quality.part import Part
from heads.quality.search import find_duplicates
from pipeline.demo.small_clip import make_encoder_folder
from pipeline.demo.world import draw_world
from tests.support.processes.command_line import done, mote, refused
from tests.support.stores.action_store import action_store
from tests.support.worlds.copied_videos import black_video, write_videos

CLASSES, OF_CLASS = 6, 16


class Copied:
    """A workspace with copies of all kinds in it: the pairs of keys by kind."""

    def __init__(self, folder: Path) -> None:
        self.videos, self.root = folder / "videos", folder / "root"
        names = write_videos(self.videos, CLASSES, OF_CLASS)
        sprite = draw_world(4).known[0].folder
        black_video(self.videos / f"train/{sprite}/black.mp4")
        make_encoder_folder(self.root / "encoders/demo-clip")
        place = ("--root", self.root)
        self.packed = done("pack", "--dataset", "clips", "--videos", self.videos, *place)
        self.store = Path(
            done(
                *("extract", "--dataset", "clips", "--encoder", "demo-clip"),
                *("--sampling", "uniform:8", "--workers", "1", *place),
            )["store"]
        )
        keys = open_store(self.store).keys
        self.pairs = {
            kind: frozenset(next(k for k in keys if _is(k, name)) for name in pair)
            for kind, pair in names.items()
        }
        self.black = next(key for key in keys if "black" in key)


def _is(key: str, name: str) -> bool:
    split, folder, stem = name.split("/")
    return key.endswith((stem, f"{stem}%2Emp4", f"{stem}%2Emkv")) and split in key and folder in key


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Copied:
    return Copied(tmp_path_factory.mktemp("copied"))


def rows_of(file: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(file).read_text())))


def kinds_of(found: dict[str, Any]) -> dict[frozenset[str], str]:
    pairs = [pair for group in found["found"] for pair in group["pairs"]]
    return {frozenset((pair["first"], pair["second"])): pair["kind"] for pair in pairs}


def test_copies_of_all_kinds_are_found_and_nothing_else(copied: Copied) -> None:
    found = done("store", "duplicates", copied.store, "--root", copied.root)
    kinds = kinds_of(found)
    assert set(kinds) == set(copied.pairs.values())
    assert found["groups"] == found["across_splits"] == len(copied.pairs)
    assert found["across_classes"] == 0
    said = {kind: kinds[pair] for kind, pair in copied.pairs.items()}
    assert said["identical"] == "identical bytes"
    assert (said["re-muxed"], said["mirrored"]) == ("same frames", "mirrored")
    assert "cropped" in said["cropped"]
    assert "trimmed" in said["trimmed"]
    listed = rows_of(found["files"]["list"])
    # The copy in val stays, so that test lists keep their videos.
    out = {row["key"] for row in listed if row["exclude"] == "yes"}
    assert out == {row["key"] for row in listed if row["splits"] == "train"}
    with Image.open(found["files"]["picture"]) as drawn:
        assert np.asarray(drawn).std() > 10
    assert json.loads(Path(found["files"]["json"]).read_text())["groups"] == found["groups"]


def test_every_store_split_and_pair_has_its_own_lists(copied: Copied) -> None:
    other = copied.root / "features" / "other" / copied.store.name
    shutil.copytree(copied.store, other)
    files = [
        done("store", "suspects", path, "--root", copied.root)["files"]["list"]
        for path in (copied.store, other, f"other/{other.stem}")
    ]
    assert files[0] != files[1] == files[2]
    name, more = str(copied.store), str(other)
    place = ("--no-picture", "--root", copied.root)
    files += [
        done("store", *words, *place)["files"]["list"]
        for words in (
            *(("duplicates", name), ("duplicates", f"{name}:train"), ("duplicates", f"{name}:val")),
            *(("leaks", f"{name}:train", f"{name}:val"), ("leaks", f"{name}:val", f"{name}:train")),
            ("leaks", f"{name}:train", f"{more}:val"),
        )
    ]
    assert len(set(files[3:])) == 6
    assert all(Path(file).is_relative_to(copied.root / "quality/clips") for file in files[3:])
    shutil.rmtree(other)


def test_a_group_says_how_many_of_it_its_evidence_is_of() -> None:
    a, b, c = (Video(0, row, f"v{row}", "wave", (), 1.0) for row in range(3))
    same, near = Pair(a, b, 1.0, "identical bytes", ""), Pair(b, c, 0.99, "trimmed", "")
    assert CopyGroup((a, b, c), (same, near)).words.startswith("3 videos, 2 of them identical b")
    assert CopyGroup((a, b), (same,)).words.startswith("2 videos, identical bytes")


def test_the_list_is_taken_back(copied: Copied) -> None:
    found = done("store", "duplicates", copied.store, "--root", copied.root)
    listed = Path(found["files"]["list"])
    train = ("--head", "knn", "--dataset", "clips", "--root", copied.root)
    trained = done("train-head", *train, "--name", "clean", "--exclude", listed)
    n = len(copied.pairs)
    assert (trained["excluded"]["videos"], trained["excluded"]["unknown"]) == (n, [])
    assert found["next"].startswith("mote-cli train-head --dataset clips ")
    assert shlex.split(found["next"])[-2:] == ["--exclude", str(listed)]
    assert trained["n_listed"] == CLASSES * OF_CLASS + 1 - n
    assert f"{n} excluded by a list" in trained["trained_on"]
    packed = done(
        *("pack", "--dataset", "clean", "--videos", copied.videos, "--exclude", listed),
        *("--root", copied.root),
    )
    assert packed["excluded"]["videos"] == n
    assert packed["videos_listed"] == copied.packed["videos_listed"] - n


def test_leaks_between_splits(copied: Copied) -> None:
    name = str(copied.store)
    found = done("store", "leaks", f"{name}:train", f"{name}:val", "--root", copied.root)
    assert set(kinds_of(found)) == set(copied.pairs.values())
    assert found["leaked"] == found["excluded"] == len(copied.pairs)
    assert {row["splits"] for row in rows_of(found["files"]["list"])} == {"train", "val"}
    shown = mote("store", "leaks", f"{name}:train", f"{name}:val", "--root", copied.root, width=80)
    assert "6 of 6 test videos are copied from 6 training videos" in " ".join(shown.out.split())
    assert max(map(len, shown.out.splitlines())) <= 80 or "/" in shown.out


def test_copies_of_training_videos_count_in_results(copied: Copied) -> None:
    place = ("--dataset", "clips", "--root", copied.root)
    shutil.rmtree(copied.root / "quality", ignore_errors=True)  # lists count, too
    done("train-head", "--head", "knn", "--name", "all", *place)
    result = mote("eval", "--closeset", "clips", "--head", "all", "--json", *place[2:])
    assert result.code == 0, result.err
    assert (result.json["n_trained_on"], result.json["n_copied"]) == (1, 1)
    assert "1 of 6 tested videos is by content in the training, under another key" in result.err


def test_listed_copies_count_in_results_as_people_corrected_them(
    copied: Copied, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(copied.root, root)
    shutil.rmtree(root / "quality", ignore_errors=True)
    place = ("--root", root)
    done("train-head", "--head", "knn", "--name", "listed", "--dataset", "clips", *place)
    name = f"clips/{copied.store.stem}"
    found = done("store", "leaks", f"{name}:train", f"{name}:val", "--no-picture", *place)
    evaluate = ("eval", "--closeset", "clips", "--head", "listed", *place)
    n = len(copied.pairs)
    result = done(*evaluate)
    assert (result["n_trained_on"], result["n_copied"]) == (n, n)
    listed = Path(found["files"]["list"])
    rows = listed.read_text().splitlines(keepends=True)
    first = [row.replace(",yes\n", ",no\n") if row.startswith("1,") else row for row in rows]
    assert first != rows
    listed.write_text("".join(first))
    kept = {group["pairs"][0]["kind"] for group in found["found"][:1]}
    # Identical bytes need no list.
    assert done(*evaluate)["n_copied"] == n - (kept != {"identical bytes"})
    listed.write_text("key\nnothing\n")
    left = mote(*evaluate, "--json")
    assert left.json["n_copied"] == 1
    assert f"the copies listed in {listed} do not count" in left.err


def test_lists_without_data_sets_are_read_or_refused_in_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As they were written once; the folder of a list of one store says which data set it is of."""
    (tmp_path / "quality/clips/a-store").mkdir(parents=True)
    text = "group,key,store,exclude\n1,a,a-store,no\n1,b,a-store,yes\n2,c,a-store,no\n"
    lists = [tmp_path / "quality/clips/a-store" / name for name in ("duplicates.csv", "leaks.csv")]
    lists[0].write_text(text.replace(",", ";"))  # as a spreadsheet may have written it
    lists[1].write_text(text)
    marks = content_marks(tmp_path / "quality", tmp_path / "datasets/clips")
    assert marks == {key: [f"{lists[0]}, group 1"] for key in "ab"}
    assert not content_marks(tmp_path / "quality", tmp_path / "datasets/others")
    assert f"{lists[1]} do not count: it has no column dataset; make it again" in caplog.text
    lists[0].write_text("group,key,dataset,exclude\n1,a\n")
    assert not content_marks(tmp_path / "quality", tmp_path / "datasets/clips")
    assert "row 2 has fewer columns" in caplog.text


def test_without_files_embeddings_decide(copied: Copied, tmp_path: Path) -> None:
    store = open_store(copied.store)
    found = find_duplicates(Part.of(store, "", tmp_path))
    pairs = {frozenset((p.first.key, p.second.key)) for g in found.groups for p in g.pairs}
    assert found.limits["looked_at"] == 0
    assert pairs >= {copied.pairs["identical"], copied.pairs["re-muxed"]}
    assert len(pairs - set(copied.pairs.values())) <= 1  # chance is allowed to give one
    assert "picture" not in found.save(tmp_path / "out")


def test_blank_videos_are_named(copied: Copied) -> None:
    found = done("store", "suspects", copied.store, "--root", copied.root)
    blank = [one["key"] for one in found["found"] if "blank" in one["problem"]]
    assert blank == [copied.black]
    listed = rows_of(found["files"]["list"])
    assert len(listed) == found["videos"] == copied.packed["videos_packed"]
    assert [row["exclude"] for row in listed if row["key"] == copied.black] == ["yes"]


def test_wrong_arguments(copied: Copied, tmp_path: Path) -> None:
    name, place = str(copied.store), ("--root", copied.root)
    assert "no split 'tests'" in refused(2, "store", "duplicates", f"{name}:tests", *place)
    assert "no store" in refused(2, "store", "suspects", "missing", *place)
    assert "in common" in refused(2, "store", "leaks", name, f"{name}:val", *place)
    other = action_store(tmp_path / "other.zarr")
    assert "one encoder" in refused(2, "store", "leaks", name, str(other.path), *place)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(
        2, "store", "duplicates", name, "--out", tmp_path / "file", *place
    )


def test_a_trimmed_sequence_is_told_from_a_shifted_one() -> None:
    """A part of a smooth path is found in it, with its place, in both orders."""
    torch.manual_seed(0)
    corners = torch.randn(40, 5, 12)
    paths = points_between(corners, torch.linspace(0, 4, 16))
    way = Trimming(0.2, 0.6)
    part = points_between(paths[:1], (way.start + way.step * torch.arange(16) / 16) * 16)
    every = torch.cat([paths, part])
    pairs = screen(every, None)
    assert [0, 40] in pairs.tolist()
    score, number = compare(every, every, torch.tensor([[0, 40], [40, 0], [0, 1]]))
    assert score[:2].min() > 0.94
    assert score[2] < 0.9
    assert int(number[1]) == -1 - int(number[0])
    found = trimmings()[int(number[0])]
    assert found.start == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("dimensions", [2, 6])
def test_chance_neighbours_are_no_copies(dimensions: int) -> None:
    """Points at random have no copies; a few that lie far nearer are found among them."""
    torch.manual_seed(1)
    points = torch.rand(1500, dimensions).double()
    points[:20] = points[20:40] + 1e-4 * torch.randn(20, dimensions)
    distance = torch.cdist(points, points)
    nearest = distance.fill_diagonal_(torch.inf).topk(8, 1, largest=False)[0]
    usual = nearest[:, -1]
    i, j = torch.triu_indices(1500, 1500, 1)
    ratios = distance[i, j] / (usual[i] * usual[j]).sqrt()
    found = ratios <= largest_ratio(nearest.float(), ratios[ratios < 1].float())
    planted = (i < 20) & (j == i + 20)
    assert int((found & ~planted).sum()) <= 1
    assert int((found & planted).sum()) >= (20 if dimensions == 6 else 12)
