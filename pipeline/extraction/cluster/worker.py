"""A worker of a cluster, which runs the ordinary extraction of its machine on shares of the tars.

All arguments and answers can be pickled. Errors are returned as values, because errors raised in
another process would arrive with a traceback.
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
from featstore.opening import AnyWriter
from pipeline.extraction.job import ExtractionJob, code_versions
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, Totals

# The most log records that an answer takes along: the latest ones.
MAX_RECORDS: Final = 100
CLAIM_RETRY_S: Final = 2.0


@dataclass(frozen=True)
class Answer:
    """The result of a call, and what was logged meanwhile."""

    where: str  # host and pid of the worker
    result: Totals | UserError | WorkError
    logged: list[logging.LogRecord]


class TarWorker:
    """Does shares of the tars, one after another."""

    def __init__(
        self, request: ExtractionRequest, versions: Mapping[str, str], claim_wait_s: float
    ) -> None:
        """Load nothing yet, so that the first `do` can return the errors.

        `versions` are the `code_versions` of the process that hands out the tars;
        `claim_wait_s` is how many seconds to wait for a tar that another process holds.
        """
        self._request = request
        self._versions = versions
        self._claim_wait_s = claim_wait_s
        self._where = f"{socket.gethostname()}, pid {os.getpid()}"
        self._started: tuple[ExtractionJob, AnyWriter] | None = None
        self._logged: SimpleQueue[logging.LogRecord] = SimpleQueue()
        # The handler makes records that can be pickled.
        handler = QueueHandler(self._logged)
        for package in ("pipeline", "featstore"):
            logger = logging.getLogger(package)
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)

    def do(self, numbers: Sequence[int]) -> Answer:
        """Encode the tars `numbers` and write their partitions; those that are done are skipped.

        The first call opens the store, loads the encoder and compares the two; without numbers it
        does nothing else. A tar that another process holds is reported like a damaged one.
        """
        result: Totals | UserError | WorkError
        try:
            self._started = self._started or self._start()
            result = self._run(*self._started, numbers)
        except (UserError, WorkError) as error:  # without causes, which may not be picklable
            result = (UserError if isinstance(error, UserError) else WorkError)(str(error))
        except OSError as error:  # a full disk, a folder without permission
            file = f"{error.filename}: " if error.filename else ""
            result = WorkError(
                f"{socket.gethostname()}: {file}{error.strerror or error}: fix this and run the "
                "same command again"
            )
        logged = [self._logged.get() for _ in range(self._logged.qsize())]
        return Answer(self._where, result, logged[-MAX_RECORDS:])

    def _start(self) -> tuple[ExtractionJob, AnyWriter]:
        for package, found in code_versions().items():
            if found != (asked := self._versions.get(package)):
                raise UserError(
                    f"{package} is {found} on a worker ({self._where}) and {asked} where the "
                    "command runs: their features may differ; install the same versions everywhere"
                )
        plan = ExtractionPlan(self._request)
        if plan.writer is None:
            raise WorkError(
                f"{self._request.store_path} cannot be found on {socket.gethostname()}: workers "
                "need the same file system, or a store on S3-compatible storage"
            )
        return ExtractionJob(plan), plan.writer

    def _run(self, job: ExtractionJob, writer: AnyWriter, numbers: Sequence[int]) -> Totals:
        """Claim tars and do them, all at once or else one by one.

        Without a claim, a worker that outlives a killed command could write at the same time as a
        worker of the next command.
        """
        alone = len(numbers) == 1
        until = time.monotonic() + (self._claim_wait_s if alone else 0.0)
        while True:
            with ExitStack() as claim:
                try:
                    claim.enter_context(writer.claim(numbers))
                except WorkError as error:
                    held = str(error)
                else:
                    return job.run(writer, numbers)
            if time.monotonic() >= until:
                break
            time.sleep(CLAIM_RETRY_S)
        if alone:
            return Totals(damaged=[f"{job.plan.tars[numbers[0]].file}: {held}"])
        totals = Totals()
        for number in numbers:  # perhaps another process holds only one of them
            totals.add(self._run(job, writer, [number]))
        return totals
