"""How tower and head are trained together: the recipe's numbers and what only this mode has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from featstore.errors import UserError
from heads.training.config import TrainConfig

Draws = Literal["shared", "per-rank"]
Saved = Literal["last", "best"]
Sharding = Literal["auto", "ddp", "fsdp"]
_CHOICES = {"draws": Draws, "save": Saved, "shard": Sharding}


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """The recipe of end-to-end training; what it inherits has the meaning it has there.

    `batch_size` counts the videos of one process, as in the released code: the batch of a step is
    that times the number of processes. `logit_scale_lr_ratio` is the rate of tower and logit scale
    relative to the head's. Raises UserError when a value is out of range.
    """

    WHAT: ClassVar[str] = "fine-tuning"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("auto", "fp32", "bf16", "fp16")

    train: str = "tower"
    """What is trained: "tower" (with the head), "head" (tower frozen, logit scale trained), or
    "tower-last-N" (the last N blocks of the tower and what follows them, with the head)."""
    checkpointing: bool = False
    """Recompute the tower's activations in the backward pass: less memory, same values."""
    draws: Draws = "shared"
    """Whether all processes share the draw of experts and temperatures of a step, or every one
    makes its own ("per-rank": the released code, seed + rank)."""
    evaluate_every: int = 1
    """Epochs between evaluations on the val (else test) split; 0 turns them off."""
    save: Saved = "last"
    """Which weights the run publishes: those of the last epoch, or of the epoch with the best
    top-1 in evaluation."""
    blend: float = 0.99
    """Share of the tuned tower in the published encoder, the rest is the tower it began with;
    0.99 in the released test code, 1 is the tuned tower alone."""
    shard: Sharding = "auto"
    """With several processes: whole copies of the model ("ddp"), or parameters, gradients and
    optimiser state in shares ("fsdp"); "auto" chooses by the tower's size."""
    augment: bool = True
    """Random crop, flip and grey; off: the centre crop of evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        last_blocks(self.train)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        for name in ("checkpointing", "augment"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        if not isinstance(self.evaluate_every, int) or self.evaluate_every < 0:
            raise UserError(
                f"evaluate_every is {self.evaluate_every!r}: it must be a whole number from 0 up"
            )
        if self.blend > 1:
            raise UserError(f"blend {self.blend:g} is no share: it must be from 0 to 1")
        if self.save == "best" and not self.evaluate_every:
            raise UserError("save best needs evaluations: evaluate_every is 0")


def last_blocks(train: object) -> int | None:
    """N of "tower-last-N", None for "tower" and "head"; UserError for any other `train`."""
    if train in ("tower", "head"):
        return None
    match = re.fullmatch(r"tower-last-([1-9][0-9]{0,5})", train) if isinstance(train, str) else None
    if match is None:
        raise UserError(
            f"train {train!r} is unknown: choose tower, head or tower-last-N (N from 1 up)"
        )
    return int(match[1])
