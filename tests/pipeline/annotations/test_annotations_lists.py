"""Lists as repositories write them, and folders of class folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featstore.errors import UserError
from pipeline.annotations.known_sets import read_listing
from pipeline.annotations.listing import Listing


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    return folder


def read(tmp_path: Path, text: str, name: str = "list.txt", names: str | None = None) -> Listing:
    path = tmp_path / name
    path.write_bytes(text.encode())
    names_file = None
    if names is not None:
        names_file = tmp_path / "names.csv"
        names_file.write_text(names)
    return read_listing("own", tmp_path / "v", path, names_file)


def rows(listing: Listing) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(record.path, record.class_name, record.splits) for record in listing.records]


FILES = ("air drumming/a b.mp4", "yoga/c.mp4")


@pytest.mark.parametrize(
    "text",
    [
        "air drumming/a b.mp4 0\nyoga/c.mp4 1\n",
        "air drumming/a b 0\r\nyoga/c 1\r\n",
        "air drumming/a b.mp4,0\nyoga/c.mp4,1\n",
        "air drumming/a b.mp4\t0\nyoga/c.mp4\t1\n",
        "path,label\nair drumming/a b.mp4,0\nyoga/c.mp4,1\n",
        "label\tvideo_path\n0\tair drumming/a b.mp4\n1\tyoga/c.mp4\n",
        "air drumming/a b.mp4 300 0\nyoga/c.mp4 250 1\n",
        "air drumming/a b,300,0\nyoga/c,250,1\n",
        "/elsewhere/k//air drumming/a b.mp4 0\n/elsewhere/k//yoga/c.mp4 1\n",
        "{root}/air drumming/a b.mp4 0\n{root}//yoga/c.mp4 1\n",
        "./air drumming/a b.avi 0\nair/../yoga/c.avi 1\n",
        "\ufeffair drumming/a b.mp4 0\n\nyoga/c.mp4 1\n",
        "video,class\nair drumming/a b.mp4,air drumming\nyoga/c.mp4,yoga\n",
        "air drumming/a b.mp4 air drumming\nyoga/c.mp4 yoga\n",
        "air_drumming/a b.mp4 0\nyoga/c.mp4 1\n",
        "a b.mp4 air_drumming\nc.mp4 yoga\n",
        "path,label,class_name\nair drumming/a b.mp4,4,air drumming\nyoga/c.mp4,9,yoga\n",
    ],
)
def test_every_way_to_write_a_list(tmp_path: Path, text: str) -> None:
    root = touch(tmp_path / "v", *FILES)
    listing = read(tmp_path, text.replace("{root}", str(root)))
    found = [(path, name.replace("_", " "), split) for path, name, split in rows(listing)]
    assert sorted(found) == [
        ("air drumming/a b.mp4", "air drumming", ()),
        ("yoga/c.mp4", "yoga", ()),
    ]
    assert listing.missing == []
    assert not any(".." in record.key or "/" in record.key for record in listing.records)


def test_commas_in_paths_of_a_spaced_list(tmp_path: Path) -> None:
    touch(tmp_path / "v", "a,b/x, y.mp4", "c,d/z, w.mp4")
    listing = read(tmp_path, "a,b/x, y.mp4 0\nc,d/z, w.mp4 1\n")
    assert [record.path for record in listing.records] == ["a,b/x, y.mp4", "c,d/z, w.mp4"]


def test_splits_come_from_columns_or_file_names(tmp_path: Path) -> None:
    touch(tmp_path / "v", "a.mp4", "b.mp4", "c.mp4")
    by_column = read(tmp_path, "path,label,subset\na.mp4,run,training\nb.mp4,jump,validation\n")
    assert rows(by_column) == [("a.mp4", "run", ("train",)), ("b.mp4", "jump", ("val",))]
    without_header = read(tmp_path, "a.mp4,run,train\nb.mp4,jump,test\n")
    assert rows(without_header) == [("a.mp4", "run", ("train",)), ("b.mp4", "jump", ("test",))]
    folder = tmp_path / "lists"
    touch(folder, "README.txt")
    (folder / "train_1.txt").write_text("a.mp4 run\nb.mp4 jump\n")
    (folder / "test_1.txt").write_text("c.mp4 run\n")
    (folder / "train_2.txt").write_text("c.mp4 run\n")
    listing = read_listing("own", tmp_path / "v", folder)
    assert rows(listing) == [
        ("a.mp4", "run", ("train1",)),
        ("b.mp4", "jump", ("train1",)),
        ("c.mp4", "run", ("test1", "train2")),
    ]


def test_names_of_integer_labels(tmp_path: Path) -> None:
    touch(tmp_path / "v", "a.mp4", "b.mp4")
    text = "a.mp4 1\nb.mp4 0\n"
    names = 'id,name\n0,zumba\n1,"tasting, eating"\n2,archery\n'
    listing = read(tmp_path, text, names=names)
    assert listing.class_names == ["zumba", "tasting, eating", "archery"]
    assert rows(listing) == [("a.mp4", "tasting, eating", ()), ("b.mp4", "zumba", ())]
    assert "'archery'" in " ".join(listing.notes)
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "val.txt").write_text(text)
    (folder / "names.csv").write_text(names)
    assert read_listing("own", tmp_path / "v", folder).class_names == listing.class_names
    (folder / "names.csv").unlink()
    (folder / "labels.json").write_text(json.dumps({"zumba": 0, "tasting": 1}))
    assert read_listing("own", tmp_path / "v", folder).class_names == ["zumba", "tasting"]
    with pytest.raises(UserError, match=r"label 1 has no name in .*0 to 0"):
        read(tmp_path, text, names="id,name\n0,zumba\n")


def test_integer_labels_without_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "v", "x/a.mp4", "y/b.mp4", "y/c.mp4")
    from_folders = read(tmp_path, "x/a.mp4 1\ny/b.mp4 0\ny/c.mp4 0\n")
    assert from_folders.class_names == ["y", "x"]
    inconsistent = read(tmp_path, "x/a.mp4 1\ny/b.mp4 0\ny/c.mp4 10\n")
    assert inconsistent.class_names == ["0", "1", "10"]
    assert "class names are the numbers of the list" in caplog.text


def test_exchanged_names_are_corrected_by_the_files(tmp_path: Path) -> None:
    names = "id,name\n0,kick ball\n1,kick\n2,brush hair\n"
    flat = ("Movie_kick_f_cm_1.avi", "Movie_kick_ball_f_cm_2.avi", "X_brush_hair_h_3.avi")
    text = f"{flat[0]} 0\n{flat[1]} 1\n{flat[2]} 2\n"
    touch(tmp_path / "v", *flat)
    listing = read(tmp_path, text, names=names)
    assert listing.class_names == ["kick", "kick ball", "brush hair"]
    assert {record.path: record.class_name for record in listing.records} == {
        flat[0]: "kick",
        flat[1]: "kick ball",
        flat[2]: "brush hair",
    }
    assert "exchanges 'kick ball', 'kick'" in " ".join(listing.notes)
    right = read(
        tmp_path, text.replace(" 0", " x").replace(" 1", " 0").replace(" x", " 1"), names=names
    )
    assert right.class_names == ["kick ball", "kick", "brush hair"]


def test_a_file_of_the_same_name_in_another_class_is_not_taken(tmp_path: Path) -> None:
    touch(tmp_path / "v", "run/0001.mp4", "train/walk/0002.mp4", "val/walk/0003.mp4")
    text = "run/0001.mp4 run\njump/0001.mp4 jump\nval/walk/0002.mp4 walk\nwalk/0003.mp4 walk\n"
    listing = read(tmp_path, text)
    assert [record.path for record in listing.records] == ["run/0001.mp4", "val/walk/0003.mp4"]
    assert [video.source for video in listing.missing] == ["jump/0001.mp4", "val/walk/0002.mp4"]


def test_paths_cannot_leave_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "secret.mp4", "v/a.mp4", "v/b.mp4")
    listing = read(tmp_path, "../secret.mp4 x\na.mp4 x\na/../../secret.mp4 x\n/etc/b.mp4 y\n")
    assert [record.path for record in listing.records] == ["a.mp4", "b.mp4"]
    assert len(listing.missing) == 1
    assert "outside the videos folder" in listing.missing[0].reason


def test_several_files_of_one_name_are_not_guessed(tmp_path: Path) -> None:
    touch(tmp_path / "v", "x/a.mp4", "y/a.mp4", "b.mp4")
    listing = read(tmp_path, "a.mp4 run\nb.mp4 run\n")
    assert "several files have this name" in listing.missing[0].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 run\na.mp4 jump\n", "two classes, 'run' and 'jump'"),
        ("a.mp4 0\nb.mp4 jump\n", "mix of numbers and names"),
        ("a.mp4 run\nb.mp4\n", "line 2: 'b.mp4' is not `path label`"),
        ("a.mp4,run\nb.mp4,\n", "lacks a path or a label"),
        ("a.mp4,run,fast,4\n", "4 columns of unknown meaning"),
        ("path,label\n", "header and no rows"),
        ("none.mp4 run\n", "none of the 1 listed videos can be packed"),
        (
            "path,label,split\na.mp4,run,val\nb.mp4,run, fast,val\n",
            "quote cells that hold a comma",
        ),
    ],
)
def test_wrong_lists(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path / "v", "a.mp4", "b.mp4")
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.mp4", "a/1.MP4", "a/.hidden.mp4", "a/notes.txt", "a/x/3.webm", "top.mp4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "annotations").mkdir()
    listing = read_listing("own", tmp_path)
    assert rows(listing) == [("a/1.MP4", "a", ()), ("a/x/3.webm", "a", ()), ("b/2.mp4", "b", ())]
    assert [record.key for record in listing.records] == ["a%2F1", "a%2Fx%2F3", "b%2F2"]
    assert listing.class_names == ["a", "b", "empty"]
    notes = " ".join(listing.notes)
    assert "left out: 1 video outside class folders" in notes
    assert "1 class has no videos and stays in the list: 'empty'" in notes


@pytest.mark.parametrize("val", ["val", "validation", "validate"])
def test_class_folders_under_splits(tmp_path: Path, val: str) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4", f"{val}/a/1.mp4", "test/b/9.mp4")
    (tmp_path / "train/c").mkdir()
    listing = read_listing("own", tmp_path)
    assert listing.class_names == ["a", "b", "c"]
    assert listing.split_names == ["train", "val", "test"]
    assert {record.key: record.splits for record in listing.records} == {
        "train%2Fa%2F1": ("train",),
        "train%2Fb%2F1": ("train",),
        f"{val}%2Fa%2F1": ("val",),
        "test%2Fb%2F9": ("test",),
    }


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4", "car/2.mp4")
    assert read_listing("own", tmp_path).class_names == ["car", "train"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no videos under"),
        (("notes.txt",), "no videos under"),
        (("train/a/1.mp4", "b/2.mp4"), "videos in 'b' as well"),
        (("BrushHair/1.mp4", "brush hair/2.mp4"), "read the same ('brush hair')"),
    ],
)
def test_wrong_folders(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    (tmp_path / "v").mkdir()
    touch(tmp_path / "v", *files)
    with pytest.raises(UserError) as caught:
        read_listing("own", tmp_path / "v")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
