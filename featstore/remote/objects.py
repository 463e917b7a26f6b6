"""Read and write objects on S3-compatible storage, and repeat requests that fail.

This is the only module that uses obstore. Credentials come from the environment alone (the
variables of AWS, Google Cloud and Azure); a URL or an argument never holds one, and no message
repeats one.

Such storage has no folders, no locks and no renames, but an object that is put under a name appears
there whole or not at all. For a few seconds, obstore itself repeats requests that fail on the way
(connection refused or lost, 5xx, time-outs) and resumes bodies that end early; after that, this
module begins the request again.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, TypeVar

from featstore.errors import UserError, WorkError, one_line
from featstore.files.durable import PARTIAL_SUFFIX
from featstore.remote.urls import (
    check_name,
    parsed,
    parsed_file,
    patience_seconds,
    require_credentials,
    s3_endpoint,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore, S3Config

log = logging.getLogger(__name__)

# For how many seconds obstore repeats a request by itself; meanwhile Ctrl-C has no effect.
_UNINTERRUPTED: Final = 3.0
_LONGEST_PAUSE: Final = 10.0
# This limits the time without any data, not the transfer: a tar of many gigabytes may take hours.
_SILENCE: Final = timedelta(seconds=60)
_CONNECT: Final = timedelta(seconds=10)
_TRANSFER: Final = timedelta(hours=24)
# Larger files are sent in parts of this size, because `_SILENCE` also limits the time to send a
# request. The object appears when its last part has arrived.
_PART_BYTES: Final = 16 * 2**20
_PARTS_AT_ONCE: Final = 4
_BLOCK_BYTES: Final = 2**20

_SECRET_VARIABLE = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS", re.IGNORECASE)
_CLOUD_VARIABLE = re.compile(r"AWS_|AZURE_|GOOGLE_", re.IGNORECASE)
_DENIED_CODES: Final = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
)

# What `_reason` returns for failures that may pass by themselves, with or without a code.
_PASSING = re.compile(
    r"no connection|no answer in time|the connection broke|408|429|5\d\d"
    r"|InternalError|ServiceUnavailable|SlowDown|RequestTimeout|OperationAborted|Throttl"
)

_NEVER: Final = Event()  # is never set

T = TypeVar("T")


class MissingObject(WorkError):
    """There is no object of that name."""


class UnreachableObject(WorkError):
    """Requests for an object failed for as long as they are repeated."""


class ChangedObject(WorkError):
    """An object's size or version changed since it was listed or since its transfer began."""


class _BrokenOff(Exception):
    """A transfer ended before the whole object was received."""


@dataclass(frozen=True)
class RemoteObject:
    """An object as a listing describes it.

    `size` is in bytes; `version` changes with the content (it is the entity tag, or the time of
    change if the storage gives no tag).
    """

    size: int
    version: str


