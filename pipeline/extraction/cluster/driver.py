"""Extraction on a Ray cluster: workers do shares of the tars; others take over from dead workers.

Workers write their own partitions, so this process handles only numbers. The store is the same that
a single process would write, because a partition depends only on its tar and the encoder.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from featstore.errors import WorkError, one_line
from featstore.opening import AnyWriter
from featstore.progress import ProgressSink, no_progress
from pipeline.encoders.specs import lasting_spec
from pipeline.extraction.cluster.connection import Cluster, connected
from pipeline.extraction.cluster.worker import Answer, TarWorker
from pipeline.extraction.job import code_versions
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, Totals

logger = logging.getLogger(__name__)

# The most tars in a share. A worker waits for the last video of a share before it begins the next
# one, and reports then. The last shares are smaller, so that all workers end at about one time.
SHARE_TARS: Final = 4
# How many more workers may try a tar after one died while doing it.
RETRIES: Final = 3
# A worker of a killed command may live for some seconds and hold a partition meanwhile.
CLAIM_WAIT_S: Final = 120.0
# How many workers may die before they have done anything; one more ends the run.
FAILED_STARTS: Final = 3
SHOWN_S: Final = 0.5
NOTHING_STARTS_S: Final = 30.0


def run_on_ray(
    plan: ExtractionPlan,
    writer: AnyWriter,
    cluster: Cluster,
    progress: ProgressSink = no_progress,
) -> Totals:
    """Do the pending partitions of a store that exists; damaged tars do not stop the others.

    The paths of the plan's request must be right on every machine; workers use the store's
    precision. A tar that no worker survived, or that another process holds, gets a line in the
    totals like a damaged tar.

    Raises UserError if the cluster cannot be reached or the workers cannot do the request,
    WorkError if their work fails, also when their disk is the reason.
    """
    if not plan.pending:
        return Totals()
    with connected(cluster) as ray:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return _Crew(ray, plan, writer, cluster.sized(machines)).run(progress)


def _for_workers(plan: ExtractionPlan, writer: AnyWriter, cluster: Cluster) -> ExtractionRequest:
    """Return the plan's request in a form that is valid in every working folder."""
    request, folder = plan.request, plan.request.encoders_dir
    dataset, store = (
        place.absolute() if isinstance(place, Path) else place
        for place in (request.dataset_dir, request.store_path)
    )
    return replace(
        request,
        dataset_dir=dataset,
        store_path=store,
        encoder=lasting_spec(request.encoder, folder),
        encoders_dir=folder and folder.absolute(),
        device=cluster.device,
        precision=writer.provenance.precision,
        workers=request.workers or cluster.cpus_per_worker,
        share=None,  # workers get the numbers of their tars
    )


@dataclass(eq=False)
class _Worker:
    actor: Any
    call: Any  # Ray's reference to the call that runs; None while there is none
    where: str = ""  # host and pid, once it has started
    tars: Sequence[int] = ()  # numbers of the tars that it is doing


