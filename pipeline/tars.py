"""Reading packed tars: an index of the samples, then the bytes of one sample at a time.

A sample is `<key>.<ext>` (the original video bytes) and `<key>.json`, as WebDataset lays them out.
Nothing is extracted to disk and nothing is unpickled. Members that are not regular files, or whose
name is a path, are refused.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import WorkError

# A sidecar holds a dozen short fields; anything larger is not one of ours.
MAX_SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TarSample:
    """Where one sample lies in its tar; `offset` and `size` are bytes of the video file."""

    key: str
    extension: str
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
        """The original bytes of the video. Raises `WorkError` when the tar ends before them."""
        data = os.pread(self._descriptor, sample.size, sample.offset)
        while len(data) < sample.size:  # one read gives at most 2 GiB
            more = os.pread(self._descriptor, sample.size - len(data), sample.offset + len(data))
            if not more:
                raise WorkError(
                    f"{self.path} ends inside {sample.key}: the tar is truncated; pack it again"
                )
            data += more
        return data


@contextmanager
def open_tar(path: Path) -> Iterator[OpenTar]:
    """Open and index a tar. Raises `WorkError` naming the tar when it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            yield OpenTar(path, file.fileno(), _index(path, file))
    except FileNotFoundError as error:
        raise WorkError(f"{path} is missing: put it back or pack the data set again") from error


def _index(path: Path, file: Any) -> list[TarSample]:
    videos: dict[str, tuple[str, int, int]] = {}
    sidecars: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not member.isreg() or "/" in member.name or not key or not extension:
                    raise WorkError(
                        f"{path} holds {member.name!r}: members must be plain files named "
                        "KEY.EXTENSION; pack the data set with `mote-cli pack`"
                    )
                if extension == "json":
                    sidecars[key] = _sidecar(path, tar, member)
                else:
                    videos[key] = (extension, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise WorkError(f"{path} is damaged ({error}): pack the data set again") from error
    if videos.keys() != sidecars.keys():
        key = sorted(videos.keys() ^ sidecars.keys())[0]
        raise WorkError(
            f"{path} lacks the video or the JSON of {key!r}: each sample needs both; pack it again"
        )
    return [TarSample(key, *videos[key], sidecars[key]) for key in videos]


def _sidecar(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    if member.size > MAX_SIDECAR_BYTES:
        raise WorkError(f"{path}: {member.name} has {member.size} bytes, too many for a sidecar")
    content = tar.extractfile(member)
    assert content is not None  # regular files always have content
    try:
        value = json.loads(content.read())
    except ValueError as error:
        raise WorkError(f"{path}: {member.name} is not JSON; pack the data set again") from error
    if not isinstance(value, dict):
        raise WorkError(f"{path}: {member.name} is not a JSON object; pack the data set again")
    return value
