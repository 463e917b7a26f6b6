"""Read chunk files without zarr: check size and checksum first, then decode the bytes.

zarr-python 3.1.6 returns fill values for a missing or an empty file, and decodes compressed text
of any announced length. But a store must never answer with zeros, and it may come from anybody, so
its chunks are read here (features in `featstore.reading.features`). Every error is a WorkError that
names the partition and the remedy.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from featstore.errors import WorkError
from featstore.format.array_spec import CRC_BYTES
from featstore.format.checksums import Checksums, MissingFile, crc32c, read_checked
from featstore.format.gaps import Gap, gaps_of_text
from featstore.format.metadata import StoreMetadata, without_links
from featstore.format.schema import GAPS, SPANS, STATUS_OK
from featstore.format.spans import MAX_SPANS_BYTES, Span, spans_of_text
from featstore.reading.repair import repair_command

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# A key is a file name (at most 255 bytes, three times that when quoted), a reason is one line.
MAX_TEXT_BYTES: Final = 4096
_MAX_TEXT_CHUNK: Final = 2**30


def text_limit(array: str) -> int:
    """Return how many bytes a string of this array may have at most."""
    return MAX_SPANS_BYTES if array in (SPANS, GAPS) else MAX_TEXT_BYTES


def text_chunk_limit(capacity: int, array: str = "key") -> int:
    """Return how many bytes the strings of a partition may take at most (before zstd)."""
    return min(_MAX_TEXT_CHUNK, 4 + capacity * (4 + text_limit(array)))


def _text_file_limit(capacity: int, array: str) -> int:
    """Return the most bytes of such a file: zstd may make text longer (ZSTD_COMPRESSBOUND)."""
    most = text_chunk_limit(capacity, array)
    return most + most // 256 + 1024


class DamagedPartition(WorkError):
    """A committed partition is not as it was written; `what` names only the damage itself."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what


class Commit(NamedTuple):
    """One entry of `commit`; a partition is done if it has one and its shard has the recorded size.

    It holds the number of listed samples, the crc32c over the checksums of the rows (of sequences:
    of their blocks), the size of the features shard in bytes, the time of writing in seconds since
    1970 and, of sequences, the number of frames. In the array it is uint64 [1, 4] or [1, 5].
    """

    rows: int
    checksum_crc32c: int
    features_bytes: int
    unix_time: int
    frames: int | None = None

    @property
    def lines(self) -> int:
        """The lines of features: frames of sequences, else rows."""
        return self.rows if self.frames is None else self.frames


