"""Both towers and a head, trained while a teacher, an average of the towers, holds them: TACO.

B = clips, T = frames, s = input size of the tower, C = classes, D = embedding width, N = anchors.

Source: TACO (Zhu et al., NeurIPS 2026) and its released code.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from heads.end_to_end.config import BOTH_TOWERS, FinetuneConfig
from heads.end_to_end.models.end_to_end_model import EndToEndModel, check_labels
from heads.end_to_end.models.trained_texts import TrainedTexts
from heads.methods.taco.head import TacoHead
from heads.methods.taco.training import training_step_parts, update_teacher
from pipeline.clip_encoder import image_embeddings


class TacoLosses(NamedTuple):
    """The losses of a batch: the cross-entropy, the divergence from the teacher, and their sum."""

    total: Tensor
    ce: Tensor
    kl: Tensor


class TaughtModel(EndToEndModel):
    """A CLIP whose both towers train with TACO's head, and its teacher.

    As `EndToEndModel` with `train` "both-towers". `clip` is used itself, and the teacher is a copy
    of it as it is now. In every training step the teacher moves towards the towers before it
    encodes the same clips and class texts, without gradients and without the head. It is no part
    of what an optimiser trains.
    """

    def __init__(
        self,
        clip: nn.Module,
        head: TacoHead,
        logit_scale: float | Tensor,
        *,
        texts: TrainedTexts,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            cast(nn.Module, clip.visual),
            head,
            logit_scale,
            train=BOTH_TOWERS,
            checkpointing=checkpointing,
            texts=texts,
        )
        self.momentum = head.config.teacher_momentum
        self.teacher = copy.deepcopy(clip).requires_grad_(False).eval()
        self.train(head.training)

    def train(self, mode: bool = True) -> TaughtModel:
        """Switch the head's mode; towers and teacher stay in evaluation mode."""
        super().train(mode)
        if "teacher" in self._modules:  # the base class calls this before there is one
            self.teacher.eval()
        return self

    def held(self) -> dict[str, Tensor]:
        """Return the teacher's parameters, under the names that the trained ones have here."""
        whose = dict(self.teacher.named_parameters())
        return {name: whose[in_clip(name)] for name in self._followed()}

    def training_loss(
        self,
        frames: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        draw: Any,
        subsets: Tensor | None = None,
        **weights: float,
    ) -> TacoLosses:
        """Move the teacher and return the losses of one batch, as `EndToEndModel.training_loss`.

        `draw` are the anchors [N,D]; of `class_embeddings` [C,D] only the number of classes is
        used; `subsets` and `weights` have no effect.
        """
        self._check_frames(frames)
        check_labels(labels, len(frames), len(class_embeddings))
        assert self.texts is not None
        text = self.class_embeddings(class_embeddings)
        video = self.encode(frames)
        update_teacher(self.held(), self._followed(), self.momentum)
        with torch.no_grad():
            images = rearrange(frames, "b t c h w -> (b t) c h w").to(self.logit_scale.dtype)
            seen = image_embeddings(cast(nn.Module, self.teacher.visual), images)
            held_text = self.texts.embeddings_by(self.teacher)
        parts = training_step_parts(
            cast(TacoHead, self.head),
            video,
            text,
            rearrange(seen, "(b t) d -> b t d", t=frames.shape[1]),
            held_text,
            labels.to(video.device, non_blocking=True),
            draw.to(video.device, non_blocking=True),
            self.logit_scale.reshape(()),
        )
        return TacoLosses(parts.total, parts.ce, parts.kl)

    def weights_of(self, config: FinetuneConfig) -> dict[str, float]:
        """Return nothing: the weight of the divergence is in the head's configuration."""
        return {}

    def further_state(self) -> dict[str, Tensor]:
        """See `EndToEndModel.further_state`: the teacher."""
        return {f"teacher.{name}": value for name, value in self.held().items()}

    def _followed(self) -> dict[str, Tensor]:
        """Return the trained parameters of towers and logit scale, by their names here."""
        named = self.named_parameters()
        return {n: p for n, p in named if not n.startswith(("head.", "teacher."))}


def in_clip(name: str) -> str:
    """Return the name that CLIP has for a parameter of the model."""
    return name.replace("image_tower.", "visual.", 1).removeprefix("texts.")
