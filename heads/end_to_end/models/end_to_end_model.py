"""Towers, temporal head and logit scale as one trainable model: pixels in, cosines out.

B = batch (views), T = frames, s = input size of the tower, D = embedding width, C = classes.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code. Weights stay float32; cosines and
losses are float32 under autocast as well, where the released code rounds cosines to half precision.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from featstore.errors import UserError
from heads.end_to_end.config import BOTH_TOWERS, FinetuneConfig
from heads.end_to_end.models.trained_parts import checkpoint_gradients, freeze_all_but
from heads.end_to_end.models.trained_texts import TrainedTexts, bytes_kept
from heads.methods.head import Head
from heads.training.config import TrainConfig
from pipeline.clip_encoder import image_embeddings

logger = logging.getLogger(__name__)


class EndToEndModel(nn.Module):
    """An image tower of open_clip and a head, trained together against the texts of the classes.

    `image_tower` is used itself, not copied: it is converted to float32 and its parameters are
    frozen or trained as `train` says, so its `Encoder` can afterwards only encode texts. Load the
    tower in fp32, and move the whole model to its device.

    The tower stays in evaluation mode in training too: a vision transformer computes the same in
    both modes (patch dropout apart, which the released code does not use), and a ResNet's batch
    statistics would depend on how a batch is shared out over processes.

    `logit_scale` is CLIP's multiplier as a number, or its natural logarithm as a tensor. `train` is
    "tower" (everything), "head" (tower frozen; head and logit scale trained), "tower-last-N"
    (`trained_parts` in this folder), or "both-towers", for which `texts` has the text tower; else
    the class texts are fixed. `checkpointing` trades time for memory in the towers.

    Raises UserError if tower and head have different widths, and if the tower does not support
    `train` or `checkpointing`.

    Attributes: `image_tower`, `texts`, `head`, `logit_scale` (parameter, natural logarithm),
    `trained` (the value of `train`), `uses_all` (every trained parameter gets a gradient in every
    step). Build an optimiser with `build_optimizer(model.head, model.tower_parameters(), config)`.
    """

    uses_all = True
    uses_autocast = True
    """Whether the whole step runs in the precision of the training."""

    def __init__(
        self,
        image_tower: nn.Module,
        head: Head,
        logit_scale: float | Tensor,
        *,
        train: str = "tower",
        checkpointing: bool = False,
        texts: TrainedTexts | None = None,
    ) -> None:
        super().__init__()
        freeze_all_but(image_tower, train)
        if (texts is not None) != (train == BOTH_TOWERS):
            raise ValueError(f"train {train} needs {'no ' if texts else ''}texts that train")
        self.trained = train
        self.image_tower = _in_float32(image_tower)
        self.texts = texts
        if texts is not None:
            self.uses_all = texts.uses_all
        self.head = head.requires_grad_(True)
        self.logit_scale = nn.Parameter(_log_scale(logit_scale))
        self._tower_trains = any(p.requires_grad for p in image_tower.parameters())
        self._size = _input_size(image_tower)
        if self._size is not None:
            width = _output_width(image_tower, self._size)
            if width != head.config.dim:
                raise UserError(
                    f"the image tower gives embeddings of width {width}, the head takes "
                    f"{head.config.dim}: use a head made for this encoder"
                )
        if checkpointing and self._tower_trains:
            checkpoint_gradients(image_tower)
            if texts is not None:
                texts.keep_within(0)
        self.train(head.training)

    def train(self, mode: bool = True) -> EndToEndModel:
        """Switch the head's mode; the towers stay in evaluation mode."""
        super().train(mode)
        self.image_tower.eval()
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """Encode preprocessed frames, floating [B,T,3,s,s] -> embeddings [B,T,D], not normalised.

        Embeddings have autocast's dtype if it is on, else float32. A frozen tower keeps no
        gradients. Raises ValueError for another shape or dtype.
        """
        self._check_frames(frames)
        images = rearrange(frames, "b t c h w -> (b t) c h w").to(self.logit_scale.dtype)
        with torch.set_grad_enabled(self._tower_trains and torch.is_grad_enabled()):
            features = image_embeddings(self.image_tower, images)
        return rearrange(features, "(b t) d -> b t d", t=frames.shape[1])

    def class_embeddings(self, fixed: Tensor) -> Tensor:
        """Return the embeddings [C,D] of the training classes as they are now, with gradients.

        They are `fixed` [C,D] unless the texts train. Training, evaluation and `publish` ask here,
        so that a model with texts of its own overrides only this. All processes have the same.
        """
        if self.texts is None:
            return fixed
        trained: Tensor = self.texts()
        return trained

    def training_loss(
        self,
        frames: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        draw: Any,
        subsets: Tensor | None = None,
        **weights: float,
    ) -> Any:
        """Return the losses of one batch, averaged over samples, as `Head.training_loss` does.

        `frames` floating [B,T,3,s,s], preprocessed; `labels` int64 [B] (or zeros and ones [B,C]
        where a video may show several classes), best on the CPU, where checking them does not wait
        for a GPU; `class_embeddings` [C,D], for which `self.class_embeddings` may have newer ones;
        `draw`, `subsets` and `weights` (missing ones: the recipe's defaults) as
        `Head.training_loss` takes them. Towers and head run under the caller's autocast, the losses
        outside it. The features are not detached. Raises ValueError for wrong shapes or labels,
        UserError for more frames than positions.
        """
        self._check_frames(frames)
        check_labels(labels, len(frames), class_embeddings.shape[0])
        class_embeddings = self.class_embeddings(class_embeddings)
        features = self.encode(frames)
        scale = self.logit_scale.reshape(())
        terms = self.head.training_loss(
            features,
            labels.to(features.device, non_blocking=True),
            class_embeddings,
            scale,
            draw,
            subsets,
            TrainConfig().loss_weights | weights,
        )
        # With the feature loss alone, the scale would get no gradient, and DDP would wait for it.
        total = terms.total + 0.0 * scale
        if self.head.logit_bias is not None:
            total = total + 0.0 * self.head.logit_bias.sum()
        return terms._replace(total=total)

    def forward(self, frames: Tensor, class_embeddings: Tensor, modulate: bool = True) -> Tensor:
        """Return cosines [B,C] of preprocessed `frames` [B,T,3,s,s] with `class_embeddings` [C,D].

        This is the head's evaluation pass (`Head.forward`); every view is a sample. Call it in
        evaluation mode and without gradients. Errors as in `training_loss`.
        """
        self._check_frames(frames)
        cosines: Tensor = self.head(self.encode(frames), class_embeddings, modulate)
        return cosines

    def weights_of(self, config: FinetuneConfig) -> dict[str, float]:
        """Return the `weights` of `training_loss` in a recipe."""
        return config.loss_weights

    def further_state(self) -> dict[str, Tensor]:
        """Return what the next step depends on besides trained parameters, by name, to be saved."""
        return {}

    def kept_bytes(self) -> int:
        """Return the bytes of activations that the tower keeps of one frame for the backward pass.

        They are most of a step's memory besides the weights; 0 if the tower is frozen or its input
        size is unknown.
        """
        if not self._tower_trains or self._size is None:
            return 0
        return self._kept(torch.zeros(1, 1, 3, *self._size, device=self.logit_scale.device))

    def _kept(self, clip: Tensor) -> int:
        """Return the bytes that encoding a clip keeps for the backward pass."""
        return bytes_kept(lambda: self.encode(clip), self.parameters())

    def tower_parameters(self) -> list[nn.Parameter]:
        """Return group 0 of `build_optimizer`: trained tower parameters and the logit scale."""
        towers = [*self.image_tower.parameters()]
        if self.texts is not None:
            towers += self.texts.parameters()
        return [*(p for p in towers if p.requires_grad), self.logit_scale]

    def _check_frames(self, frames: Tensor) -> None:
        size = "s,s" if self._size is None else f"{self._size[0]},{self._size[1]}"
        fits = frames.ndim == 5 and 0 not in frames.shape and frames.shape[2] == 3
        if not fits or (self._size is not None and tuple(frames.shape[3:]) != self._size):
            raise ValueError(f"frames must be [B,T,3,{size}], not {list(frames.shape)}")
        if not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype}: they must be preprocessed, floating")
        self.head.require_frames(frames.shape[1])


