"""Batches are reproducible, complete, and equal to a slow reference made sample by sample."""

from __future__ import annotations

import logging
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
from sample_stores import make_store
from torch import Tensor

from featstore import Store, WorkError, open_store
from featstore.converting import convert
from featstore.loader import (
    Batch,
    FeatureLoader,
    Holding,
    MappedFeatures,
    StreamedFeatures,
    available_memory,
    choose_holding,
    load_features,
    resident,
)
from featstore.segments import SegmentSampler, segment_ranges
from featstore.streaming import BatchMemory


@pytest.fixture
def store(tmp_path: Path) -> Store:
    make_store(tmp_path / "s.zarr", rows=(8, 8, 3), row_shape=(3, 9, 16), failed=())
    return open_store(tmp_path / "s.zarr")


HOLDINGS = ("resident", "mapped", "streamed")


def loader_of(
    store: Store, holding: Holding | bool, seed: int = 3, rank: int = 0, world_size: int = 1
) -> FeatureLoader:
    """`holding` True stands for mapped, False for resident; pools of a stream have 6 rows."""
    rows = store.rows[::-1].copy()
    features: Tensor | MappedFeatures | StreamedFeatures = resident(store, rows)
    if holding in ("mapped", True):
        features = MappedFeatures(store, rows)
    elif holding == "streamed":
        features = StreamedFeatures(store, rows, memory=12 * store.schema.row_bytes)
    return FeatureLoader(
        features,
        store.labels[store.positions(rows)],
        batch_size=5,
        frames=4,
        seed=seed,
        rows=rows,
        rank=rank,
        world_size=world_size,
    )


def same(ours: Batch, theirs: Batch) -> bool:
    return (
        torch.equal(ours.features, theirs.features)
        and torch.equal(ours.labels, theirs.labels)
        and torch.equal(ours.rows, theirs.rows)
    )


@pytest.mark.parametrize("holding", HOLDINGS)
def test_an_epoch_holds_every_sample_once(store: Store, holding: Holding) -> None:
    batches = list(loader_of(store, holding).epoch(0))
    assert [len(b.labels) for b in batches] == [5, 5, 5, 4]
    assert batches[0].features.shape == (5, 4, 16)
    assert batches[0].features.dtype == torch.float16  # as stored
    assert batches[0].labels.dtype == torch.int64
    rows = torch.cat([b.rows for b in batches])
    assert sorted(rows.tolist()) == store.rows.tolist()
    labels = torch.cat([b.labels for b in batches])
    np.testing.assert_array_equal(labels, store.labels[store.positions(rows.numpy())])


