"""A temporal head: CLIP frame features of a view in, cosines with class texts out.

B = batch (views), T = frames, D = embedding width, C = classes tested, S = training classes,
L = layers, E = experts, R = routings of a layer (1, or 2 for placement "separate"), H = 4D.

Names in the state dict:

| name | shape | |
|---|---|---|
| `training_class_embeddings` | [S,D] | buffer, unit rows; modulation compares with them |
| `logit_scale` | [] | buffer, natural logarithm of the multiplier used in training |
| `transformer.positions` | [77,D] | |
| `transformer.blocks.L.attention_norm.weight`, `.bias` | [D] | |
| `transformer.blocks.L.attention.qkv_weight`, `.qkv_bias` | [3D,D], [3D] | query, key, value |
| `transformer.blocks.L.attention.out_weight`, `.out_bias` | [D,D], [D] | |
| `transformer.blocks.L.feed_forward_norm.weight`, `.bias` | [D] | |
| `transformer.blocks.L.feed_forward.up_weight`, `.up_bias` | [E,H,D], [E,H] | |
| `transformer.blocks.L.feed_forward.down_weight`, `.down_bias` | [E,D,H], [E,D] | |
| `transformer.blocks.L.feed_forward.fusion_logits` | [E] | buffer, not trained |

Kind "mean" has the two buffers only. With placement "up" or "down" the other projection has one
entry instead of E; with "separate" the fusion logits are [2,E], up and down.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.mote.config import HeadConfig, HeadOrigin, RoutingDraw
from heads.methods.mote.experts import temperature_weights
from heads.methods.mote.modulation import modulation
from heads.methods.mote.temporal_transformer import TemporalTransformer
from heads.methods.text_classifier import class_cosines, video_embeddings

CLIP_LOGIT_SCALE = 100.0  # the multiplier CLIP's own training ended at (Radford et al., 2021)


class TrainingPass(NamedTuple):
    """What the loss of one training step is computed from."""

    expert_cosines: Tensor
    """[B,C] cosines of the expert pass (of the only pass for kind "transformer")."""
    merged_cosines: Tensor | None
    """[B,C] cosines of the merged pass; None for kind "transformer"."""
    merged_features: Tensor | None
    """[B,T,D] output of the merged pass; None for kind "transformer"."""


class TemporalHead(nn.Module):
    """MoTE's head, the plain temporal transformer, or no head at all, by `config.kind`.

    The output for a view is `m * transformer(x) + x` with m = 1 in training and without
    modulation; since the transformer's residual stream starts at x, that is `2x + ...` for m = 1.

    Attributes: `config`; `origin`, what it was trained on (None when built by hand).
    """

    training_class_embeddings: Tensor
    logit_scale: Tensor

    def __init__(self, config: HeadConfig, training_classes: int) -> None:
        super().__init__()
        self.config = config
        self.origin: HeadOrigin | None = None
        self.register_buffer("training_class_embeddings", torch.zeros(training_classes, config.dim))
        self.register_buffer("logit_scale", torch.tensor(math.log(CLIP_LOGIT_SCALE)))
        self.transformer = None if config.kind == "mean" else TemporalTransformer(config)

    def forward(self, features: Tensor, class_embeddings: Tensor, modulate: bool = True) -> Tensor:
        """Cosines [B,C] of `features` [B,T,D] with `class_embeddings` [C,D] (evaluation pass).

        Experts are merged; `modulate` applies Temporal Feature Modulation (no effect for kind
        "mean" or where the configuration turns it off). Floating dtypes are cast to the head's.
        Raises UserError on another width, more frames than positions, or fewer classes than
        modulation compares (five).
        """
        class_embeddings = self._checked(class_embeddings, "class embeddings", 2)
        frames = self.aggregate(features, class_embeddings if modulate else None)
        return class_cosines(video_embeddings(frames), class_embeddings)

    def aggregate(self, features: Tensor, class_embeddings: Tensor | None = None) -> Tensor:
        """Frame features after the head, [B,T,D] -> [B,T,D]; with class embeddings, modulated."""
        features, hidden = self.temporal(features)
        if hidden is None:
            return features
        if class_embeddings is None or not self.config.modulates:
            return hidden + features
        class_embeddings = self._checked(class_embeddings, "class embeddings", 2)
        scale = modulation(
            features,
            class_embeddings,
            self.training_class_embeddings,
            self.config.modulation_neighbours,
            self.config.modulation_temperature,
        ).scale
        return scale[:, None, None] * hidden + features

    def temporal(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """(`features` [B,T,D] in the head's dtype, the transformer's output of them, [B,T,D]).

        The output is that of the merged pass, before modulation and skip; None for kind "mean".
        Raises UserError as `forward`.
        """
        features = self._checked(features, "features", 3)
        return features, None if self.transformer is None else self.transformer(features)[0]

    def training_pass(
        self,
        features: Tensor,
        class_embeddings: Tensor,
        draw: RoutingDraw,
        subsets: Tensor | None = None,
    ) -> TrainingPass:
        """Expert pass and merged pass over the same `features` [B,T,D], run together.

        `draw` has L*R entries, and `subsets` [B] int64, the data subset of every sample, is given
        for "subset" routing and only for it (ValueError otherwise). Kind "transformer" has one
        pass; kind "mean" returns its features for both.
        """
        features = self._checked(features, "features", 3)
        class_embeddings = self._checked(class_embeddings, "class embeddings", 2)
        if (subsets is not None) != (self.config.routing == "subset"):
            raise ValueError(
                f"{self.config.routing} routing {'takes no' if subsets is not None else 'needs'} "
                "data subsets of the samples"
            )
        if subsets is None:
            return self._training_pass(features, class_embeddings, draw)
        # A batch of several subsets is one batch for each of them, with its own expert.
        present = sorted(set(subsets.tolist()))
        members = [(subsets == subset).nonzero().squeeze(1) for subset in present]
        passes = [
            self._training_pass(
                features[part], class_embeddings, replace(draw, experts=(e,) * len(draw.experts))
            )
            for e, part in zip(present, members, strict=True)
        ]
        back = torch.cat(members).argsort()
        return TrainingPass._make(torch.cat(parts)[back] for parts in zip(*passes, strict=True))

    def _training_pass(
        self, features: Tensor, class_embeddings: Tensor, draw: RoutingDraw
    ) -> TrainingPass:
        if self.transformer is None:
            cosines = class_cosines(video_embeddings(features), class_embeddings)
            return TrainingPass(cosines, cosines, features)
        frames = self.transformer(features, self._coefficients(draw)) + features
        cosines = class_cosines(video_embeddings(frames), class_embeddings)
        if self.config.kind == "transformer":
            return TrainingPass(cosines[0], None, None)
        return TrainingPass(cosines[0], cosines[1], frames[1])

    def _coefficients(self, draw: RoutingDraw) -> list[Tensor]:
        """Per layer [P,E], or [2,P,E]: one-hot for the expert pass, then the merged pass."""
        layers, experts, routings = self.config.layers, self.config.experts, self.config.routings
        if not len(draw.experts) == len(draw.temperatures) == layers * routings:
            raise ValueError(
                f"the draw has {len(draw.experts)} experts and {len(draw.temperatures)} "
                f"temperatures, the head {layers} layers: one of each per layer is needed, two "
                'with placement "separate"'
            )
        if any(not 0 <= expert < experts for expert in draw.experts):
            raise ValueError(f"the draw names experts {draw.experts}, the head has {experts}")
        if self.config.kind == "transformer":
            return [torch.ones(1, 1)] * layers
        table = torch.stack(
            [
                functional.one_hot(torch.tensor(draw.experts), experts).float(),
                torch.stack([temperature_weights(t, experts) for t in draw.temperatures]),
            ],
            dim=1,
        )
        if routings > 1:
            table = table.view(layers, routings, *table.shape[1:])
        return list(table.to(self.logit_scale.device))

    def _checked(self, values: Tensor, what: str, rank: int) -> Tensor:
        if values.ndim != rank or values.shape[-1] != self.config.dim:
            raise UserError(
                f"{what} of shape {list(values.shape)} do not fit this head: it takes "
                f"{'[batch, frames, ' if rank == 3 else '[classes, '}{self.config.dim}]; "
                "use features of the encoder it was trained on"
            )
        if rank == 3 and self.transformer is not None:
            positions = self.config.positions
            if values.shape[1] > positions:
                raise UserError(
                    f"{values.shape[1]} frames per view are more than the head's {positions} "
                    "positions: choose fewer frames"
                )
        return values.to(self.logit_scale.dtype)


def build_head(
    config: HeadConfig,
    class_embeddings: Tensor | None = None,
    *,
    logit_scale: float = CLIP_LOGIT_SCALE,
    generator: torch.Generator | None = None,
) -> TemporalHead:
    """A new head on the CPU, initialised as the released code does.

    `class_embeddings` [S,D] are those of the training classes (None: none, modulation impossible);
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
    head = TemporalHead(config, class_embeddings.shape[0])
    head.training_class_embeddings.copy_(class_embeddings)
    head.logit_scale.fill_(math.log(logit_scale))
    if head.transformer is not None:
        head.transformer.reset_parameters(generator)
    return head.eval()
