"""A worker of a cluster: the ordinary extraction of this machine, run over shares of the tars.

Knows nothing of what carries its calls. Everything that goes in and out can be pickled, and what
went wrong is given back as a value: exceptions from afar would arrive with a traceback.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Final

from featstore.errors import UserError, WorkError
from pipeline.extraction.job import ExtractionJob, code_versions
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, Totals

# Log records kept until the next answer takes them.
MAX_RECORDS: Final = 100
CLAIM_RETRY_S: Final = 2.0


@dataclass(frozen=True)
class Answer:
    """What came of a call, and what was logged meanwhile."""

    result: str | Totals | UserError | WorkError
    logged: list[logging.LogRecord]


class TarWorker:
    """Does shares of the tars, one after another."""

    def __init__(self, request: ExtractionRequest, claim_wait_s: float) -> None:
        """Nothing is loaded before `start`, whose errors can be told.

        `claim_wait_s` is how long a worker waits, in seconds, for a tar that another process holds.
        """
        self._request = request
        self._claim_wait_s = claim_wait_s
        self._logged: SimpleQueue[logging.LogRecord] = SimpleQueue()
        # The handler makes records that can be pickled.
        handler = QueueHandler(self._logged)
        for package in ("pipeline", "featstore"):
            logger = logging.getLogger(package)
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)

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
            return self._answer(_told(error))
        return self._answer(here)

    def do(self, numbers: Sequence[int]) -> Answer:
        """Encode the tars `numbers` and write their partitions; those that are done are skipped.

        A tar that another process keeps to itself is named as a damaged one is.
        """
        try:
            return self._answer(self._run(numbers))
        except (UserError, WorkError, OSError) as error:
            return self._answer(_told(error))

    def _run(self, numbers: Sequence[int]) -> Totals:
        with ExitStack() as claim:
            # Held while writing: a worker that outlives a killed command must not write beside one
            # of the next.
            held = self._claim(claim, numbers)
            if held is None:
                return self._job.run(self._writer, numbers)
        if len(numbers) == 1:
            return Totals(damaged=[f"{self._job.plan.tars[numbers[0]].file}: {held}"])
        totals = Totals()
        for number in numbers:  # each alone: perhaps only one of them is held
            totals.add(self._run([number]))
        return totals

    def _claim(self, claim: ExitStack, numbers: Sequence[int]) -> str | None:
        """Claim the partitions, waiting for a single one; returns who holds one of them if not."""
        until = time.monotonic() + (self._claim_wait_s if len(numbers) == 1 else 0.0)
        while True:
            try:
                claim.enter_context(self._writer.claim(numbers))
                return None
            except WorkError as error:
                if time.monotonic() >= until:
                    return str(error)
            time.sleep(CLAIM_RETRY_S)

    def _answer(self, result: str | Totals | UserError | WorkError) -> Answer:
        logged = [self._logged.get() for _ in range(self._logged.qsize())]
        return Answer(result, logged[-MAX_RECORDS:])


def _told(error: UserError | WorkError | OSError) -> UserError | WorkError:
    """The error without its causes, which other processes may not know; a disk's in one line."""
    if isinstance(error, OSError):  # a full disk, a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        return WorkError(
            f"{socket.gethostname()}: {where}{error.strerror or error}: mend it and run the same "
            "command again"
        )
    return UserError(str(error)) if isinstance(error, UserError) else WorkError(str(error))


def _require_versions(versions: Mapping[str, str], here: str) -> None:
    """Raise UserError unless this machine runs the same code."""
    for package, found in code_versions().items():
        if found != versions.get(package):
            raise UserError(
                f"{package} is {found} on a worker ({here}) and {versions.get(package)} where the "
                "command runs: the features would not be of one kind; install the same versions"
            )