def test_resident_and_mapped_give_the_same_batches(store: Store) -> None:
    pairs = zip(loader_of(store, False).epoch(2), loader_of(store, True).epoch(2), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("holding", HOLDINGS)
def test_order_and_draws_depend_on_seed_and_epoch_only(store: Store, holding: Holding) -> None:
    first, again = loader_of(store, holding), loader_of(store, holding)
    list(again.epoch(0))
    assert all(same(a, b) for a, b in zip(first.epoch(1), again.epoch(1), strict=True))
    one = next(loader_of(store, holding).epoch(1))
    assert not torch.equal(one.rows, next(first.epoch(2)).rows)
    assert not torch.equal(one.rows, next(loader_of(store, holding, seed=4).epoch(1)).rows)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("holding", HOLDINGS)
def test_start_resumes_exactly(store: Store, holding: Holding, world_size: int) -> None:
    loader = loader_of(store, holding, rank=world_size - 1, world_size=world_size)
    whole = list(loader.epoch(7))
    for start in range(len(whole) + 1):
        rest = list(loader.epoch(7, start))
        assert len(rest) == len(whole) - start
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_each_frame_comes_from_its_segment_of_one_view(store: Store) -> None:
    """Slow reference: look each drawn frame up among the frames its segment allows."""
    lowest, highest = segment_ranges(9, 4)
    for batch in loader_of(store, False).epoch(0):
        for clip, row in zip(batch.features, batch.rows.tolist(), strict=True):
            stored = torch.from_numpy(store.features([row])[0])  # [V, F, D]
            views = [
                v
                for v in range(3)
                if all(
                    any(torch.equal(clip[k], stored[v, f]) for f in range(lo, hi + 1))
                    for k, (lo, hi) in enumerate(zip(lowest, highest, strict=True))
                )
            ]
            assert len(views) == 1


def test_gather_equals_a_per_sample_reference(store: Store) -> None:
    """Word by word: four numbers a word, four frames and a view a sample, so two words each."""
    order = np.random.default_rng((3, 5, 0)).permutation(19)
    words = np.random.PCG64((3, 5, 1, 0)).random_raw(19 * 2).tolist()
    lowest, highest = (edges.tolist() for edges in segment_ranges(9, 4))
    rows = store.rows[::-1]
    batches = list(loader_of(store, False).epoch(5))
    clips = torch.cat([batch.features for batch in batches])
    for i, sample in enumerate(order):
        numbers = [
            word >> at & 0xFFFF for word in words[2 * i : 2 * i + 2] for at in (0, 16, 32, 48)
        ]
        view = numbers[4] * 3 >> 16
        for t in range(4):
            frame = lowest[t] + (numbers[t] * (highest[t] - lowest[t] + 1) >> 16)
            expected = store.features([rows[sample]])[0, view, frame]
            np.testing.assert_array_equal(clips[i, t].numpy(), expected)


def test_the_size_of_groups_and_batches_changes_no_draw(store: Store) -> None:
    """Batches drawn together or one by one, of five samples or two: the same clips in turn."""
    whole = list(loader_of(store, False).epoch(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featstore.loader._TOGETHER", 1)
        patch.setattr("featstore.segments._AT_ONCE", 9)
        single = list(loader_of(store, False).epoch(1))
        small = loader_of(store, True)
        small.batch_size = 2
        pairs = list(small.epoch(1))
    assert all(same(a, b) for a, b in zip(whole, single, strict=True))
    of_whole, of_pairs = (torch.cat([b.features for b in batches]) for batches in (whole, pairs))
    assert torch.equal(of_whole, of_pairs)


def test_ranks_draw_apart() -> None:
    """Each rank has a stream of its own: the same places of two ranks rarely agree."""
    features = torch.arange(64.0).expand(400, 1, 64).unsqueeze(-1).contiguous().half()
    drawn = []
    for rank in range(2):
        loader = FeatureLoader(
            features,
            np.zeros(400, np.int64),
            batch_size=200,
            frames=4,
            seed=0,
            rank=rank,
            world_size=2,
        )
        drawn.append(next(loader.epoch(0)).features)
    assert (drawn[0] == drawn[1]).float().mean() < 0.12  # by chance 1/16 or 1/17


def test_all_frames_of_a_segment_and_all_views_occur(store: Store) -> None:
    features = torch.zeros(64, 3, 9, 2, dtype=torch.float16)
    features[..., 0] = torch.arange(3).reshape(1, 3, 1)
    features[..., 1] = torch.arange(9).reshape(1, 1, 9)
    loader = FeatureLoader(features, np.zeros(64, np.int32), batch_size=64, frames=4, seed=0)
    drawn = torch.cat([b.features for epoch in range(20) for b in loader.epoch(epoch)])
    assert set(drawn[..., 0].unique().tolist()) == {0, 1, 2}
    lowest, highest = segment_ranges(9, 4)
    for k, (lo, hi) in enumerate(zip(lowest, highest, strict=True)):
        assert set(drawn[:, k, 1].unique().tolist()) == set(range(lo, hi + 1))


def test_resident_compares_checksums(store: Store) -> None:
    path = store.path / "features/c/1/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[500] ^= 16
    path.write_bytes(raw)
    with pytest.raises(WorkError, match=r"partition 1 .*checksum"):
        resident(open_store(store.path), store.rows)


def test_resident_reports_progress(store: Store) -> None:
    seen: list[tuple[float, float]] = []
    loaded = resident(store, store.rows, lambda done, total, **_: seen.append((done, total)))
    assert seen == [(8, 19), (16, 19), (19, 19)]
    np.testing.assert_array_equal(loaded.numpy(), store.features(store.rows))


def test_choice_by_size_is_logged(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_holding(600, available=1000) == "resident"
    assert choose_holding(601, available=1000) == "mapped"
    assert choose_holding(901, available=1000) == "streamed"
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "features: held in memory",
        "features: read from memory-mapped files",
        "features: streamed from files, shuffled in blocks",
    ]
    caplog.clear()
    assert isinstance(load_features(store, store.rows), torch.Tensor)
    size = len(store) * store.schema.row_bytes
    monkeypatch.setattr("featstore.loader.available_memory", lambda: size * 5 // 4)
    assert isinstance(load_features(store, store.rows), MappedFeatures)
    monkeypatch.setattr("featstore.loader.available_memory", lambda: 1000)
    assert isinstance(load_features(store, store.rows), StreamedFeatures)
    assert "% of the" in caplog.messages[-1]
    assert available_memory() > 2**20


def test_what_cannot_be_mapped_is_streamed_instead(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random row of such a store costs a chunk that is decoded."""
    convert(store.path, tmp_path / "zstd.zarr", "zstd")
    size = len(store) * store.schema.row_bytes
    monkeypatch.setattr("featstore.loader.available_memory", lambda: size * 5 // 4)
    caplog.set_level(logging.INFO)
    for other in (open_store(tmp_path / "zstd.zarr"), open_store(store.path, mapped=False)):
        caplog.clear()
        assert isinstance(load_features(other, other.rows), StreamedFeatures)
        assert "exceed 60 % of" in caplog.messages[-1]
        assert caplog.messages[-1].endswith("the store is not one that is mapped")
    monkeypatch.setattr("featstore.loader.available_memory", lambda: size * 2)
    assert isinstance(load_features(other, other.rows), torch.Tensor)


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
    monkeypatch.setattr("featstore.loader._INT32_PLACES", 0)
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


def test_sizes_must_fit_together() -> None:
    features = torch.zeros(4, 1, 3, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match="N > 0"):
        FeatureLoader(features[:0], np.zeros(0, np.int64), batch_size=2, frames=2, seed=0)
    with pytest.raises(ValueError, match="as many labels"):
        FeatureLoader(features, np.zeros(3, np.int64), batch_size=2, frames=2, seed=0)
    with pytest.raises(ValueError, match="rank 1 of 1"):
        FeatureLoader(
            features, np.zeros(4, np.int64), batch_size=2, frames=2, seed=0, rank=1, world_size=1
        )
    with pytest.raises(ValueError, match="rank 0 of 5 with 4 samples"):
        FeatureLoader(
            features, np.zeros(4, np.int64), batch_size=2, frames=2, seed=0, rank=0, world_size=5
        )


@pytest.mark.parametrize("world_size", [2, 3, 7, 19])
@pytest.mark.parametrize("holding", HOLDINGS)
def test_ranks_share_an_epoch_without_padding_or_repeats(
    store: Store, holding: Holding, world_size: int
) -> None:
    seen: list[int] = []
    sizes = []
    for rank in range(world_size):
        loader = loader_of(store, holding, rank=rank, world_size=world_size)
        batches = list(loader.epoch(4))
        assert len(batches) == len(loader)
        assert all(len(batch.rows) == 5 for batch in batches[:-1])
        seen += torch.cat([batch.rows for batch in batches]).tolist()
        sizes.append(len(batches))
    assert sorted(seen) == store.rows.tolist()
    assert max(sizes) - min(sizes) <= 1


def test_streamed_batches_hold_what_they_say(store: Store) -> None:
    """Every clip is of its row, with the frames that the seed draws; pools end inside batches."""
    loader = loader_of(store, "streamed")
    sampler = SegmentSampler(3, 9, 4)
    for step, batch in enumerate(loader.epoch(2)):
        views, frames = np.divmod(sampler.draw((3, 2, 1, 0), step * 5, len(batch.rows)), 9)
        expected = store.clips(batch.rows.numpy(), views[:, 0], frames)
        np.testing.assert_array_equal(batch.features.numpy(), expected)
        np.testing.assert_array_equal(batch.labels, store.labels[store.positions(batch.rows)])


def test_streaming_mixes_blocks_and_reads_ahead_no_more_than_its_memory(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", rows=(64,) * 4, capacity=64, row_shape=(1, 2, 4), failed=())
    store = open_store(tmp_path / "s.zarr")
    features = StreamedFeatures(store, store.rows, memory=2 * 100 * store.schema.row_bytes)
    assert features.pool_rows == 100
    blocks = features.shuffled(np.random.default_rng(0), 0, 1)
    assert sorted(blocks.order.tolist()) == list(range(256))
    read: list[int] = []
    original = Store.read_into

    def counted(self: Store, rows: np.ndarray, out: np.ndarray, **options: object) -> None:
        read.append(len(rows))
        original(self, rows, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "read_into", counted)
        clips = blocks.clips(0, np.repeat(blocks.starts[:, None], 2, 1), 32)
        first = next(clips)
        kept = first.clone()
        list(clips)
        blocks.close()
    assert read == [100, 100, 56]
    assert torch.equal(first, kept), "a batch that somebody holds was written over"
    tars = store.rows[blocks.order[:100]] // 64
    assert len(set(tars.tolist())) >= 2
    assert (np.diff(tars) != 0).sum() > 20, "blocks were not mixed"


def test_damage_in_streamed_and_mapped_files_is_an_error(store: Store) -> None:
    path = store.path / "features/c/1/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[500] ^= 16
    path.write_bytes(raw)
    for holding in ("mapped", "streamed"):
        opened = open_store(store.path)
        kind = MappedFeatures if holding == "mapped" else StreamedFeatures
        loader = FeatureLoader(
            kind(opened, opened.rows), opened.labels, batch_size=4, frames=4, seed=0
        )
        with pytest.raises(WorkError, match=r"partition 1 .*checksum"):
            list(loader.epoch(0))


def test_memory_of_batches_is_used_again_only_when_free(store: Store) -> None:
    loader = loader_of(store, "resident")
    kept = list(loader.epoch(0))
    again = [batch.features.clone() for batch in loader.epoch(0)]
    assert all(torch.equal(a.features, b) for a, b in zip(kept, again, strict=True))


def test_threads_share_the_memory_of_batches() -> None:
    """Four threads take from one memory and write their own number: no batch is given twice."""
    memory = BatchMemory()

    def work(number: int) -> bool:
        held = None
        for step in range(300):
            batch, rows = memory.take(2, 3, (4,))
            rows.fill_(number * 300 + step)
            if held is not None and not bool((held == number * 300 + step - 1).all()):
                return False
            held = batch
            if not bool((batch == number * 300 + step).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_repeats_give_every_sample_as_often() -> None:
    features = torch.arange(5, dtype=torch.float16).reshape(5, 1, 1, 1).expand(5, 1, 4, 2)
    arguments = {"batch_size": 4, "frames": 2, "seed": 3}
    loader = FeatureLoader(features, np.arange(5), repeats=3, **arguments)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == 4
    labels = torch.cat([batch.labels for batch in batches])
    assert torch.bincount(labels).tolist() == [3] * 5
    values = torch.cat([batch.features[:, 0, 0] for batch in batches])
    assert values.tolist() == labels.tolist()
    once = FeatureLoader(features, np.arange(5), **arguments)
    same = FeatureLoader(features, np.arange(5), repeats=1, **arguments)
    for a, b in zip(once.epoch(1), same.epoch(1), strict=True):
        assert torch.equal(a.labels, b.labels)
    with pytest.raises(ValueError, match="0 repeats"):
        FeatureLoader(features, np.arange(5), repeats=0, **arguments)
