"""Provides tars from this machine, from S3-compatible storage or from a web server.

Tars in storage are fetched whole, one ahead of its use. Videos are read often and at random places
of a tar, so each tar is fetched once into a scratch folder and read there. While one tar is
decoded, the next one is being fetched.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock

from featstore.errors import UserError, WorkError
from featstore.files.disk import has_room
from featstore.files.documents import LISTS_LIMIT
from featstore.files.durable import write_bytes
from featstore.files.scratch import require_room
from featstore.remote.objects import ChangedObject, MissingObject, ObjectFolder, remote_file
from pipeline.tars.dataset import DATASET_FILE, TARS_FOLDER, Dataset, Tar, load_dataset
from pipeline.tars.reading import DamagedTar, damage_of

logger = logging.getLogger(__name__)

# One in use, one being fetched.
TARS_ON_DISK = 2


class TarSource:
    """Provides the tars of a data set as local files; this class uses files that are local anyway.

    The caller first calls `open_order` with the order in which it will read the tars, so that they
    can be fetched ahead, and calls `release` for each tar that it no longer needs.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def open_order(self, tars: Sequence[Tar]) -> None:
        """Set the order in which `path` will be called; nothing has to be fetched here."""

    def path(self, tar: Tar) -> Path:
        """Return the path of the tar's file, which may be missing."""
        return self._dataset.tar_path(tar)

    def release(self, tar: Tar) -> None:
        """Give up a tar that is no longer needed; nothing has to be deleted here."""

    def close(self) -> None:
        """Free all resources; there are none here."""


def remote_dataset(url: str, scratch: Path) -> Dataset:
    """Load the packed data set at `url` (s3://bucket/prefix/datasets/NAME); its tars stay there.

    `dataset.json` is fetched into `scratch`. Raises UserError when it is missing or has a newer
    version, WorkError when it is damaged or the storage fails.
    """
    objects = ObjectFolder(url)
    try:
        content = objects.get_bytes(DATASET_FILE, LISTS_LIMIT)
    except MissingObject:
        raise UserError(
            f"no {DATASET_FILE} at {url}: pack the data set with `mote-cli pack` and copy its "
            f"folder there, {DATASET_FILE} last"
        ) from None
    folder = scratch / "dataset"
    write_bytes(folder / DATASET_FILE, content)
    try:
        dataset = load_dataset(folder)
        for tar in dataset.tars:
            if tar.source:
                index = dataset.index_path(tar)
                name = index.relative_to(folder).as_posix()
                write_bytes(index, objects.get_bytes(name, LISTS_LIMIT))
        return dataset
    except (UserError, WorkError) as error:
        # The damage is at the URL, not in the copy.
        raise type(error)(str(error).replace(str(folder), url)) from error


def _to_copy_again(url: str, what: str) -> DamagedTar:
    return DamagedTar(f"{url} {what}; copy the packed tar there again")


class RemoteTars(TarSource):
    """Provides tars of a data set as local files in `scratch`: those at URLs.

    These are the data set's own tars below `url`, and tars that were taken from URLs. One thread
    fetches in the order given to `open_order`, ahead of `path` as long as fewer than two tars are
    on disk. A tar that `path` is called for is fetched in any case. `release` deletes its file.
    """

    def __init__(self, url: str | None, dataset: Dataset, scratch: Path) -> None:
        """`url` is the data set's own, None for one whose folder is on this machine."""
        super().__init__(dataset)
        self._objects = ObjectFolder(f"{url.rstrip('/')}/{TARS_FOLDER}") if url else None
        self._scratch = scratch / TARS_FOLDER
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch-tars")
        self._lock = Lock()
        self._stop = Event()
        self._waiting: list[Tar] = []  # in order; fetching has not begun
        self._fetches: dict[str, Future[Path]] = {}  # being fetched, or on disk

    def open_order(self, tars: Sequence[Tar]) -> None:
        """Set the order in which the tars will be needed, and begin to fetch."""
        with self._lock:
            self._waiting = [
                tar for tar in tars if self._is_fetched(tar) and tar.file not in self._fetches
            ]
            self._prefetch()

    def path(self, tar: Tar) -> Path:
        """Wait for the tar and return its local file, which stays until `release`.

        Raises DamagedTar, which names the URL, when the tar is missing or is not the packed one;
        raises WorkError when the storage fails or the disk has no room for the tar.
        """
        if not self._is_fetched(tar):
            return super().path(tar)
        with self._lock:
            fetch = self._fetches.get(tar.file)
            # A fetch that failed ahead of time (no room, storage unreachable) may succeed now.
            if fetch is None or (fetch.done() and fetch.exception() is not None):
                fetch = self._begin(tar)
        try:
            return fetch.result()
        except BaseException:
            self.release(tar)
            raise

    def release(self, tar: Tar) -> None:
        """Delete the tar's file, and fetch the next tar if there is one."""
        with self._lock:
            fetch = self._fetches.pop(tar.file, None)
            if fetch is not None and not fetch.cancel():
                path = self._scratch / tar.file
                fetch.add_done_callback(lambda _: path.unlink(missing_ok=True))
            self._prefetch()

    def close(self) -> None:
        """Stop fetching and delete the files on disk."""
        with self._lock:
            self._stop.set()
            self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)
        with self._lock:  # a thread that waited for a tar may release it now
            fetches, self._fetches = self._fetches, {}
        for file in fetches:
            (self._scratch / file).unlink(missing_ok=True)

    def _is_fetched(self, tar: Tar) -> bool:
        return tar.remote if tar.source else self._objects is not None

    def _prefetch(self) -> None:
        """Begin to fetch the next tars if their number and the disk allow; needs the lock."""
        while self._waiting and len(self._fetches) < TARS_ON_DISK:
            if not has_room(self._scratch, self._waiting[0].bytes):
                break  # `path` raises an error if the tar is needed and there is still no room
            self._begin(self._waiting[0])

    def _begin(self, tar: Tar) -> Future[Path]:
        self._waiting = [other for other in self._waiting if other.file != tar.file]
        fetch = self._fetches[tar.file] = self._pool.submit(self._fetch, tar)
        return fetch

    def _object(self, tar: Tar) -> tuple[ObjectFolder, str]:
        if tar.source or self._objects is None:
            return remote_file(tar.source)
        return self._objects, tar.file

    def _fetch(self, tar: Tar) -> Path:
        path, (objects, name) = self._scratch / tar.file, self._object(tar)
        url = objects.at(name)
        damage = damage_of(self._dataset, tar) if tar.source else partial(_to_copy_again, url)
        require_room(self._scratch, tar.bytes, url)
        try:
            objects.download(name, path, tar.bytes, stop=self._stop)
        except MissingObject:
            raise damage("is missing") from None
        except ChangedObject as error:
            raise damage(str(error).removeprefix(f"{url} ")) from None
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != tar.sha256:
            raise damage("is damaged: its sha256 differs from the packed file's")
        logger.debug("fetched %s (%d bytes)", url, tar.bytes)
        return path
