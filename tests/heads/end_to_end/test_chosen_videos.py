"""Shots and halves for fine-tuning are those that a store gives, and labels follow the classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from featstore import Store, open_store
from featstore.errors import UserError
from heads.end_to_end.chosen_videos import VideoChoice, choose_videos
from heads.training.training_set import choose_training_set
from pipeline.annotations.listing import name_from_key
from pipeline.tars.dataset import Dataset, load_dataset
from pipeline.video_clips.order import listed_clips, of_classes
from tests.support.processes.command_line import done
from tests.support.stores.one_hot_stores import one_hot_store
from tests.support.worlds.official_trees import TREES


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Store]:
    """HMDB51 in miniature, packed, and a store of it."""
    folder = tmp_path_factory.mktemp("hmdb51")
    tree, root = TREES["hmdb51"](folder / "source"), folder / "root"
    done(*tree.pack, "--root", root)
    one_hot_store(root, tree)
    (path,) = (root / "features/hmdb51").glob("*.zarr")
    return load_dataset(root / "datasets/hmdb51"), open_store(path)


@pytest.mark.parametrize("half", ["all", "base", "novel"])
@pytest.mark.parametrize("shots", [None, 1, 2])
@pytest.mark.parametrize("seed", [1, 7])
def test_the_videos_are_those_of_a_store(
    packed: tuple[Dataset, Store], half: str, shots: int | None, seed: int
) -> None:
    dataset, store = packed
    expected = choose_training_set(
        *(store, store.split("train1")),
        split="train1",
        shots=shots,
        draw_seed=seed,
        half=half,
    )
    keys = {store.keys[at] for at in store.positions(expected.rows)}
    choice = VideoChoice(shots, seed, half)
    found = choose_videos(dataset, "train1", choice)
    clips = listed_clips(dataset, "train1", found.left_out)
    assert choice.suffix == expected.suffix
    assert {clip.key for clip in clips} == keys
    assert found.words == ("" if choice.whole else expected.words)
    if half == "all":
        assert (found.classes, found.dataset) == (None, dataset)
        return
    assert expected.classes is not None
    assert found.classes == tuple(expected.classes.tolist())
    names = [dataset.class_names[label] for label in found.classes]
    assert list(found.dataset.class_names) == names
    before = {clip.key: dataset.class_names[clip.label] for clip in clips}
    renumbered = of_classes(clips, found.classes)
    assert {clip.key: names[clip.label] for clip in renumbered} == before
    assert [clip.position for clip in renumbered] == list(range(len(clips)))
    tested = of_classes(listed_clips(dataset, "test1"), found.classes)
    assert {names[clip.label] for clip in tested} == set(names)


def test_what_cannot_be_chosen(packed: tuple[Dataset, Store]) -> None:
    dataset, _ = packed
    with pytest.raises(UserError, match="classes 'bass' are unknown: did you mean base"):
        choose_videos(dataset, "train1", VideoChoice(half="bass"))
    with pytest.raises(UserError, match="split 'nothere' does not exist"):
        choose_videos(dataset, "nothere", VideoChoice(1))


def clone_of(folder: Path, name: str, keys: Iterable[str]) -> Path:
    """A clone with one list, whose numbers of classes are wrong on purpose."""
    folder.mkdir()
    (folder / name).write_text("".join(f"{name_from_key(key)}.avi 0\n" for key in keys))
    return folder


def of_each_class(dataset: Dataset, labels: Iterable[int], count: int) -> list[str]:
    """The last `count` training keys of each class, which no draw takes all of."""
    clips = listed_clips(dataset, "train1")
    return [k for label in labels for k in [c.key for c in clips if c.label == label][-count:]]


def test_a_published_list_gives_the_videos(packed: tuple[Dataset, Store], tmp_path: Path) -> None:
    dataset, _ = packed
    every = {clip.key for clip in listed_clips(dataset, "train1")}
    keys = of_each_class(dataset, range(len(dataset.class_names)), 2)
    few = VideoChoice(2, lists_from=clone_of(tmp_path / "a", "hmdb_few_shot_2.txt", keys))
    found = choose_videos(dataset, "train1", few)
    assert every - found.left_out == set(keys)
    assert (found.classes, few.suffix) == (None, "-k2-list")
    assert found.words == f"the {len(keys)} videos of list hmdb_few_shot_2.txt"
    without = choose_videos(dataset, "train1", few, keys[:1])
    assert every - without.left_out - {keys[0]} == set(keys[1:])
    base = [1, 3, 4]
    keys = of_each_class(dataset, base, 2)
    clone = clone_of(tmp_path / "b", "hmdb_base_s3.txt", keys)
    halves = VideoChoice(2, 3, "base", clone)
    found = choose_videos(dataset, "train1", halves)
    assert every - found.left_out == set(keys)
    assert (found.classes, halves.suffix) == (tuple(base), "-base-s3-list")
    assert found.dataset.class_names == tuple(dataset.class_names[at] for at in base)


def test_published_lists_that_cannot_be_meant(
    packed: tuple[Dataset, Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, _ = packed
    whole = of_each_class(dataset, range(len(dataset.class_names)), 1)
    tested = listed_clips(dataset, "test1")[0].key
    clone = clone_of(tmp_path / "a", "hmdb_shots_1_base_s1.txt", whole)
    with pytest.raises(UserError, match="so that no class is novel"):
        choose_videos(dataset, "train1", VideoChoice(1, 1, "base", clone))
    clone = clone_of(tmp_path / "b", "hmdb_shots_1.txt", [*whole[1:], tested])
    with pytest.raises(UserError, match=r"1 video of hmdb_shots_1.txt is not in split train1: '"):
        choose_videos(dataset, "train1", VideoChoice(1, lists_from=clone))
    clone = clone_of(tmp_path / "c", "hmdb_shots_1.txt", whole[1:])
    choose_videos(dataset, "train1", VideoChoice(1, lists_from=clone))
    assert "1 class does not have exactly 1 video in hmdb_shots_1.txt" in caplog.text
    with pytest.raises(UserError, match="no list for the 4 shots of hmdb51"):
        choose_videos(dataset, "train1", VideoChoice(4, lists_from=clone))
    with pytest.raises(UserError, match="add --shots K"):
        VideoChoice(lists_from=clone)
    with pytest.raises(UserError, match="no training lists of novel classes"):
        VideoChoice(1, half="novel", lists_from=clone)


def test_excluded_videos_are_not_drawn(packed: tuple[Dataset, Store]) -> None:
    dataset, _ = packed
    every = [clip.key for clip in listed_clips(dataset, "train1")]
    first = choose_videos(dataset, "train1", VideoChoice(1))
    drawn = set(every) - first.left_out
    second = choose_videos(dataset, "train1", VideoChoice(1), drawn)
    assert not (set(every) - drawn - second.left_out) & drawn
    assert len(set(every) - drawn - second.left_out) == len(drawn)
