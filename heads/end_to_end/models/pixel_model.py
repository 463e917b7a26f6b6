"""A head that looks at pixels beside a frozen tower, trained on its own: DiST.

B = clips, T' = dense frames, s = input size of the tower, D = embedding width, C = classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from heads.arithmetic import resolve_precision
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.models.end_to_end_model import EndToEndModel, check_labels
from heads.end_to_end.models.trained_parts import require_frozen
from heads.methods.dist.config import DistConfig
from heads.methods.dist.head import DistHead
from heads.methods.dist.model import DistModel, for_tower
from heads.methods.dist.training import draw_mix, training_step_parts
from heads.methods.head import Head
from heads.methods.registry import method
from heads.methods.settings import MethodConfig
from heads.methods.text_classifier import class_cosines
from pipeline.clip_encoder import PRECISIONS


class PixelLosses(NamedTuple):
    """The loss of a batch: cross-entropy with mixed, smoothed targets."""

    total: Tensor


class PixelHeadModel(EndToEndModel):
    """A frozen tower and a head that reads its tokens and the pixels; the head alone is trained.

    As `EndToEndModel`, but `train` must be "head", and the logit scale stays CLIP's. The tower's
    blocks run under inference mode in `precision`, everything else in float32: nothing of the tower
    is kept for the backward pass. `checkpointing` trades time for memory in the branch.
    """

    uses_autocast = False
    uses_all = False  # the last map to the temporal encoder, and more without pooling blocks

    def __init__(
        self,
        image_tower: nn.Module,
        head: Head,
        logit_scale: float | Tensor,
        *,
        train: str = "head",
        checkpointing: bool = False,
        precision: str = "fp32",
    ) -> None:
        super().__init__(image_tower, head, logit_scale, train=train)
        self.logit_scale.requires_grad_(False)
        self.image_tower.to(PRECISIONS[precision])
        self.dist = DistModel(image_tower, cast(DistHead, head).branch, self.logit_scale)
        self.dist.logit_scale = self.logit_scale
        self.dist.branch.checkpointing = checkpointing
        self.train(head.training)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the video features [B,1,D] of frames [B,T',3,s,s], not normalised."""
        self._check_frames(frames)
        return self.dist.video_features(frames)[:, None]

    def training_loss(
        self,
        frames: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        draw: Any,
        subsets: Tensor | None = None,
        **weights: float,
    ) -> PixelLosses:
        """Return the loss of one batch, as `EndToEndModel.training_loss`.

        `draw` is the seed of the batch's mixing; `weights` are `FinetuneConfig.mixing`.
        """
        self._check_frames(frames)
        check_labels(labels, len(frames), len(class_embeddings))
        height, width = frames.shape[-2:]
        mix = draw_mix(
            np.random.RandomState(draw),
            *(height, width),
            mixup=weights.get("mixup", 0.0),
            cutmix=weights.get("cutmix", 0.0),
        )
        smoothing = weights.get("smoothing", 0.0)
        parts = training_step_parts(self.dist, frames, labels, class_embeddings, mix, smoothing)
        return PixelLosses(parts.loss)

    def forward(self, frames: Tensor, class_embeddings: Tensor, modulate: bool = True) -> Tensor:
        """Return cosines [B,C], as `EndToEndModel.forward`; `modulate` has no effect."""
        unit = functional.normalize(self.encode(frames)[:, 0], dim=-1)
        return class_cosines(unit, class_embeddings)

    def weights_of(self, config: FinetuneConfig) -> dict[str, float]:
        """Return how clips are mixed and labels smoothed."""
        return config.mixing

    def kept_bytes(self) -> int:
        """Return the bytes that a dense frame of a clip keeps for the backward pass."""
        config, size = self.dist.config, cast(Any, self.image_tower).image_size
        device = self.logit_scale.device
        clip = torch.zeros(1, config.dense_frames, 3, *size, device=device)
        return self._kept(clip) // config.dense_frames

    def tower_parameters(self) -> list[nn.Parameter]:
        """Return nothing: tower and logit scale stay as they are."""
        return []


def tower_precision(config: FinetuneConfig, dim: int, device: torch.device) -> str:
    """Return the number type of a frozen tower: "auto" takes bf16 where it saves time.

    It depends on the machine and the width alone, not on a measurement, so that a run that
    continues gives the same bits. `dim` is the embedding width.
    """
    if config.precision != "auto":
        return config.precision
    return resolve_precision("auto", dim, device)


def pixel_head_config(
    config: MethodConfig, training: FinetuneConfig, image_tower: nn.Module
) -> DistConfig:
    """Return the configuration of a new head for a tower and clips of `training.frames`.

    Raises UserError for frames or layers that are not possible.
    """
    wanted = replace(cast(DistConfig, config), dense_frames=training.frames)
    return for_tower(wanted, image_tower)


def require_pixel_training(head: Head, config: FinetuneConfig) -> None:
    """Raise UserError for settings of training that a head beside a frozen tower cannot follow."""
    title, frames = method(head.config.kind).title, head.config.dense_frames
    require_frozen(title, "the tower as it is", config, frames)