class ObjectFolder:
    """All objects under one URL, `s3://bucket/prefix` (also gs:// and az://; `remote_file` also
    gives files on a web server, which are only read); safe to share between threads.

    Names are relative to the URL, with "/" between their parts. Every error is one line: UserError
    for a URL, a name or an environment that cannot be used; WorkError for a request that failed,
    with the object's URL and the remedy.
    """

    def __init__(self, url: str) -> None:
        """Prepare the connection; no request is sent yet."""
        self._begin(*parsed(url))

    def _begin(self, scheme: str, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix
        self.url = "/".join(filter(None, (f"{scheme}://{bucket}", prefix)))
        self.patience = patience_seconds()
        self._store = _connect(scheme, bucket, self.patience)

    @property
    def identity(self) -> str:
        """A text that differs for the same URL on another server; it holds nothing secret."""
        return f"{s3_endpoint()} {self.url}" if self.url.startswith("s3:") else self.url

    def at(self, name: str) -> str:
        """Return the URL of an object, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def get_bytes(self, name: str, limit: int) -> bytes:
        """Return the content of an object of at most `limit` bytes.

        Raises MissingObject if there is none, WorkError if it is larger.
        """

        def content() -> bytes:
            answer = self._store.get(self._key(name))
            size = int(answer.meta["size"])
            if size > limit:
                raise WorkError(
                    f"{self.at(name)} has {size} bytes, but may have at most {limit}: "
                    "check what was put under this name"
                )
            return bytes(answer.bytes())

        return self._ask(name, content)

    def get_range(self, name: str, start: int, length: int, size: int) -> bytes:
        """Return `length` bytes of an object from byte `start` on; the object has `size` bytes.

        Raises MissingObject if there is none, ChangedObject if it has another size.
        """

        def content() -> bytes:
            key = self._key(name)
            answer = self._store.get(key, options={"range": (start, start + length)})
            if int(answer.meta["size"]) != size:
                raise ChangedObject(f"it has {answer.meta['size']} bytes, not {size}")
            return bytes(answer.bytes())

        return self._ask(name, content)

    def head(self, name: str) -> RemoteObject:
        """Return size and version of an object. Raises MissingObject if there is none."""
        meta = self._ask(name, lambda: self._store.head(self._key(name)))
        return RemoteObject(int(meta["size"]), _version(meta))

    def download(
        self,
        name: str,
        path: Path,
        size: int | None = None,
        version: str | None = None,
        *,
        stop: Event = _NEVER,
    ) -> None:
        """Write an object's bytes to `path`, which appears complete or not at all.

        Once `stop` is set, a transfer ends with a WorkError.
        A transfer that breaks off begins again, so that the bytes of two versions never mix.
        Raises MissingObject if there is none, ChangedObject if it does not have the expected
        `size` or `version`, OSError if the disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")

        def attempt() -> None:
            with open(unfinished, "wb") as file:
                self._receive(name, file, size, version, stop)

        try:
            self._ask(name, attempt, stop)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def put(self, name: str, source: bytes | Path, *, only_new: bool = False) -> bool:
        """Put bytes or a file as one object, whole or not at all; replace an earlier one.

        With `only_new`, an object that is there already stays and False is returned. This call may
        have put that object itself, if the answer to its first attempt was lost.
        """
        from obstore.exceptions import AlreadyExistsError

        key = self._key(name)
        mode: Literal["create", "overwrite"] = "create" if only_new else "overwrite"
        put = partial(self._store.put, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
        try:
            self._ask(name, lambda: put(key, source, mode=mode))
        except AlreadyExistsError:
            return False
        return True

    def list(self) -> dict[str, RemoteObject]:
        """Return every object by its name; empty if there is none."""
        start = len(self._prefix) + 1 if self._prefix else 0
        listed = self._ask("", lambda: self._store.list(self._prefix or None).collect())
        return {
            meta["path"][start:]: RemoteObject(int(meta["size"]), _version(meta)) for meta in listed
        }

    def delete(self, name: str) -> None:
        """Delete an object; nothing happens if there is none."""
        key = self._key(name)
        with suppress(MissingObject):  # S3 reports no error for a missing object, others do
            self._ask(name, lambda: self._store.delete(key))

    def _key(self, name: str) -> str:
        check_name(name, "object name")
        return f"{self._prefix}/{name}" if self._prefix else name

    def _receive(
        self, name: str, file: BinaryIO, size: int | None, version: str | None, stop: Event
    ) -> None:
        """Try once, for `_ask`, to write the object's bytes to `file`; errors as `download`."""
        from obstore.exceptions import BaseError, PreconditionError

        answer = self._store.get(self._key(name))
        found, problem = int(answer.meta["size"]), "the connection was closed"
        if version is not None and _version(answer.meta) != version:
            raise self._changed(name)
        if size is not None and found != size:
            raise ChangedObject(f"{self.at(name)} has {found} bytes, not {size}")
        try:
            for block in answer.stream(min_chunk_size=_BLOCK_BYTES):
                self._go_on(name, stop)
                file.write(block)
        except PreconditionError:
            raise self._changed(name) from None
        except BaseError as error:
            problem = _reason(error)
        if file.tell() < found:
            raise _BrokenOff(f"it breaks off after {file.tell()} of {found} bytes: {problem}")

    def _changed(self, name: str) -> ChangedObject:
        return ChangedObject(
            f"{self.at(name)} was changed while it was read: run the same command again"
        )

    def _ask(self, name: str, request: Callable[[], T], stop: Event = _NEVER) -> T:
        """Return the answer to a call of obstore; repeat the call while it fails on the way.

        obstore also repeats requests, but ignores Ctrl-C meanwhile, so it gets only a few seconds
        at a time. `patience` counts from the first failure. AlreadyExistsError is not handled.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError

        deadline, pause = 0.0, 0.1
        while True:
            try:
                return request()
            except AlreadyExistsError:
                raise
            except (BaseError, ValueError, FileNotFoundError, _BrokenOff) as error:
                final, reason = self._final(error, name), _reason(error)
            # Raised outside of `except`: the text of obstore's error may hold an access key.
            if final is not None:
                raise final
            if not deadline:
                deadline = time.monotonic() + self.patience
                log.warning(
                    "%s: %s; trying again for up to %g s", self.at(name), reason, self.patience
                )
            if time.monotonic() > deadline:
                raise UnreachableObject(
                    f"{self.at(name)} cannot be reached ({reason}; tried for {self.patience:g} s): "
                    "check the network and, for s3, AWS_ENDPOINT_URL and AWS_REGION, then run the "
                    "same command again"
                )
            # The pause gets longer each time, and is never the same for two clients.
            pause = min(_LONGEST_PAUSE, 2 * pause)
            self._go_on(name, stop, random.uniform(0.5, 1) * pause)

    def _go_on(self, name: str, stop: Event, after: float = 0.0) -> None:
        """Wait for `after` seconds; raise WorkError as soon as `stop` is set."""
        if stop.wait(after):
            raise WorkError(f"{self.at(name)} was not fetched: the work was stopped")

    def _final(self, error: BaseException, name: str) -> WorkError | None:
        """Return the error to raise if repeating does not help; None if the failure may pass."""
        from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

        if isinstance(error, _BrokenOff):
            return None
        code, reason = _code(error), _reason(error)
        if code == "NoSuchBucket":
            return WorkError(
                f"there is no bucket {self._bucket!r} for {self.url}: make it, or check the URL "
                "and AWS_ENDPOINT_URL"
            )
        if isinstance(error, FileNotFoundError):
            return MissingObject(f"{self.at(name)} does not exist")
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError)
        if denied or code in _DENIED_CODES or reason[:3] in ("401", "403"):
            return WorkError(
                f"access to {self.at(name)} is denied ({code or reason}): check the credentials in "
                "the environment (for s3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_SESSION_TOKEN) and their permissions"
            )
        if isinstance(error, GenericError) and _PASSING.match(reason):
            return None
        return WorkError(
            f"{self.at(name)} cannot be used ({reason}): check the URL and, for s3, "
            "AWS_ENDPOINT_URL and AWS_REGION"
        )


class _WebFolder(ObjectFolder):
    """A folder of a web server, whose files are only read: it has no listing."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        host, _, prefix = rest.partition("/")
        self._begin(scheme, host, prefix)


def remote_file(url: str) -> tuple[ObjectFolder, str]:
    """Return the folder and the name of one file: s3://BUCKET/NAME, http(s)://HOST/NAME.

    UserError for any other URL, and for one that holds a credential.
    """
    folder, name = parsed_file(url)
    return folder_at(folder), name


def folder_at(url: str) -> ObjectFolder:
    """Return a folder of storage or of a web server, as `parsed_file` gives its URL."""
    return (_WebFolder if url.startswith("http") else ObjectFolder)(url)


def _connect(scheme: str, bucket: str, patience: float) -> ObjectStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ModuleNotFoundError as error:
        raise UserError(
            f"{scheme}:// URLs need the extra `cloud`: pip install 'mote-video[cloud]'"
        ) from error
    if scheme == "s3":
        require_credentials()
    # Delete objects one at a time, because not every server can delete many at once.
    config: S3Config | None = {"disable_bulk_delete": True} if scheme == "s3" else None
    try:
        return from_url(
            f"{scheme}://{bucket}",
            config=config,
            client_options={
                "allow_http": scheme == "http"
                or (scheme == "s3" and s3_endpoint().startswith("http://")),
                "connect_timeout": _CONNECT,
                "read_timeout": _SILENCE,
                "timeout": _TRANSFER,
            },
            retry_config={
                "retry_timeout": timedelta(seconds=min(patience, _UNINTERRUPTED)),
                "backoff": {"max_backoff": timedelta(seconds=1)},
            },
        )
    except (BaseError, ValueError) as error:
        raise UserError(
            f"{scheme}://{bucket} cannot be used ({_reason(error)}): check the environment"
        ) from None


def _version(meta: ObjectMeta) -> str:
    tag = meta["e_tag"]
    return tag.strip('"') if tag else meta["last_modified"].isoformat()


def _code(error: BaseException) -> str:
    """Return the error code in S3's answer, "" if there is none."""
    found = re.search(r"<Code>(\w{1,60})</Code>", str(error))
    return found[1] if found else ""


def _reason(error: BaseException) -> str:
    """Say in a few words why a request failed, without addresses and without secrets."""
    text = str(error)
    if code := _code(error):
        return code
    if status := re.search(r"status code: (\d{3} [A-Za-z ]+)", text):
        return status[1].strip()
    if re.search(r"kind: Connect|[Cc]onnection refused", text):
        return "no connection"
    if re.search(r"kind: Timeout|timed out", text):
        return "no answer in time"
    if "HTTP error" in text or "error sending request" in text:
        return "the connection broke"
    text = text.partition("\n")[0]
    for name, value in os.environ.items():
        if value and _CLOUD_VARIABLE.match(name) and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return one_line(re.sub(r"https?://\S+", "the server", text), 160)
