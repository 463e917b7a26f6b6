"""Writing a store: it is made once, then gets one partition per tar, each complete or absent."""

from __future__ import annotations

import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import UserError, WorkError, one_line
from featstore.files.durable import (
    PARTIAL_SUFFIX,
    link_or_copy,
    make_folder,
    sync_folder,
    write_bytes,
    write_json,
)
from featstore.files.exchange import staging
from featstore.files.locks import claimed, exclusive
from featstore.format.array_checks import wrong_labels
from featstore.format.checksums import Checksums, crc32c
from featstore.format.class_texts import ClassText
from featstore.format.int8 import dequantise, quantise
from featstore.format.metadata import (
    ARRAY_METADATA_LIMIT,
    GROUP_METADATA_LIMIT,
    StoreMetadata,
    array_nodes,
    check_text_name,
    prompt_set_names,
    read_metadata,
)
from featstore.format.schema import (
    CLASS_TEXT_GROUP,
    FEATURE_SCALE,
    FRAME_ARRAYS,
    GAPS,
    SPANS,
    FeatureArray,
    FloatArray,
    class_text_spec,
)
from featstore.reading.chunk_files import MAX_TEXT_BYTES, ChunkFiles, Commit, text_limit
from featstore.reading.coded_shards import read_scale
from featstore.reading.damage_notes import DamageNote
from featstore.writing.frame_blocks import FrameBlocks
from featstore.writing.partition import Partition, SequencePartition
from featstore.writing.shard_rows import FeatureRows, compressed_shard, write_chunk

log = logging.getLogger(__name__)


class PartitionWriter(ABC):
    """What all writers have in common, wherever their store lies."""

    def __init__(self, folder: Path, metadata: StoreMetadata) -> None:
        """Write to the store whose metadata files are in `folder`."""
        self.metadata = metadata
        self.schema = metadata.schema
        self.provenance = metadata.provenance
        self._folder = folder

    @property
    def prompt_sets(self) -> list[str]:
        """The names of the prompt sets whose class texts the store holds."""
        return prompt_set_names(self._folder)

    @abstractmethod
    def done(self, tar: int) -> bool:
        """Return whether a partition is committed and has all its files."""

    def pending(self) -> list[int]:
        """Return the numbers of the partitions that are not done."""
        return [tar for tar in range(self.schema.tars) if not self.done(tar)]


