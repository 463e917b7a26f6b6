"""The base class of all heads: CLIP frame features of a view in, cosines with class texts out.

B = batch (views), T = frames, D = embedding width, C = classes tested, S = training classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.mote.modulation import modulation
from heads.methods.registry import method
from heads.methods.settings import HeadOrigin, MethodConfig
from heads.methods.text_classifier import class_cosines, video_embeddings

CLIP_LOGIT_SCALE: Final = (
    100.0  # the multiplier CLIP's own training ended at (Radford et al., 2021)
)


class Head(nn.Module):
    """A head, which adds `hidden` to each frame of a video and averages the frames.

    A method inherits from this class, writes `hidden`, `reset_parameters` and `training_loss`, and
    overrides whatever else differs. The output for a view is `m * hidden(x) + x`, with m = 1 in
    training and without modulation.

    Attributes: `config`; `origin`, what the head was trained on (None if built by hand).
    """

    of_views: ClassVar[bool] = False
    """Whether the rows that it takes are of whole views (`Provenance.of_views`), not of frames."""

    training_class_embeddings: Tensor
    """[S,D] buffer, unit rows; modulation compares with them."""
    logit_scale: Tensor
    """[] buffer, natural logarithm of the multiplier used in training."""
    logit_bias: nn.Parameter | None
    """[1] what is added to scaled cosines before the sigmoid; only in a head for several classes a
    video, whose probabilities are independent. None: the classes share one softmax."""
    class_weights: Tensor | None
    """[S] buffer that no file holds: what the classes count in training; None: all the same."""

    def __init__(self, config: MethodConfig, training_classes: int) -> None:
        super().__init__()
        self.config: Any = config
        self.origin: HeadOrigin | None = None
        self.register_buffer("training_class_embeddings", torch.zeros(training_classes, config.dim))
        self.register_buffer("logit_scale", torch.tensor(math.log(CLIP_LOGIT_SCALE)))
        self.register_parameter("logit_bias", None)
        self.register_buffer("class_weights", None, persistent=False)

    def take_several_classes(self, bias: float = 0.0) -> None:
        """Make this a head for several classes a video, with the given bias to begin with."""
        self.logit_bias = nn.Parameter(torch.full_like(self.logit_scale[None], bias))

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities [...,C] float64 of classes with the scores (cosines) [...,C].

        It is the softmax of (logit scale * score), or, for several classes a video, the sigmoid of
        (logit scale * score + bias), in which no class depends on another.
        """
        logits = self.logit_scale.double().exp() * scores.double()
        if self.logit_bias is None:
            return logits.softmax(-1)
        return (logits + self.logit_bias.detach().double()).sigmoid()

    def hidden(self, features: Tensor) -> Tensor | None:
        """Return what evaluation adds to `features` [B,T,D], also [B,T,D]; None for nothing."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the first weights of a new head; `generator` is on the CPU."""

    def shrink(self, share: float) -> None:
        """Take away `share` (0 to 1) of what the head adds to the mean of frames; 1: all of it.

        A head without such weights stays as it is.
        """

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return AdamW's groups of the trained parameters: `params` and their `weight_decay`."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "weight_decay": weight_decay}]

    def draw(self, generator: torch.Generator) -> Any:
        """Make the random draw of one training step, for the whole batch; `generator` on CPU."""
        return None

    def training_loss(
        self,
        features: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        logit_scale: Tensor,
        draw: Any,
        subsets: Tensor | None,
        weights: Mapping[str, float],
    ) -> Any:
        """Return the losses of one batch: a NamedTuple of scalars, `total`, then `Method.losses`.

        `features` floating [B,T,D], not detached; `labels` int64 [B], or [B,C] of zeros and ones
        where a video may show several classes (`classification_loss` takes both);
        `class_embeddings` [C,D]; `logit_scale` [] natural logarithm; `draw` from `draw`; `subsets`
        int64 [B], where `data_subsets` is not 0. `weights` are the recipe's
        (`TrainConfig.loss_weights`). The pass runs under the caller's autocast, the losses outside
        it.
        """
        raise NotImplementedError

    def fit(self, embeddings: Tensor, labels: Tensor, seed: int) -> Mapping[str, float]:
        """Learn all at once what a method that is `fitted` learns, and return facts about it.

        `embeddings` floating [n,D], unit video embeddings on the head's device; `labels` int64 [n],
        or [n,C] of zeros and ones where the method is `multi_label` and a video may show several;
        `seed` fixes every random choice. The facts, such as `loss`, go into the run's metrics.
        """
        raise NotImplementedError

    def require_sound(self) -> None:
        """Raise WorkError if tensors of the right shapes hold what the head cannot work with."""

    def check_loss_weights(self, weights: Mapping[str, float]) -> None:
        """Raise UserError if the recipe's loss weights leave this head without a loss."""

    @property
    def data_subsets(self) -> int:
        """The number of subsets that the training videos are divided into; 0 for none."""
        return 0

    @property
    def most_frames(self) -> int | None:
        """The most frames per view that the head takes; None for any number."""
        return None

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts, in order, that may be kept in shares over several GPUs."""
        return []

    def scorer(
        self, class_embeddings: Tensor, class_names: Sequence[str] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Return the function from unit video embeddings [...,D] to scores of classes [...,C].

        `class_embeddings` [C,D] belong to `class_names`. A score is a cosine, or a logit divided by
        the multiplier of cosines; -inf for a class that `require_classes` refuses.
        """
        return lambda embeddings: class_cosines(embeddings, class_embeddings)

    def require_classes(self, class_names: Sequence[str]) -> None:
        """Raise UserError if the head cannot score a class, given its text."""

    def merged(self) -> Head:
        """Return the head as one plain network on the CPU, with the same cosines, for export."""
        return self.cpu().eval()

    def forward(self, features: Tensor, class_embeddings: Tensor, modulate: bool = True) -> Tensor:
        """Return evaluation cosines [B,C] of `features` [B,T,D] and `class_embeddings` [C,D].

        `modulate` applies Temporal Feature Modulation (no effect where the head adds nothing or its
        configuration turns it off). Floating dtypes are cast to the head's. Raises UserError on
        another width, more frames than the head takes, or fewer classes than modulation compares.
        """
        class_embeddings = self.checked(class_embeddings, "class embeddings", 2)
        frames = self.aggregate(features, class_embeddings if modulate else None)
        return self.scorer(class_embeddings)(video_embeddings(frames))

    def aggregate(self, features: Tensor, class_embeddings: Tensor | None = None) -> Tensor:
        """Apply the head to frames, [B,T,D] -> [B,T,D]; modulated if given class embeddings."""
        features, hidden = self.temporal(features)
        if hidden is None:
            return features
        if class_embeddings is None or not self.config.modulates:
            return hidden + features
        class_embeddings = self.checked(class_embeddings, "class embeddings", 2)
        scale = modulation(
            features,
            class_embeddings,
            self.training_class_embeddings,
            self.config.modulation_neighbours,
            self.config.modulation_temperature,
        ).scale
        return scale[:, None, None] * hidden + features

    def temporal(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `features` [B,T,D] in the head's dtype and their `hidden`; errors as `forward`."""
        features = self.checked(features, "features", 3)
        return features, self.hidden(features)

    def view_vectors(self, features: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return what scores are computed from, of `features` [B,T,D]: three vectors [B,D] a view.

        They are the means over frames of `hidden` (None without one), of the frames, and of the
        frames scaled to length 1. Errors as `forward`.
        """
        features, hidden = self.temporal(features)
        units = functional.normalize(features, dim=-1).mean(1)
        return None if hidden is None else hidden.mean(1), features.mean(1), units

    def checked(self, values: Tensor, what: str, rank: int) -> Tensor:
        """Return features (rank 3) or class embeddings (2) in the head's dtype, or UserError."""
        if values.ndim != rank or values.shape[-1] != self.config.dim:
            raise UserError(
                f"{what} of shape {list(values.shape)} do not fit this head: it takes "
                f"{'[batch, frames, ' if rank == 3 else '[classes, '}{self.config.dim}]; "
                "use features of the encoder it was trained on"
            )
        if rank == 3:
            self.require_frames(values.shape[1])
        return values.to(self.logit_scale.dtype)

    def require_frames(self, frames: int) -> None:
        """Raise UserError if the head takes fewer than `frames` frames per view."""
        most = self.most_frames
        if most is not None and frames > most:
            raise UserError(
                f"{frames} frames per view are more than the head's {most} positions: choose fewer "
                "frames"
            )


def build_head(
    config: MethodConfig,
    class_embeddings: Tensor | None = None,
    *,
    logit_scale: float = CLIP_LOGIT_SCALE,
    generator: torch.Generator | None = None,
) -> Head:
    """Build a new head of the method `config.kind` on the CPU and draw its first weights.

    `class_embeddings` [S,D] belong to the training classes (with None, modulation is impossible);
    `logit_scale` is the encoder's multiplier. `generator` (CPU) makes the draw reproducible.
    Raises UserError when the embeddings have another width than the head.
    """
    if class_embeddings is None:
        class_embeddings = torch.zeros(0, config.dim)
    if class_embeddings.ndim != 2 or class_embeddings.shape[1] != config.dim:
        raise UserError(
            f"class embeddings of shape {list(class_embeddings.shape)} do not fit a head of width "
            f"{config.dim}: use the class texts of the same encoder"
        )
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise UserError(f"logit scale {logit_scale} is not a multiplier: it must be positive")
    head = method(config.kind).head(config, class_embeddings.shape[0])
    head.training_class_embeddings.copy_(class_embeddings)
    head.logit_scale.fill_(math.log(logit_scale))
    head.reset_parameters(generator)
    return head.eval()
