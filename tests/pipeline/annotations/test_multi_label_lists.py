"""Lists of videos with several classes: own tables, Charades, MultiTHUMOS and THUMOS14."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.errors import UserError
from pipeline.annotations.known_sets import read_listing
from pipeline.annotations.listing import ClassSpan, Listing
from tests.pipeline.annotations.test_annotations_official import touch, write

Spans = dict[str, tuple[ClassSpan, ...]]


def spans_of(listing: Listing) -> Spans:
    assert listing.multi_label
    assert all(not record.class_name for record in listing.records)
    return {record.key: record.spans for record in listing.records}


def read(tmp_path: Path, text: str, cells: str, name: str = "list.csv") -> Listing:
    touch(tmp_path / "v", "a.mp4", "b.mp4", "c.mp4")
    return read_listing("own", tmp_path / "v", write(tmp_path / name, text), multi_label=cells)


RUN, JUMP, SIT = ClassSpan("run"), ClassSpan("jump"), ClassSpan("sit")


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ("|", "a.mp4,run|jump\nb.mp4,sit\nc.mp4,\n"),
        (";", "path,labels\na.mp4,run; jump\nb.mp4,sit\nc.mp4,\n"),
        ("rows", "path,label\na.mp4,run\na.mp4,jump\nb.mp4,sit\nb.mp4,sit\nc.mp4,\n"),
        ("|", "split\tlabels\tfile\ntrain\trun|jump\ta.mp4\nval\tsit\tb.mp4\nval\t\tc.mp4\n"),
    ],
)
def test_a_row_a_video_or_a_row_a_class(tmp_path: Path, cells: str, text: str) -> None:
    listing = read(tmp_path, text, cells)
    assert spans_of(listing) == {"a": (RUN, JUMP), "b": (SIT,), "c": ()}
    assert listing.class_names == ["jump", "run", "sit"]
    assert any("1 video shows none" in note for note in listing.notes)
    if "split" in text:
        assert listing.split_names == ["train", "val"]


def test_a_separator_that_was_not_named_stays_in_the_name(tmp_path: Path) -> None:
    """What parts the classes is never guessed."""
    assert read(tmp_path, "a.mp4,run|jump\n", "rows").class_names == ["run|jump"]
    assert read(tmp_path, "a.mp4,open; close|sit\n", "|").class_names == ["open; close", "sit"]


def test_times_are_kept_and_reversed_ones_are_said(tmp_path: Path) -> None:
    text = "path,label,start,end\na.mp4,run,1.5,2.25\na.mp4,run,4,6\nb.mp4,sit,9,3\nc.mp4,sit,,\n"
    listing = read(tmp_path, text, "rows")
    twice = (ClassSpan("run", 1.5, 2.25), ClassSpan("run", 4, 6))
    assert spans_of(listing) == {"a": twice, "b": (SIT,), "c": (SIT,)}
    assert any("1 times end before they begin (first: 'b.mp4')" in n for n in listing.notes)


def test_numbers_get_their_names_from_a_file(tmp_path: Path) -> None:
    names = write(tmp_path / "names.csv", "id,name\n0,run\n1,jump\n2,swim\n")
    touch(tmp_path / "v", "a.mp4")
    listing = read_listing(
        "own", tmp_path / "v", write(tmp_path / "l.csv", "a.mp4,1|0\n"), names, multi_label="|"
    )
    assert listing.class_names == ["run", "jump", "swim"]
    assert spans_of(listing) == {"a": (JUMP, RUN)}


@pytest.mark.parametrize(
    ("cells", "text", "message"),
    [
        (",", "a.mp4,run\n", "--multi-label ',' is unknown: choose one of rows, |, ;"),
        ("rows", "a.mp4,run,jump\n", "has 3 columns, not 2: quote cells"),
        ("rows", "path,label\na.mp4,run,x\n", "has 3 columns, not 2"),
        ("rows", "path,label,start,end\na.mp4,run,soon,3\n", "'soon', '3' of 'a.mp4' are not sec"),
        ("rows", "path,label,start,end\na.mp4,run,1,\n", "are not seconds"),
        ("rows", "path,label,start,end\na.mp4,run,-1,2\n", "are not seconds"),
        ("rows", "path,label\n,run\n", "lacks a path"),
        ("|", "a.mp4,\nb.mp4,\n", "no row of the list has a class"),
        ("|", "", "is empty"),
    ],
)
def test_wrong_lists_are_refused(tmp_path: Path, cells: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text, cells)
    assert message in str(error.value)


def test_the_option_needs_a_list_of_ones_own(tmp_path: Path) -> None:
    touch(tmp_path / "v", "run/a.mp4")
    with pytest.raises(UserError, match="give the list with --annotations"):
        read_listing("own", tmp_path / "v", multi_label="rows")
    charades(tmp_path / "c")
    with pytest.raises(UserError, match="has the format of Charades, so leave the option out"):
        read_listing("own", tmp_path / "v", tmp_path / "c/annotations", multi_label="rows")


def test_a_video_listed_twice_without_the_option_is_told_of_it(tmp_path: Path) -> None:
    touch(tmp_path / "v", "a.mp4")
    lines = write(tmp_path / "l.csv", "a.mp4,run\na.mp4,jump\n")
    with pytest.raises(UserError, match="pack the list with --multi-label rows"):
        read_listing("own", tmp_path / "v", lines)


COLUMNS = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"


def charades(root: Path) -> Path:
    write(
        root / "annotations/Charades_v1_train.csv",
        COLUMNS + '46GP8,HR43,Kitchen,6,7,Yes,"A person, cooking.",food,x,'
        "c092 11.90 21.20;c147 0.00 12.60,24.83\n"
        "N11GT,0KZ7,Study,7,7,Yes,Nothing,,x,,20.1\n",
    )
    write(
        root / "annotations/Charades_v1_test.csv",
        COLUMNS + "YSKX3,X,Den,7,7,Yes,x,,x,c147 4.00 2.00,9.5\n",
    )
    write(
        root / "annotations/Charades_v1_classes.txt",
        "c000 Holding some clothes\nc092 Watching/Looking at something\nc147 Someone is cooking\n",
    )
    touch(root / "videos", "46GP8.mp4", "N11GT.mp4")
    return root / "videos"


def test_charades(tmp_path: Path) -> None:
    listing = read_listing("charades", charades(tmp_path))
    assert listing.class_names == [
        "Holding some clothes", "Watching/Looking at something", "Someone is cooking",
    ]  # fmt: skip
    assert spans_of(listing) == {
        "46GP8": (
            ClassSpan("Watching/Looking at something", 11.9, 21.2),
            ClassSpan("Someone is cooking", 0.0, 12.6),
        ),
        "N11GT": (),
    }
    assert {record.key: record.splits for record in listing.records} == {
        "46GP8": ("train",), "N11GT": ("train",),
    }  # fmt: skip
    named = read_listing("own", tmp_path / "videos", tmp_path / "annotations")
    (missing,) = named.missing
    assert (missing.key, missing.splits) == ("YSKX3", ("test",))
    assert missing.spans == (ClassSpan("Someone is cooking"),)
    assert any("1 times end before they begin" in note for note in named.notes)


@pytest.mark.parametrize("action", ["c092 1.0", "c092 one 2.0", "c999 1.0 2.0", "run"])
def test_a_damaged_action_of_charades_is_refused(tmp_path: Path, action: str) -> None:
    videos = charades(tmp_path)
    write(
        tmp_path / "annotations/Charades_v1_train.csv",
        COLUMNS + f"46GP8,x,x,7,7,Yes,x,,x,{action},9.5\n",
    )
    with pytest.raises(UserError, match=r"is not `c092 11\.90 21\.20` with one of the 3 classes"):
        read_listing("charades", videos)


def test_charades_without_its_list_of_classes_says_so(tmp_path: Path) -> None:
    videos = charades(tmp_path)
    (tmp_path / "annotations/Charades_v1_classes.txt").unlink()
    listing = read_listing("charades", videos)
    assert listing.class_names == ["c092", "c147"]
    assert any("zero-shot needs words" in note for note in listing.notes)


@pytest.mark.parametrize("ending", ["", "_val"])
def test_multithumos_and_thumos14(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "annotations"
    write(
        folder / f"Run{ending}.txt",
        "video_validation_0000266 72.80 76.40\nvideo_validation_0000266 1.0 2.0\n"
        "video_test_0000004 1.2 3.4\n",
    )
    write(folder / f"Jump{ending}.txt", "video_validation_0000266  5.0 6.5\n")
    write(folder / f"Ambiguous{ending}.txt", "video_test_0000004 7.0 8.0\n")
    write(tmp_path / "class_list.txt", "1 Run\n2 Jump\n")
    touch(
        tmp_path / "videos", "validation/video_validation_0000266.mp4",
        "test/video_test_0000004.mp4",
    )  # fmt: skip
    listing = read_listing("own", tmp_path / "videos", folder)
    assert listing.class_names == ["Run", "Jump"]
    assert spans_of(listing) == {
        "video_validation_0000266": (
            ClassSpan("Jump", 5.0, 6.5), ClassSpan("Run", 72.8, 76.4), ClassSpan("Run", 1.0, 2.0),
        ),
        "video_test_0000004": (ClassSpan("Run", 1.2, 3.4),),
    }  # fmt: skip
    assert listing.split_names == ["train", "test"]
    assert any("split train" in note for note in listing.notes)
    write(folder / f"Jump{ending}.txt", "video_validation_0000266  5.0\n")
    assert not any(
        "Jump" in n for n in read_listing("own", tmp_path / "videos", folder).class_names
    )
    write(folder / f"Run{ending}.txt", "video_test_0000004 1.2 3.4\nvideo_test_0000004 x 3\n")
    with pytest.raises(UserError, match="line 2: 'video_test_0000004 x 3' is not"):
        read_listing("own", tmp_path / "videos", folder)
