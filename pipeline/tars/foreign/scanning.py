"""Reads tars one after another: their samples, which of them give frames, and every hash.

A record of each finished tar is kept, so that an interrupted run continues and a tar is read again
only if it has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import BinaryIO, NamedTuple

from featstore.errors import UserError, WorkError, one_line
from featstore.files.documents import LISTS_LIMIT, found_object
from featstore.files.durable import write_json
from featstore.files.scratch import ScratchFolder, require_room
from featstore.progress import ProgressSink
from featstore.remote.urls import is_url
from pipeline.tars.foreign.samples import FoundSample, UnreadableTar, find_samples
from pipeline.tars.probing import in_order, probe

Asked = tuple[str, str]
"""The class field and the cells that samples are read with (`find_samples`)."""


class State(NamedTuple):
    """What shows that a tar has changed: its size in bytes, and its time or entity tag."""

    bytes: int
    version: str


@dataclass(frozen=True)
class FoundTar:
    """The record of a tar. `class_field` and `cells` are what it was asked for, as `find_samples`.

    The rest as `FoundSamples`.
    """

    source: str
    class_field: str
    bytes: int
    version: str
    sha256: str
    problem: str
    passed_over: list[str]
    fields: dict[str, int]
    samples: list[FoundSample]
    cells: str = ""

    def write(self, path: Path) -> None:
        """Write the record, complete or not at all."""
        write_json(path, asdict(self), indent=None)


def read_record(path: Path, source: str, asked: Asked, state: State) -> FoundTar | None:
    """Return the record of a tar, or None if there is none of the tar as it is now."""
    value = found_object(path, LISTS_LIMIT)
    if value is None:
        return None
    try:
        samples = [FoundSample(**sample) for sample in value.pop("samples")]
        found = FoundTar(**value, samples=samples)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    same = (found.source, found.class_field, found.cells, found.bytes, found.version)
    return found if same == (source, *asked, *state) else None


def scanned(
    sources: Sequence[str], folder: Path, asked: Asked, workers: int, progress: ProgressSink
) -> Iterator[FoundTar | str]:
    """Yield what every tar holds, in order, or why it cannot be read; keep records in `folder`.

    `asked` are the class field and the cells of `find_samples`.

    Tars at URLs are fetched whole, one ahead. Memory holds the bytes of `workers` + 1 videos.
    Raises WorkError if the storage fails or the disk has no room, and if a tar changes meanwhile.
    """
    remote = any(map(is_url, sources))
    stop = Event()
    with ExitStack() as stack:
        scratch = stack.enter_context(ScratchFolder()) if remote else folder
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="probe"))
        fetching = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="fetch-tars"))
        stack.callback(stop.set)  # comes first: nobody waits for a transfer that is not needed
        prepare = partial(_prepared, folder, asked, scratch, stop)
        videos = failed = 0
        progress(0, len(sources), videos=videos, failed=failed)
        # Two at a time: one that is read, and the next one, which is being fetched.
        prepared = in_order(fetching, prepare, list(enumerate(sources)), window=2)
        for number, (source, ready) in enumerate(zip(sources, prepared, strict=True)):
            found = ready
            if isinstance(ready, _Tar):
                try:
                    found = _scan(ready, source, asked, pool, workers)
                    found.write(record_file(folder, source))
                except UnreadableTar as error:
                    found = f"{source} {error}"
                finally:
                    if is_url(source):
                        ready.path.unlink(missing_ok=True)
            if isinstance(found, FoundTar):
                videos += len(found.samples)
                failed += sum(bool(sample.reason) for sample in found.samples)
            progress(number + 1, len(sources), videos=videos, failed=failed)
            assert not isinstance(found, _Tar)
            yield found


class _Tar(NamedTuple):
    """A tar that is to be read: its file on this machine, and its state."""

    path: Path
    state: State


def record_file(folder: Path, source: str) -> Path:
    """Return where the record of a tar is kept between runs."""
    name = hashlib.blake2b(source.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return folder / f"{name}.json"


def _prepared(
    folder: Path, asked: Asked, scratch: Path, stop: Event, numbered: tuple[int, str]
) -> FoundTar | _Tar | str:
    """Return the kept record of a tar, else the tar on this machine, or why it cannot be used."""
    number, source = numbered
    kept = record_file(folder, source)
    if not is_url(source):
        try:
            state = _state(os.stat(source))
        except OSError as error:
            return f"{source} cannot be read ({error.strerror})"
        return read_record(kept, source, asked, state) or _Tar(Path(source), state)
    from featstore.remote.objects import MissingObject, remote_file

    objects, name = remote_file(source)
    try:
        there = objects.head(name)
        state = State(there.size, there.version)
        if found := read_record(kept, source, asked, state):
            return found
        require_room(scratch, there.size, source)
        path = scratch / f"{number}.tar"
        objects.download(name, path, there.size, there.version, stop=stop)
    except MissingObject as error:
        return str(error)
    return _Tar(path, state)


def _scan(tar: _Tar, source: str, asked: Asked, pool: ThreadPoolExecutor, workers: int) -> FoundTar:
    try:
        with open(tar.path, "rb") as file:
            found = find_samples(file, *asked)
            usable = [sample for sample in found.samples if not sample.reason]
            for _ in in_order(pool, partial(_probe, file, source), usable, workers + 1):
                pass
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            now = _state(os.fstat(file.fileno()))
    except OSError as error:
        raise UnreadableTar(f"cannot be read ({error.strerror or one_line(error)})") from error
    if now != tar.state and not is_url(source):
        raise WorkError(
            f"{source} changed while it was read: wait until it is complete and run the same "
            "command again"
        )
    return FoundTar(
        source=source,
        class_field=asked[0],
        cells=asked[1],
        bytes=tar.state.bytes,
        version=tar.state.version,
        sha256=sha256,
        problem=found.problem,
        passed_over=found.passed_over,
        fields=found.fields,
        samples=found.samples,
    )


def _probe(file: BinaryIO, source: str, sample: FoundSample) -> None:
    """Fill in the hash and the facts of a sample's video, or the reason why it cannot be used."""
    data = os.pread(file.fileno(), sample.size, sample.offset)
    while len(data) < sample.size:  # one read gives at most 2 GiB
        more = os.pread(file.fileno(), sample.size - len(data), sample.offset + len(data))
        if not more:
            raise UserError(f"{source} became shorter while it was read: run the command again")
        data += more
    sample.sha256 = hashlib.sha256(data).hexdigest()
    sample.facts, sample.reason = probe(data, f"{source}: {sample.member}")


def _state(status: os.stat_result) -> State:
    return State(status.st_size, str(status.st_mtime_ns))
