"""A worker of a cluster: the ordinary extraction of this machine, run over shares of the tars.

Knows nothing of what carries its calls. Everything that goes in and out can be pickled, and what
went wrong is given back as a value: exceptions from afar would arrive with a traceback.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from featstore.errors import UserError, WorkError
from pipeline.extraction.job import ExtractionJob, code_versions
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, Totals

# Notices kept until the next answer takes them.
MAX_NOTICES: Final = 100


@dataclass(frozen=True)
class Failure:
    """Why nothing came of a call, as a value. It ends the whole work unless `claimed`."""

    message: str
    users_fault: bool = False  # `UserError`, else `WorkError`
    claimed: bool = False  # another process is writing one of the partitions

    @classmethod
    def of(cls, error: UserError | WorkError | OSError) -> Failure:
        """The value for an error of this process."""
        if isinstance(error, OSError):  # a full disk, a folder without permission
            where = f"{error.filename}: " if error.filename else ""
            message = f"{socket.gethostname()}: {where}{error.strerror or error}: mend it and run "
            return cls(f"{message}the same command again")
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
class Answer:
    """What came of a call, and what was logged meanwhile."""

    result: str | Totals | Failure
    notices: list[Notice]


class TarWorker:
    """Does shares of the tars, one after another."""

    def __init__(self, request: ExtractionRequest) -> None:
        """Nothing is loaded before `start`, whose errors can be told."""
        self._request = request
        self._notices = _KeptNotices()

    def start(self, versions: Mapping[str, str]) -> Answer:
        """Open the store, load the encoder and compare the two; "HOST, pid PID" when all is well.

        `versions` are those of the process that hands out the tars (`code_versions`).
        """
        here = f"{socket.gethostname()}, pid {os.getpid()}"
        try:
            _require_versions(versions, here)
            plan = ExtractionPlan(self._request)
            if plan.writer is None:
                raise WorkError(
                    f"{self._request.store_path} is not seen from {socket.gethostname()}: workers "
                    "need the same file system, or a store on S3-compatible storage"
                )
            self._writer = plan.writer
            self._job = ExtractionJob(plan)
        except (UserError, WorkError, OSError) as error:
            return Answer(Failure.of(error), self._notices.take())
        return Answer(here, self._notices.take())

    def do(self, numbers: Sequence[int]) -> Answer:
        """Encode the tars `numbers` and write their partitions; those that are done are skipped."""
        return Answer(self._done(numbers), self._notices.take())

    def _done(self, numbers: Sequence[int]) -> Totals | Failure:
        with ExitStack() as claim:
            try:
                # Held while writing: a worker that outlives a killed command must not write
                # beside one of the next.
                claim.enter_context(self._writer.claim(numbers))
            except WorkError as error:
                return Failure(str(error), claimed=True)
            try:
                return self._job.run(self._writer, numbers)
            except (UserError, WorkError, OSError) as error:
                return Failure.of(error)


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
