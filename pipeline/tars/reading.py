"""Reading packed tars: an index of the samples, then the bytes of one sample at a time.

A sample is `<key>.<ext>` (the original video bytes) and `<key>.json`, as WebDataset lays them out.
Nothing is extracted to disk and nothing is unpickled. Members that are not regular files, or whose
name is a path, are refused.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from featstore.errors import WorkError, one_line
from featstore.files.documents import parse_json
from pipeline.tars.dataset import Dataset, Tar

# A sidecar holds a dozen short fields; anything larger is not one of ours.
MAX_SIDECAR_BYTES = 1 << 20
HASH_BLOCK_BYTES = 1 << 20
_SIDECAR_FIELDS = {"key": str, "label": int, "num_frames": int, "splits": list}


class DamagedTar(WorkError):
    """A tar is missing or differs from what was packed; the other tars are not affected."""

    @classmethod
    def of(cls, path: Path, what: str) -> DamagedTar:
        """The error for the tar at `path`, with the remedy."""
        delete = "delete it and " if path.exists() else ""
        return cls(f"{path} {what}; {delete}run the same `mote-cli pack` command again")


@dataclass(frozen=True, slots=True)
class TarSample:
    """The place of one sample in its tar; `offset` and `size` of the video file are in bytes."""

    key: str
    offset: int
    size: int
    sidecar: dict[str, Any]


class OpenTar:
    """An indexed tar; `read` may be called from several threads."""

    def __init__(self, path: Path, descriptor: int, samples: list[TarSample]) -> None:
        self.path = path
        self.samples = samples
        self._descriptor = descriptor

    def read(self, sample: TarSample) -> bytes:
        """Return the original bytes of the video. Raises `DamagedTar` if the tar ends too early."""
        return _video(self.path, self._descriptor, sample.key, sample.offset, sample.size)

    def require(self, sha256: str) -> None:
        """Read the whole file and raise `DamagedTar` if its hash is not `sha256`."""
        digest, offset = hashlib.sha256(), 0
        while block := _bytes(self.path, self._descriptor, offset, HASH_BLOCK_BYTES):
            digest.update(block)
            offset += len(block)
        if digest.hexdigest() != sha256:
            raise DamagedTar.of(self.path, "is damaged: its sha256 differs from the packed file's")


@contextmanager
def open_tar(path: Path, size: int | None = None) -> Iterator[OpenTar]:
    """Open and index a tar; `size` is the number of bytes that it must have, if given.

    Raises `DamagedTar`, which names the tar, if it is missing, has another size or is damaged.
    """
    file = _opened(path)
    with file:
        found = os.fstat(file.fileno()).st_size
        if size is not None and found != size:
            raise DamagedTar.of(path, f"is damaged: it has {found} bytes, but {size} were packed")
        yield OpenTar(path, file.fileno(), _index(path, file))


def read_video(path: Path, key: str, offset: int, size: int) -> bytes:
    """Read the bytes of one video at a known offset, without keeping the tar open.

    Raises `DamagedTar` if the tar is missing, cannot be read or ends too early.
    """
    with _opened(path) as file:
        return _video(path, file.fileno(), key, offset, size)


def require_packed(archive: OpenTar, dataset: Dataset, tar: Tar) -> None:
    """Raise `DamagedTar` unless the tar's samples agree with `dataset.json`."""
    found = len(archive.samples)
    if found != tar.samples:
        raise DamagedTar.of(archive.path, f"holds {found} samples, but {tar.samples} were packed")
    for sample in archive.samples:
        label, splits = sample.sidecar["label"], set(sample.sidecar["splits"])
        known = 0 <= label < len(dataset.class_names)
        if not known or splits != set(dataset.splits_of(sample.key)):
            raise DamagedTar.of(
                archive.path,
                f"and dataset.json do not agree on the class or splits of {sample.key!r}",
            )


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise DamagedTar.of(path, "is missing") from error
    except OSError as error:
        raise DamagedTar.of(path, f"cannot be read ({error.strerror})") from error


def _video(path: Path, descriptor: int, key: str, offset: int, size: int) -> bytes:
    data = _bytes(path, descriptor, offset, size)
    while len(data) < size:  # one read gives at most 2 GiB
        more = _bytes(path, descriptor, offset + len(data), size - len(data))
        if not more:
            raise DamagedTar.of(path, f"is damaged: it ends inside {key!r}")
        data += more
    return data


def _bytes(path: Path, descriptor: int, offset: int, size: int) -> bytes:
    try:
        return os.pread(descriptor, size, offset)
    except OSError as error:
        raise DamagedTar.of(path, f"cannot be read ({error.strerror})") from error


def _index(path: Path, file: BinaryIO) -> list[TarSample]:
    videos: dict[str, tuple[int, int]] = {}
    sidecars: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
                if not regular or "/" in member.name or not key or not extension:
                    raise DamagedTar.of(
                        path,
                        f"holds {one_line(member.name)!r}: members must be plain files named "
                        "KEY.EXTENSION",
                    )
                if key in (sidecars if extension == "json" else videos):
                    raise DamagedTar.of(path, f"holds {key!r} twice")
                if extension == "json":
                    sidecars[key] = _sidecar(path, tar, member, key)
                else:
                    videos[key] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DamagedTar.of(path, f"is damaged ({one_line(error)})") from error
    if videos.keys() != sidecars.keys():
        key = sorted(videos.keys() ^ sidecars.keys())[0]
        raise DamagedTar.of(path, f"lacks the video or the JSON of {key!r}: each sample needs both")
    return [TarSample(key, *videos[key], sidecars[key]) for key in videos]


def _sidecar(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> dict[str, Any]:
    """Read a sidecar: a JSON object that must have the fields needed to read the sample."""
    if member.size > MAX_SIDECAR_BYTES:
        raise DamagedTar.of(path, f"has too large a sidecar of {member.size} bytes: {member.name}")
    content = tar.extractfile(member)
    assert content is not None  # regular files always have content
    try:
        value = parse_json(content.read())
    except ValueError as error:
        what = f"is damaged: {member.name} is not JSON ({one_line(error, 120)})"
        raise DamagedTar.of(path, what) from error
    if not isinstance(value, dict):
        raise DamagedTar.of(path, f"is damaged: {member.name} is not a JSON object")
    for name, kind in _SIDECAR_FIELDS.items():
        if type(value.get(name)) is not kind:
            raise DamagedTar.of(path, f"is damaged: {name} in {member.name} is {value.get(name)!r}")
    if value["key"] != key or not all(isinstance(split, str) for split in value["splits"]):
        raise DamagedTar.of(path, f"is damaged: {member.name} is the sidecar of another video")
    return value
