"""Videos of the same bytes are named, and lists of videos are left out."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

from featstore.commands import pack_command
from featstore.errors import UserError
from featstore.files.key_lists import Excluded, read_keys, superfluous
from pipeline.tars.dataset import DATASET_FILE, load_dataset
from pipeline.tars.identical import IDENTICAL_FILE, content_hashes
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import make_clip


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Seven files: one twice in two classes, one in train and val, one twice in a class."""
    folder = tmp_path / "videos"
    first = make_clip(folder / "train/run/a.mp4", 0)
    second = make_clip(folder / "train/sit/b.mp4", 1)
    (folder / "train/sit/a again.mp4").write_bytes(first)
    third = make_clip(folder / "train/run/c.mp4", 2)
    (folder / "val/run").mkdir(parents=True)
    (folder / "val/run/d.mp4").write_bytes(third)
    (folder / "train/sit/e.mp4").write_bytes(second)
    make_clip(folder / "val/sit/f.mp4", 3)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def keys_of(folder: Path) -> set[str]:
    dataset = load_dataset(folder)
    return {key for keys in dataset.keys_by_split.values() for key in keys}


def test_pack_names_identical_videos_and_takes_its_list_back(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    pack = ("pack", "--dataset", "clips", "--videos", videos, "--root", root)
    shown = mote(*pack, width=80)
    assert shown.code == 0, shown.err
    assert "6 videos in 3 groups, 1 across classes, 1 across splits" in shown.out
    assert "a (run, train) = " in " ".join(shown.out.split())
    found = done(*pack)["identical"]
    assert (found["groups"], found["videos"]) == (3, 6)
    assert (found["across_classes"], found["across_splits"]) == (1, 1)
    said = {frozenset(v["key"] for v in group["videos"]) for group in found["found"]}
    listed = rows_of(root / "datasets/clips" / IDENTICAL_FILE)
    assert said == {
        frozenset(row["key"] for row in listed if row["group"] == number) for number in "123"
    }
    out = {row["key"] for row in listed if row["exclude"] == "yes"}
    kinds = {row["path"]: row["exclude"] for row in listed}
    # Two classes: none stays. Train and val: val stays. The same twice: the first stays.
    assert kinds == {
        **{"train/run/a.mp4": "yes", "train/sit/a again.mp4": "yes"},
        **{"train/run/c.mp4": "yes", "val/run/d.mp4": "no"},
        **{"train/sit/b.mp4": "no", "train/sit/e.mp4": "yes"},
    }
    other = tmp_path / "other"
    path = root / "datasets/clips" / IDENTICAL_FILE
    clean = done(
        *("pack", "--dataset", "clean", "--videos", videos, "--exclude", path, "--root", other)
    )
    assert clean["excluded"]["keys"] == [row["key"] for row in listed if row["exclude"] == "yes"]
    assert (clean["excluded"]["unknown"], clean["identical"]["groups"]) == ([], 0)
    assert keys_of(other / "datasets/clean") == keys_of(root / "datasets/clips") - out
    assert clean["videos_listed"] == 3


def test_tars_taken_as_they_are(tmp_path: Path) -> None:
    first = make_clip(tmp_path / "x.mp4", 4)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in {
            "one.mp4": first, "one.cls": b"run", "two.mp4": first, "two.cls": b"sit",
            "three.mp4": make_clip(tmp_path / "y.mp4", 5), "three.cls": b"sit",
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pack = ("pack", "--tars", tmp_path / "t.tar", "--label-field", ".cls", "--root", tmp_path / "r")
    made = done(*pack, "--dataset", "all")
    assert (made["identical"]["groups"], made["identical"]["across_classes"]) == (1, 1)
    folder = tmp_path / "r/datasets/all"
    hashes = content_hashes(folder)
    assert hashes["one"] == hashes["two"] != hashes["three"]
    (tmp_path / "out.txt").write_text("two\n\nnobody\n")
    less = done(*pack, "--dataset", "less", "--exclude", tmp_path / "out.txt")
    assert less["excluded"] == {
        "file": str(tmp_path / "out.txt"), "videos": 1, "keys": ["two"], "unknown": ["nobody"]
    }  # fmt: skip
    assert (less["videos_listed"], less["videos_failed"], less["identical"]["groups"]) == (2, 0, 0)
    words = refused(2, *pack, "--dataset", "less")
    assert f"`--exclude {tmp_path}/out.txt` left out 1 video of these before" in words
    assert "give the list again, or use another --dataset name" in words
    assert pack_command(tmp_path / "r/datasets/less", tmp_path)[0].count("--exclude") == 1
    again = done(*pack, "--dataset", "less", "--exclude", tmp_path / "out.txt")
    assert any("nothing to do" in note for note in again["notes"])


def test_packing_again_without_the_list_says_which_one(videos: Path, tmp_path: Path) -> None:
    pack = ("pack", "--dataset", "clips", "--videos", videos, "--root", tmp_path)
    some = tmp_path / "two words.txt"
    some.write_text("train%2Frun%2Fa\nval%2Frun%2Fd\n")
    done(*pack, "--exclude", some)
    words = refused(2, *pack)
    assert "2 videos added" in words
    assert f"`--exclude '{some}'` left out 2 videos of these before: give the list again" in words
    assert "with --append, or use another --dataset name" in words
    some.write_text("val%2Frun%2Fd\n")  # the list has changed: what it left out is remembered
    assert "left out 1 video of these before" in refused(2, *pack, "--exclude", some)
    grown = done(*pack, "--append")
    assert any("left out 2 videos" in n and "are packed now" in n for n in grown["notes"])
    assert done(*pack)["shards_written"] == 0
    make_clip(videos / "train/run/new.mp4", 77)
    words = refused(2, *pack)
    assert "pack new videos into new tars with --append" in words
    assert "--exclude" not in words


def test_a_data_set_of_an_earlier_version_gets_its_list(videos: Path, tmp_path: Path) -> None:
    pack = ("pack", "--dataset", "clips", "--videos", videos, "--root", tmp_path)
    done(*pack)
    folder = tmp_path / "datasets/clips"
    before = (folder / DATASET_FILE).read_bytes()
    listed = (folder / IDENTICAL_FILE).read_bytes()
    (folder / IDENTICAL_FILE).unlink()
    assert done(*pack)["shards_written"] == 0
    assert (folder / IDENTICAL_FILE).read_bytes() == listed
    assert (folder / DATASET_FILE).read_bytes() == before


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "list"
    for text, keys in {
        "a\nb, c\n\n a \n": ("a", "b, c"),
        "\ufeffkey,why\na,x\n": ("a",),
        "n,key,exclude\n1,a,no\n2,b,yes\n3,c,\n4,'=d,YES\n": ("b", "=d"),
        "key;exclude\na;no\nb;yes\n": ("b",),
        '"n"\t"key"\t"exclude"\n1\ta\tyes\n': ("a",),
        "": (),
    }.items():
        path.write_text(text)
        assert read_keys(path) == keys


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "no list of keys"),
        (b"exclude,name\nyes,a\n", "no column key"),
        (b"key,exclude\na,perhaps\n", "not yes or no"),
        (b"key,exclude\na\n", "row 2 has 1 columns"),
    ],
)
def test_lists_that_are_none(content: bytes, why: str, tmp_path: Path, videos: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(content)
    with pytest.raises(UserError, match=why):
        read_keys(path)
    pack = ("pack", "--dataset", "c", "--videos", videos, "--root", tmp_path / "r", "--exclude")
    assert "one key a line" in refused(2, *pack, path)
    assert "cannot be read" in refused(2, *pack, tmp_path / "missing")


def test_listed_keys_mean_what_reads_the_same(tmp_path: Path) -> None:
    """A list from another system, or typed by a person, names the same videos."""
    path = tmp_path / "list"
    known = ["run%2Fcaf%C3%A9", "sit%2Fa%20b", "x-1", "x_1", "y%2D1"]
    path.write_text("run%2Fcafe%CC%81\nsit/A b\nx-1\nX 1\nsit%2Fa%20b\nnowhere\n")
    excluded = Excluded.of(path, known)
    assert excluded.keys == ("run%2Fcaf%C3%A9", "sit%2Fa%20b", "x-1")
    assert excluded.unknown == ("X 1", "nowhere")  # the first could be either of two


def test_not_everything_is_left_out(videos: Path, tmp_path: Path) -> None:
    pack = ("pack", "--dataset", "clips", "--videos", videos, "--root", tmp_path)
    done(*pack)
    every = tmp_path / "every"
    every.write_text("\n".join(json.dumps(k)[1:-1] for k in keys_of(tmp_path / "datasets/clips")))
    assert "names all 7 videos" in refused(2, *pack[:2], "other", *pack[3:], "--exclude", every)


def test_which_copy_stays() -> None:
    train, test = ("train",), ("test",)
    assert superfluous([("b", train, 1), ("a", train, 1)]) == ("b",)
    assert superfluous([("a", train, 1), ("b", test, 1)]) == ("a",)
    assert superfluous([("a", train, 1), ("b", test, 2)]) == ("b", "a")
