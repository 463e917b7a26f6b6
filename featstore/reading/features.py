"""Read features. Before a row is returned, its checksum proves that it is the committed one.

Single rows and frames are gathered from memory-mapped shards, whose inner chunks are checked when
they are first used; many rows at once are read from the files and checked while reading.

Of sequences, each of the three arrays along the axis of frames is read so, and a row is a frame:
then the store holds the checksums of inner chunks instead of rows, and chunks are read as a whole.

Dimension letters: V views, F stored frames, D dim (in other tiers the item), n requested rows.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from featstore.files.after_fork import settle_torch
from featstore.format.checksums import Checksums, chunk_checksums, crc32c
from featstore.format.schema import FRAME_ARRAYS, FeatureArray, RowArray
from featstore.progress import ProgressSink, no_progress
from featstore.reading.chunk_files import ChunkFiles, Commit
from featstore.reading.coded_shards import CodedFeatures
from featstore.reading.shards import ShardFile, ShardMap

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# How many shards are opened together, because reading the megabytes of one shard removes from the
# core's caches all that opening the next one needs. Far below the limit of open files per process.
_OPEN_AT_ONCE: Final = 32


class FeatureFiles:
    """The features of the partitions that were committed when the store was opened.

    Of sequences, it may also be another array along the axis of frames.
    """

    def __init__(
        self,
        files: ChunkFiles,
        commits: Mapping[int, Commit],
        key_of: Callable[[int], str],
        mapped: bool,
        array: str = "features",
    ) -> None:
        """`key_of` returns the key of an array row, for messages. For `mapped` see `open_store`."""
        self._files = files
        self._schema = files.schema
        self._array = array
        self._shape = files.schema.sharded[array]
        self._commits = commits
        self._key_of = key_of
        self._plain = self._schema.mappable or array != "features"
        self._map = self._reserved() if mapped and self._plain else None
        self._coded = CodedFeatures(files)
        self._lock = threading.Lock()
        # Checksums of the rows, or of the chunks of sequences, by partition.
        self._checksums: dict[int, Checksums] = {}
        # The checksums of the inner chunks, counted over all shards, without what a chunk holds
        # beyond the listed rows. They are set only for the partitions in `_checksums`.
        chunks = self._shape.tars * self._shape.chunks_per_shard
        self._chunk_checksums = np.zeros(chunks, np.uint32)
        self._checked = np.zeros(chunks, bool)  # which chunks of the map were checked

    @property
    def mapped(self) -> bool:
        """Whether features are memory-mapped; otherwise they are decoded chunk by chunk."""
        return self._map is not None

    def gather(self, rows: RowArray, views: RowArray | None, frames: RowArray | None) -> Tensor:
        """Return the features [n, V', F', D] of listed array rows, in the store's dtype.

        `views` [n] picks one view of each row (V' = 1), None picks all; `frames` is [n, F'], or
        None for all (only if `views` is None). Needs `mapped`. Errors as `Store.features`.
        """
        import torch

        settle_torch()
        starts = self._row_starts(rows)
        shape = self._schema.row_shape
        stored, item = shape[1], shape[2:]
        dim = math.prod(item)
        if frames is None and not self._schema.pooled:
            # One window per number, each as wide as a row, would be more than 2**63 numbers.
            frames = np.broadcast_to(np.arange(stored), (len(rows), stored))
        if frames is None:
            index, width, taken = starts, math.prod(shape), shape
        else:
            if views is None:
                within = np.arange(shape[0])[:, None] * stored + frames[:, None]
            else:
                within = (views[:, None] * stored + frames)[:, None]
            index = starts[:, None, None] + within * dim
            width, taken = dim, (*index.shape[1:], *item)
        assert self._map is not None
        windows = self._map.windows(width)
        picked = windows.index_select(0, torch.from_numpy(index.reshape(-1)))
        return picked.view(len(rows), *taken)

    def block(self, tar: int, number: int) -> FeatureArray:
        """Return the listed lines [n, ...] of one inner chunk of a partition; errors as `gather`.

        It is a view of the file where that is mapped, so that it may not be written to.
        """
        chunk_rows = self._shape.chunk_rows
        chunk = tar * self._shape.chunks_per_shard + number
        lines = min(chunk_rows, self._commits[tar].lines - number * chunk_rows)
        if self._map is not None:
            if not self._checked[chunk]:
                self._check_chunks(np.array([chunk]))
            return self._map.chunk(chunk, lines)
        dtype = self._schema.dtype if self._array == "features" else self._shape.dtype
        out: FeatureArray = np.empty((lines, *self._shape.row_shape), dtype)
        first = chunk * chunk_rows
        self.read_into(np.arange(first, first + lines), out)
        return out

    def read_into(
        self,
        rows: RowArray,
        out: FeatureArray,
        check: bool = True,
        progress: ProgressSink = no_progress,
    ) -> None:
        """Read listed array rows into `out` [n, V, F, D], C-contiguous, in the store's dtype.

        Each shard is opened once, whatever the order of the rows, and neighbouring rows are read
        together. `check` False skips the comparison with the checksums of the rows. `progress`
        counts rows. Errors as `Store.features`.
        """
        shape = self._shape
        # Features that are not mapped are decoded chunk by chunk.
        runs = list(_runs(rows, shape.chunk_rows if self._map is None else shape.lines))
        runs.sort(key=lambda run: int(rows[run[0]]))
        tars = rows[[start for start, _ in runs]] // shape.lines
        if check:
            self._require_checksums(np.unique(tars))
        done = 0
        edges = [0, *(np.flatnonzero(np.diff(tars)) + 1).tolist(), len(runs)] if runs else []
        for at in range(0, len(edges) - 1, _OPEN_AT_ONCE):
            with ExitStack() as files:
                shards = [
                    (int(tars[begin]), runs[begin:end])
                    for begin, end in pairwise(edges[at : at + _OPEN_AT_ONCE + 1])
                ]
                readers = [files.enter_context(self._reading(tar, check)) for tar, _ in shards]
                for (tar, runs_of_tar), read in zip(shards, readers, strict=True):
                    for start, stop in runs_of_tar:
                        row, target = int(rows[start]), out[start:stop]
                        try:
                            checksums = read(row - tar * shape.lines, target)
                        except ValueError as error:
                            raise self._files.damaged(tar, str(error)) from error
                        if check:
                            self._compare(row, target, checksums)
                        done += stop - start
                    progress(done, len(rows))

    def _row_starts(self, rows: RowArray) -> RowArray:
        """Map and check the chunks of `rows`; return where each row begins, counted in numbers."""
        chunks = rows // self._shape.chunk_rows
        fresh = ~self._checked[chunks]
        if fresh.any():
            self._check_chunks(np.unique(chunks[fresh]))
        assert self._map is not None
        starts: RowArray = self._map.starts[chunks] + (rows - chunks * self._shape.chunk_rows) * (
            self._shape.row_bytes // self._shape.dtype.itemsize
        )
        return starts

    def _check_chunks(self, chunks: RowArray) -> None:
        """Map the shards of these inner chunks and check the chunks against the rows' checksums."""
        assert self._map is not None
        per_shard, chunk_rows = self._shape.chunks_per_shard, self._shape.chunk_rows
        self._require_checksums(np.unique(chunks // per_shard))
        for chunk in chunks.tolist():
            tar, number = divmod(chunk, per_shard)
            with self._lock:
                if self._map.starts[chunk] < 0:
                    commit = self._commits[tar]
                    path = self._checked_path(tar, commit)
                    try:
                        self._map.add(tar, path, commit.lines)
                    except ValueError as error:
                        raise self._files.damaged(tar, str(error)) from error
            rows = min(chunk_rows, self._commits[tar].lines - number * chunk_rows)
            features = self._map.chunk(chunk, rows)
            self._compare(chunk * chunk_rows, features, [crc32c(features)])
            self._checked[chunk] = True

    def _compare(self, first: int, features: FeatureArray, checksums: list[int]) -> None:
        """Raise WorkError unless rows first, first + 1, ... of one partition are as committed.

        `checksums` holds one checksum for each part of `features` that lies in one inner chunk.
        """
        tar, position = divmod(first, self._shape.lines)
        chunk_rows, listed = self._shape.chunk_rows, self._commits[tar].lines
        chunk = first // chunk_rows
        begin, end = position, position + len(features)
        for checksum, of_chunk in zip(
            checksums, self._chunk_checksums[chunk : chunk + len(checksums)].tolist(), strict=True
        ):
            stop = min((position // chunk_rows + 1) * chunk_rows, end)
            whole = position % chunk_rows == 0 and (stop % chunk_rows == 0 or stop == listed)
            if not (whole and checksum == of_chunk):
                self._compare_rows(tar, position, features[position - begin : stop - begin])
            position = stop

    def _compare_rows(self, tar: int, position: int, features: FeatureArray) -> None:
        """Compare row by row: for parts of chunks, and to find which row is damaged."""
        if self._schema.sequences:
            block = position // self._shape.chunk_rows
            raise self._files.damaged(tar, f"{self._array} of block {block} fail their checksum")
        recorded = self._checksums[tar][position : position + len(features)].tolist()
        for i, expected in enumerate(recorded):
            if crc32c(features[i]) != expected:
                key = self._key_of(tar * self._schema.capacity + position + i)
                raise self._files.damaged(tar, f"features of sample {key!r} fail their checksum")

    def _require_checksums(self, tars: npt.NDArray[np.integer]) -> None:
        """Read the checksums of these partitions, of rows and chunks, unless they were read."""
        fresh = [tar for tar in tars.tolist() if tar not in self._checksums]
        schema = self._schema
        for tar in fresh:
            commit = self._commits[tar]
            recorded = self._files.checksums(tar, commit)
            if schema.sequences:
                sums = recorded[:, FRAME_ARRAYS.index(self._array)]
            else:
                sums = chunk_checksums(recorded, schema.chunk_rows, schema.row_bytes)
            first = tar * self._shape.chunks_per_shard
            self._chunk_checksums[first : first + len(sums)] = sums
            self._checksums[tar] = recorded

    @contextmanager
    def _reading(self, tar: int, check: bool) -> Iterator[Callable[[int, FeatureArray], list[int]]]:
        """Yield a function that reads rows of a partition, beginning at a position in it.

        If `check`, the function returns a crc32c for each inner chunk that it read from. When it
        decodes instead of reading from the file, all its rows must lie in one chunk.
        """
        commit = self._commits[tar]
        path = self._checked_path(tar, commit)
        if self._map is None and self._array == "features":
            yield partial(self._coded.read, tar, commit, check=check)
            return
        try:
            file = ShardFile(path, self._shape, commit.lines)
        except ValueError as error:
            raise self._files.damaged(tar, str(error)) from error
        with file:
            yield partial(file.read, check=check)

    def _checked_path(self, tar: int, commit: Commit) -> Path:
        self._files.check_shard(tar, commit)
        return self._files.path(self._array, tar)

    def _reserved(self) -> ShardMap | None:
        try:
            return ShardMap(self._shape)
        except (OSError, OverflowError) as error:
            log.warning(
                "%s is read chunk by chunk, which is slower: its features cannot be mapped (%s)",
                *(self._files.store, error),
            )
            return None


def _runs(rows: RowArray, width: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each run of consecutive numbers in `rows`; none crosses k * width."""
    if len(rows):
        breaks = (np.diff(rows) != 1) | (rows[1:] // width != rows[:-1] // width)
        yield from pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(rows)])
