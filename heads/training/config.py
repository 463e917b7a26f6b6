"""The numbers of a training recipe.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code and configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from featstore.errors import UserError
from heads.methods.settings import Settings, within


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The training recipe; defaults are the released ViT-B/16 Kinetics-400 configuration.

    Raises UserError when a value is out of range.
    """

    WHAT: ClassVar[str] = "training"

    epochs: int = within(30, 1, 100_000)
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up; if not shorter than the run, a sixth of the run is used instead."""
    lr: float = 5e-5
    """Base learning rate of the head."""
    logit_scale_lr_ratio: float = 0.07
    """Rate of the logit scale (and of the tower, end to end) relative to `lr`."""
    weight_decay: float = 0.2
    """Applied to every tensor, including biases and norms."""
    batch_size: int = within(192, 1, 2**20)
    frames: int = within(8, 1, 65_536)
    """T, frames per view, drawn from the stored frames."""
    seed: int = 1024
    accumulation: int = within(1, 1, 2**20)
    """Batches per optimiser step; a remainder is carried into the next epoch."""
    lr_refresh: int = within(1, 1, 2**31)
    """Iterations between refreshes of the learning rate; 10 is the authors' quirk."""
    expert_weight: float = 1.0
    """Weight of the expert pass's cross-entropy; 0 turns a term off, here and in the next two."""
    merged_weight: float = 0.5
    """Weight of the merged pass's cross-entropy."""
    feature_weight: float = 0.1
    """Weight of the distance between the merged pass's features and the encoder's."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    patience: int = field(default=0, metadata={"range": (0, None), "later": True})
    """Epochs without a better validation after which training from a store stops; 0: never."""
    shrinkage: float = field(default=0.0, metadata={"range": (0, 1), "later": True})
    """Share of what a head trained from a store adds to the mean of frames that is taken away after
    training; 1: it answers as no head. Few videos teach much that is chance."""
    keep_best: bool = field(default=False, metadata={"later": True})
    """Whether a head trained from a store is that of the best epoch on its validation videos."""

    schedule: Literal["", "whole-wave", "floored-wave"] = field(
        default="", metadata={"later": True}
    )
    """The course of the learning rate after the warm-up: half a cosine wave that begins then (the
    empty word), the rest of one that spans the whole run (DiST), or the rest of one that spans the
    whole run and ends at a hundredth of the rate, where the warm-up ends at the rate (MSTA)."""
    warmup_start: float = field(default=0.0, metadata={"later": True})
    """Rate at which the warm-up of "whole-wave" begins."""

    class_sampling: str = field(default="", metadata={"later": True})
    """How often an epoch has the classes: as the videos are, or all equally often ("balanced")."""
    class_weights: str = field(default="", metadata={"later": True})
    """What classes count in the loss: all the same, "balanced", "sqrt" or as a CSV file says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_sampling not in ("", "balanced"):
            raise UserError(
                f"class_sampling {self.class_sampling!r} is unknown: give balanced, or leave it out"
            )
        if self.warmup_start and self.schedule != "whole-wave":
            raise UserError("warmup_start belongs to the schedule whole-wave: leave it out")
        if not isinstance(self.class_weights, str):
            raise UserError(f"class_weights {self.class_weights!r}: give balanced, sqrt or a file")
        if not self.expert_weight + self.merged_weight + self.feature_weight:
            raise UserError("all three loss weights are 0: there is nothing to train")

    @property
    def warmup(self) -> float:
        """The epochs of warm-up that are used: a sixth of the run if the run is short."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 6

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights of the losses, as a head's `training_loss` takes them."""
        return {
            "expert_weight": self.expert_weight,
            "merged_weight": self.merged_weight,
            "feature_weight": self.feature_weight,
        }
