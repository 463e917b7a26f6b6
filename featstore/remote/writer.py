"""A store on S3-compatible storage, written object by object.

The bytes are those of a local store, and so is the order in which they appear. What differs: a
partition is written into a scratch folder first and then put, file by file; and there is no lock
that would keep a second writer out. Two writers of one partition put equal objects, each whole; a
mixture of two that were not equal fails its checksums when it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from featstore.errors import UserError
from featstore.files.durable import write_bytes
from featstore.files.scratch import ScratchFolder
from featstore.format.class_texts import ClassText
from featstore.format.metadata import GROUP_METADATA_LIMIT, StoreMetadata
from featstore.format.schema import PARTITION_ARRAYS, FloatArray
from featstore.remote.contents import (
    ARRAY_NODES,
    CHUNK,
    CLASS_TEXT,
    GROUP,
    is_done,
    metadata_names,
    partition_names,
)
from featstore.remote.objects import ObjectFolder, RemoteObject
from featstore.writing.partition import Partition
from featstore.writing.shard_rows import FeatureRows
from featstore.writing.writer import PartitionWriter, StoreExists, StoreWriter

log = logging.getLogger(__name__)


class RemoteStoreWriter(PartitionWriter):
    """Adds partitions to a store at a URL; what `StoreWriter` is for a folder.

    Make one with `init` (new store) or `open` (existing store). Nothing but partitions is written
    after `init`. Errors of the storage are one-line WorkErrors; what was put stays.
    """

    def __init__(
        self, objects: ObjectFolder, scratch: ScratchFolder, listing: Mapping[str, RemoteObject]
    ) -> None:
        """`scratch` holds the store's metadata in its folder `store`; it is closed with this.

        `listing` says what is there now. It is not asked for again: what other processes write
        meanwhile is theirs, and the next opening sees it.
        """
        self._staging = StoreWriter.open(scratch.path / "store")
        super().__init__(self._staging.path, self._staging.metadata)
        self.url = objects.url
        self._objects = objects
        self._scratch = scratch
        tars = range(self.schema.tars)
        self._done = {tar for tar in tars if is_done(self.metadata, listing, tar)}

    @classmethod
    def init(
        cls,
        url: str,
        metadata: StoreMetadata,
        class_texts: Mapping[str, ClassText],
        feature_scale: FloatArray | None = None,
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
            StoreWriter.init(folder, metadata, class_texts, feature_scale)
            names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            names.remove(GROUP)
            _clear(objects, names)
            for name in sorted(names):
                objects.put(name, folder / name)
            node = (folder / GROUP).read_bytes()
            # An earlier one was put by a worker that began at the same moment, or by a first
            # attempt of ours whose answer was lost: it is equal, as a rule.
            ours = objects.put(GROUP, node, only_new=True)
            if not ours and objects.get_bytes(GROUP, GROUP_METADATA_LIMIT) != node:
                raise StoreExists(f"{url} was made by another process meanwhile: continue it")
            return cls(objects, scratch, {})
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
            for name, limit in metadata_names(objects, listing):
                write_bytes(folder / name, objects.get_bytes(name, limit))
            return cls(objects, scratch, listing)
        except BaseException:
            scratch.close()
            raise

    def done(self, tar: int) -> bool:
        """Whether it was committed, with all its objects, at the opening or was written since.

        Of what was there at the opening, sizes are compared and contents are not read: objects
        appear whole, and readers check them.
        """
        return tar in self._done

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
        names = partition_names(self.schema, tar)
        try:
            self._staging.write_partition(tar, partition)
            self._done.discard(tar)
            for array in ("commit", "features"):
                self._objects.delete(names[array])
            for array in PARTITION_ARRAYS:
                self._objects.put(names[array], self._staging.path / names[array])
            self._done.add(tar)
        finally:
            for name in names.values():
                (self._staging.path / name).unlink(missing_ok=True)

    @contextmanager
    def claim(self, tars: Iterable[int] | None = None) -> Iterator[None]:
        """Does not keep others out, because object storage has no locks; the log says so.

        Two processes that write the same partitions do the work twice, and no harm.
        """
        log.info(
            "%s: nothing keeps another process from doing the same partitions: give each its own "
            "--partition K/N",
            self.url,
        )
        yield

    def close(self) -> None:
        """Remove the scratch folder; happens by itself when the process ends."""
        self._scratch.close()


def _clear(objects: ObjectFolder, kept: Sequence[str]) -> None:
    """Make room for a new store: delete what a killed `init`, or a removed store, left behind.

    What is about to be put anyway, `kept`, stays: another worker may have put it just now.
    StoreExists when there is a store, UserError when there is anything else.
    """
    listing = objects.list()
    if GROUP in listing:
        raise StoreExists(f"{objects.url} exists already: remove it or continue it")
    for name in listing:
        if not (name in ARRAY_NODES or CLASS_TEXT.fullmatch(name) or CHUNK.fullmatch(name)):
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
