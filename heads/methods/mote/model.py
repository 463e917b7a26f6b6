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

from collections.abc import Mapping
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.head import Head
from heads.methods.mote.config import HeadConfig
from heads.methods.mote.experts import temperature_weights
from heads.methods.mote.losses import LossTerms, TrainingPass, mote_loss
from heads.methods.mote.routing import RoutingDraw
from heads.methods.mote.temporal_transformer import TemporalTransformer
from heads.methods.text_classifier import class_cosines, video_embeddings


class TemporalHead(Head):
    """MoTE's head, the plain temporal transformer, or no head at all, by `config.kind`.

    The output for a view is `m * transformer(x) + x` with m = 1 in training and without
    modulation; since the transformer's residual stream starts at x, that is `2x + ...` for m = 1.
    """

    def __init__(self, config: HeadConfig, training_classes: int) -> None:
        super().__init__(config, training_classes)
        self.config: HeadConfig = config
        self.transformer = None if config.kind == "mean" else TemporalTransformer(config)

    def hidden(self, features: Tensor) -> Tensor | None:
        """Return the merged pass's output, before modulation and skip; None for kind "mean"."""
        return None if self.transformer is None else self.transformer(features)[0]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as the released code does."""
        if self.transformer is not None:
            self.transformer.reset_parameters(generator)

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        """Take `share` of the positions and of all that is added to the residual stream away."""
        added = ("positions", "out_weight", "out_bias", "down_weight", "down_bias")
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[2] in added:
                parameter.mul_(1 - share)

    def draw(self, generator: torch.Generator) -> RoutingDraw:
        """Draw the experts and temperatures of one step."""
        return RoutingDraw.sample(self.config, generator)

    def training_loss(
        self,
        features: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        logit_scale: Tensor,
        draw: RoutingDraw,
        subsets: Tensor | None,
        weights: Mapping[str, float],
    ) -> LossTerms:
        """Return `mote_loss` of `training_pass`; arguments as `Head.training_loss`."""
        passes = self.training_pass(features, class_embeddings, draw, subsets)
        with torch.autocast(features.device.type, enabled=False):
            return mote_loss(
                passes,
                features,
                labels,
                logit_scale.exp(),
                **weights,
                logit_bias=self.logit_bias,
                class_weights=self.class_weights,
            )

    def check_loss_weights(self, weights: Mapping[str, float]) -> None:
        """Raise UserError if a plain transformer, with its one pass, has expert weight 0."""
        if self.config.kind == "transformer" and not weights["expert_weight"]:
            raise UserError(
                "expert_weight is 0, and a plain transformer has no other loss: choose another "
                "weight or a head of kind mote"
            )

    @property
    def data_subsets(self) -> int:
        """One subset for every expert with "subset" routing, else 0."""
        return self.config.experts if self.config.routing == "subset" else 0

    @property
    def most_frames(self) -> int | None:
        """The number of rows in the position table; None for kind "mean"."""
        return None if self.transformer is None else self.config.positions

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of the transformer."""
        return [] if self.transformer is None else list(self.transformer.blocks)

    @torch.no_grad()
    def merged(self) -> TemporalHead:
        """Return the head with every block's experts merged into one, as evaluation merges them.

        It has the same cosines and the same origin. Raises UserError for a head that averages its
        experts' outputs, because no single network computes such an average.
        """
        config = self.config
        if self.transformer is None:
            return self.cpu()
        if config.aggregation == "outputs" and config.placement == "ffn" and config.experts > 1:
            raise UserError(
                "the head averages its experts' outputs, which no single network gives: only a "
                "head with aggregation weights can be merged"
            )
        merged = TemporalHead(
            replace(config, experts=1, placement="ffn", aggregation="weights", expert_prior=()),
            self.training_class_embeddings.shape[0],
        )
        if self.logit_bias is not None:
            merged.take_several_classes()
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        for place, block in enumerate(self.transformer.blocks):
            prefix = f"transformer.blocks.{place}.feed_forward."
            weights = block.feed_forward.evaluation_weights()  # type: ignore[union-attr, operator]
            state |= {f"{prefix}{name}": value.cpu() for name, value in weights._asdict().items()}
            state[f"{prefix}fusion_logits"] = torch.zeros(1)
        merged.load_state_dict(state)
        merged.origin = self.origin
        return merged.eval()

    def training_pass(
        self,
        features: Tensor,
        class_embeddings: Tensor,
        draw: RoutingDraw,
        subsets: Tensor | None = None,
    ) -> TrainingPass:
        """Run expert pass and merged pass together over the same `features` [B,T,D].

        `draw` has L*R entries. `subsets` [B] int64, the data subset of every sample, must be given
        for "subset" routing and only then (ValueError otherwise). Kind "transformer" has one
        pass; kind "mean" returns its features for both.
        """
        features = self.checked(features, "features", 3)
        class_embeddings = self.checked(class_embeddings, "class embeddings", 2)
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
        """Return per layer [P,E] or [2,P,E]: a one-hot row for the expert pass, then the merged."""
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
            table = rearrange(table, "(l r) p e -> l r p e", r=routings)
        return list(table.to(self.logit_scale.device))