class TrainingStep(nn.Module):
    """A module whose forward is the weighted `EndToEndModel.training_loss`, for several processes.

    DistributedDataParallel wraps this module, because it hooks into `forward`, which in the model
    itself is the evaluation pass. FSDP2 shards the model, so that both passes work, after
    `register_fsdp_forward_method(model, "training_loss")`; FSDP2 accepts no scalar parameters, so
    `model.logit_scale` is left out of the sharding.
    """

    def __init__(
        self,
        model: EndToEndModel,
        **weights: float,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_weights = weights

    def forward(
        self,
        frames: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        draw: Any,
        subsets: Tensor | None = None,
        weight: float = 1.0,
    ) -> Any:
        """Return the losses of this process's part of a batch, each multiplied by `weight`.

        Processes average gradients, so n samples of N over W processes get weight n * W / N, which
        gives the gradient of the mean over all N. A part without samples (`frames` [0,T,3,s,s])
        uses a black clip with weight 0, because every process must exchange gradients.
        """
        if frames.shape[0] == 0:
            weight = 0.0
            frames = frames.new_zeros(1, *frames.shape[1:])
            labels = labels.new_zeros(1, *labels.shape[1:])
            subsets = None if subsets is None else subsets.new_zeros(1)
        terms = self.model.training_loss(
            frames, labels, class_embeddings, draw, subsets, **self.loss_weights
        )
        return terms._make(weight * term for term in terms)


def check_labels(labels: Tensor, clips: int, classes: int) -> None:
    """Raise ValueError unless `labels` fit so many clips and classes, as `training_loss` says."""
    several = labels.ndim == 2 and labels.shape[1] == classes
    if len(labels) != clips or not (several or labels.dtype == torch.int64):
        raise ValueError(
            f"labels must be int64 [{clips}], one per clip, not {labels.dtype} {list(labels.shape)}"
        )
    lowest, highest = (int(v) for v in labels.aminmax())
    if not several and (lowest < 0 or highest >= classes):
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"label {wrong} is none of the {classes} classes, 0 to {classes - 1}")


