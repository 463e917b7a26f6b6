"""A store on S3-compatible storage: written object by object, read through a mirror on disk.

The bytes are those of a local store, and so is the order in which they appear. What differs: a
partition is written into a scratch folder first and then put, file by file; and there is no lock
that would keep a second writer out. Two writers of one partition put equal objects, each whole; a
mixture of two that were not equal fails its checksums when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final

from featstore.errors import UserError, WorkError
from featstore.files.durable import write_bytes
from featstore.files.locks import one_at_a_time
from featstore.files.scratch import ScratchFolder, cache_folder, require_room
from featstore.format.class_texts import ClassText
from featstore.format.metadata import (
    ARRAY_METADATA_LIMIT,
    GROUP_METADATA_LIMIT,
    StoreMetadata,
    read_metadata,
)
from featstore.format.provenance import Provenance
from featstore.format.schema import (
    CLASS_TEXT_GROUP,
    CRC_BYTES,
    FEATURE_SCALE,
    SMALL_ARRAYS,
    StoreSchema,
)
from featstore.reading.store import Store
from featstore.remote.objects import ChangedObject, MissingObject, ObjectFolder, RemoteObject
from featstore.writing.partition import Partition
from featstore.writing.shard_rows import FeatureRows
from featstore.writing.writer import StoreExists, StoreWriter

log = logging.getLogger(__name__)

_GROUP: Final = "zarr.json"
# In the order in which a partition is put; the commit entry makes it a done one.
_PARTITION_ARRAYS: Final = (*SMALL_ARRAYS, "chunk_checksum", "features", "commit")
_ARRAY_NODES: Final = tuple(f"{name}/{_GROUP}" for name in _PARTITION_ARRAYS)
_SCALE: Final = (f"{FEATURE_SCALE}/zarr.json", f"{FEATURE_SCALE}/c/0")  # of int8 features
_CLASS_TEXT = re.compile(CLASS_TEXT_GROUP + r"/(zarr\.json|[A-Za-z0-9][\w.-]*/(zarr\.json|c/0/0))")
_CHUNK = re.compile(rf"({'|'.join(_PARTITION_ARRAYS)})/c/[0-9/]+")
# Small objects cost a round trip each, whatever the bandwidth.
_FETCHES_AT_ONCE: Final = 8


class RemoteStoreWriter:
    """Adds partitions to a store at a URL; what `StoreWriter` is for a folder.

    Make one with `init` (new store) or `open` (existing store). Nothing but partitions is written
    after `init`. Errors of the storage are one-line WorkErrors; what was put stays.
    """

    def __init__(self, objects: ObjectFolder, scratch: ScratchFolder) -> None:
        """`scratch` holds the store's metadata in its folder `store`; it is closed with this."""
        self.url = objects.url
        self._objects = objects
        self._scratch = scratch
        self._staging = StoreWriter.open(scratch.path / "store")

    @classmethod
    def init(
        cls,
        url: str,
        schema: StoreSchema,
        provenance: Provenance,
        *,
        tars: Sequence[Mapping[str, Any]],
        class_names: Sequence[str],
        raw_class_names: Sequence[str],
        split_names: Sequence[str],
        class_texts: Mapping[str, ClassText],
    ) -> RemoteStoreWriter:
        """Make an empty store; its `zarr.json` is put last, so that it is there whole or not.

        What a killed `init` left is replaced. Two processes that make the same store at the same
        moment both succeed. Arguments and errors as `StoreWriter.init`; also UserError when there
        are objects under the URL that belong to no store.
        """
        objects = ObjectFolder(url)
        scratch = ScratchFolder()
        try:
            folder = scratch.path / "store"
            StoreWriter.init(
                folder,
                schema,
                provenance,
                tars=tars,
                class_names=class_names,
                raw_class_names=raw_class_names,
                split_names=split_names,
                class_texts=class_texts,
            )
            names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            names.remove(_GROUP)
            _clear(objects, names)
            for name in sorted(names):
                objects.put(name, folder / name)
            node = (folder / _GROUP).read_bytes()
            # One that is there was put by a worker that began at the same moment, or by a first
            # attempt of ours whose answer was lost: equal, as a rule.
            ours = objects.put(_GROUP, node, only_new=True)
            if not ours and objects.get_bytes(_GROUP, GROUP_METADATA_LIMIT) != node:
                raise StoreExists(f"{url} was made by another process meanwhile: continue it")
            return cls(objects, scratch)
        except BaseException:
            scratch.close()
            raise

    @classmethod
    def open(cls, url: str) -> RemoteStoreWriter:
        """Open an existing store to add partitions; UserError when it is not a valid store."""
        objects = ObjectFolder(url)
        scratch = ScratchFolder()
        try:
            folder = scratch.path / "store"
            listing = objects.list()
            for name, limit in _metadata_names(objects, listing):
                write_bytes(folder / name, objects.get_bytes(name, limit))
            return cls(objects, scratch)
        except BaseException:
            scratch.close()
            raise

    @classmethod
    def exists(cls, url: str) -> bool:
        """Whether a store is there (a half-made one is not)."""
        return ObjectFolder(url).head(_GROUP) is not None

    @property
    def metadata(self) -> StoreMetadata:
        """Everything the group attributes hold."""
        return self._staging.metadata

    @property
    def schema(self) -> StoreSchema:
        """Sizes of the store."""
        return self._staging.schema

    @property
    def provenance(self) -> Provenance:
        """How the features in it were made."""
        return self._staging.provenance

    @property
    def prompt_sets(self) -> list[str]:
        """Prompt sets whose class texts the store holds."""
        return self._staging.prompt_sets

    def done(self, tar: int) -> bool:
        """Whether it is committed with all its objects; lists the store, as `pending` does."""
        return tar not in self.pending()

    def pending(self) -> list[int]:
        """Numbers of the partitions that are not done, from one listing of all objects.

        Sizes are compared, contents are not read: objects appear whole, and whoever reads them
        checks them.
        """
        listing = self._objects.list()
        return [tar for tar in range(self.schema.tars) if not _done(self.metadata, listing, tar)]

    def feature_rows(self, tar: int) -> FeatureRows:
        """As `StoreWriter.feature_rows`; needs scratch space for the partition."""
        return self._staging.feature_rows(tar)

    def write_partition(self, tar: int, partition: Partition) -> None:
        """Write the partition of one tar, also over an earlier one, done or not.

        Order as in `StoreWriter.write_partition`: a process killed at any moment leaves the
        partition done and right, or not done. Needs scratch space for one partition.
        Raises ValueError when the partition does not fit the tar, WorkError when the storage
        fails, OSError when the disk is full.
        """
        names = _partition_names(self.schema, tar)
        try:
            self._staging.write_partition(tar, partition)
            for array in ("commit", "features"):
                self._objects.delete(names[array])
            for array in _PARTITION_ARRAYS:
                self._objects.put(names[array], self._staging.path / names[array])
        finally:
            for name in names.values():
                (self._staging.path / name).unlink(missing_ok=True)

    @contextmanager
    def claim(self, tars: Iterable[int] | None = None) -> Iterator[None]:
        """Keep nobody out: storage of this kind has no locks. Says so in the log.

        Two processes that write the same partitions do the work twice, and no harm.
        """
        log.info(
            "%s: nothing keeps another process from doing the same partitions: give each its own "
            "--partition K/N",
            self.url,
        )
        yield

    def finalise(self) -> None:
        """Return when every partition is done; WorkError names those that are missing."""
        missing = self.pending()
        if missing:
            shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
            raise WorkError(
                f"{self.url} lacks {len(missing)} of {self.schema.tars} partitions ({shown}): "
                "run the same `mote-cli extract` command again"
            )

    def close(self) -> None:
        """Remove the scratch folder; happens by itself when the process ends."""
        self._scratch.close()


