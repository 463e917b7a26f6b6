"""Batches are reproducible, complete, and equal to a slow reference made sample by sample."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_stores import make_store

from featstore import Store, WorkError, open_store
from featstore.loader import (
    Batch,
    FeatureLoader,
    MappedFeatures,
    StreamedFeatures,
    available_memory,
    choose_holding,
    load_features,
    resident,
)
from featstore.segments import segment_ranges


@pytest.fixture
def store(tmp_path: Path) -> Store:
    make_store(tmp_path / "s.zarr", rows=(8, 8, 3), row_shape=(3, 9, 16), failed=())
    return open_store(tmp_path / "s.zarr")


def loader_of(store: Store, mapped: bool, seed: int = 3) -> FeatureLoader:
    rows = store.rows[::-1].copy()
    features = MappedFeatures(store, rows) if mapped else resident(store, rows)
    labels = store.labels[store.positions(rows)]
    return FeatureLoader(features, labels, batch_size=5, frames=4, seed=seed, rows=rows)


def same(ours: Batch, theirs: Batch) -> bool:
    return (
        torch.equal(ours.features, theirs.features)
        and torch.equal(ours.labels, theirs.labels)
        and torch.equal(ours.rows, theirs.rows)
    )


@pytest.mark.parametrize("mapped", [False, True])
def test_an_epoch_holds_every_sample_once(store: Store, mapped: bool) -> None:
    batches = list(loader_of(store, mapped).epoch(0))
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


def test_order_and_draws_depend_on_seed_and_epoch_only(store: Store) -> None:
    first, again = loader_of(store, False), loader_of(store, False)
    list(again.epoch(0))
    assert all(same(a, b) for a, b in zip(first.epoch(1), again.epoch(1), strict=True))
    one = next(loader_of(store, False).epoch(1))
    assert not torch.equal(one.rows, next(first.epoch(2)).rows)
    assert not torch.equal(one.rows, next(loader_of(store, False, seed=4).epoch(1)).rows)


def test_start_resumes_exactly(store: Store) -> None:
    loader = loader_of(store, False)
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
    loader = loader_of(store, False)
    order = np.random.default_rng((3, 5, 0)).permutation(19)
    rows = store.rows[::-1]
    for step, batch in enumerate(loader.epoch(5)):
        samples = order[step * 5 : step * 5 + 5]
        rng = np.random.default_rng((3, 5, 1 + step))
        views = rng.integers(0, 3, len(samples))
        lowest, highest = segment_ranges(9, 4)
        frames = rng.integers(lowest, highest, (len(samples), 4), endpoint=True)
        for i, sample in enumerate(samples):
            for t in range(4):
                expected = store.features([rows[sample]])[0, views[i], frames[i, t]]
                np.testing.assert_array_equal(batch.features[i, t].numpy(), expected)


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


def test_sizes_must_fit_together() -> None:
    features = torch.zeros(4, 1, 3, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match="N > 0"):
        FeatureLoader(features[:0], np.zeros(0, np.int64), batch_size=2, frames=2, seed=0)
    with pytest.raises(ValueError, match="as many labels"):
        FeatureLoader(features, np.zeros(3, np.int64), batch_size=2, frames=2, seed=0)
