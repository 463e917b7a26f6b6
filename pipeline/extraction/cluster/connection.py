"""Connects to the Ray cluster of an extraction, and decides how many workers run there.

Ray (https://docs.ray.io) comes with the extra `cluster`; nothing here imports it before it is used.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from featstore.errors import UserError, one_line
from featstore.files.machine import usable_cores

logger = logging.getLogger(__name__)

CONNECT_S: Final = 5.0
# Only messages pass through Ray's shared memory; this is the smallest size that Ray accepts.
OBJECT_STORE_BYTES: Final = 80 << 20


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and the part of it to use; `sized` fills in what is None."""

    address: str | None = None  # None: RAY_ADDRESS, else a new cluster on this machine
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float = 0.0

    @property
    def device(self) -> str:
        """Where the workers' encoders run."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"

    def sized(self, machines: Sequence[Mapping[str, float]]) -> Cluster:
        """Return the cluster with its workers sized for `machines`.

        Ray names the resources of a machine "CPU" and "GPU".
        By default there is one worker per machine with all its CPUs, or one per GPU with its part
        of the CPUs; if machines differ, the smallest sets the size. Raises UserError if not even
        one worker fits.
        """
        gpus, cpus = self.gpus_per_worker, self.cpus_per_worker
        found = [(machine.get("CPU", 0), machine.get("GPU", 0)) for machine in machines]
        fit = [(c, g) for c, g in found if c >= 1 and g >= gpus]
        if cpus is None:
            parts = [c // int(g / gpus) if gpus else c for c, g in fit]
            if self.workers:
                parts.append(sum(c for c, _ in fit) // self.workers)
            cpus = max(1, int(min(parts, default=1)))
        room = sum(int(min(c // cpus, g / gpus if gpus else c)) for c, g in fit)
        if room == 0:
            most_cpus, most_gpus = max(found, default=(0, 0))
            raise UserError(
                f"a worker of {cpus} CPUs{f' and {gpus:g} GPUs' if gpus else ''} fits on no "
                f"machine of the cluster (the largest has {most_cpus:g} and {most_gpus:g}): give a "
                "smaller --cpus-per-worker or --gpus-per-worker"
            )
        if not gpus and any(g for _, g in found):
            logger.warning("the GPUs of the cluster are not used: --gpus-per-worker 1 uses them")
        if (self.workers or 0) > room:
            logger.warning(
                "asked for %d workers, and the cluster has room for %d", self.workers, room
            )
        return replace(self, workers=self.workers or room, cpus_per_worker=cpus)


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Yield the module ray, connected; disconnect at the end, and stop a cluster started here.

    A process that is connected already stays connected.
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
    in_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the Ray cluster {address!r} cannot be used ({one_line(error, 200)}): check "
            "--address and RAY_ADDRESS, that Ray's version is the same everywhere, and "
            "RAY_AUTH_MODE where the cluster asks for a token"
        ) from None
    finally:
        if in_main:  # Ray sets a handler of its own, which ends the process at once
            signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield ray
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    # Ray prints its daemon's messages about dead workers to stdout, which is only for the result;
    # the driver logs them in one line each.
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
    """Raise UserError if nothing answers at `address`; Ray itself would try for two minutes."""
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
