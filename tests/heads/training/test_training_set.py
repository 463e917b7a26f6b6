"""Draws of shots, halves of classes, and training on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore import Store, UserError
from heads import HeadConfig, TrainConfig, TrainSummary, load_head, train_head
from heads.files.run_files import read_training_keys
from heads.training.training_set import (
    choose_training_set,
    draw_shots,
    frequency_halves,
    repeats_of,
    rows_of_classes,
)
from tests.support.stores.action_store import action_store

HEAD = HeadConfig(dim=16, layers=1, experts=2)
RECIPE = TrainConfig(epochs=3, warmup_epochs=0, lr=1e-3, batch_size=4, frames=4, seed=5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """48 clips of 8 classes, six each; train and val take turns."""
    return action_store(tmp_path / "toy.zarr", samples=48, failed=(0,))


def keys(store: Store, rows: object) -> set[str]:
    return {store.keys[place] for place in store.positions(np.asarray(rows)).tolist()}


def test_a_draw_depends_on_seed_and_keys_alone(tmp_path: Path, store: Store) -> None:
    drawn = draw_shots(store, store.rows, 2, 1)
    assert len(drawn.rows) == 16
    assert drawn.short == {}
    assert keys(store, drawn.rows) == keys(store, draw_shots(store, store.rows[::-1], 2, 1).rows)
    counts = np.bincount(store.labels[store.positions(drawn.rows)])
    assert counts.tolist() == [2] * 8
    # Another store of the same keys, of which other rows failed.
    again = action_store(tmp_path / "other.zarr", samples=48, failed=(7, 9), seed=3)
    assert keys(again, draw_shots(again, again.rows, 2, 1).rows) == keys(store, drawn.rows)
    assert keys(store, draw_shots(store, store.rows, 2, 2).rows) != keys(store, drawn.rows)
    # Fixed for all time: a published number names its draw by the seed.
    assert keys(store, rows_of_classes(store, drawn.rows, [0])) == {"clip016", "clip032"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return action_store(tmp_path_factory.mktemp("whole") / "s.zarr", samples=48, failed=())


@given(shots=st.integers(1, 7), seed=st.integers(0, 50))
def test_draws_are_nested(whole: Store, shots: int, seed: int) -> None:
    small, large = (draw_shots(whole, whole.rows, k, seed).rows for k in (shots, shots + 1))
    assert set(small.tolist()) <= set(large.tolist())
    assert len(small) == 8 * min(shots, 6)


def test_fewer_videos_than_shots(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    drawn = draw_shots(store, store.split("train"), 7, 1, [0, 1, 2])
    # labels are even in train: class 1 has no video there
    assert drawn.short == {"jump": 6, "run": 0, "sit": 6}
    assert "3 classes have fewer than 7 training videos" in caplog.text
    assert drawn.words == "7 videos per class (draw 1; 3 classes have fewer)"
    with pytest.raises(UserError, match="no video of"):
        draw_shots(store, store.split("train"), 2, 1, [1])
    with pytest.raises(UserError, match="at least 1 shot"):
        draw_shots(store, store.rows, 0, 1)


def test_frequency_halves(caplog: pytest.LogCaptureFixture) -> None:
    names = ["e", "d", "c", "b", "a"]
    base, novel = frequency_halves([0, 0, 1, 2, 3], names)
    # e has two, then b, c and d tie and go by name, a has none
    assert (base.tolist(), novel.tolist()) == ([0, 2, 3], [1, 4])
    assert "1 class has no training videos: 'a'" in caplog.text


def test_sizes_of_the_published_halves() -> None:
    for classes, sizes in ((400, (200, 200)), (51, (26, 25)), (101, (51, 50)), (174, (87, 87))):
        halves = frequency_halves(np.arange(classes), [f"{i:03d}" for i in range(classes)])
        assert tuple(map(len, halves)) == sizes


def test_repeats() -> None:
    assert [repeats_of(text, 3570, 102) for text in ("full", "1", "7")] == [35, 1, 7]
    assert repeats_of("full", 3, 5) == 1
    for text in ("0", "all", "-1", ""):
        with pytest.raises(UserError, match="not understood"):
            repeats_of(text, 1, 1)


def train(store: Store, run: Path, **changes: object) -> TrainSummary:
    arguments = {"rows": store.split("train"), "prompt_set": "mote28", "device": "cpu"} | changes
    return train_head(store, run, HEAD, RECIPE, **arguments)  # type: ignore[arg-type]


def test_a_subset_of_classes_has_labels_of_its_own(tmp_path: Path, store: Store) -> None:
    classes = np.array([6, 2])
    rows = rows_of_classes(store, store.split("train"), classes)
    train(store, tmp_path / "run", rows=rows, classes=classes, trained_on="two classes")
    head = load_head(tmp_path / "run")
    assert head.origin is not None
    assert head.origin.class_names == (store.class_names[6], store.class_names[2])
    assert head.origin.trained_on == "two classes"
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    assert torch.equal(head.training_class_embeddings, text[classes])
    with pytest.raises(UserError, match="is not one of the 2 classes to train on"):
        train(store, tmp_path / "a", classes=classes)
    with pytest.raises(UserError, match="none of the store's 8 classes"):
        train(store, tmp_path / "b", classes=[1, 8])
    with pytest.raises(UserError, match="different label ids"):
        train(store, tmp_path / "c", classes=[1, 1])


def test_classes_without_videos_are_told(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    train(store, tmp_path / "run")
    assert "4 of 8 classes have no training videos" in caplog.text


def test_repeats_and_hook_of_a_run(tmp_path: Path, store: Store) -> None:
    rows = store.split("train")[1:5]
    seen = []

    def hook(head: torch.nn.Module, epoch: int) -> dict[str, float]:
        seen.append((epoch, head.training))
        return {"measured": epoch / 2}

    train(store, tmp_path / "run", rows=rows, repeats=5, after_epoch=hook)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["samples"] for record in records] == [20] * 3
    assert [record["measured"] for record in records] == [0.5, 1, 1.5]
    assert seen == [(1, False), (2, False), (3, False)]
    # Measuring changes nothing, and neither does an interruption between two epochs.
    train(store, tmp_path / "plain", rows=rows, repeats=5)
    calls = []

    def interrupted(head: torch.nn.Module, epoch: int) -> dict[str, float]:
        calls.append(epoch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"measured": epoch / 2}

    with pytest.raises(KeyboardInterrupt):
        train(store, tmp_path / "broken", rows=rows, repeats=5, after_epoch=interrupted)
    train(store, tmp_path / "broken", rows=rows, repeats=5, after_epoch=interrupted, resume=True)
    assert calls == [1, 2, 2, 3]
    for other in ("plain", "broken"):
        a, b = (load_head(tmp_path / name).state_dict() for name in ("run", other))
        assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match=r"data\.repeats is 5 in the run"):
        train(store, tmp_path / "run", rows=rows, repeats=4, resume=True)


def test_starting_from_a_head(tmp_path: Path, store: Store) -> None:
    train(store, tmp_path / "first")
    first = load_head(tmp_path / "first")
    rows = store.split("val")[:4]
    still = TrainConfig(epochs=1, warmup_epochs=0, lr=0, batch_size=4, frames=4)
    train_head(
        *(store, tmp_path / "next", HEAD, still),
        rows=rows,
        classes=[1, 3, 5, 7],
        initial=first,
        initial_run=tmp_path / "first",
        prompt_set="mote28",
        device="cpu",
    )
    head = load_head(tmp_path / "next")
    a, b = first.state_dict(), head.state_dict()
    same = {name for name in a if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}
    assert set(a) - same == {"training_class_embeddings"}
    known = read_training_keys(tmp_path / "next")
    assert known is not None
    assert known["toy"] >= keys(store, store.split("train")[1:]) | keys(store, rows)
    with pytest.raises(UserError, match="the head to start from"):
        train_head(
            *(store, tmp_path / "x", HeadConfig(dim=16, layers=2, experts=2), still),
            rows=rows,
            initial=first,
            prompt_set="mote28",
            device="cpu",
        )


def test_a_training_set_in_words(store: Store) -> None:
    chosen = choose_training_set(
        store, store.split("train"), split="train", shots=2, half="base", repeat="full"
    )
    assert (
        chosen.words == "train, 2 videos per class (draw 1), the 4 base classes, repeated 3 times"
    )
    assert (chosen.suffix, chosen.repeats, len(chosen.rows)) == ("-base-k2-s1", 3, 8)
    whole = choose_training_set(store, store.split("train"), split=None)
    assert (whole.words, whole.suffix, whole.classes) == ("all videos", "", None)
    with pytest.raises(UserError, match="choose one of all, base, novel"):
        choose_training_set(store, store.rows, split=None, half="rare")
