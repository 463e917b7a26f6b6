"""Batches may be kept, epochs given up, loaders shared, and sizes be as awkward as they like."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore import Store, WorkError, open_store
from featstore.batches.loader import FeatureLoader, Holding
from featstore.segments import SegmentSampler
from tests.support.stores.sample_loaders import HOLDINGS, loader_of, same
from tests.support.stores.sample_stores import make_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    make_store(tmp_path / "s.zarr", rows=(8, 8, 3), row_shape=(3, 9, 16), failed=())
    return open_store(tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("count", "small"),
    [(2**15 - 1, True), (2**15, False)],  # of 2**16 frames: 2**31 is the first that is too many
)
def test_places_are_small_numbers_as_long_as_they_fit(
    monkeypatch: pytest.MonkeyPatch, count: int, small: bool
) -> None:
    """Features without strides take no memory; a place outside of them would be an error."""
    drawn = []
    original = SegmentSampler.draw

    def noted(*arguments: Any) -> Any:
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr(SegmentSampler, "draw", noted)
    features = torch.ones(1, dtype=torch.float16).expand(count, 1, 2**16, 1)
    loader = FeatureLoader(features, np.zeros(count, np.int64), batch_size=2**14, frames=2, seed=0)
    for batch in loader.epoch(0):
        assert bool((batch.features == 1).all())
    places = np.concatenate(drawn)
    assert places.dtype == (np.int32 if small else np.int64)
    assert sorted(places[:, 0] >> 16) == list(range(count))
    assert 0 <= places.min() <= places.max() < count * 2**16


def test_large_places_give_the_same_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small = list(loader_of(store, "resident").epoch(0))
    monkeypatch.setattr("featstore.batches.loader._INT32_PLACES", 0)
    pairs = zip(small, loader_of(store, "resident").epoch(0), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("holding", HOLDINGS)
def test_every_batch_of_an_epoch_may_be_kept(store: Store, holding: Holding) -> None:
    """As it is, as a view, as numpy sees it or as its storage: nobody writes over any of them."""
    loader = loader_of(store, holding)
    kept, copies = [], []
    for epoch in range(3):
        for step, batch in enumerate(loader.epoch(epoch)):
            tensor = batch.features
            copies.append(tensor.clone())
            kept.append([tensor, tensor[:, 1:], tensor.numpy(), tensor.untyped_storage()][step % 4])
            del tensor, batch
    for one, copy in zip(kept, copies, strict=True):
        if isinstance(one, torch.UntypedStorage):
            one = torch.tensor(one, dtype=torch.uint8).view(torch.float16).view(copy.shape)
        theirs = copy[:, 1:] if one.shape != copy.shape else copy
        assert np.array_equal(np.asarray(one), theirs.numpy())


def open_files(folder: Path) -> list[str]:
    links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.parametrize("holding", HOLDINGS)
def test_an_epoch_that_is_given_up_leaves_nothing_behind(store: Store, holding: Holding) -> None:
    loader = loader_of(store, holding)
    for taken in range(len(loader) + 1):
        batches = loader.epoch(0)
        for _ in range(taken):
            next(batches)
        del batches
        assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]
        assert not open_files(store.path)


def test_an_error_of_the_reading_thread_is_raised_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the batch that needs what was not read, in its place, and then the epoch is over."""
    original = Store.read_into
    whole = len(list(loader_of(store, "streamed").epoch(0)))
    loader = loader_of(store, "streamed")  # pools of 6 rows, batches of 5
    for broken, batches in [(0, 0), (1, 1), (2, 2), (3, 3)]:
        reads = iter(range(99))

        def read(self: Store, *arguments: Any, at: int = broken, n: Any = reads) -> None:
            if next(n) == at:
                raise WorkError("the disk is gone")
            original(self, *arguments)

        monkeypatch.setattr(Store, "read_into", read)
        epoch = loader.epoch(0)
        for _ in range(batches):
            next(epoch)
        with pytest.raises(WorkError, match="the disk is gone"):
            next(epoch)
        assert list(epoch) == []
        assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]
    monkeypatch.setattr(Store, "read_into", original)
    assert len(list(loader.epoch(0))) == whole


@pytest.mark.parametrize("holding", HOLDINGS)
def test_threads_share_a_loader(store: Store, holding: Holding) -> None:
    loader = loader_of(store, holding)
    expected = {epoch: [b.features.clone() for b in loader.epoch(epoch)] for epoch in range(3)}

    def work(start: int) -> bool:
        return all(
            torch.equal(ours.features, theirs)
            for epoch in range(start, start + 3)
            for ours, theirs in zip(loader.epoch(epoch % 3), expected[epoch % 3], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(1, 12), frames=st.integers(1, 7))
def test_any_sizes_share_resume_and_agree(data: st.DataObject, count: int, frames: int) -> None:
    """Fewer samples than a batch, as many as ranks, more frames than are stored, one frame."""
    views, stored = data.draw(st.sampled_from([(1, 1), (1, 4), (3, 5)]))
    batch_size = data.draw(st.integers(1, 15))
    world_size = data.draw(st.integers(1, count))
    repeats = data.draw(st.integers(1, 3))
    shape = (count, views, stored, 2)
    features = torch.arange(count * views * stored * 2, dtype=torch.float16).reshape(shape)
    seen: list[int] = []
    for rank in range(world_size):
        loader = FeatureLoader(
            features,
            np.arange(count),
            batch_size=batch_size,
            frames=frames,
            seed=1,
            rank=rank,
            world_size=world_size,
            repeats=repeats,
        )
        whole = list(loader.epoch(2))
        assert len(whole) == len(loader)
        seen += torch.cat([batch.rows for batch in whole]).tolist()
        for batch in whole:
            first = (batch.features[:, :, 0] / 2).long()  # number of the stored frame
            assert torch.equal(first // (views * stored), batch.labels[:, None].expand_as(first))
            view = first // stored
            assert torch.equal(view, view[:, :1].expand_as(view))
            assert bool((first.diff() >= 0).all())
        for start in range(len(whole) + 1):
            rest = loader.epoch(2, start)
            assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))
    assert sorted(seen) == sorted([*range(count)] * repeats)