class StoreWriter(PartitionWriter):
    """Adds partitions to a store. Make one with `init` (new store) or `open` (existing store).

    After `init`, only partitions are written. Only one process may write a partition at a time:
    hold `claim` around the work. Different processes may fill different partitions.
    """

    def __init__(self, path: Path, metadata: StoreMetadata) -> None:
        super().__init__(path, metadata)
        self.path = path
        self._files = ChunkFiles(path, metadata)

    @classmethod
    def init(
        cls,
        path: Path,
        metadata: StoreMetadata,
        class_texts: Mapping[str, ClassText],
        feature_scale: FloatArray | None = None,
    ) -> StoreWriter:
        """Make a store without partitions; it appears at `path` complete or not at all.

        `class_texts` are by prompt set. `feature_scale` float32 [D] is needed for int8 features
        and only for them. Waits if another process is making the same store. Raises StoreExists if
        `path` exists, UserError if a name cannot be stored or class texts do not fit, ValueError
        if the scale does not fit, WorkError if the disk is full.
        """
        if (feature_scale is not None) != metadata.schema.quantised:
            raise ValueError("int8 features need a scale, and other features must have none")
        make_folder(path.parent)
        with exclusive(lock_file(path), f"making {path}", wait=True, keep=path.exists):
            if path.exists():
                raise StoreExists(f"{path} exists already: remove it or continue it")
            with staging(path) as folder:
                write_skeleton(folder, metadata, class_texts, feature_scale)
                folder.rename(path)
                sync_folder(path.parent)
        return cls(path, metadata)

    @classmethod
    def open(cls, path: Path) -> StoreWriter:
        """Open an existing store to add partitions; raises UserError if it is not a valid store."""
        return cls(path, read_metadata(path))

    def file(self, array: str, tar: int) -> Path:
        """Return the path of an array's file for one tar."""
        return self._files.path(array, tar)

    def done(self, tar: int) -> bool:
        """Return whether it is committed, with a shard of the right size and all small chunks.

        It is not done if `mote-cli verify` noted damage that was not repaired since.
        """
        try:
            commit = self._files.commit(tar)
            if commit is None:
                return False
            self._files.check_shard(tar, commit)
            whole = all(
                self._files.path(name, tar).is_file() for name in self.schema.per_tar_arrays
            )
        except (WorkError, UserError) as error:  # damage, a symbolic link
            log.warning("%s will be redone: %s", self.path, error)
            return False
        found = self._noted.reason(tar)
        if found is not None:
            log.warning("%s: partition %d will be redone: %s", self.path, tar, found)
            return False
        return whole

    @cached_property
    def _noted(self) -> DamageNote:
        return DamageNote(self._files)

    def feature_rows(self, tar: int) -> FeatureRows:
        """Return an object that takes the features of a partition row by row before it is written.

        Hold `claim`, pass the object to `write_partition` as the partition's features, then close
        it. Raises UserError if the store is compressed.
        """
        if not self.schema.mappable:
            raise UserError(
                f"{self.path} stores features as {self.schema.storage}, but {self.schema.tier} "
                "are extracted uncompressed: finish the store it was made from, then convert that"
            )
        shape = self.schema.sharded["features"]
        return FeatureRows(self.file("features", tar), shape, self.metadata.tars[tar].rows)

    def write_partition(
        self, tar: int, partition: Partition | SequencePartition, shard: Path | None = None
    ) -> None:
        """Write the partition of one tar; an earlier one, done or not, is replaced.

        `shard` is a features file with exactly these features from a store of the same sizes,
        codec and type. It is linked, or copied if it cannot be linked, instead of written anew;
        sequences are always written anew, block by block.

        The order is: write the new shard beside its place, remove the commit entry and the old
        shard, write the small arrays, move the shard into its place, write the commit entry. Each
        file is synced before the next begins, so that a process killed at any moment leaves the
        partition either done and right, or not done.
        Raises ValueError if the partition does not fit the tar, OSError if the disk is full.
        """
        self._check_fits(tar, partition)
        paths = {name: self._files.make_way(name, tar) for name in self.schema.partition_arrays}
        try:
            earlier = self._files.commit(tar)
        except WorkError:
            earlier = None  # no sound entry equals a damaged one
        # If the disk is full, the new shard fails and the earlier partition stays.
        with self._shards(paths, partition, shard) as (checksums, put_shards):
            for name in ("commit", "features"):
                if paths[name].exists():
                    paths[name].unlink()
                    sync_folder(paths[name].parent)
            digests = [
                write_chunk(
                    paths[name],
                    self._files.specs[name],
                    checksums if name == "checksum" else partition.column(name),
                )
                for name in self.schema.small_arrays
            ]
            write_chunk(
                paths["chunk_checksum"],
                self._files.specs["chunk_checksum"],
                np.array([digests], np.uint32),
            )
            put_shards()
        commit = Commit(
            rows=len(partition.key),
            checksum_crc32c=crc32c(checksums),
            features_bytes=paths["features"].stat().st_size,
            # This makes the new entry differ from the one before it.
            unix_time=max(earlier.unix_time + 1 if earlier else 0, int(time.time())),
            frames=int(partition.length.sum())
            if isinstance(partition, SequencePartition)
            else None,
        )
        entry = [number for number in commit if number is not None]
        write_chunk(paths["commit"], self._files.specs["commit"], np.array([entry], np.uint64))

    @contextmanager
    def _shards(
        self, paths: Mapping[str, Path], partition: Partition | SequencePartition, same: Path | None
    ) -> Iterator[tuple[Checksums, Callable[[], None]]]:
        """Yield the checksums of what will be read, and a function that places the shards."""
        if isinstance(partition, Partition):
            with self._shard(paths["features"], partition.features, same) as made:
                yield made
            return
        scale = read_scale(self._files)

        def coded(frames: FeatureArray) -> tuple[FeatureArray, FeatureArray]:
            assert scale is not None
            stored = quantise(frames, scale)
            return stored, dequantise(stored, scale)

        with ExitStack() as stack:
            files = []
            for name in FRAME_ARRAYS:
                coding = coded if name == "features" and scale is not None else None
                blocks = FrameBlocks(paths[name], self.schema.sharded[name], coding)
                files.append(stack.enter_context(blocks))
            for some in partition.checked_frames():
                for file, frames in zip(files, some, strict=True):
                    file.append(frames)
            for file in files:
                file.finish()
            # The commit entry says the size of the features, which are placed last.
            columns = [file.checksums for file in files]

            def place() -> None:
                for file in reversed(files):
                    file.place()

            yield np.array(columns, np.uint32).T.copy(), place

    @contextmanager
    def _shard(
        self, path: Path, features: FeatureArray | FeatureRows, same: Path | None
    ) -> Iterator[tuple[Checksums, Callable[[], None]]]:
        """Yield checksums uint32 [n] of the rows as read, and a function that makes the shard."""
        if isinstance(features, FeatureRows):
            yield features.finish(), features.place
            return
        scale = read_scale(self._files)
        stored: FeatureArray = features if scale is None else quantise(features, scale)
        readable = features if scale is None else dequantise(stored, scale)
        if same is None and self.schema.codec == "none":
            with FeatureRows(path, self.schema.sharded["features"], len(stored)) as rows:
                rows.put_all(stored)
                checksums = rows.finish()
                yield checksums if scale is None else _row_checksums(readable), rows.place
        elif same is None:
            content = compressed_shard(self.schema, stored)
            yield _row_checksums(readable), partial(write_bytes, path, content)
        else:
            yield _row_checksums(readable), partial(link_or_copy, same, path)

    @contextmanager
    def claim(self, tars: Iterable[int] | None = None) -> Iterator[None]:
        """Be the only process that writes the partitions `tars` (None means all).

        The claim is a lock on ranges of a file beside the store, which the kernel frees when the
        process ends in any way. Files that interrupted writes left in these partitions are
        removed. Raises WorkError if another process holds one of the partitions.
        """
        mine = frozenset(range(self.schema.tars) if tars is None else tars)
        records = [1 + tar for tar in sorted(mine)]
        with claimed(
            lock_file(self.path), records, lambda n: f"writing partition {n - 1} of {self.path}"
        ):
            swept = 0
            # Other processes may be writing unfinished files of other partitions.
            for leftover in list(self.path.rglob(f"*{PARTIAL_SUFFIX}")):
                _, chunks, tar, *_ = (*leftover.relative_to(self.path).parts, "", "")
                number = tar.partition(".")[0]  # the name begins with the partition's number
                if chunks == "c" and number.isdecimal() and int(number) in mine:
                    swept += 1
                    if leftover.is_dir() and not leftover.is_symlink():  # not made by mote
                        shutil.rmtree(leftover)
                    else:
                        leftover.unlink(missing_ok=True)
            if swept:
                log.info("%s: removed %d files of interrupted writes", self.path, swept)
            yield

    def _check_fits(self, tar: int, partition: Partition | SequencePartition) -> None:
        if not 0 <= tar < self.schema.tars:
            raise ValueError(f"no partition {tar}: the store has 0 to {self.schema.tars - 1}")
        n = len(partition.key)
        if n != self.metadata.tars[tar].rows:
            raise ValueError(
                f"partition {tar} has {n} samples, but its tar lists {self.metadata.tars[tar].rows}"
            )
        if self.schema.sequences != isinstance(partition, SequencePartition):
            raise ValueError(f"partition {tar} and the store differ in having sequences")
        if isinstance(partition, Partition):
            dtype, row_shape = partition.rows
            if row_shape != self.schema.row_shape:
                raise ValueError(
                    f"partition {tar} has rows {list(row_shape)}, the store has "
                    f"{list(self.schema.row_shape)}"
                )
            if dtype != self.schema.dtype:
                raise ValueError(f"partition {tar} has {dtype}, the store has {self.schema.dtype}")
        elif partition.length.sum() > self.schema.frame_capacity:
            raise UserError(
                f"the videos of {self.metadata.tars[tar].file} have {partition.length.sum()} "
                f"frames, and a partition of {self.path} has room for "
                f"{self.schema.frame_capacity}: pack fewer videos a tar (--samples-per-shard) or "
                "extract the data set as a new store"
            )
        classes, splits = len(self.metadata.class_names), len(self.metadata.split_names)
        multi_label = self.schema.multi_label
        if wrong_labels(partition.label, classes, multi_label):
            raise ValueError(f"partition {tar} has a label outside 0..{classes - 1}")
        if multi_label != (partition.spans is not None):
            raise ValueError(f"partition {tar} and the store differ in having spans")
        for spans in partition.spans or ():
            if any(not 0 <= span.label < classes for span in spans):
                raise ValueError(f"partition {tar} has a span outside 0..{classes - 1}")
        if int(partition.splits.max()) >> splits:
            raise ValueError(f"partition {tar} names a split beyond the {splits} of the store")
        for text in (*partition.key, *partition.reason):
            try:
                fits = len(text.encode()) <= MAX_TEXT_BYTES
            except UnicodeEncodeError:  # file names may hold bytes that are not text
                fits = False
            if not fits:
                raise UserError(
                    f"{one_line(ascii(text), 100)} cannot be stored: a key or a reason must be "
                    f"Unicode text of at most {MAX_TEXT_BYTES} bytes; rename the video"
                )
        if isinstance(partition, SequencePartition):
            longest = max(map(len, partition.column(GAPS)))
            if longest > text_limit(GAPS):
                raise ValueError(f"the gaps of a video take {longest} characters")
        long = max(map(len, partition.column(SPANS) if multi_label else ("",)))
        if long > text_limit(SPANS):
            raise UserError(
                f"the classes of a video take {long} characters with their times: at most "
                f"{text_limit(SPANS)} can be stored; list fewer, or cut the video"
            )


