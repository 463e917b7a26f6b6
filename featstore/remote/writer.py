"""Write a store to S3-compatible storage, object by object.

The bytes and the order in which they appear are the same as in a local store. Two things differ: a
partition is first written into a scratch folder and then put, file by file; and no lock keeps a
second writer out. Two writers of one partition put equal objects, each of them whole; if they are
not equal, a mixture of both fails its checksums when it is read.
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
from featstore.format.schema import FloatArray
from featstore.remote.contents import (
    ARRAY_NODES,
    CHUNK,
    CLASS_TEXT,
    GROUP,
    OPTIONAL,
    is_done,
    metadata_names,
    partition_names,
)
from featstore.remote.objects import ObjectFolder, RemoteObject
from featstore.writing.partition import Partition, SequencePartition
from featstore.writing.shard_rows import FeatureRows
from featstore.writing.writer import PartitionWriter, StoreExists, StoreWriter

log = logging.getLogger(__name__)


class RemoteStoreWriter(PartitionWriter):
    """Adds partitions to a store at a URL, as `StoreWriter` does to a store in a folder.

    Make one with `init` (new store) or `open` (existing store). After `init`, only partitions are
    written. If the storage fails, a one-line WorkError is raised and objects that were put stay.
    """

    def __init__(
        self, objects: ObjectFolder, scratch: ScratchFolder, listing: Mapping[str, RemoteObject]
    ) -> None:
        """`scratch` holds the store's metadata in its folder `store`; `close` closes it, too.

        `listing` holds the objects that exist now. It is not read again: this writer ignores what
        other processes write in the meantime, and only the next opening sees it.
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
        """Make an empty store. Its `zarr.json` is put last, so a store is complete or absent.

        What a killed `init` left is replaced. Two processes that make the same store at the same
        moment both succeed. Arguments and errors as `StoreWriter.init`; also UserError if there
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
            # If there is one already, a worker put it that began at the same moment, or our own
            # first attempt did, and its answer was lost. Usually it is equal.
            ours = objects.put(GROUP, node, only_new=True)
            if not ours and objects.get_bytes(GROUP, GROUP_METADATA_LIMIT) != node:
                raise StoreExists(f"{url} was made by another process just now: continue it")
            return cls(objects, scratch, {})
        except BaseException:
            scratch.close()
            raise

    @classmethod
    def open(cls, url: str) -> RemoteStoreWriter:
        """Open an existing store to add partitions; UserError if it is not a valid store."""
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
        """Return whether the partition was complete at the opening, or was written since.

        At the opening only the sizes of objects are compared. Their contents are not read, because
        objects appear whole and readers check them.
        """
        return tar in self._done

    def feature_rows(self, tar: int) -> FeatureRows:
        """Do the same as `StoreWriter.feature_rows`; needs scratch space for the partition."""
        return self._staging.feature_rows(tar)

    def write_partition(self, tar: int, partition: Partition | SequencePartition) -> None:
        """Write the partition of one tar; it replaces an earlier partition, done or not.

        The order is that of `StoreWriter.write_partition`: if the process is killed at any moment,
        the partition is done and right, or not done. Needs scratch space for one partition.
        Raises ValueError if the partition does not fit the tar, WorkError if the storage fails,
        OSError if the disk is full.
        """
        names = partition_names(self.schema, tar)
        try:
            self._staging.write_partition(tar, partition)
            self._done.discard(tar)
            for array in ("commit", "features"):
                self._objects.delete(names[array])
            for array in self.schema.partition_arrays:
                self._objects.put(names[array], self._staging.path / names[array])
            self._done.add(tar)
        finally:
            for name in names.values():
                (self._staging.path / name).unlink(missing_ok=True)

    @contextmanager
    def claim(self, tars: Iterable[int] | None = None) -> Iterator[None]:
        """Log that this keeps no other process out, because object storage has no locks.

        Two processes that write the same partitions do the work twice, but do no harm.
        """
        log.info(
            "%s: nothing keeps another process from writing the same partitions: give each process "
            "its own --partition K/N",
            self.url,
        )
        yield

    def close(self) -> None:
        """Remove the scratch folder; this also happens when the process ends."""
        self._scratch.close()


def _clear(objects: ObjectFolder, kept: Sequence[str]) -> None:
    """Make room for a new store: delete what a killed `init` or a removed store left behind.

    The objects named in `kept` stay: they will be put anyway, or another worker put them just now.
    Raises StoreExists if there is a store, UserError if there is an object of anything else.
    """
    listing = objects.list()
    if GROUP in listing:
        raise StoreExists(f"{objects.url} exists already: remove it or continue it")
    for name in listing:
        if not (
            name in (*ARRAY_NODES, *OPTIONAL) or CLASS_TEXT.fullmatch(name) or CHUNK.fullmatch(name)
        ):
            raise UserError(
                f"{objects.at(name)} belongs to no store: choose a URL under which there are no "
                "objects yet"
            )
    stale = listing.keys() - set(kept)
    if stale:
        log.info("%s: removing %d objects of an unfinished store", objects.url, len(stale))
    # Delete commit entries first: without them no other object is used.
    for name in sorted(stale, key=lambda name: not name.startswith("commit/")):
        objects.delete(name)
