"""Read sequences: rows of their own length over the flat axis of frames of a partition.

Dimension letters: n frames of a part of a row, B rows, V crops (an axis that is left out where
there is one), D dim (in other tiers the item).

Memory is bounded by what is asked for: times are found by bisection over blocks, each of which is
compared with its checksum when it is first used.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError
from featstore.format.gaps import Gap
from featstore.format.schema import FRAME_ARRAYS, STATUS_OK, FeatureArray, RowArray, StoreSchema
from featstore.reading.chunk_files import ChunkFiles, Commit
from featstore.reading.features import FeatureFiles

_KEPT_BLOCKS: Final = 64  # of times and frame numbers, where files are not mapped: some KB each


class Window(NamedTuple):
    """A part of a row: frames `first` to before `after` of it, shown from `start_s` to `end_s`."""

    row: int
    start_s: float
    end_s: float
    first: int
    after: int


class Sequences:
    """The sequences of the partitions that were committed when the store was opened.

    A row is given as (partition, position). Frames are counted from the row's first one.
    """

    def __init__(
        self,
        files: ChunkFiles,
        commits: Mapping[int, Commit],
        features: FeatureFiles,
        key_of: Callable[[int], str],
    ) -> None:
        """`features` reads the array of that name; the others are opened here."""
        self._files, self._commits = files, commits
        # These cannot be mapped: after the 4 bytes of a checksum, numbers of 8 bytes lie askew.
        others = {
            name: FeatureFiles(files, commits, key_of, False, name) for name in FRAME_ARRAYS[1:]
        }
        self._arrays = {"features": features, **others}
        self._block = lru_cache(_KEPT_BLOCKS)(
            lambda name, tar, number: self._arrays[name].block(tar, number)
        )
        self.edges = lru_cache(None)(self._edges)

    def length(self, tar: int, position: int) -> int:
        """Return how many frames a row has; 0 if it failed."""
        edges = self.edges(tar)
        return int(edges[position + 1] - edges[position])

    def blocks(
        self, name: str, tar: int, position: int, first: int, after: int
    ) -> Iterator[npt.NDArray[Any]]:
        """Yield the frames `first` to before `after` of a row, of one array, in pieces [n, ...].

        A piece lies in one block; it is a view where the files are mapped and may not be changed.
        """
        start = int(self.edges(tar)[position])
        at, end, size = start + first, start + after, self._files.shape.chunk_rows
        read = self._arrays[name].block if name == "features" else partial(self._block, name)
        while at < end:
            number, offset = divmod(at, size)
            piece = read(tar, number)[offset : min(size, end - number * size)]
            yield piece
            at += len(piece)

    def read(self, name: str, tar: int, position: int, first: int, after: int) -> FeatureArray:
        """Return the frames `first` to before `after` of a row, of one array, [n, ...]."""
        schema = self._files.schema
        dtype = self._files.specs[name].numpy_dtype if name != "features" else schema.dtype
        shape = schema.row_shape if name == "features" else ()
        out: FeatureArray = np.empty((after - first, *shape), dtype.newbyteorder("="))
        at = 0
        for piece in self.blocks(name, tar, position, first, after):
            out[at : at + len(piece)] = piece
            at += len(piece)
        return out

    def frames_between(
        self, tar: int, position: int, start_s: float | None, end_s: float | None
    ) -> tuple[int, int]:
        """Return the first frame shown at or after `start_s`, and the first at or after `end_s`.

        None means the beginning, or the end. UserError for times that are no numbers or reversed.
        """
        length = self.length(tar, position)
        for bound in (start_s, end_s):
            if bound is not None and math.isnan(bound):
                raise UserError(f"{bound} is no time: give seconds from the video's beginning")
        if start_s is not None and end_s is not None and end_s < start_s:
            raise UserError(f"a part from {start_s:g} s to {end_s:g} s ends before it begins")
        first = 0 if start_s is None else self._at(tar, position, start_s, length)
        after = length if end_s is None else self._at(tar, position, end_s, length)
        return first, after

    def seconds(self, tar: int, position: int, frame: int) -> float:
        """Return when one frame is shown, in seconds."""
        return float(next(self.blocks("pts", tar, position, frame, frame + 1))[0])

    def windows(
        self, row: int, tar: int, position: int, seconds: float, stride: float
    ) -> Iterator[Window]:
        """Yield the windows of a row: one every `stride` seconds until one reaches the row's end.

        A window without a frame, as inside a gap, is left out.
        """
        length = self.length(tar, position)
        if not length:
            return
        begin, last = (self.seconds(tar, position, frame) for frame in (0, length - 1))
        # Another one is needed while the last frame does not lie before the end of the one before.
        more = math.floor((last - begin - seconds) / stride + 1 + 1e-9)
        for number in range(1 + max(0, more)):
            start = begin + number * stride
            first, after = self.frames_between(tar, position, start, start + seconds)
            if first < after:
                yield Window(row, start, start + seconds, first, after)

    def _at(self, tar: int, position: int, seconds: float, length: int) -> int:
        start, size = int(self.edges(tar)[position]), self._files.shape.chunk_rows

        def times(number: int) -> npt.NDArray[Any]:
            first = number * size
            block = self._block("pts", tar, number)
            return block[max(0, start - first) : start + length - first]

        numbers = range(start // size, (start + length - 1) // size + 1) if length else range(0)
        before = bisect_left(numbers, seconds, key=lambda number: float(times(number)[0]))
        if not before:
            return 0
        number = numbers[before - 1]
        within = int(np.searchsorted(times(number), seconds))
        return max(0, number * size - start) + within

    def _edges(self, tar: int) -> npt.NDArray[np.int64]:
        return self._files.lengths(tar, self._commits[tar])


class SequenceRows:
    """What a `Store` has for sequences: a row has frames of its own number."""

    path: Path
    status: npt.NDArray[np.uint8]
    _files: ChunkFiles
    _commits: Mapping[int, Commit]
    _of_sequences: Sequences
    _listed: Callable[[npt.ArrayLike], RowArray]

    if TYPE_CHECKING:

        @property
        def schema(self) -> StoreSchema:
            """See `Store.schema`."""

        @cached_property
        def rows(self) -> RowArray:
            """See `Store.rows`."""

        def partitions(self) -> Iterator[int]:
            """See `Store.partitions`."""

        def __len__(self) -> int: ...

    def require_fixed_rows(self) -> None:
        """Raise UserError in a store of sequences, whose rows have different lengths."""
        if self.sequences:
            raise UserError(
                f"{self.path.name} holds sequences, a row of its own length for every video: heads "
                "work on equally many frames of each, so choose or extract a store with a sampling "
                "such as uniform:16; from Python, Store.sequence reads this one"
            )

    @property
    def sequences(self) -> bool:
        """Whether rows have their own length; then `sequence` reads them."""
        return self.schema.sequences

    @cached_property
    def lengths(self) -> RowArray:
        """The number of stored frames of every listed sample, int64 [len], read-only; 0 if failed.

        In a store of fixed rows a video has as many as the store's `frames`.
        """
        if self.sequences:
            parts = [np.diff(self._of_sequences.edges(tar)) for tar in self.partitions()]
            lengths: RowArray = np.concatenate([np.zeros(0, np.int64), *parts])
        else:
            lengths = np.where(self.status == STATUS_OK, self.schema.frames, 0).astype(np.int64)
        lengths.flags.writeable = False
        return lengths

    @cached_property
    def gaps(self) -> tuple[tuple[Gap, ...], ...]:
        """Damaged stretches of every listed sample, which a store of sequences has no frames of."""
        if not self.sequences:
            return ((),) * len(self)
        found = (self._files.gaps(tar, self._commits[tar].rows) for tar in self.partitions())
        return tuple(gaps for part in found for gaps in part)

    def sequence(
        self, row: int, start_s: float | None = None, end_s: float | None = None
    ) -> FeatureArray:
        """Return the features of a row's frames that are shown from `start_s` to before `end_s`.

        They are float16 [frames, crops, D], or [frames, D] in a store of one crop (of another tier
        its items, in its type), in ascending time; `sequence_times` has their times. None means
        from the beginning, or to the end. A failed row has no frames, a part in a gap none either.
        Raises UserError for a row that holds no sample, for times that are reversed, and in a store
        of fixed rows; WorkError if a block fails its checksum.
        """
        return self._part("features", row, start_s, end_s)

    def sequence_times(
        self, row: int, start_s: float | None = None, end_s: float | None = None
    ) -> npt.NDArray[np.float64]:
        """Return when these frames are shown, float64 [frames] in seconds; errors as `sequence`."""
        return self._part("pts", row, start_s, end_s)

    def sequence_frames(
        self, row: int, start_s: float | None = None, end_s: float | None = None
    ) -> npt.NDArray[np.int32]:
        """Return which frames of the video these are, int32 [frames]; errors as `sequence`."""
        return self._part("frame_index", row, start_s, end_s)

    def blocks(self, row: int) -> Iterator[tuple[int, FeatureArray]]:
        """Yield a row's features in pieces of a megabyte: (number of the first frame, [n, ...]).

        The pieces are views of the files where these are mapped, and may not be changed. Errors as
        `sequence`.
        """
        first = 0
        for piece, _, _ in self.frame_blocks(row):
            yield first, piece
            first += len(piece)

    def frame_blocks(self, row: int) -> Iterator[tuple[FeatureArray, ...]]:
        """Yield the pieces of `blocks` as (features, times, frame numbers)."""
        at = self._place(row)
        length = self._of_sequences.length(*at)
        pieces = [self._of_sequences.blocks(name, *at, 0, length) for name in FRAME_ARRAYS]
        yield from zip(*pieces, strict=True)

    def windows(
        self, seconds: float, stride: float | None = None, rows: npt.ArrayLike | None = None
    ) -> Iterator[Window]:
        """Yield windows of `seconds`, one every `stride` (default: `seconds`), row after row.

        The first window of a row begins at its first frame, the last one holds its last. A window
        without a frame is left out. `window_features` reads one. `rows` None means all rows.
        Raises UserError for lengths that are not positive, and as `sequence`.
        """
        stride = seconds if stride is None else stride
        if not (0 < seconds < np.inf and 0 < stride < np.inf):
            raise UserError(f"windows of {seconds:g} s every {stride:g} s: both must be above zero")
        wanted = self.rows if rows is None else self._listed(rows)
        for row in wanted.tolist():
            yield from self._of_sequences_or_refusal().windows(
                row, *self._place(row), seconds, stride
            )

    def frames_of(self, name: str, row: int, first: int, after: int) -> FeatureArray:
        """Return the frames `first` to before `after` of a row: features, pts or frame_index."""
        return self._of_sequences.read(name, *self._place(row), first, after)

    def window_features(self, window: Window) -> FeatureArray:
        """Return the features of a window's frames, as `sequence` does."""
        return self.frames_of("features", window.row, window.first, window.after)

    def _part(
        self, name: str, row: int, start_s: float | None, end_s: float | None
    ) -> npt.NDArray[Any]:
        at = self._place(row)
        first, after = self._of_sequences.frames_between(*at, start_s, end_s)
        return self._of_sequences.read(name, *at, first, after)

    def _place(self, row: int) -> tuple[int, int]:
        """Return the partition of a row, and the row's position in it."""
        self._of_sequences_or_refusal()
        (wanted,) = self._listed([row]).tolist()
        tar, position = divmod(int(wanted), self.schema.capacity)
        return tar, position

    def _of_sequences_or_refusal(self) -> Sequences:
        if not self.sequences:
            raise UserError(
                f"{self.path.name} holds {self.schema.frames} frames of every video, no sequences: "
                "`features` reads them, and a sampling such as fps:4 extracts sequences"
            )
        return self._of_sequences
