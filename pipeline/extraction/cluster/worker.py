"""A worker of a cluster: one encoder and one pool for all the tars that are handed to it.

Knows nothing of what carries its calls. Everything that goes in and out can be pickled, and what
went wrong is given back as a value: exceptions from afar would arrive with a traceback.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Final

from featstore.errors import UserError, WorkError
from featstore.opening import AnyWriter, writer_of
from pipeline.extraction.cpu_pool import VideoPool
from pipeline.extraction.engine import Totals, run_partitions
from pipeline.extraction.plan import ExtractionPlan, ExtractionRequest
from pipeline.extraction.pool_choice import decoder_for, open_pool
from pipeline.extraction.rows import EncodedVideo
from pipeline.extraction.store import (
    code_versions,
    load_request_encoder,
    provenance_of,
    require_same,
)

# Tars that a worker has at a time: while the last videos of one are encoded, those of the next
# are already in the pool.
TARS_IN_HAND: Final = 2
# Notices kept until the next report takes them.
MAX_NOTICES: Final = 100


@dataclass(frozen=True)
class Failure:
    """An error that ends the whole work, as a value."""

    message: str
    users_fault: bool  # `UserError`, else `WorkError`

    @classmethod
    def of(cls, error: UserError | WorkError | OSError) -> Failure:
        """The value for an error of this process."""
        if isinstance(error, OSError):  # a full disk, a folder without permission
            where = f"{error.filename}: " if error.filename else ""
            message = f"{socket.gethostname()}: {where}{error.strerror or error}: mend it and run "
            return cls(f"{message}the same command again", users_fault=False)
        return cls(str(error), isinstance(error, UserError))

    def error(self) -> UserError | WorkError:
        """The error to raise."""
        return UserError(self.message) if self.users_fault else WorkError(self.message)


@dataclass(frozen=True)
class Notice:
    """A line for the log of the command that the user runs."""

    logger: str
    level: int
    message: str


@dataclass(frozen=True)
class Report:
    """Videos done of each tar in hand, and the notices since the last report."""

    videos: dict[int, int]
    notices: list[Notice]


@dataclass(frozen=True)
class Outcome:
    """What came of one tar: totals (of nothing when it was done before), or why there are none."""

    tar: int
    totals: Totals = field(default_factory=Totals)
    claimed: str = ""  # another process is writing this partition, in one line
    failure: Failure | None = None


class TarWorker:
    """Does tars, `TARS_IN_HAND` at a time; calls may come from several threads."""

    def __init__(self, request: ExtractionRequest, threads: int) -> None:
        """Nothing is loaded before `start`, whose errors can be told."""
        self._request = request
        self._threads = threads
        self._videos: dict[int, int] = {}
        self._turn = Lock()
        self._notices = _KeptNotices()

    def start(self, versions: Mapping[str, str]) -> str | Failure:
        """Load the encoder and hold it against the store; returns "HOST, pid PID".

        `versions` are those of the process that hands out the tars (`code_versions`).
        """
        here = f"{socket.gethostname()}, pid {os.getpid()}"
        try:
            _require_versions(versions, here)
            self._plan = ExtractionPlan(self._request)
            writer = self._writer()
            name = decoder_for(self._request, writer.provenance.decoder)
            encoder = load_request_encoder(self._plan)
            require_same(self._plan, writer, provenance_of(self._plan, encoder, name))
            self._pool = open_pool(replace(self._request, workers=self._threads), name, encoder)
        except (UserError, WorkError, OSError) as error:
            return Failure.of(error)
        return here

    def do(self, tar: int) -> Outcome:
        """Encode one tar and write its partition."""
        request, plan = self._request, self._plan
        samples = plan.shards[tar].samples
        self._videos[tar] = 0

        def count(done: float, total: float, **_: float | int | str) -> None:
            self._videos[tar] = int(done)

        turn = _Turn(self._pool, self._turn, samples)
        with ExitStack() as resources:
            resources.callback(self._videos.pop, tar)
            resources.callback(turn.end)
            try:
                writer = self._writer()
            except (UserError, WorkError, OSError) as error:
                return Outcome(tar, failure=Failure.of(error))
            try:
                # Held while writing: a worker that outlives a killed command must not write
                # beside one of the next.
                resources.enter_context(writer.claim([tar]))
            except WorkError as error:
                return Outcome(tar, claimed=str(error))
            try:
                if writer.done(tar) and not request.retry_failed:
                    return Outcome(tar)
                source = plan.tar_source()
                resources.callback(source.close)
                source.open_order([plan.shards[tar]])
                totals = run_partitions(
                    plan.dataset, plan.shards, [tar], writer, turn, source, count, samples
                )
            except (UserError, WorkError, OSError) as error:
                return Outcome(tar, failure=Failure.of(error))
        return Outcome(tar, totals)

    def _writer(self) -> AnyWriter:
        """A writer of its own for every tar: they are done at the same time."""
        writer = writer_of(self._request.store_path)
        if writer is None:
            raise WorkError(
                f"{self._request.store_path} is not seen from {socket.gethostname()}: workers need "
                "the same file system, or a store on S3-compatible storage"
            )
        return writer

    def report(self) -> Report:
        """How far the tars in hand are."""
        return Report(dict(self._videos), self._notices.take())


class _Turn:
    """The pool as one tar sees it: its videos go in together, before or after another tar's.

    Taking videos of two tars by turns, a pool would run dry when both come to their end.
    """

    def __init__(self, pool: VideoPool, turn: Lock, samples: int) -> None:
        self.window = pool.window
        self._pool = pool
        self._turn = turn
        self._mine = False
        self._left = samples
        self._futures: list[Future[EncodedVideo | str]] = []

    def submit(self, read: Callable[[], bytes]) -> Future[EncodedVideo | str]:
        """See `VideoPool.submit`; waits until it is this tar's turn."""
        if not self._mine:
            self._turn.acquire()
            self._mine = True
        future = self._pool.submit(read)
        self._futures = [f for f in self._futures if not f.done()] + [future]
        self._left -= 1
        if self._left == 0:
            self.end()
        return future

    def end(self) -> None:
        """Let the next tar's videos in."""
        if self._mine:
            self._mine = False
            self._turn.release()

    def close(self) -> None:
        """Drop this tar's videos; the pool stays as it is."""
        for future in self._futures:
            future.cancel()
        wait(self._futures)


class _KeptNotices(logging.Handler):
    """Keeps what the packages log until somebody takes it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: deque[Notice] = deque(maxlen=MAX_NOTICES)
        for package in ("pipeline", "featstore"):
            logger = logging.getLogger(package)
            logger.addHandler(self)
            logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(Notice(record.name, record.levelno, record.getMessage()))

    def take(self) -> list[Notice]:
        return [self._kept.popleft() for _ in range(len(self._kept))]


def _require_versions(versions: Mapping[str, str], here: str) -> None:
    """Raise UserError unless this machine runs the same code."""
    for package, found in code_versions().items():
        if found != versions.get(package):
            raise UserError(
                f"{package} is {found} on a worker ({here}) and {versions.get(package)} where the "
                "command runs: the features would not be of one kind; install the same versions"
            )
