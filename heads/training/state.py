"""The saved state of a run: one file with everything the next step depends on.

`state/last.safetensors` holds the trained parameters, the optimiser's state of each, gradients of
an incomplete group of batches, what else the model says its next step depends on, and (as its card)
the position in the data, the scaler, partial sums and the records so far. Tensors are stored whole,
however many processes share the model, so that the number of processes may change.
`state/best.safetensors` holds the parameters alone, as does `state/mean.safetensors`, the mean of
those at the start and after every epoch (`heads.end_to_end.kept_weights`).

Random draws need no state: they depend on seed, epoch, step and position only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from featstore.errors import UserError, WorkError
from heads.files.head_file import open_tensors, save_tensors
from heads.training.ranks import Ranks

STATE_FORMAT: Final = 2
"""Format 1 is also read: there, heads trained from a store kept epoch and records elsewhere."""

Parameters = Mapping[str, nn.Parameter]
"""The trained parameters, by their names in files."""


@dataclass
class Position:
    """The progress of a run, JSON-ready; all numbers count all processes together."""

    epoch: int = 0
    """Epochs done, including their evaluation."""
    step: int = 0
    """Batches done in the current epoch."""
    sums: list[float] = field(default_factory=list)
    """Sums of the epoch's losses over its samples, the total loss first."""
    pending: int = 0
    """Samples whose gradients wait for an incomplete optimiser step."""
    samples: int = 0
    """Samples trained on in the epoch."""
    failed: int = 0
    """Samples in the epoch that could not be decoded."""
    seconds: float = 0.0
    waited: float = 0.0
    """The part of `seconds` that was spent waiting for data."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Records of the finished epochs."""
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason and first epoch of every video that failed, by key."""
    best: dict[str, Any] | None = None
    """Epoch and top1 of the best evaluation so far; from a store also how it compares."""

    def next_epoch(self) -> None:
        """Count the epoch as done and begin the next."""
        self.epoch += 1
        self.step = self.samples = self.failed = 0
        self.sums = [0.0] * len(self.sums)
        self.seconds = self.waited = 0.0


def all_finite(parameters: Parameters, ranks: Ranks) -> bool:
    """Return whether every trained weight is finite on all processes."""
    bad = 0
    for parameter in parameters.values():
        value: Any = parameter.detach()
        bad += not bool((value.to_local() if in_shares(value) else value).isfinite().all())
    return not int(ranks.summed(torch.tensor(bad)))


def save_state(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    position: Position,
    ranks: Ranks,
    further: Mapping[str, Tensor],
) -> None:
    """Write the state, complete or not at all. Every process must call this; the first writes.

    `further` is what the next step depends on besides, the same on all processes.
    """
    parts: list[tuple[str, Tensor]] = []
    for name, parameter in parameters.items():
        parts.append((f"parameter.{name}", parameter))
        parts += [(f"{part}.{name}", v) for part, v in optimizer.state.get(parameter, {}).items()]
        if parameter.grad is not None:  # of batches that are not a whole optimiser step yet
            parts.append((f"gradient.{name}", parameter.grad))
    parts += further.items()
    tensors = whole_tensors(parts, ranks)
    card = {
        "format": STATE_FORMAT,
        "position": asdict(position),
        "scaler": scaler.state_dict(),
    }
    ranks.only_first(lambda: save_tensors(path, tensors, card))


def restore_state(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    further: Mapping[str, Tensor],
) -> Position:
    """Load what `save_state` wrote; raises WorkError if the file does not fit the model."""
    with open_tensors(path) as (names, read, card):
        _require_format(path, card)
        known = set(names)
        try:
            for name, parameter in parameters.items():
                _copy(parameter, read(f"parameter.{name}"))
                if f"gradient.{name}" in known:
                    parameter.grad = like(read(f"gradient.{name}"), parameter)
                if f"exp_avg.{name}" in known:
                    optimizer.state[parameter] = {
                        "step": read(f"step.{name}").to(parameter.device),
                        "exp_avg": like(read(f"exp_avg.{name}"), parameter),
                        "exp_avg_sq": like(read(f"exp_avg_sq.{name}"), parameter),
                    }
            for name, value in further.items():
                _copy(value, read(name))
            if "epoch" in known:  # format 1 of a head trained from a store
                kept = any(parameter.grad is not None for parameter in parameters.values())
                return Position(int(read("epoch")), pending=int(kept), metrics=card["metrics"])
            scaler.load_state_dict(card["scaler"]) if card["scaler"] else None
            position = Position(**card["position"])
            if {f.name for f in fields(Position)} != set(card["position"]):
                raise KeyError("position")
        except (KeyError, TypeError, RuntimeError) as error:
            raise WorkError(
                f"{path} does not fit this run ({error}): delete the run and train again"
            ) from error
    return position


def save_weights(path: Path, parameters: Mapping[str, Tensor], epoch: int, ranks: Ranks) -> None:
    """Write trained parameters of `epoch` epochs; every process must call this."""
    tensors = whole_tensors(((f"parameter.{n}", p) for n, p in parameters.items()), ranks)
    card = {"format": STATE_FORMAT, "epoch": epoch}
    ranks.only_first(lambda: save_tensors(path, tensors, card))


def restore_weights(path: Path, parameters: Parameters, epoch: int) -> None:
    """Load what `save_weights` wrote of `epoch` epochs; WorkError for another number."""
    with open_tensors(path) as (_, read, card):
        _require_format(path, card)
        if card.get("epoch") != epoch:
            raise WorkError(
                f"{path} holds epoch {card.get('epoch')}, but epoch {epoch} is wanted: train again"
            )
        for name, parameter in parameters.items():
            _copy(parameter, read(f"parameter.{name}"))


def whole_tensors(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Return the whole tensors by name, on the CPU, in the first process; nothing in the others.

    Every process must call this, because together they assemble a sharded tensor.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if ranks.first:
            held[name] = whole(tensor)
        elif in_shares(tensor):
            whole(tensor)
    return held


def in_shares(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing its module, which is slow."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the CPU; for a sharded tensor, all processes must call this."""
    value: Any = tensor.detach()
    full: Tensor = value.full_tensor() if in_shares(value) else value
    return full.cpu()


def like(full: Tensor, model: Tensor) -> Tensor:
    """Move the whole tensor `full` to the device and dtype of `model` and shard it likewise."""
    moved = full.to(model.device, model.dtype)
    if not in_shares(model):
        return moved
    from torch.distributed.tensor import distribute_tensor

    shares: Any = model
    return distribute_tensor(moved, shares.device_mesh, shares.placements, src_data_rank=None)


def _copy(parameter: Tensor, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise RuntimeError(f"{list(value.shape)} for {list(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(like(value, parameter))


def _require_format(path: Path, card: dict[str, Any]) -> None:
    if card.get("format") not in (1, STATE_FORMAT):
        raise UserError(
            f"{path} has format {card.get('format')!r}, this version writes "
            f"{STATE_FORMAT}: finish the run with the version that began it"
        )
