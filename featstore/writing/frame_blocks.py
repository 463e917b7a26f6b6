"""Writes the shards of sequences block by block, so that memory holds one block of frames.

A shard is written beside its place, in order, and moved there when the partition is committed.

Dimension letters: n frames.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from featstore.files.durable import PARTIAL_SUFFIX, make_folder, sync_folder
from featstore.format.array_spec import CRC_BYTES, ShardShape
from featstore.format.checksums import crc32c
from featstore.format.schema import BLOSC_LEVEL, FeatureArray
from featstore.writing.shard_rows import shard_index

Coding = Callable[[FeatureArray], tuple[FeatureArray, FeatureArray]]
"""Returns a block as it is stored and as it will be read (of int8 features they differ)."""


class FrameBlocks(AbstractContextManager["FrameBlocks"]):
    """A shard of frames that come in any portions.

    It is a context manager: at the end it removes the file if that was not placed. After a kill -9
    the next claim of the partition removes it.
    """

    def __init__(self, path: Path, shape: ShardShape, coding: Coding | None = None) -> None:
        """Begin a shard, which `place` moves to `path`; OSError if the file cannot be made."""
        self._path, self._shape, self._coding = path, shape, coding
        make_folder(path.parent)
        self._partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        self._file = open(self._partial, "xb")  # noqa: SIM115 (closed by `close`)
        self._waiting: list[FeatureArray] = []
        self._starts = [0]
        self.checksums: list[int] = []
        """Of the frames of each block that was written, as they will be read."""
        self.frames = 0

    def append(self, frames: FeatureArray) -> None:
        """Add frames [n, ...] in the type that reading gives. They are copied where they wait.

        Raises ValueError for frames of another shape or type, and if there are more than the shard
        has room for.
        """
        size = self._shape.chunk_rows
        dtype = np.dtype(np.float16) if self._coding is not None else self._shape.dtype
        if frames.shape[1:] != self._shape.row_shape or frames.dtype != dtype:
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape[1:])}: they must be {dtype} "
                f"{list(self._shape.row_shape)}"
            )
        if self.frames + len(frames) > self._shape.lines:
            raise ValueError(f"a partition has room for {self._shape.lines} frames")
        while len(frames):
            room = size - self.frames % size
            self._waiting.append(frames[:room].copy())
            self.frames += len(self._waiting[-1])
            frames = frames[room:]
            if self.frames % size == 0:
                self._write_block()

    def finish(self) -> None:
        """Write what waits, and the index; sync the file."""
        if self._waiting:
            self._write_block()
        self._file.write(shard_index(self._shape, self._starts))
        self._file.flush()
        os.fsync(self._file.fileno())

    def place(self) -> None:
        """Move the finished file into its place as the shard; the commit entry must be gone."""
        self._partial.replace(self._path)
        self._file.close()
        sync_folder(self._path.parent)

    def close(self) -> None:
        """Remove the file unless it was placed."""
        if not self._file.closed:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write_block(self) -> None:
        shape = self._shape
        frames: FeatureArray = np.concatenate(self._waiting)
        self._waiting.clear()
        stored, read = (frames, frames) if self._coding is None else self._coding(frames)
        self.checksums.append(crc32c(np.ascontiguousarray(read, read.dtype.newbyteorder("<"))))
        block = np.full((shape.chunk_rows, *shape.row_shape), shape.missing, shape.dtype)
        block[: len(stored)] = stored
        content = block.tobytes()
        if shape.codec != "none":
            from numcodecs.blosc import BITSHUFFLE, compress  # only codecs need it

            how = shape.codec.encode(), BLOSC_LEVEL[shape.codec], BITSHUFFLE, 0
            content = compress(content, *how, typesize=shape.dtype.itemsize)
        self._file.write(content)
        self._file.write(crc32c(content).to_bytes(CRC_BYTES, "little"))
        self._starts.append(self._starts[-1] + len(content) + CRC_BYTES)