@dataclass(eq=False)
class _Crew:
    """The workers of one run, and the shares that they do."""

    ray: Any
    plan: ExtractionPlan
    writer: AnyWriter
    cluster: Cluster  # how many workers there are, and what each of them takes

    def __post_init__(self) -> None:
        plan, cluster = self.plan, self.cluster
        self.request = _for_workers(plan, self.writer, cluster)
        self.count = cluster.workers or 1
        self.actor_class = self.ray.remote(TarWorker).options(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self.shares: deque[Sequence[int]] = deque()
        rest = plan.pending
        while rest:
            size = min(SHARE_TARS, max(1, len(rest) // (2 * self.count)))
            self.shares.append(rest[:size])
            rest = rest[size:]
        self.deaths: Counter[int] = Counter()  # by tar: how many workers died while doing it
        self.failed_starts = 0
        self.workers: list[_Worker] = []
        self.left = set(plan.pending)
        self.totals = Totals()

    def samples(self, numbers: Collection[int]) -> int:
        """Return the number of videos in these tars."""
        return sum(self.plan.tars[number].samples for number in numbers)

    def run(self, progress: ProgressSink) -> Totals:
        pending, waiting_since = self.plan.pending, time.monotonic()
        videos = self.samples(pending)
        try:
            while self.left:
                self.hand_out()
                self.wait()
                done, started = (
                    len(pending) - len(self.left),
                    sum(bool(w.where) for w in self.workers),
                )
                progress(
                    videos - self.samples(self.left),
                    videos,
                    tars=f"{done}/{len(pending)}",
                    workers=started,
                )
                if started or done:
                    waiting_since = time.monotonic()
                elif time.monotonic() - waiting_since > NOTHING_STARTS_S:
                    waiting_since = float("inf")
                    logger.warning(
                        "no worker has started yet: each needs %d free CPUs and %g free GPUs, and "
                        "loads the encoder first; waiting",
                        self.cluster.cpus_per_worker,
                        self.cluster.gpus_per_worker,
                    )
        finally:
            for worker in self.workers:
                self.ray.kill(worker.actor)
        self.totals.damaged.sort()
        return self.totals

    def hand_out(self) -> None:
        """Give a share to every idle worker; start workers, but no more than there are tars."""
        while len(self.workers) < min(self.count, len(self.left)):
            actor = self.actor_class.remote(self.request, code_versions(), CLAIM_WAIT_S)
            self.workers.append(_Worker(actor, actor.do.remote(())))
        for worker in self.workers:
            if worker.call is None and self.shares:
                worker.tars = self.shares.popleft()
                worker.call = worker.actor.do.remote(worker.tars)

    def wait(self) -> None:
        """Wait for an answer and take it, but only until progress must be shown again."""
        calls = {worker.call: worker for worker in self.workers if worker.call is not None}
        ready, _ = self.ray.wait(list(calls), num_returns=1, timeout=SHOWN_S)
        for call in ready:
            try:
                answer = self.ray.get(call)
            except self.ray.exceptions.RayActorError as error:
                self.bury(calls[call], error)
            else:
                self.take(calls[call], answer)

    def take(self, worker: _Worker, answer: Answer) -> None:
        """Log what the worker logged, and count what it did."""
        for record in answer.logged:
            record.msg = f"{record.msg} (worker on {answer.where})"
            log = logging.getLogger(record.name)
            if log.isEnabledFor(record.levelno):
                log.handle(record)
        if isinstance(answer.result, Exception):
            raise answer.result
        self.totals.add(answer.result)
        self.left.difference_update(worker.tars)
        worker.where, worker.call, worker.tars = answer.where, None, ()

    def bury(self, worker: _Worker, error: Exception) -> None:
        """Put back the tars that a dead worker had not done."""
        self.workers.remove(worker)
        self.ray.kill(worker.actor)  # it may be alive and only out of reach
        # Ray's message about the death, without its guesses at the cause.
        _, found, detail = str(error).partition("Worker exit detail: ")
        reason = one_line(detail.partition(" Some common causes")[0] if found else error, 200)
        where = worker.where or "before it had started"
        logger.warning("a worker died (%s): others do its tars; %s", where, reason)
        self.failed_starts += not worker.where
        if self.failed_starts > FAILED_STARTS:
            raise WorkError(
                f"{self.failed_starts} workers died while they started (the last: {reason}): "
                "what is done is kept; check Ray's logs and the memory of the machines"
            )
        lacking = worker.tars
        # With `retry_failed` the store does not show which of the tars were done again.
        if lacking and not self.request.retry_failed:
            lacking = sorted(set(lacking).intersection(self.writer.pending()))
        written = [number for number in worker.tars if number not in lacking]
        self.totals.add(Totals(videos=self.samples(written), done=written))
        self.left.difference_update(written)
        for number in lacking:
            self.deaths[number] += 1
            if self.deaths[number] > RETRIES:
                why = f"{self.deaths[number]} workers died doing it, the last on {where}: {reason}"
                self.totals.damaged.append(f"{self.plan.tars[number].file}: {why}")
                self.left.discard(number)
            else:  # as a share of its own, so that no other tar is blamed for it
                self.shares.append([number])
