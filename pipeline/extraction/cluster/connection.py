"""Which Ray cluster does an extraction, with how many workers, and the connection to it.

Ray (https://docs.ray.io) comes with the extra `cluster`; nothing here imports it before it is used.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from featstore.errors import UserError, one_line
from featstore.files.machine import usable_cores
from pipeline.extraction.request import ExtractionRequest

logger = logging.getLogger(__name__)

CONNECT_S: Final = 5.0
# Only messages pass through Ray's shared memory; this is the least it takes.
OBJECT_STORE_BYTES: Final = 80 << 20


@dataclass(frozen=True)
class Cluster:
    """Which cluster, and what of it; None leaves the choice to `sizes`."""

    address: str | None = None  # None: RAY_ADDRESS, else a cluster on this machine for this work
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float = 0.0

    @property
    def device(self) -> str:
        """Where the workers' encoders run."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"


@dataclass(frozen=True)
class Sizes:
    """How many workers, and what each of them takes."""

    workers: int
    cpus: int
    gpus: float


def sizes(cluster: Cluster, machines: Sequence[tuple[float, float]]) -> Sizes:
    """Workers for `machines` of (CPUs, GPUs) each.

    Unless told otherwise: one worker per machine with all its CPUs, or one per GPU with its part of
    the CPUs; of the smallest machine where they differ. Raises UserError when not even one fits.
    """
    gpus = cluster.gpus_per_worker
    fit = [(c, g) for c, g in machines if c >= 1 and g >= gpus]
    cpus = cluster.cpus_per_worker
    if cpus is None and fit:
        share = [c // max(1, int(g / gpus)) if gpus else c for c, g in fit]
        if cluster.workers:
            share.append(sum(c for c, _ in fit) // cluster.workers)
        cpus = max(1, int(min(share)))
    cpus = cpus or 1
    room = sum(int(min(c // cpus, g / gpus if gpus else c)) for c, g in fit)
    if room == 0:
        largest = max(machines, default=(0, 0))
        raise UserError(
            f"a worker of {cpus} CPUs{f' and {gpus:g} GPUs' if gpus else ''} fits on no machine of "
            f"the cluster (the largest has {largest[0]:g} and {largest[1]:g}): give a smaller "
            "--cpus-per-worker or --gpus-per-worker"
        )
    workers = cluster.workers or room
    if not gpus and any(g for _, g in machines):
        logger.warning("the GPUs of the cluster are not used: --gpus-per-worker 1 takes them")
    if workers > room:
        logger.warning("%d workers were asked for, the cluster has room for %d", workers, room)
    return Sizes(workers, cpus, gpus)


def require_precision(cluster: Cluster, request: ExtractionRequest) -> None:
    """Raise UserError when "auto" would have to be timed on a GPU and this machine has none."""
    if request.precision != "auto" or cluster.device == "cpu":
        return
    import torch  # slow to import, and only needed here

    if not torch.cuda.is_available():
        raise UserError(
            "--precision auto is timed where the command runs, which has no GPU as the workers "
            "have: give --precision fp16, bf16 or fp32"
        )


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """The module ray, connected; a cluster of this machine is stopped at the end.

    A process that is connected already stays so.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        options = {
            "num_cpus": usable_cores(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        _require_reachable(address)
    with _own_signals():
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the Ray cluster {address!r} cannot be used ({one_line(error, 200)}): check "
                "--address and RAY_ADDRESS, that Ray's version is the same everywhere, and "
                "RAY_AUTH_MODE where the cluster asks for a token"
            ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    # Ray prints what its daemon says about dead workers to stdout, which belongs to the result;
    # these are said here in one line each.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "--engine ray needs the package ray, which is not installed: "
            "pip install 'mote-video[cluster]'"
        ) from None
    return ray


def _require_reachable(address: str) -> None:
    """Raise UserError when nobody listens: Ray itself would try for two minutes."""
    if "://" in address:
        raise UserError(
            f"{address!r} is an address of Ray Client, which is not supported: run the command on "
            "a machine of the cluster, with --address auto or HOST:PORT"
        )
    host, _, port = address.rpartition(":")
    if not host:
        return  # "auto", which Ray answers at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster can be reached at {address!r} ({one_line(error, 100)}): give "
            "HOST:PORT as `ray start --head` prints it, or leave --address out"
        ) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of SIGINT and SIGTERM, which `ray.init` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
