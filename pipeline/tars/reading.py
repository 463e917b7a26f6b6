"""Reading packed tars: an index of the samples, then the bytes of one sample at a time.

In a tar of our own a sample is `<key>.<ext>` (the original video bytes) and `<key>.json`, its
sidecar, as WebDataset lays them out; members that are not regular files, or whose name is a path,
are refused. A tar that was taken where it lies has its sidecars in an index in the data set's
folder, with the place of every video. Nothing is extracted to disk and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from featstore.errors import WorkError, one_line, quoted
from featstore.files.documents import LISTS_LIMIT, parse_json, read_document
from featstore.format.spans import Span, spans_from_json
from pipeline.tars.dataset import Dataset, Tar

if TYPE_CHECKING:
    from featstore.remote.objects import ObjectFolder

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


Damage = Callable[[str], DamagedTar]
"""Makes the error for what is wrong with a tar ("is missing"), with the remedy."""


def damage_of(dataset: Dataset, tar: Tar) -> Damage:
    """Return what makes the errors for a tar of this data set.

    A tar that was taken where it lies belongs to the user: no remedy may be to delete it.
    """
    if not tar.source:
        return partial(DamagedTar.of, dataset.tar_path(tar))
    return lambda what: DamagedTar(
        f"{tar.source} {what}; put back the file that was packed, or delete {dataset.folder} and "
        "run the same `mote-cli pack --tars` command again"
    )


@dataclass(frozen=True, slots=True)
class TarSample:
    """The place of one sample in its tar; `offset` and `size` of the video file are in bytes."""

    key: str
    offset: int
    size: int
    sidecar: dict[str, Any]

    def spans(self, classes: int) -> tuple[Span, ...]:
        """The classes of a video that may show several; ValueError if its sidecar has none such."""
        return spans_from_json(self.sidecar.get("spans", []), classes)


class OpenTar:
    """An indexed tar; `read` may be called from several threads."""

    def __init__(
        self, samples: list[TarSample], damage: Damage, read: Callable[[int, int], bytes]
    ) -> None:
        """`read(offset, size)` returns at most `size` bytes of the file."""
        self.samples = samples
        self.damage = damage
        self._read = read

    def read(self, sample: TarSample) -> bytes:
        """Return the original bytes of the video. Raises `DamagedTar` if the tar ends too early."""
        return _whole(self._read, self.damage, sample.key, sample.offset, sample.size)

    def require(self, sha256: str) -> None:
        """Read the whole file and raise `DamagedTar` if its hash is not `sha256`."""
        digest, offset = hashlib.sha256(), 0
        while block := self._read(offset, HASH_BLOCK_BYTES):
            digest.update(block)
            offset += len(block)
        if digest.hexdigest() != sha256:
            raise self.damage("is damaged: its sha256 differs from the packed file's")


@contextmanager
def open_tar(path: Path, size: int | None = None) -> Iterator[OpenTar]:
    """Open and index a tar of our own; `size` is the number of bytes that it must have, if given.

    Raises `DamagedTar`, which names the tar, if it is missing, has another size or is damaged.
    """
    damage = partial(DamagedTar.of, path)
    with _opened(path, damage, size) as file:
        yield OpenTar(_index(path, file), damage, partial(_bytes, file.fileno(), damage))


@contextmanager
def open_packed(dataset: Dataset, tar: Tar, path: Path | None = None) -> Iterator[OpenTar]:
    """Open a tar of a data set with its samples; `path` is where it lies, if not in its own place.

    A tar that lies at a URL and has no `path` is read by ranges. Raises `DamagedTar` if the tar is
    missing, has another size or does not agree with `dataset.json`, WorkError if the storage fails.
    """
    if not tar.source:
        with open_tar(path or dataset.tar_path(tar), tar.bytes) as archive:
            _require_packed(archive, dataset, tar)
            yield archive
        return
    damage, samples = damage_of(dataset, tar), _listed(dataset, tar)
    if tar.remote and path is None:
        archive = OpenTar(samples, damage, partial(_ranged, tar, damage))
        _require_packed(archive, dataset, tar)
        yield archive
        return
    with _opened(path or dataset.tar_path(tar), damage, tar.bytes) as file:
        archive = OpenTar(samples, damage, partial(_bytes, file.fileno(), damage))
        _require_packed(archive, dataset, tar)
        yield archive


def read_video(dataset: Dataset, tar: Tar, key: str, offset: int, size: int) -> bytes:
    """Read the bytes of one video at a known offset, without keeping the tar open.

    Raises `DamagedTar` if the tar is missing, cannot be read or ends too early, WorkError if the
    storage fails.
    """
    damage = damage_of(dataset, tar)
    if tar.remote:
        return _whole(partial(_ranged, tar, damage), damage, key, offset, size)
    with _opened(dataset.tar_path(tar), damage) as file:
        return _whole(partial(_bytes, file.fileno(), damage), damage, key, offset, size)


def _require_packed(archive: OpenTar, dataset: Dataset, tar: Tar) -> None:
    """Raise `DamagedTar` unless the tar's samples agree with `dataset.json`."""
    found = len(archive.samples)
    if found != tar.samples:
        raise archive.damage(f"holds {found} samples, but {tar.samples} were packed")
    for sample in archive.samples:
        label, splits = sample.sidecar["label"], set(sample.sidecar["splits"])
        try:
            sample.spans(len(dataset.class_names))
        except ValueError as error:
            raise archive.damage(f"and the sidecar of {sample.key!r}: {error}") from error
        if not dataset.has_label(label) or splits != set(dataset.splits_of(sample.key)):
            raise archive.damage(
                f"and dataset.json do not agree on the class or splits of {sample.key!r}"
            )


