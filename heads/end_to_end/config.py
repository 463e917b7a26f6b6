"""The settings for training tower and head together: the recipe's and those of this mode."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from featstore.errors import UserError, meant
from heads.methods.settings import within
from heads.training.config import TrainConfig

BOTH_TOWERS: Final = "both-towers"
"""The value of `train` with which the text tower trains too."""
AVERAGES: Final = ("mean", "teacher")
"""Values of `save` that only trainings with a teacher have."""


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """The recipe of end-to-end training; inherited fields mean the same as in `TrainConfig`.

    `batch_size` counts the videos of one process, as in the released code: a step has `batch_size`
    times the number of processes. `logit_scale_lr_ratio` is the rate of tower and logit scale
    relative to the head's. Raises UserError when a value is out of range.
    """

    WHAT: ClassVar[str] = "fine-tuning"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # type: ignore[assignment]
    """fp16 is possible too, with a gradient scaler."""

    train: str = "tower"
    """What is trained: "tower" (with the head), "head" (tower frozen, logit scale trained),
    "tower-last-N" (the last N blocks of the tower and what follows them, with the head), or
    "both-towers" (image and text tower with the head)."""
    checkpointing: bool = False
    """Recompute the tower's activations in the backward pass: less memory, same values."""
    draws: Literal["shared", "per-rank"] = "shared"
    """Whether all processes share the draw of experts and temperatures of a step, or every one
    makes its own ("per-rank": the released code, seed + rank)."""
    evaluate_every: int = 1
    """Epochs between evaluations on the val (else test) split; 0 turns them off."""
    save: Literal["last", "best", "mean", "teacher"] = "last"
    """Which weights the run publishes: those of the last epoch, of the epoch with the best top-1 in
    evaluation, or of methods with a teacher the mean of all epochs, or the teacher's."""
    blend: float = within(0.99, 0, 1)
    """Share of the tuned tower in the published encoder; the rest is the original tower. It is 0.99
    in the released test code; 1 means the tuned tower alone."""
    shard: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: whole copies of the model ("ddp"), or parameters, gradients and
    optimiser state in shares ("fsdp"); "auto" chooses by the tower's size."""
    augment: bool = True
    """Whether to crop, flip and grey at random; if not, the centre crop of evaluation is used."""
    mixup: float = field(default=0.0, metadata={"range": (0, 100), "later": True})
    """Alpha of mixup: the share of two clips that are blended is drawn from Beta(alpha, alpha).
    Only for methods that mix clips, as the next three are; 0 turns each off."""
    cutmix: float = field(default=0.0, metadata={"range": (0, 100), "later": True})
    """Alpha of cutmix, which puts a box of one clip into another; with mixup, either by chance."""
    smoothing: float = field(default=0.0, metadata={"range": (0, 1), "later": True})
    """Share of a label that is spread over all classes."""
    mirror: Literal["", "plain", "names"] = field(default="", metadata={"later": True})
    """Which clips augmentation mirrors: none, any ("plain"), or any whose mirrored label has a
    class, which it then gets ("names": left becomes right)."""

    @property
    def mixing(self) -> dict[str, float]:
        """The settings of mixed clips and their labels."""
        return {"mixup": self.mixup, "cutmix": self.cutmix, "smoothing": self.smoothing}

    def __post_init__(self) -> None:
        super().__post_init__()
        last_blocks(self.train)
        if self.save == "best" and not self.evaluate_every:
            raise UserError("save best needs evaluations: evaluate_every is 0")
        if self.train == BOTH_TOWERS and self.shard == "fsdp":
            raise UserError(
                "--shard fsdp spreads the image tower alone, and --train both-towers trains the "
                "text tower too: use --shard ddp, where every process holds whole copies"
            )


def last_blocks(train: object) -> int | None:
    """N of "tower-last-N", None for the other values of `train`; UserError for an unknown one."""
    known = ("tower", "head", BOTH_TOWERS)
    if train in known:
        return None
    match = re.fullmatch(r"tower-last-([1-9][0-9]{0,5})", train) if isinstance(train, str) else None
    if match is None:
        raise UserError(
            f"train {train!r} is unknown: {meant(train, (*known, 'tower-last-N'))}choose "
            "tower, head, both-towers or tower-last-N (N from 1 up)"
        )
    return int(match[1])
