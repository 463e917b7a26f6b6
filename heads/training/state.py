"""What a run continues from: one file with everything the next step depends on.

`state/last.safetensors` holds the trained parameters, what the optimiser knows of each, gradients
of a batch group that is not complete, and (as its card) the place in the data, the scaler, partial
sums and the records so far. Tensors are whole, however many processes share the model, so that the
number of processes may change. `state/best.safetensors` holds the parameters alone.

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
"""1 is read as well: heads trained from a store kept epoch and records in another place there."""

Parameters = Mapping[str, nn.Parameter]
"""What is trained, by the name that files have it under."""


@dataclass
class Position:
    """How far a run is; JSON-ready. Numbers of a run of several processes are of all of them."""

    epoch: int = 0
    """Epochs done, their evaluation included."""
    step: int = 0
    """Batches done of the epoch that is under way."""
    sums: list[float] = field(default_factory=list)
    """Of the epoch's losses over its samples, the total first."""
    pending: int = 0
    """Samples whose gradients are kept for an optimiser step that is not complete."""
    samples: int = 0
    """Samples trained on in the epoch."""
    failed: int = 0
    """Samples of the epoch that could not be decoded."""
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of those that were spent waiting for data."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Records of the epochs done."""
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason and first epoch of every video that failed, by key."""
    best: dict[str, Any] | None = None
    """Epoch and top1 of the best evaluation."""

    def next_epoch(self) -> None:
        """The epoch is done: begin the next."""
        self.epoch += 1
        self.step = self.samples = self.failed = 0
        self.sums = [0.0] * len(self.sums)
        self.seconds = self.waited = 0.0


def all_finite(parameters: Parameters, ranks: Ranks) -> bool:
    """Whether every trained weight is a number, on all processes."""
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
) -> None:
    """Write the state, complete or not at all; every process must come here, the first writes."""
    parts: list[tuple[str, Tensor]] = []
    for name, parameter in parameters.items():
        parts.append((f"parameter.{name}", parameter))
        parts += [(f"{part}.{name}", v) for part, v in optimizer.state.get(parameter, {}).items()]
        if parameter.grad is not None:  # of batches that are not a whole optimiser step yet
            parts.append((f"gradient.{name}", parameter.grad))
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
) -> Position:
    """Take over what `save_state` wrote; WorkError when the file does not fit the model."""
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


def save_best(path: Path, parameters: Parameters, epoch: int, ranks: Ranks) -> None:
    """Write the trained parameters after `epoch` epochs; every process must come here."""
    tensors = whole_tensors(((f"parameter.{n}", p) for n, p in parameters.items()), ranks)
    card = {"format": STATE_FORMAT, "epoch": epoch}
    ranks.only_first(lambda: save_tensors(path, tensors, card))


def restore_best(path: Path, parameters: Parameters, epoch: int) -> None:
    """Take over the parameters that `save_best` wrote after `epoch`; WorkError where it did not."""
    with open_tensors(path) as (_, read, card):
        _require_format(path, card)
        if card.get("epoch") != epoch:
            raise WorkError(
                f"{path} is of epoch {card.get('epoch')}, the best was {epoch}: train again"
            )
        for name, parameter in parameters.items():
            _copy(parameter, read(f"parameter.{name}"))


def whole_tensors(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Each tensor by its name, whole and on the CPU, in the first process; nothing in the others.

    Every process must come here: those of a sharded tensor put it together.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if ranks.first:
            held[name] = whole(tensor)
        elif in_shares(tensor):
            whole(tensor)
    return held


def in_shares(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, told without its module, which takes a while to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; a sharded one is put together, for which all must ask."""
    value: Any = tensor.detach()
    full: Tensor = value.full_tensor() if in_shares(value) else value
    return full.cpu()


def like(full: Tensor, model: Tensor) -> Tensor:
    """`full`, given whole, as `model` is: on its device, sharded as it is."""
    moved = full.to(model.device, model.dtype)
    if not in_shares(model):
        return moved
    from torch.distributed.tensor import distribute_tensor

    shares: Any = model
    return distribute_tensor(moved, shares.device_mesh, shares.placements, src_data_rank=None)


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
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
