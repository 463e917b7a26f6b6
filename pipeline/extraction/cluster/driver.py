"""Extraction on a Ray cluster: tars are handed to workers, and a dead worker's tars to others.

Workers write their own partitions, so nothing but numbers passes through this process. The store
is the one that the local engine would write: a partition depends on its tar and the encoder alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from featstore.errors import WorkError, one_line
from featstore.progress import ProgressSink, no_progress
from pipeline.encoders.specs import lasting_spec
from pipeline.extraction.cluster.connection import Cluster, Sizes, connected, sizes
from pipeline.extraction.cluster.worker import TARS_IN_HAND, Failure, Outcome, Report, TarWorker
from pipeline.extraction.engine import Totals
from pipeline.extraction.plan import ExtractionPlan, ExtractionRequest
from pipeline.extraction.store import code_versions

logger = logging.getLogger(__name__)

# A tar is given to as many workers more when one died over it.
RETRIES: Final = 3
# A worker of a killed command may live for some seconds and hold a partition meanwhile.
CLAIM_WAIT_S: Final = 120.0
CLAIM_RETRY_S: Final = 2.0
# Workers that die before they have done anything are not replaced for ever.
FAILED_STARTS: Final = 3
REPORT_S: Final = 0.5
NOTHING_STARTS_S: Final = 30.0


def run_on_ray(
    plan: ExtractionPlan,
    request: ExtractionRequest,
    tars: Sequence[int],
    cluster: Cluster,
    progress: ProgressSink = no_progress,
) -> Totals:
    """Do the partitions `tars` of a store that exists; damaged tars do not stop the others.

    `request` goes to the workers, with its precision fixed; its paths are right on every machine.
    A tar that no worker survived, or that another process kept to itself, has its line in the
    totals as a damaged one has.

    Raises UserError when the cluster cannot be had or the workers cannot do what is asked,
    WorkError when their work fails, also where their disk is the reason.
    """
    if not tars:
        return Totals()
    with connected(cluster) as ray:
        machines = [
            (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in ray.nodes()
            if node["Alive"]
        ]
        size = sizes(cluster, machines)
        return _Run(ray, plan, _for_workers(request, cluster), size, tars, progress).over()


def _for_workers(request: ExtractionRequest, cluster: Cluster) -> ExtractionRequest:
    """The request as processes with another working folder understand it."""
    folder = request.encoders_dir
    return replace(
        request,
        dataset_dir=_everywhere(request.dataset_dir),
        store_path=_everywhere(request.store_path),
        encoder=lasting_spec(request.encoder, folder),
        encoders_dir=folder and folder.absolute(),
        device=cluster.device,
        share=None,  # the tars are named
    )


def _everywhere(place: Path | str) -> Path | str:
    return place if isinstance(place, str) else place.absolute()


@dataclass(eq=False)
class _Tar:
    number: int
    deaths: int = 0  # of workers that had it in hand
    not_before: float = 0.0
    claimed_since: float | None = None


@dataclass(eq=False)
class _Worker:
    actor: Any
    where: str = ""  # host and pid, once it has started
    hand: list[_Tar] = field(default_factory=list)
    calls: dict[Any, Callable[[Any], None]] = field(default_factory=dict)  # by Ray's reference
    reported: float = 0.0
    reporting: bool = False


class _Run:
    def __init__(
        self,
        ray: Any,
        plan: ExtractionPlan,
        request: ExtractionRequest,
        size: Sizes,
        tars: Sequence[int],
        progress: ProgressSink,
    ) -> None:
        self.ray = ray
        self.plan = plan
        self.request = request
        self.size = size
        self.queue = deque(_Tar(number) for number in tars)
        self.progress = progress
        self.workers: list[_Worker] = []
        self.totals = Totals()
        self.ended = 0
        self.count = len(tars)
        self.total = sum(plan.shards[tar].samples for tar in tars)
        self.videos: dict[int, int] = {}  # by tar, in hand or done
        self.failed_starts = 0
        self.began = time.monotonic()
        self.actor_class = ray.remote(TarWorker)

    def over(self) -> Totals:
        try:
            while self.ended < self.count:
                self._hire()
                self._hand_out()
                self._ask_for_reports()
                self._wait()
                self._show()
        finally:
            for worker in self.workers:
                self.ray.kill(worker.actor)
        self.totals.damaged.sort()
        return self.totals

    def _hire(self) -> None:
        """Start workers up to their number, but no more than there are tars."""
        while len(self.workers) < min(self.size.workers, self.count - self.ended):
            actor = self.actor_class.options(
                num_cpus=self.size.cpus,
                num_gpus=self.size.gpus,
                max_restarts=0,
                max_concurrency=TARS_IN_HAND + 1,  # and one for reports
                scheduling_strategy="SPREAD",
            ).remote(self.request, self.request.workers or self.size.cpus)
            worker = _Worker(actor)
            self.workers.append(worker)
            worker.calls[actor.start.remote(code_versions())] = partial(self._started, worker)

    def _started(self, worker: _Worker, answer: str | Failure) -> None:
        if isinstance(answer, Failure):
            raise answer.error()
        worker.where = answer

    def _hand_out(self) -> None:
        """Give tars to workers that have room, those with the least in hand first."""
        now = time.monotonic()
        for room in range(TARS_IN_HAND):
            for worker in self.workers:
                if worker.where and len(worker.hand) == room:
                    self._give(worker, now)

    def _give(self, worker: _Worker, now: float) -> None:
        tar = next((tar for tar in self.queue if tar.not_before <= now), None)
        # One over which a worker died is done alone, so that no other is blamed for it. The last
        # ones are not kept waiting in one worker's hand while another has nothing to do.
        alone = tar is not None and (tar.deaths > 0 or len(self.queue) < len(self.workers))
        if tar is None or (worker.hand and (alone or any(t.deaths for t in worker.hand))):
            return
        self.queue.remove(tar)
        worker.hand.append(tar)
        worker.calls[worker.actor.do.remote(tar.number)] = partial(self._done, worker, tar)

    def _done(self, worker: _Worker, tar: _Tar, outcome: Outcome) -> None:
        worker.hand.remove(tar)
        if outcome.failure is not None:
            raise outcome.failure.error()
        if outcome.claimed:
            self._put_off(tar, outcome.claimed)
            return
        self.totals.add(outcome.totals)
        if tar.deaths and not (outcome.totals.done or outcome.totals.damaged):
            self.totals.done.append(tar.number)  # by the worker that died before it could say so
        self._end(tar, self.plan.shards[tar.number].samples)

    def _put_off(self, tar: _Tar, claimed: str) -> None:
        now = time.monotonic()
        tar.claimed_since = tar.claimed_since or now
        tar.not_before = now + CLAIM_RETRY_S
        if now - tar.claimed_since > CLAIM_WAIT_S:
            self._give_up(tar, claimed)
        else:
            self.queue.append(tar)

    def _give_up(self, tar: _Tar, why: str) -> None:
        self.totals.damaged.append(f"{self.plan.shards[tar.number].file}: {why}")
        self._end(tar, 0)

    def _end(self, tar: _Tar, videos: int) -> None:
        self.videos[tar.number] = videos
        self.ended += 1

    def _ask_for_reports(self) -> None:
        now = time.monotonic()
        for worker in self.workers:
            if worker.where and not worker.reporting and now - worker.reported >= REPORT_S:
                worker.reporting = True
                worker.calls[worker.actor.report.remote()] = partial(self._reported, worker)

    def _reported(self, worker: _Worker, report: Report) -> None:
        worker.reporting, worker.reported = False, time.monotonic()
        in_hand = {tar.number for tar in worker.hand}
        self.videos |= {tar: done for tar, done in report.videos.items() if tar in in_hand}
        for notice in report.notices:
            logging.getLogger(notice.logger).log(
                notice.level, "%s (worker on %s)", notice.message, worker.where
            )

    def _wait(self) -> None:
        """Handle the answers that are there; wait for one, but not longer than a report may."""
        waiting = {call: worker for worker in self.workers for call in worker.calls}
        if not waiting:
            time.sleep(REPORT_S)
            return
        ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=REPORT_S)
        for call in ready:
            worker = waiting[call]
            try:
                answer = self.ray.get(call)
            except self.ray.exceptions.RayActorError as error:
                self._bury(worker, error)
            else:
                worker.calls.pop(call)(answer)

    def _bury(self, worker: _Worker, error: Exception) -> None:
        """Put a dead worker's tars back."""
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
        for tar in worker.hand:
            self.videos.pop(tar.number, None)
            tar.deaths += 1
            if tar.deaths > RETRIES:
                self._give_up(
                    tar, f"{tar.deaths} workers died over it, the last on {where}: {reason}"
                )
            else:
                self.queue.append(tar)

    def _show(self) -> None:
        started = sum(bool(worker.where) for worker in self.workers)
        self.progress(
            sum(self.videos.values()),
            self.total,
            tars=f"{self.ended}/{self.count}",
            workers=started,
        )
        if started or self.ended:
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
