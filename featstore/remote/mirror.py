"""Read a store at a URL through a mirror on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Final

from featstore.files.documents import parse_json
from featstore.files.durable import write_bytes
from featstore.files.locks import exclusive
from featstore.files.scratch import cache_folder, require_room
from featstore.format.metadata import StoreMetadata, read_metadata
from featstore.format.schema import CLASS_TEXT_GROUP
from featstore.reading.store import Store
from featstore.remote.contents import GROUP, is_done, metadata_names, partition_names
from featstore.remote.objects import ChangedObject, MissingObject, ObjectFolder, RemoteObject

log = logging.getLogger(__name__)

# Each small object costs a round trip, whatever the bandwidth, so several are fetched at once.
_FETCHES_AT_ONCE: Final = 8


def open_remote(url: str, *, mapped: bool = True, features: bool = True) -> Store:
    """Fetch everything new of the store at `url` into a mirror on disk and open that, read-only.

    The mirror lies in MOTE_CACHE or the user's cache folder. Only committed partitions are
    fetched, and only what changed since the last time; several processes may do so at once. The
    store shows the partitions that were committed when it was opened.
    With `features` False, a separate mirror holds everything except features, for counts and
    lists; reading features from that store raises WorkError.
    Raises UserError if it is no store of this format, WorkError if the storage or the disk fails.
    """
    objects = ObjectFolder(url)
    mirror = _Mirror(objects, features)
    lock = mirror.path.with_name(f"{mirror.path.name}.lock")
    with exclusive(lock, f"fetching {url}", wait=True, keep=mirror.path.exists):
        mirror.update()
        return Store(mirror.path, mapped=mapped)


class _Mirror:
    """The fetched files of a remote store, and a journal that records their versions.

    The journal beside the folder has one line per file, [name, size, version]; the last line of a
    file counts. It shows which objects were written again since, as most keep their size.
    """

    def __init__(self, objects: ObjectFolder, features: bool) -> None:
        name = objects.url.rpartition("/")[2].removesuffix(".zarr")
        digest = hashlib.sha256(objects.identity.encode()).hexdigest()[:16]
        kind = "" if features else "-rows"
        self.path = cache_folder() / "stores" / f"{name}-{digest}{kind}.zarr"
        self._features = features
        self._journal = self.path.with_name(f"{self.path.name}.journal")
        self._objects = objects
        self._lock = Lock()
        self._held: dict[str, RemoteObject] = {}
        self._listing: dict[str, RemoteObject] = {}

    def update(self) -> None:
        """Make the folder hold the partitions that are committed now, and no others."""
        self._held = self._read_journal()
        self._listing = self._objects.list()
        names = metadata_names(self._objects, self._listing)
        if self._held.get(GROUP) != self._listing[GROUP]:  # a new store: no old file is valid
            shutil.rmtree(self.path, ignore_errors=True)
            self._held = {}
        for name, _ in names:
            self._fetch(name)
        for path in (self.path / CLASS_TEXT_GROUP).rglob("*"):
            if path.is_file() and str(path.relative_to(self.path)) not in self._listing:
                path.unlink()
        metadata = read_metadata(self.path)
        wanted: list[int] = []
        missing_bytes = 0
        for tar in range(metadata.schema.tars):
            files = partition_names(metadata.schema, tar)
            if not is_done(metadata, self._listing, tar):
                (self.path / files["commit"]).unlink(missing_ok=True)
            elif lacking := [name for name in files.values() if not self._is_current(name)]:
                wanted.append(tar)
                missing_bytes += sum(
                    self._listing[name].size
                    for name in lacking
                    if self._features or not name.startswith("features/")
                )
        if wanted:
            require_room(self.path, missing_bytes, f"what is to be fetched of {self._objects.url}")
            log.info(
                "fetching %d of %d partitions (%.1f MiB) of %s into %s",
                *(len(wanted), metadata.schema.tars, missing_bytes / 2**20),
                *(self._objects.url, self.path),
            )
            with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
                futures = [pool.submit(self._fetch_partition, metadata, tar) for tar in wanted]
                try:
                    for future in futures:
                        future.result()
                finally:
                    pool.shutdown(cancel_futures=True)
        self._write_journal()

    def _fetch_partition(self, metadata: StoreMetadata, tar: int) -> None:
        files = partition_names(metadata.schema, tar)
        commit = self.path / files["commit"]
        if (
            not commit.exists()
            and self._held.get(files["commit"]) == self._listing[files["commit"]]
        ):
            # The user deleted the entry, as the remedy for damage says: fetch all files again.
            for name in files.values():
                self._held.pop(name, None)
        commit.unlink(missing_ok=True)
        try:
            for array in metadata.schema.partition_arrays:
                self._fetch(files[array])
        except (ChangedObject, MissingObject):
            commit.unlink(missing_ok=True)
            log.warning(
                "partition %d of %s is left out: it is being written", tar, self._objects.url
            )

    def _fetch(self, name: str) -> None:
        if self._is_current(name):
            return
        found, path = self._listing[name], self.path / name
        if name.startswith("features/c/") and not self._features:
            # An empty file of the right size, none of whose rows passes its checksum.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.touch()
            os.truncate(path, found.size)
        else:
            self._objects.download(name, path, found.size, found.version)
        with self._lock:
            self._held[name] = found
            with open(self._journal, "a", encoding="utf-8") as journal:
                journal.write(json.dumps([name, found.size, found.version]) + "\n")

    def _is_current(self, name: str) -> bool:
        found = self._listing[name]
        if self._held.get(name) != found:
            return False
        path = self.path / name
        return path.is_file() and path.stat().st_size == found.size

    def _read_journal(self) -> dict[str, RemoteObject]:
        held: dict[str, RemoteObject] = {}
        try:
            lines = self._journal.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return held
        for line in lines:
            try:
                name, size, version = parse_json(line)
            except (ValueError, TypeError):  # a killed process did not finish this line
                continue
            held[str(name)] = RemoteObject(int(size), str(version))
        return held

    def _write_journal(self) -> None:
        kept = {name: held for name, held in self._held.items() if name in self._listing}
        lines = [json.dumps([name, held.size, held.version]) for name, held in kept.items()]
        write_bytes(self._journal, "".join(f"{line}\n" for line in lines).encode())