def _listed(dataset: Dataset, tar: Tar) -> list[TarSample]:
    """Return the samples that the index of a tar lists."""
    path = dataset.index_path(tar)
    remedy = "run the same `mote-cli pack --tars` command again, which makes it anew"

    def wrong(what: str) -> NoReturn:
        raise DamagedTar(f"{path} {what}; {remedy}")

    content = read_document(path, remedy, limit=LISTS_LIMIT, error=DamagedTar)
    if hashlib.sha256(content).hexdigest() != tar.index_sha256:
        wrong("is damaged: its sha256 differs from the one in dataset.json")
    samples = []
    try:
        for entry in parse_json(content):
            sample = TarSample(entry["key"], entry["offset"], entry["size"], entry)
            if _wrong_field(entry, sample.key, path.name) or not (
                type(sample.offset) is type(sample.size) is int
                and 0 <= sample.offset <= sample.offset + sample.size <= tar.bytes
            ):
                wrong(f"does not say where {sample.key!r} is")
            samples.append(sample)
    except (ValueError, LookupError, TypeError) as error:
        wrong(f"is damaged ({one_line(error)})")
    return samples


def _wrong_field(sidecar: dict[str, Any], key: str, name: str) -> str:
    """Return why the sidecar in the file `name` is not that of the video `key`; "" if it is."""
    for field, kind in _SIDECAR_FIELDS.items():
        if type(sidecar.get(field)) is not kind:
            return f"{field} in {name} is {sidecar.get(field)!r}"
    if sidecar["key"] != key or not all(isinstance(split, str) for split in sidecar["splits"]):
        return f"{name} is the sidecar of another video"
    return ""


@contextmanager
def _opened(path: Path, damage: Damage, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a tar, which must have `size` bytes if that is given."""
    with _file(path, damage) as file:
        found = os.fstat(file.fileno()).st_size
        if size is not None and found != size:
            raise damage(f"is damaged: it has {found} bytes, but {size} were packed")
        yield file


def _file(path: Path, damage: Damage) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise damage("is missing") from error
    except OSError as error:
        raise damage(f"cannot be read ({error.strerror})") from error


def _whole(
    read: Callable[[int, int], bytes], damage: Damage, key: str, offset: int, size: int
) -> bytes:
    data = read(offset, size)
    while len(data) < size:  # one read gives at most 2 GiB
        more = read(offset + len(data), size - len(data))
        if not more:
            raise damage(f"is damaged: it ends inside {key!r}")
        data += more
    return data


def _bytes(descriptor: int, damage: Damage, offset: int, size: int) -> bytes:
    try:
        return os.pread(descriptor, size, offset)
    except OSError as error:
        raise damage(f"cannot be read ({error.strerror})") from error


def _ranged(tar: Tar, damage: Damage, offset: int, size: int) -> bytes:
    """Read a range of a tar at a URL, which must still have its size."""
    from featstore.remote.objects import ChangedObject, MissingObject

    if offset >= tar.bytes or not size:
        return b""
    folder, name = _remote_file(tar.source)
    try:
        return folder.get_range(name, offset, min(size, tar.bytes - offset), tar.bytes)
    except MissingObject:
        raise damage("is missing") from None
    except ChangedObject as error:
        raise damage(f"was changed ({one_line(error)})") from None


@cache
def _remote_file(url: str) -> tuple[ObjectFolder, str]:
    from featstore.remote.objects import remote_file

    return remote_file(url)


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
                        f"holds {quoted(member.name)}: members must be plain files named "
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
    if wrong := _wrong_field(value, key, member.name):
        raise DamagedTar.of(path, f"is damaged: {wrong}")
    return value
