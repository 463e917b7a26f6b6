"""Pools that are closed when their test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.decoding.nvdec import batcher as nvdec_batcher
from tests.support.processes.gpu_pool_on_cpu import PoolMaker


@pytest.fixture(autouse=True)
def no_sizes_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec_batcher, "SHOWN_SIZES", {})


@pytest.fixture
def make_pool() -> Iterator[PoolMaker]:
    maker = PoolMaker()
    yield maker
    for pool in maker.pools:
        pool.close()
