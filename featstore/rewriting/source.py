"""Reads whole partitions of a store, for code that makes another store from them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import WorkError
from featstore.files.exchange import recover, sweep
from featstore.format.class_texts import ClassText
from featstore.format.metadata import StoreMetadata, read_metadata
from featstore.format.provenance import Provenance
from featstore.format.schema import GAPS, SPANS, FloatArray, StoreSchema
from featstore.opening import open_store
from featstore.progress import ProgressSink
from featstore.reading.chunk_files import ChunkFiles
from featstore.reading.repair import repair_command
from featstore.reading.store import Store
from featstore.writing.partition import Partition, SequencePartition, SomeFrames
from featstore.writing.writer import StoreWriter


class SourceStore:
    """A store that is read as whole partitions, while no writer is at work on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store: Store = open_store(path)
        self.metadata: StoreMetadata = read_metadata(path)
        self.files = ChunkFiles(path, self.metadata)

    def partition(self, tar: int) -> Partition | SequencePartition:
        """Return a committed partition, all checksums compared; raises WorkError for damage.

        The frames of sequences are read, and compared, block by block while they are written.
        """
        schema, rows = self.metadata.schema, self.metadata.tars[tar].rows
        first = tar * schema.capacity
        values: dict[str, Any] = {}
        for name in self.metadata.schema.small_arrays:
            spec = self.files.specs[name]
            if name in ("checksum", "first_frame"):
                continue
            if name == SPANS:
                values[name] = self.files.spans(tar, rows)
            elif name == GAPS:
                values[name] = self.files.gaps(tar, rows)
            elif spec.dtype == "string":
                values[name] = self.files.texts(name, tar)[:rows]
            else:
                chunk: npt.NDArray[Any] = self.files.numbers(name, tar)[:rows]
                values[name] = chunk.astype(spec.numpy_dtype.newbyteorder("="))
        if schema.sequences:
            return SequencePartition(frames=partial(self._frames, first, rows), **values)
        features = self.store.features(np.arange(first, first + rows))
        return Partition(features=features, **values)

    def _frames(self, first: int, rows: int) -> Iterator[SomeFrames]:
        for row in range(first, first + rows):
            for arrays in self.store.frame_blocks(row):
                yield SomeFrames(*arrays)

    def shard(self, tar: int) -> Path:
        """Return the path of a partition's features file."""
        return self.files.path("features", tar)

    def texts(self) -> dict[str, ClassText]:
        """Return the class texts by prompt set."""
        return {name: self.store.class_text(name) for name in self.store.prompt_sets}

    def rewrite(
        self,
        folder: Path,
        schema: StoreSchema,
        provenance: Provenance,
        scale: FloatArray | None,
        progress: ProgressSink,
    ) -> tuple[int, int]:
        """Make a store with the same partitions and class texts in `folder`.

        `scale` float32 [D] is the scale of int8 features. Returns the bytes of all features
        files before and after. Errors as `StoreWriter.init` and `partition`.
        """
        metadata = replace(self.metadata, schema=schema, provenance=provenance)
        writer = StoreWriter.init(folder, metadata, self.texts(), scale)
        tars = list(self.store.partitions())
        for number, tar in enumerate(tars):
            same = self.shard(tar) if schema == self.metadata.schema else None
            writer.write_partition(tar, self.partition(tar), same)
            progress(number + 1, len(tars))
        files = (self.shard, partial(writer.file, "features"))
        before, after = (sum(file(tar).stat().st_size for tar in tars) for file in files)
        return before, after

    def require_complete(self, work: str) -> None:
        """Raise WorkError with the remedy if a partition is missing."""
        missing = self.metadata.schema.tars - len(list(self.store.partitions()))
        if missing:
            raise WorkError(
                f"{self.path} lacks {missing} of {self.metadata.schema.tars} partitions: finish it "
                f"with `{repair_command(self.path, self.metadata)}` before you {work} it"
            )


@contextmanager
def claimed_source(path: Path) -> Iterator[SourceStore]:
    """Open a store and keep other processes from writing to it inside the block.

    Raises WorkError while a process writes to it, UserError if it is not a store.
    """
    recover(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(StoreWriter.open(path).claim())
            sweep(path)
        except OSError as error:
            # If no lock file can be made, nothing can be written either.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        yield SourceStore(path)
