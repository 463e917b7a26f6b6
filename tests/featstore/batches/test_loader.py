"""Batches are reproducible, complete, and equal to a slow reference made sample by sample."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore import Store, WorkError, open_store
from featstore.batches.loader import (
    FeatureLoader,
    Holding,
    MappedFeatures,
    StreamedFeatures,
    available_memory,
    choose_holding,
    load_features,
    resident,
)
from featstore.batches.streaming import BatchMemory
from featstore.rewriting.convert import convert
from featstore.segments import SegmentSampler, segment_ranges
from tests.support.stores.sample_loaders import HOLDINGS, loader_of, same
from tests.support.stores.sample_stores import make_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    make_store(tmp_path / "s.zarr", rows=(8, 8, 3), row_shape=(3, 9, 16), failed=())
    return open_store(tmp_path / "s.zarr")


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
        patch.setattr("featstore.batches.loader._TOGETHER", 1)
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
    monkeypatch.setattr("featstore.batches.loader.available_memory", lambda: size * 5 // 4)
    assert isinstance(load_features(store, store.rows), MappedFeatures)
    monkeypatch.setattr("featstore.batches.loader.available_memory", lambda: 1000)
    assert isinstance(load_features(store, store.rows), StreamedFeatures)
    assert "% of the" in caplog.messages[-1]
    assert available_memory() > 2**20


def test_what_cannot_be_mapped_is_streamed_instead(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random row of such a store costs a chunk that is decoded."""
    convert(store.path, tmp_path / "zstd.zarr", "zstd")
    size = len(store) * store.schema.row_bytes
    monkeypatch.setattr("featstore.batches.loader.available_memory", lambda: size * 5 // 4)
    caplog.set_level(logging.INFO)
    for other in (open_store(tmp_path / "zstd.zarr"), open_store(store.path, mapped=False)):
        caplog.clear()
        assert isinstance(load_features(other, other.rows), StreamedFeatures)
        assert "exceed 60 % of" in caplog.messages[-1]
        assert caplog.messages[-1].endswith("this store cannot be memory-mapped")
    monkeypatch.setattr("featstore.batches.loader.available_memory", lambda: size * 2)
    assert isinstance(load_features(other, other.rows), torch.Tensor)


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
