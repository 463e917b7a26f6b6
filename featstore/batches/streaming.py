"""Features that are read anew in every epoch: blocks of rows, in pools that are shuffled.

This is for stores that do not fit into memory. Blocks of two megabytes are read in random order, so
that the disk reads large pieces, and a pool of blocks is shuffled as a whole: with the usual sizes
a batch comes from some 60 places of the store. A thread reads the next pool while one is used.

Dimension letters as in `featstore.batches.loader`.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.format.schema import FeatureArray, RowArray
from featstore.reading.store import Store
from featstore.segments import Places

POOL_BYTES: Final = 256 * 2**20
"""Memory for streaming: one pool in use and one being read take half of it each."""

# How much is read from one place: a disk takes longer to find a smaller piece than to read it.
BLOCK_BYTES: Final = 2 * 2**20


def _references() -> int:
    """Return Python's reference count of an array that only `BatchMemory` and its caller hold.

    It is 3 in the Python versions so far; 3.14 leaves out references it need not count.
    """
    pieces = deque([(np.empty(0), None)])
    piece = pieces.popleft()
    array = piece[0]
    return sys.getrefcount(array)


# The count of a piece whose batch is gone; a batch that somebody holds adds one.
_FREE: Final = _references()


class BatchMemory:
    """Memory for batches, which is used again once nobody holds the batch that was in it.

    Fresh memory of a few megabytes for every batch may come from the system page by page, which
    takes half as long as gathering the batch. Several threads may share one memory.
    """

    def __init__(self, dtype: npt.DTypeLike = np.float16) -> None:
        self._dtype = np.dtype(dtype)
        self._pieces: deque[tuple[FeatureArray, Tensor]] = deque()  # the one longest in use first

    def take(self, count: int, clip: int, item: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return a batch [B, T, *item] of any content, and its memory as [B * T, D] to write to."""
        shape = (count, clip, *item)
        for _ in range(len(self._pieces)):
            try:
                piece = self._pieces.popleft()  # no other thread sees it until it is put back
            except IndexError:
                break
            array = piece[0]
            free = array.shape == shape and sys.getrefcount(array) <= _FREE
            batch = torch.from_numpy(array) if free else None
            self._pieces.append(piece)
            if batch is not None:
                return batch, piece[1]
        fresh: FeatureArray = np.empty((count * clip, math.prod(item)), self._dtype)
        piece = fresh.reshape(shape), torch.from_numpy(fresh)
        batch = torch.from_numpy(piece[0])
        if len(self._pieces) < 4:  # a caller who keeps its batches does not fill the memory
            self._pieces.append(piece)
        return batch, piece[1]


@dataclass(frozen=True, eq=False)
class StreamedFeatures:
    """Features of array rows `rows` in the files of `store`; stands in for float16 [N, V, F, D].

    `memory` is the size of two pools in bytes; a pool has at least one row.
    """

    store: Store
    rows: RowArray
    memory: int = POOL_BYTES

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, V, F, D)."""
        return (len(self.rows), *self.store.schema.row_shape)

    @property
    def pool_rows(self) -> int:
        """The number of samples in one pool."""
        return max(1, min(len(self.rows), self.memory // 2 // self.store.schema.row_bytes))

    def shuffled(self, rng: np.random.Generator, rank: int, world_size: int) -> ShuffledBlocks:
        """Shuffle one rank's part of the samples; the same `rng` state gives the same parts."""
        blocks = rng.permutation(len(self._edges) - 1)
        lengths = np.diff(self._edges)[blocks]
        # Positions of the blocks' samples in `_by_row`: each block's start, counted on.
        shifts = self._edges[blocks] - (np.cumsum(lengths) - lengths)
        sequence = self._by_row[np.arange(len(self.rows)) + np.repeat(shifts, lengths)]
        share, rest = divmod(len(sequence), world_size)
        start = rank * share + min(rank, rest)
        mine = sequence[start : start + share + (rank < rest)]
        pools = range(0, len(mine), self.pool_rows)
        places = [rng.permutation(min(self.pool_rows, len(mine) - first)) for first in pools]
        return ShuffledBlocks(self, mine, np.concatenate(places))

    @cached_property
    def _by_row(self) -> RowArray:
        """Positions of the samples in the order of their array rows."""
        order: RowArray = np.argsort(self.rows, kind="stable")
        return order

    @cached_property
    def _edges(self) -> RowArray:
        """Where blocks begin in `_by_row`, and its length; no block crosses a shard or a chunk."""
        schema = self.store.schema
        chunks = max(1, BLOCK_BYTES // (schema.chunk_rows * schema.row_bytes))
        tars, positions = np.divmod(self.rows[self._by_row], schema.capacity)
        block = tars * schema.capacity + positions // (chunks * schema.chunk_rows)
        edges: RowArray = np.flatnonzero(np.diff(block, prepend=-1, append=-1))
        return edges


class ShuffledBlocks:
    """One epoch of one rank: reads pools ahead and gathers clips from them, front to back.

    `order` [n] lists the samples in turn; `starts` [n] is the position of each sample's first
    frame among the frames of its pool.
    """

    def __init__(self, features: StreamedFeatures, samples: RowArray, places: RowArray) -> None:
        """`samples` in the order they are read; `places` of the order's samples in their pools."""
        self._store = features.store
        self._rows = features.rows[samples]
        self._size = features.pool_rows
        self.starts = places * (features.store.schema.views * features.store.schema.frames)
        self.order = samples[np.arange(len(samples)) // self._size * self._size + places]
        self._outputs = BatchMemory(features.store.schema.dtype)
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._buffers: list[FeatureArray] = []
        self._coming: dict[int, Future[Tensor]] = {}
        self._pool: tuple[int, Tensor] | None = None

    def clips(self, first: int, places: Places, count: int) -> Iterator[Tensor]:
        """Yield samples first, first + 1, ... of the order in batches of at most `count`.

        Each batch is [B, T, *item], the frames at `places` [n, T] of the samples' pools (see
        `starts`). Call with parts in order; the first may be any. Errors as `Store.read_into`.
        """
        clip = places.shape[1]
        for begin in range(0, len(places), count):
            part = places[begin : begin + count]
            batch, out = self._outputs.take(len(part), clip, self._store.schema.item)
            done = 0
            while done < len(part):
                pool, before = divmod(first + begin + done, self._size)
                taken = min(len(part) - done, self._size - before)
                index = torch.from_numpy(part[done : done + taken].reshape(-1))
                target = out[done * clip : (done + taken) * clip]
                torch.index_select(self._flat(pool), 0, index, out=target)
                done += taken
            yield batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _flat(self, pool: int) -> Tensor:
        """Wait for a pool, begin to read the next, and return this one [pool rows * V * F, D]."""
        if self._pool is None or self._pool[0] != pool:
            self._begin(pool)
            self._pool = pool, self._coming.pop(pool).result()
            self._begin(pool + 1)  # into the memory of the pool before
        return self._pool[1]

    def _begin(self, pool: int) -> None:
        if pool not in self._coming and pool * self._size < len(self._rows):
            self._coming[pool] = self._reader.submit(self._read, pool)

    def _read(self, pool: int) -> Tensor:
        rows = self._rows[pool * self._size : (pool + 1) * self._size]
        schema = self._store.schema
        if len(self._buffers) < 2:
            self._buffers.append(np.empty((len(rows), *schema.row_shape), schema.dtype))
        else:
            self._buffers.reverse()  # the one that is not in use comes last
        filled = self._buffers[-1][: len(rows)]
        self._store.read_into(rows, filled)
        return torch.from_numpy(filled).view(-1, math.prod(schema.item))