class StoreExists(UserError):
    """A store was to be made at a path that exists already."""


def write_skeleton(
    folder: Path,
    metadata: StoreMetadata,
    class_texts: Mapping[str, ClassText],
    feature_scale: FloatArray | None = None,
) -> None:
    """Write all of a store but its partitions; raises UserError if a name cannot be stored."""
    for prompt_set, text in class_texts.items():
        require_fitting(prompt_set, text, metadata)
    _write_node(folder, metadata.group_node(), GROUP_METADATA_LIMIT)
    for name, node in array_nodes(metadata).items():
        _write_node(folder / name, node, ARRAY_METADATA_LIMIT)
    texts = folder / CLASS_TEXT_GROUP
    _write_node(texts, {"zarr_format": 3, "node_type": "group", "attributes": {}}, 1024)
    for prompt_set, text in class_texts.items():
        write_class_text(texts / prompt_set, text)
    if feature_scale is not None:
        spec = metadata.schema.arrays()[FEATURE_SCALE]
        write_chunk(folder / FEATURE_SCALE / spec.chunk_key(0), spec, feature_scale)


def require_fitting(prompt_set: str, text: ClassText, metadata: StoreMetadata) -> None:
    """Raise UserError unless the class texts fit the classes and the size of a store."""
    check_text_name(prompt_set)
    names, dim = metadata.class_names, metadata.schema.dim
    if text.names != names or text.embeddings.shape[1] != dim:
        raise UserError(
            f"class texts {prompt_set!r} are for {len(text.names)} classes with "
            f"{text.embeddings.shape[1]} numbers each, the store has {len(names)} with {dim}: "
            "compute class texts for the store's classes with its encoder"
        )


def write_class_text(folder: Path, text: ClassText) -> None:
    """Write the class texts of one prompt set as an array in the new folder `folder`."""
    spec = class_text_spec(*text.embeddings.shape)
    _write_node(folder, spec.metadata(text.attributes()), ARRAY_METADATA_LIMIT)
    write_chunk(folder / spec.chunk_key(0), spec, text.embeddings)


def _row_checksums(features: FeatureArray) -> Checksums:
    return np.array([crc32c(row) for row in features], np.uint32)


def _write_node(folder: Path, node: dict[str, Any], limit: int) -> None:
    path = folder / "zarr.json"
    try:
        write_json(path, node)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{one_line(ascii(error.object), 100)} holds a name that is not Unicode text: rename it"
        ) from error
    if path.stat().st_size > limit:
        raise UserError(
            f"the metadata of the store takes {path.stat().st_size} bytes, but only {limit} can be "
            "read again: pack with a larger --samples-per-shard"
        )


def lock_file(store: Path) -> Path:
    """Return the lock file beside a store: record 0 is held while the store is made, and record
    1 + tar while the partition of a tar is written."""
    return store.with_name(f"{store.name}.lock")
