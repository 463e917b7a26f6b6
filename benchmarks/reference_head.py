"""MoTE's head the straightforward way: the baseline of bench_head, written for it from the paper.

One `nn.Linear` per expert and projection, merged in every forward pass that merges; time-major
attention through `nn.MultiheadAttention`; the two passes of a training step one after the other;
float32 throughout. T = frames, B = batch, D = embedding width, E = experts, L = layers.

Source: MoTE (Zhu et al., NeurIPS 2024), sections 3.1 to 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from heads.methods.mote.routing import RoutingDraw


class ReferenceExperts(nn.Module):
    """E linear maps; a pass uses one of them, or the average of their weights."""

    def __init__(self, inputs: int, outputs: int, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(experts))

    def forward(self, hidden: Tensor, weights: Tensor | int) -> Tensor:
        if isinstance(weights, int):
            mapped: Tensor = self.experts[weights](hidden)
            return mapped
        weight = sum(w * e.weight for w, e in zip(weights, self.experts, strict=True))
        bias = sum(w * e.bias for w, e in zip(weights, self.experts, strict=True))
        return functional.linear(hidden, weight, bias)


class ReferenceBlock(nn.Module):
    def __init__(self, dim: int, heads: int, experts: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads)
        self.norm_1 = nn.LayerNorm(dim, eps=1e-12)
        self.norm_2 = nn.LayerNorm(dim, eps=1e-12)
        self.up = ReferenceExperts(dim, 4 * dim, experts)
        self.down = ReferenceExperts(4 * dim, dim, experts)

    def forward(self, hidden: Tensor, weights: Tensor | int) -> Tensor:
        normed = self.norm_1(hidden)
        hidden = hidden + self.attention(normed, normed, normed, need_weights=False)[0]
        inner = self.up(self.norm_2(hidden), weights)
        return hidden + self.down(inner * torch.sigmoid(1.702 * inner), weights)


class ReferenceHead(nn.Module):
    """`features` [B,T,D] -> [B,T,D]; `weights` per layer: an expert's number or weights [E]."""

    def __init__(self, dim: int, heads: int, layers: int, experts: int) -> None:
        super().__init__()
        self.number_of_experts = experts
        self.positions = nn.Embedding(77, dim)
        self.blocks = nn.ModuleList(ReferenceBlock(dim, heads, experts) for _ in range(layers))

    def forward(self, features: Tensor, weights: list[Tensor] | list[int]) -> Tensor:
        places = self.positions(torch.arange(features.shape[1]))
        hidden = (features + places).permute(1, 0, 2)
        for block, chosen in zip(self.blocks, weights, strict=True):
            hidden = block(hidden, chosen)
        return hidden.permute(1, 0, 2) + features

    def merging_weights(self, temperatures: tuple[float, ...]) -> list[Tensor]:
        numbers = torch.arange(1, self.number_of_experts + 1, dtype=torch.float32)
        return [(numbers / temperature).softmax(0) for temperature in temperatures]

    def cosines(self, frames: Tensor, classes: Tensor) -> Tensor:
        return functional.normalize(frames.mean(1), dim=-1) @ classes.T

    def loss(
        self, features: Tensor, labels: Tensor, classes: Tensor, scale: Tensor, draw: RoutingDraw
    ) -> Tensor:
        """The training objective: expert pass, merged pass, distance to the features."""
        expert = self(features, list(draw.experts))
        merged = self(features, self.merging_weights(draw.temperatures))
        total = functional.cross_entropy(scale * self.cosines(expert, classes), labels)
        total = total + 0.5 * functional.cross_entropy(
            scale * self.cosines(merged, classes), labels
        )
        return total + 0.1 * functional.mse_loss(merged, features)

    @torch.no_grad()
    def evaluate(self, features: Tensor, classes: Tensor, training_classes: Tensor) -> Tensor:
        """Cosines [B,C] with temporal feature modulation; experts are merged in every call."""
        even = [torch.zeros(self.number_of_experts).softmax(0)] * len(self.blocks)
        video = functional.normalize(features.mean(1), dim=-1)
        tested = classes[(video @ classes.T).topk(5).indices]
        trained = training_classes[(video @ training_classes.T).topk(5).indices]
        similarity = (tested @ trained.transpose(1, 2)).amax(-1).mean(-1)
        factor = torch.exp(-(1 - similarity) / 0.05)
        hidden = self(features, even) - features
        return self.cosines(factor[:, None, None] * hidden + features, classes)
