"""Extraction on a Ray cluster: workers get shares of the tars, and a dead worker's go to others.

Workers write their own partitions, so nothing but numbers passes through this process. The store
is the one that a single process would write: a partition depends on its tar and the encoder alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from featstore.errors import WorkError, one_line
from featstore.opening import AnyWriter
from featstore.progress import ProgressSink, no_progress
from pipeline.encoders.specs import lasting_spec
from pipeline.extraction.cluster.connection import Cluster, Sizes, connected, sizes
from pipeline.extraction.cluster.worker import Answer, TarWorker
from pipeline.extraction.job import code_versions
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, Totals

logger = logging.getLogger(__name__)

# The most tars of a share: between two of them a worker waits for the last video of the first, and
# it tells of what it did when a share is done. The last shares are smaller: workers end together.
SHARE_TARS: Final = 4
# A tar is given to as many workers more when one died over it.
RETRIES: Final = 3
# A worker of a killed command may live for some seconds and hold a partition meanwhile.
CLAIM_WAIT_S: Final = 120.0
# Workers that die before they have done anything are not replaced for ever.
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

    The paths of the plan's request are right on every machine, and its precision is the store's. A
    tar that no worker survived, or that another process kept to itself, has its line in the totals
    as a damaged one has.

    Raises UserError when the cluster cannot be had or the workers cannot do what is asked,
    WorkError when their work fails, also where their disk is the reason.
    """
    if not plan.pending:
        return Totals()
    with connected(cluster) as ray:
        machines = [
            (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in ray.nodes()
            if node["Alive"]
        ]
        crew = _Crew(ray, plan, writer, cluster, sizes(cluster, machines), progress)
        return crew.run()


def _for_workers(
    request: ExtractionRequest, writer: AnyWriter, cluster: Cluster, size: Sizes
) -> ExtractionRequest:
    """The request as processes with another working folder understand it."""
    folder = request.encoders_dir
    return replace(
        request,
        dataset_dir=_everywhere(request.dataset_dir),
        store_path=_everywhere(request.store_path),
        encoder=lasting_spec(request.encoder, folder),
        encoders_dir=folder and folder.absolute(),
        device=cluster.device,
        precision=writer.provenance.precision,
        workers=request.workers or size.cpus,
        share=None,  # the tars are named
    )


def _everywhere(place: Path | str) -> Path | str:
    return place if isinstance(place, str) else place.absolute()


@dataclass(eq=False)
class _Share:
    numbers: list[int]  # of tars
    deaths: int = 0  # of workers that had it in hand


@dataclass(eq=False)
class _Worker:
    actor: Any
    call: Any  # Ray's reference of what it is at; None when it has nothing to do
    where: str = ""  # host and pid, once it has started
    share: _Share | None = None


class _Crew:
    """The workers of one run, and the shares that they do."""

    def __init__(
        self,
        ray: Any,
        plan: ExtractionPlan,
        writer: AnyWriter,
        cluster: Cluster,
        size: Sizes,
        progress: ProgressSink,
    ) -> None:
        self.ray = ray
        self.plan = plan
        self.writer = writer
        self.request = _for_workers(plan.request, writer, cluster, size)
        self.size = size
        self.progress = progress
        self.fresh = list(plan.pending)  # tars that nobody was given
        self.again: deque[_Share] = deque()  # of one tar each
        self.workers: list[_Worker] = []
        self.totals = Totals()
        self.left = set(plan.pending)
        self.videos = self.samples(plan.pending)
        self.failed_starts = 0
        self.began = time.monotonic()
        self.actor_class = ray.remote(TarWorker)

    def samples(self, numbers: list[int]) -> int:
        """Videos in these tars."""
        return sum(self.plan.tars[number].samples for number in numbers)

    def run(self) -> Totals:
        try:
            while self.left:
                self.hire()
                self.hand_out()
                self.wait()
                self.show()
        finally:
            for worker in self.workers:
                self.ray.kill(worker.actor)
        self.totals.damaged.sort()
        return self.totals

    def hire(self) -> None:
        """Start workers up to their number, but no more than there are tars."""
        while len(self.workers) < min(self.size.workers, len(self.left)):
            actor = self.actor_class.options(
                num_cpus=self.size.cpus,
                num_gpus=self.size.gpus,
                max_restarts=0,
                scheduling_strategy="SPREAD",
            ).remote(self.request, CLAIM_WAIT_S)
            self.workers.append(_Worker(actor, actor.start.remote(code_versions())))

    def hand_out(self) -> None:
        """Give a share to every worker that has nothing to do."""
        for worker in self.workers:
            if worker.call is None and (share := self.next_share()):
                worker.share, worker.call = share, worker.actor.do.remote(share.numbers)

    def next_share(self) -> _Share | None:
        if self.fresh:
            size = min(SHARE_TARS, max(1, len(self.fresh) // (2 * self.size.workers)))
            share, self.fresh = _Share(self.fresh[:size]), self.fresh[size:]
            return share
        return self.again.popleft() if self.again else None

    def wait(self) -> None:
        """Take an answer when there is one; wait for it, but not longer than the progress may."""
        calls = {worker.call: worker for worker in self.workers if worker.call is not None}
        if not calls:
            time.sleep(SHOWN_S)
            return
        ready, _ = self.ray.wait(list(calls), num_returns=1, timeout=SHOWN_S)
        for call in ready:
            try:
                answer = self.ray.get(call)
            except self.ray.exceptions.RayActorError as error:
                self.bury(calls[call], error)
            else:
                self.take(calls[call], answer)

    def take(self, worker: _Worker, answer: Answer) -> None:
        """Tell what the worker logged, and count what it did."""
        result, share = answer.result, worker.share
        if isinstance(result, str):
            worker.where = result
        for record in answer.logged:
            record.msg = f"{record.msg} (worker on {worker.where})"
            log = logging.getLogger(record.name)
            if log.isEnabledFor(record.levelno):
                log.handle(record)
        worker.call = worker.share = None
        if isinstance(result, Exception):
            raise result
        if isinstance(result, Totals) and share is not None:
            self.totals.add(result)
            self.left.difference_update(share.numbers)

    def bury(self, worker: _Worker, error: Exception) -> None:
        """Put back the tars that a dead worker had not done."""
        self.workers.remove(worker)
        self.ray.kill(worker.actor)  # it may only be out of reach
        reason = _reason(error)
        where = worker.where or "before it had started"
        logger.warning("a worker died (%s): its tars go to others; %s", where, reason)
        if not worker.where:
            self.failed_starts += 1
            if self.failed_starts > FAILED_STARTS:
                raise WorkError(
                    f"{self.failed_starts} workers died while they started (the last: {reason}): "
                    "what is done is kept; see the logs of Ray, and the memory of the machines"
                )
        if worker.share is None:
            return
        deaths = worker.share.deaths + 1
        lacking = worker.share.numbers
        if not self.request.retry_failed:  # the store does not tell what was done once more
            pending = set(self.writer.pending())
            lacking = [number for number in lacking if number in pending]
        written = [number for number in worker.share.numbers if number not in lacking]
        self.totals.add(Totals(videos=self.samples(written), done=written))
        self.left.difference_update(written)
        for number in lacking:
            if deaths > RETRIES:
                why = f"{deaths} workers died over it, the last on {where}: {reason}"
                self.totals.damaged.append(f"{self.plan.tars[number].file}: {why}")
                self.left.discard(number)
            else:  # alone, so that no other is blamed for it
                self.again.append(_Share([number], deaths))

    def show(self) -> None:
        started = sum(bool(worker.where) for worker in self.workers)
        count = len(self.plan.pending)
        self.progress(
            self.videos - self.samples(list(self.left)),
            self.videos,
            tars=f"{count - len(self.left)}/{count}",
            workers=started,
        )
        if started or len(self.left) < count:
            self.began = time.monotonic()
        elif time.monotonic() - self.began > NOTHING_STARTS_S:
            self.began = float("inf")
            logger.warning(
                "no worker has started yet: each takes %d CPUs and %g GPUs that must be free, and "
                "loads the encoder; waiting",
                self.size.cpus,
                self.size.gpus,
            )


def _reason(error: Exception) -> str:
    """What Ray says of a death, without its guesses."""
    _, found, detail = str(error).partition("Worker exit detail: ")
    return one_line(detail.partition(" Some common causes")[0] if found else str(error), 200)