def open_remote(
    url: str, cache: Path | None = None, *, mapped: bool = True, features: bool = True
) -> Store:
    """Fetch what is new of the store at `url` into a mirror on disk and open that, read-only.

    `cache` defaults to MOTE_CACHE or the user's cache folder. Only committed partitions are
    fetched, and only what changed since the last time; several processes may do so at once. The
    store shows the partitions that were committed when it was opened.
    Without `features` a mirror of its own holds everything else, for counts and lists; reading
    features from that raises WorkError.
    Raises UserError when it is no store of this format, WorkError when the storage or the disk
    fails.
    """
    objects = ObjectFolder(url)
    mirror = _Mirror(objects, cache or cache_folder(), features)
    with one_at_a_time(mirror.path.with_name(f"{mirror.path.name}.lock"), f"fetching {url}"):
        mirror.update()
        return Store(mirror.path, mapped=mapped)


class _Mirror:
    """The files of a remote store as far as they were fetched, and a journal of what they are.

    The journal beside the folder has one line per file, [name, size, version]; the last one
    counts. It tells a rewritten object from one that is here: most have the same size.
    """

    def __init__(self, objects: ObjectFolder, cache: Path, features: bool) -> None:
        name = objects.url.rpartition("/")[2].removesuffix(".zarr")
        digest = hashlib.sha256(objects.identity.encode()).hexdigest()[:16]
        kind = "" if features else "-rows"
        self.path = cache / "stores" / f"{name}-{digest}{kind}.zarr"
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
        names = _metadata_names(self._objects, self._listing)
        if self._held.get(_GROUP) != self._listing[_GROUP]:  # made anew: nothing of it holds
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
            files = _partition_names(metadata.schema, tar)
            if not _done(metadata, self._listing, tar):
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
        files = _partition_names(metadata.schema, tar)
        commit = self.path / files["commit"]
        if (
            not commit.exists()
            and self._held.get(files["commit"]) == self._listing[files["commit"]]
        ):
            # It was here and was deleted, as the remedy for damage says: fetch all of it again.
            for name in files.values():
                self._held.pop(name, None)
        commit.unlink(missing_ok=True)
        try:
            for array in _PARTITION_ARRAYS:
                self._fetch(files[array])
        except (ChangedObject, MissingObject):
            commit.unlink(missing_ok=True)
            log.warning(
                "partition %d of %s is being written just now: left out", tar, self._objects.url
            )

    def _fetch(self, name: str) -> None:
        if self._is_current(name):
            return
        found, path = self._listing[name], self.path / name
        if name.startswith("features/c/") and not self._features:
            # As long as it should be, without content: no row of it passes its checksum.
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
                name, size, version = json.loads(line)
            except ValueError:  # the line that a killed process was writing
                continue
            held[str(name)] = RemoteObject(int(size), str(version))
        return held

    def _write_journal(self) -> None:
        kept = {name: held for name, held in self._held.items() if name in self._listing}
        lines = [json.dumps([name, held.size, held.version]) for name, held in kept.items()]
        write_bytes(self._journal, "".join(f"{line}\n" for line in lines).encode())


