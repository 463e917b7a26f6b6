"""The numbers of a training recipe.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code and configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from featstore.errors import UserError
from heads.methods.settings import Settings


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The training recipe; defaults are the released ViT-B/16 Kinetics-400 configuration.

    Raises UserError when a value is out of range.
    """

    WHAT: ClassVar[str] = "training"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("auto", "fp32", "bf16")

    epochs: int = 30
    warmup_epochs: float = 5.0
    """Linear warm-up; one as long as the whole run or longer counts as a sixth of the run."""
    lr: float = 5e-5
    """Base learning rate of the head."""
    logit_scale_lr_ratio: float = 0.07
    """Rate of the logit scale (and of the tower, end to end) relative to `lr`."""
    weight_decay: float = 0.2
    """On every tensor, biases and norms included."""
    batch_size: int = 192
    frames: int = 8
    """T, frames per view drawn from the stored ones."""
    seed: int = 1024
    accumulation: int = 1
    """Batches per optimiser step; a remainder is carried into the next epoch."""
    lr_refresh: int = 1
    """Iterations between refreshes of the learning rate; 10 is the authors' quirk."""
    expert_weight: float = 1.0
    """Weight of the expert pass's cross-entropy; of all three weights, 0 turns the term off."""
    merged_weight: float = 0.5
    """Weight of the merged pass's cross-entropy."""
    feature_weight: float = 0.1
    """Weight of the distance between the merged pass's features and the encoder's."""
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "frames", "accumulation", "lr_refresh"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number from 1 up")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"seed is {self.seed!r}: it must be a whole number from 0 up")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(field.default, float):
                continue
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise UserError(f"{field.name} is {value!r}: it must be a number from 0 up")
            object.__setattr__(self, field.name, float(value))
        if not self.expert_weight + self.merged_weight + self.feature_weight:
            raise UserError("all three loss weights are 0: there is nothing to train")
        if self.precision not in self.PRECISIONS:
            raise UserError(
                f"precision {self.precision!r} is unknown: choose one of "
                f"{', '.join(self.PRECISIONS)}"
            )

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in force (the recipe's share of the run where the run is short)."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 6

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights of the losses, as a head's `training_loss` takes them."""
        return {
            "expert_weight": self.expert_weight,
            "merged_weight": self.merged_weight,
            "feature_weight": self.feature_weight,
        }
