"""The processes of one training or evaluation, and how they exchange values and errors.

Everything goes through torch.distributed under torchrun's environment variables (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT): gloo between CPUs, NCCL between GPUs. Without them there is
one process and nothing is set up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from featstore.errors import UserError, WorkError, one_line
from heads.arithmetic import resolve_device

PEER_TIMEOUT: Final = timedelta(minutes=10)
"""The longest a process waits for the others: rank 0 writing a checkpoint, a slow disk. A process
that dies is noticed at once between CPUs; between GPUs, at the latest after this."""

_CONTACT = re.compile(r"gloo|nccl|connection|peer|socket|timed out|timeout|broken pipe", re.I)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """One of `world_size` processes; `device` is where its share of the work is done."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def joined_before(cls) -> Ranks:
        """Return this process's rank in the group it has joined; alone if it has joined none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    def summed(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over the processes; the same bits everywhere."""
        if not self.alone:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        return float(self.greatest(torch.tensor(value, dtype=torch.float64)))

    def greatest(self, values: Tensor) -> Tensor:
        """The largest of the processes' values, entry by entry of a CPU tensor."""
        if not self.alone:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def gathered(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank, on every process."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def everywhere(self, value: Result) -> Result:
        """Return the value of the first process, on every process."""
        if self.alone:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run a block that may fail on some processes; if it does, it fails on all of them.

        The error of the lowest rank is raised everywhere; its attribute `speaks` says which
        process should print it. Every process must come here.
        """
        if self.alone:
            yield
            return
        error: UserError | WorkError | None = None
        try:
            yield
        except (UserError, WorkError) as raised:
            error = raised
        except OSError as raised:
            where = f"{raised.filename}: " if raised.filename else ""
            error = WorkError(f"{where}{one_line(raised.strerror or raised)}")
        kinds = self.gathered(None if error is None else (type(error).__name__, str(error)))
        failed = [(rank, *kind) for rank, kind in enumerate(kinds) if kind is not None]
        if not failed:
            return
        rank, kind, text = failed[0]
        if len({text for _, _, text in failed}) > 1 or len(failed) < self.world_size:
            text = f"rank {rank} of {self.world_size}: {text}"
        raise agreed(WorkError(text) if kind == "WorkError" else UserError(text), self.first)

    def only_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the first process and return its result (or raise its error) everywhere."""
        result: Any = None
        with self.agreeing():
            if self.first:
                result = work()
        return cast(Result, self.everywhere(result))


def agreed(error: UserError | WorkError, speaks: bool) -> UserError | WorkError:
    """Mark `error`, which all processes raise, with whether this process prints it."""
    error.speaks = speaks  # type: ignore[union-attr]
    return error


def joined(device: str = "auto") -> Ranks:
    """Join the processes that torchrun (or another launcher) started, each on its own GPU.

    Waits for the others. Raises UserError if the launcher's variables are wrong or the device is
    not available, WorkError if the other processes cannot be reached.
    """
    try:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise UserError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers ({error}): start with torchrun"
        ) from None
    where = resolve_device(device)
    if where.type == "cuda":
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise UserError(
                f"rank {rank} is number {local_rank} on this machine, which has {found} GPUs: "
                f"start at most {found} processes here (--nproc-per-node {found})"
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    if world_size == 1:
        return Ranks(device=where)
    # The small exchanges of every step stay on the CPU, where a vanished process is noticed and
    # which do not hold up the GPU.
    backend = "gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(
            backend, timeout=PEER_TIMEOUT, device_id=where if where.type == "cuda" else None
        )
    except (ValueError, RuntimeError) as error:  # dist.DistError is a RuntimeError
        raise WorkError(
            f"rank {rank} cannot reach the other {world_size - 1} processes "
            f"({one_line(error, 160)}): start them with torchrun"
        ) from error
    return Ranks(rank, world_size, where)


def left(ranks: Ranks) -> None:
    """Leave the process group; does nothing for a single process."""
    if not ranks.alone and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


@contextmanager
def contact(ranks: Ranks) -> Iterator[None]:
    """Turn errors about a lost process into a one-line WorkError; other errors pass through."""
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistError) or _CONTACT.search(str(error))
        if ranks.alone or not known:
            raise
        reason = one_line(str(error).rpartition("] ")[2], 120)
        raise WorkError(
            f"rank {ranks.rank} of {ranks.world_size} lost the others ({reason}): one of them "
            "ended, see its message; run the same command with --resume to continue"
        ) from error


@contextmanager
def together(device: str = "auto") -> Iterator[Ranks]:
    """Join the other processes for the duration of the block; errors as `joined`."""
    ranks = joined(device)
    try:
        yield ranks
    finally:
        left(ranks)