class ChunkFiles:
    """Reads the chunk files of one store; the partition of a tar has the tar's number."""

    def __init__(self, store: Path, metadata: StoreMetadata) -> None:
        self.store = store
        self._root = os.path.realpath(store)
        self.metadata = metadata
        self.schema = metadata.schema
        self.shape = metadata.schema.sharded["features"]
        self.specs = metadata.schema.arrays()
        self._recorded: dict[int, dict[str, int]] = {}
        self._committed: dict[int, bytes] = {}  # the entries that `commit` returned, by partition

    def check_small_sizes(self, tar: int) -> None:
        """Raise WorkError unless the chunk files of the small arrays have a possible size.

        Also raises WorkError if this user may not read a file of the partition.
        """
        for name in self.schema.partition_arrays:
            if os.path.exists(path := self.path(name, tar)) and not os.access(path, os.R_OK):
                raise self.damaged(tar, f"{name} chunk cannot be read (Permission denied)")
        for name in self.schema.per_tar_arrays:
            spec, path = self.specs[name], self.path(name, tar)
            try:
                size = _size_of_file(path)
            except ValueError as error:
                raise self.damaged(tar, f"{name} chunk {error}") from error
            if spec.dtype == "string":  # its length depends on the compression
                if not CRC_BYTES < size <= _text_file_limit(self.schema.capacity, name):
                    raise self.damaged(tar, f"{name} chunk has {size} bytes")
            elif size != spec.file_bytes:
                raise self.damaged(tar, f"{name} chunk has {size} bytes, not {spec.file_bytes}")

    def path(self, array: str, tar: int) -> Path:
        """Return the path of the chunk file; UserError if a symbolic link is on the way."""
        return without_links(self._root, f"{array}/{self.specs[array].chunk_key(tar)}")

    def make_way(self, array: str, tar: int) -> Path:
        """Return `path` after removing everything that stands in the way of a new file there.

        That is a folder or a symbolic link in the place of the file itself, or a file in the place
        of a folder. A symbolic link on the way is never followed, but raises UserError.
        """
        *folders, _ = parts = self.specs[array].chunk_key(tar).split("/")
        for depth in range(1, len(folders) + 1):
            folder = without_links(self._root, "/".join([array, *parts[:depth]]))
            if folder.exists() and not folder.is_dir():
                folder.unlink()
        path = Path(self._root, array, *parts)
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        return path

    def commit(self, tar: int) -> Commit | None:
        """Return the commit entry of a partition, or None if it was never committed.

        Raises WorkError if there is an entry but it is damaged.
        """
        try:
            values = self.numbers("commit", tar).reshape(-1)
        except DamagedPartition as error:
            if isinstance(error.__cause__, MissingFile):
                return None
            raise
        commit = Commit(*values.tolist())
        expected_rows = self.metadata.tars[tar].rows
        if commit.rows != expected_rows:
            raise self.damaged(
                tar, f"commit entry lists {commit.rows} samples, but the tar has {expected_rows}"
            )
        possible = commit.lines <= self.schema.lines
        if not (possible and self.shape.shard_can_have(commit.features_bytes, commit.lines)):
            raise self.damaged(tar, "commit entry records a size that no shard can have")
        self._committed[tar] = values.tobytes()
        return commit

    def check_shard(self, tar: int, commit: Commit) -> Path:
        """Return the path of a committed features shard.

        Raises WorkError if its size is wrong, or that of another sharded array.
        """
        for name, shape in reversed(self.schema.sharded.items()):
            path = self.path(name, tar)
            written = shape.shard_bytes(commit.lines)
            if name == "features":
                written = commit.features_bytes
            try:
                size = _size_of_file(path)
                problem = f"has {size} bytes, but {written} were written"
            except ValueError as error:
                size, problem = -1, str(error)
            if size != written:
                key = self.specs[name].chunk_key(tar)
                raise self.damaged(tar, f"{name} shard {key} {problem}")
        return path

    def numbers(self, array: str, tar: int) -> npt.NDArray[Any]:
        """Return the partition's chunk of a numeric array, read-only, in the shape of a chunk."""
        spec = self.specs[array]
        body = self._checked_bytes(array, tar, spec.file_bytes)
        size = len(body) + CRC_BYTES
        if size != spec.file_bytes:
            raise self.damaged(tar, f"{array} chunk has {size} bytes, not {spec.file_bytes}")
        return np.frombuffer(body, spec.numpy_dtype).reshape(spec.chunks)

    def checksums(self, tar: int, commit: Commit) -> Checksums:
        """Return the checksums of the listed rows uint32 [n], or of the blocks of frames [n, 3].

        Raises WorkError if they are not those of the commit entry.
        """
        lines = self.shape.chunks(commit.lines) if self.schema.sequences else commit.rows
        recorded: Checksums = self.numbers("checksum", tar)[:lines]
        if crc32c(recorded) != commit.checksum_crc32c:
            raise self.damaged(tar, "row checksums do not match the commit entry")
        return recorded

    def texts(self, array: str, tar: int) -> list[str]:
        """Return the partition's chunk of a string array: `capacity` strings."""
        # Imported here because it takes longer than opening a store, and labels need no codec.
        from numcodecs import VLenUTF8, Zstd

        capacity = self.schema.capacity
        most = text_chunk_limit(capacity, array)
        body = self._checked_bytes(array, tar, _text_file_limit(capacity, array))
        length = _zstd_content_size(body)
        if length is None or not 4 + 4 * capacity <= length <= most:
            raise self.damaged(tar, f"{array} chunk announces an impossible length")
        try:
            plain = bytes(Zstd().decode(body))
            (count,) = struct.unpack_from("<I", plain)
            if count != capacity:
                raise ValueError(f"{count} strings instead of {capacity}")
            decoded: list[str] = VLenUTF8().decode(plain).tolist()
        except (RuntimeError, ValueError, MemoryError) as error:
            raise self.damaged(tar, f"{array} chunk cannot be decoded ({error})") from error
        return decoded

    def spans(self, tar: int, rows: int) -> list[tuple[Span, ...]]:
        """Return the spans of the first `rows` samples of a partition of a multi-label store."""
        classes = len(self.metadata.class_names)
        try:
            return [spans_of_text(text, classes) for text in self.texts(SPANS, tar)[:rows]]
        except ValueError as error:
            raise self.damaged(tar, f"spans chunk is no list of spans ({error})") from error

    def gaps(self, tar: int, rows: int) -> list[tuple[Gap, ...]]:
        """Return the gaps of the first `rows` samples of a partition of sequences."""
        try:
            return [gaps_of_text(text) for text in self.texts(GAPS, tar)[:rows]]
        except ValueError as error:
            raise self.damaged(tar, f"gaps chunk is no list of gaps ({error})") from error

    def lengths(self, tar: int, commit: Commit) -> npt.NDArray[np.int64]:
        """Return where the frames of every listed sample begin, and where the last ones end.

        They are counted from the partition's first frame: int64 [rows + 1]. Raises WorkError if
        the lengths do not follow one another, or are not those of the commit entry.
        """
        first, length = (self.numbers(n, tar)[: commit.rows] for n in ("first_frame", "length"))
        edges: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        missing = self.numbers("status", tar)[: commit.rows] != STATUS_OK
        whole = (length >= 0).all() and (edges[:-1] == first).all() and edges[-1] == commit.frames
        if not whole or ((length == 0) != missing).any():
            raise self.damaged(tar, "the lengths of its rows do not fit together")
        return edges

    def damaged(self, tar: int, what: str) -> DamagedPartition:
        """Return the error for a damaged committed partition, with its remedy.

        If a writer is replacing or has replaced the partition since its commit entry was read, the
        message says that instead.
        """
        if self._written_anew(tar):
            return DamagedPartition(
                "it was written anew while it was being read",
                f"partition {tar} of {self.store} was written anew while it was being read, or "
                "removed: open the store again",
            )
        return DamagedPartition(
            what,
            f"partition {tar} of {self.store}: {what}; delete {self.store / 'commit' / 'c'}/{tar} "
            f"and run `{repair_command(self.store, self.metadata)}` to redo just this partition",
        )

    def _written_anew(self, tar: int) -> bool:
        known = self._committed.get(tar)
        if known is None:
            return False
        try:
            now, _ = read_checked(self.path("commit", tar), len(known) + CRC_BYTES)
        except MissingFile:
            return True
        except ValueError:  # damage, not the work of a writer
            return False
        return now != known

    def _checked_bytes(self, array: str, tar: int, limit: int) -> bytes:
        """Return a chunk file's bytes without their checksum, after checking file and commit."""
        path = self.path(array, tar)
        try:
            body, crc = read_checked(path, limit)
        except ValueError as error:
            raise self.damaged(tar, f"{array} chunk {error}") from error
        # The checksum inside the file would not show that the file belongs to another partition.
        if array in self.schema.small_arrays and crc != self._recorded_checksums(tar)[array]:
            raise self.damaged(tar, f"{array} chunk is not the one that was committed")
        return body

    def _recorded_checksums(self, tar: int) -> dict[str, int]:
        recorded = self._recorded.get(tar)
        if recorded is None:
            values = self.numbers("chunk_checksum", tar).reshape(-1).tolist()
            recorded = dict(zip(self.schema.small_arrays, values, strict=True))
            self._recorded[tar] = recorded
        return recorded


def _size_of_file(path: Path) -> int:
    """Return the size of a regular file in bytes; ValueError says why it is no such file."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise MissingFile("is missing") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is no regular file")
    return found.st_size


def _zstd_content_size(frame: bytes) -> int | None:
    """Return the content size in a Zstandard frame header (RFC 8878, 3.1.1.1), or None."""
    if len(frame) < 6 or frame[:4] != _ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    size_flag, single_segment, dictionary = descriptor >> 6, descriptor >> 5 & 1, descriptor & 3
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[dictionary]
    width = (1 if single_segment else 0, 2, 4, 8)[size_flag]
    if width == 0 or len(frame) < start + width:
        return None
    size = int.from_bytes(frame[start : start + width], "little")
    return size + 256 if width == 2 else size