def _metadata_names(
    objects: ObjectFolder, listing: Mapping[str, RemoteObject]
) -> list[tuple[str, int]]:
    """Names and size limits of everything of a store but its partitions, `zarr.json` first.

    UserError when what is listed is no store, or none that is safe to fetch.
    """
    if _GROUP not in listing:
        state = "it has no zarr.json" if listing else "there are no objects"
        raise UserError(
            f"{objects.url} is not a feature store: {state}; make one with `mote-cli extract`"
        )
    for name in _ARRAY_NODES:
        if name not in listing:
            raise UserError(f"{objects.at(name)} is missing: not a complete feature store")
    texts = [name for name in sorted(listing) if _CLASS_TEXT.fullmatch(name)]
    texts += [name for name in _SCALE if name in listing]
    names = [
        (_GROUP, GROUP_METADATA_LIMIT),
        *((name, ARRAY_METADATA_LIMIT) for name in _ARRAY_NODES),
        # 100,000 classes of 1,024 numbers take 0.4 GB.
        *((n, ARRAY_METADATA_LIMIT if n.endswith(_GROUP) else 2**30) for n in texts),
    ]
    for name, limit in names:
        if listing[name].size > limit:
            raise UserError(
                f"{objects.at(name)} is larger than {limit} bytes: no store of this format needs "
                "that; do not open a store from a source you do not trust"
            )
    return names


def _partition_names(schema: StoreSchema, tar: int) -> dict[str, str]:
    """The objects of one partition by array, in the order in which they are put."""
    specs = schema.arrays()
    return {array: f"{array}/{specs[array].chunk_key(tar)}" for array in _PARTITION_ARRAYS}


def _done(metadata: StoreMetadata, listing: Mapping[str, RemoteObject], tar: int) -> bool:
    """Whether all objects of a partition are listed, with the sizes they must have."""
    schema = metadata.schema
    specs = schema.arrays()
    for array, name in _partition_names(schema, tar).items():
        found, spec = listing.get(name), specs[array]
        if found is None:
            return False
        if array == "features":
            fits = schema.shard_can_have(found.size, metadata.tars[tar].rows)
        elif spec.dtype == "string":  # compressed
            fits = found.size > CRC_BYTES
        else:
            fits = found.size == math.prod(spec.chunks) * spec.numpy_dtype.itemsize + CRC_BYTES
        if not fits:
            log.warning("%s has %d bytes: partition %d is not done", name, found.size, tar)
            return False
    return True


def _clear(objects: ObjectFolder, kept: Sequence[str]) -> None:
    """Make room for a new store: delete what a killed `init`, or a removed store, left behind.

    What is about to be put anyway, `kept`, stays: another worker may have put it just now.
    StoreExists when there is a store, UserError when there is anything else.
    """
    listing = objects.list()
    if _GROUP in listing:
        raise StoreExists(f"{objects.url} exists already: remove it or continue it")
    for name in listing:
        if not (name in _ARRAY_NODES or _CLASS_TEXT.fullmatch(name) or _CHUNK.fullmatch(name)):
            raise UserError(
                f"{objects.at(name)} belongs to no store: choose a URL under which there is "
                "nothing yet"
            )
    stale = listing.keys() - set(kept)
    if stale:
        log.info("%s: removing %d objects of an unfinished store", objects.url, len(stale))
    # Commit entries first: without them nothing else counts.
    for name in sorted(stale, key=lambda name: not name.startswith("commit/")):
        objects.delete(name)
