"""Keys, class names, split names, and the merging of mentions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline.annotations.class_names import natural_class_name
from pipeline.annotations.listing import (
    ListingBuilder,
    key_from_name,
    name_from_key,
    ordered_splits,
    split_from_file_name,
    split_from_folder,
)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_keys_are_reversible_and_safe(name: str) -> None:
    key = key_from_name(name)
    assert name_from_key(key) == name
    assert key.isascii()
    assert not set("./\\ \n\0") & set(key)


def test_key_of_a_name_that_is_no_utf8() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert name_from_key(key_from_name(name)) == name


@pytest.mark.parametrize(
    ("raw", "natural"),
    [
        ("brush_hair", "brush hair"),
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("Archery", "archery"),
        ("YoYo", "yo yo"),
        ("TaiChi", "tai chi"),
        ("HandstandPushups", "handstand pushups"),
        ("HandStandPushups", "handstand pushups"),
        ("WritingOnBoard", "writing on board"),
        ("passing American football (in game)", "passing American football (in game)"),
        ("passing_American_football_(in_game)", "passing American football (in game)"),
        ("massaging person's head", "massaging person's head"),
        ("Brush_Hair", "brush hair"),
        ("TV", "TV"),
        ("doing a hand stand", "doing a hand stand"),
        ("Playing_TV_Games", "playing TV games"),
        ("openDoor", "openDoor"),
        ("tai chi", "tai chi"),
        ("Pushing [something] from left to right", "Pushing something from left to right"),
        ("Approaching something with your camera", "Approaching something with your camera"),
        ("climb_stairs", "climb stairs"),
        ("_", "_"),
        ("跑步", "跑步"),
        ("class 7", "class 7"),
    ],
)
def test_natural_class_names(raw: str, natural: str) -> None:
    assert natural_class_name(raw) == natural


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train", "train"),
        ("validate", "val"),
        ("kinetics400_val_list_videos", "val"),
        ("kinetics600_holdout_test", "test"),
        ("trainlist01", "train1"),
        ("hmdb51_test_split_2", "test2"),
        ("train_rgb_split3", "train3"),
        ("test1", "test1"),
        ("train_256", "train"),
        ("something-something-v2-validation", "val"),
        ("labels", ""),
        ("restrained", ""),
        ("latest", ""),
    ],
)
def test_split_from_file_name(stem: str, split: str) -> None:
    assert split_from_file_name(stem) == split


def test_split_from_folder() -> None:
    folders = ["train", "Validation", "validate", "videos_val", "train_256", "trains", "pretrain"]
    expected = ["train", "val", "val", "val", "train", None, None]
    assert [split_from_folder(folder) for folder in folders] == expected


def test_splits_come_in_reading_order() -> None:
    names = ["test2", "odd", "test", "test1", "train2", "val", "train", "train1"]
    assert ordered_splits(names) == [
        "train",
        "val",
        "test",
        "train1",
        "test1",
        "train2",
        "test2",
        "odd",
    ]
    with pytest.raises(UserError, match="at most 32"):
        ordered_splits(f"part{number}" for number in range(33))


def test_the_same_file_again_adds_its_splits() -> None:
    builder = ListingBuilder()
    builder.add("x", source="x.mp4", class_name="run", split="test1", path="run/x.mp4")
    builder.add("run/x", source="run/x.mp4", class_name="run", split="train2", path="run/x.mp4")
    listing = builder.build()
    (record,) = listing.records
    assert (record.key, record.splits) == ("x", ("test1", "train2"))
    assert "1 repeated mention" in listing.notes[0]


def test_two_files_of_one_name_get_keys_from_their_paths() -> None:
    builder = ListingBuilder()
    builder.add("x", source="x.mp4", class_name="run", path="a/x.mp4")
    builder.add("x", source="x.mp4", class_name="run", path="b/x.mp4")
    assert [record.key for record in builder.build().records] == ["a%2Fx%2Emp4", "b%2Fx%2Emp4"]


def test_one_file_with_two_classes_names_both() -> None:
    builder = ListingBuilder()
    builder.add("x", source="x.mp4", class_name="run", path="a/x.mp4")
    builder.add("y", source="y.mp4", class_name="jump", path="a/x.mp4")
    with pytest.raises(UserError, match=r"two classes, 'run' and 'jump'"):
        builder.build()


def test_long_names_are_refused_one_by_one() -> None:
    builder = ListingBuilder()
    builder.add("n" * 200, source="a", class_name="run", path="a.mp4")
    builder.add("n" * 201, source="b", class_name="run", path="b.mp4")
    listing = builder.build()
    assert len(listing.records) == 1
    assert "201 characters" in listing.missing[0].reason