def _in_float32(image_tower: nn.Module) -> nn.Module:
    dtypes = {p.dtype for p in image_tower.parameters()} - {torch.float32, torch.float64}
    if dtypes:
        logger.warning(
            "the image tower was loaded in %s and is trained in float32 from those rounded "
            "weights: load it with precision fp32",
            " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        )
    return image_tower.float()


def _log_scale(logit_scale: float | Tensor) -> Tensor:
    """Return the parameter's value [] float32 from a multiplier (number) or logarithm (tensor)."""
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"the logit scale must be one number, not {list(logit_scale.shape)}")
        return logit_scale.detach().to("cpu", torch.float32, copy=True).reshape(())
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise UserError(f"logit scale {logit_scale} is not a multiplier: it must be positive")
    return torch.tensor(math.log(logit_scale))


def _input_size(image_tower: nn.Module) -> tuple[int, int] | None:
    size = getattr(image_tower, "image_size", None)  # every tower of open_clip has one
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))


@torch.no_grad()
def _output_width(image_tower: nn.Module, size: tuple[int, int]) -> int:
    """Measure D: not every tower has it as an attribute, and a changed tower may have it wrong."""
    parameter = next(image_tower.parameters())
    blank = torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
    return image_embeddings(image_tower.eval(), blank).shape[-1]
