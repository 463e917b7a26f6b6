"""The mixture feed-forward layer of MoTE: E experts, stacked, merged by one product.

P = passes run together (1, or 2 in training: expert pass and merged pass), E = experts,
N = tokens (batch x frames), D = embedding width, H = 4D hidden width.

Source: MoTE (Zhu et al., NeurIPS 2024), sections 3.2 and 3.3, and its released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 4  # H / D, as in CLIP's transformers


class FeedForwardWeights(NamedTuple):
    """Weights of P feed-forward networks: up [P,H,D] and [P,H], down [P,D,H] and [P,D]."""

    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


def temperature_weights(temperature: float, experts: int) -> Tensor:
    """Merging weights [E] float32: softmax((1, ..., E) / temperature); infinity averages evenly.

    They are formed in float32 whatever the layer's dtype, as the released code does.
    """
    return (torch.arange(1, experts + 1, dtype=torch.float32) / temperature).softmax(0)


def quick_gelu(hidden: Tensor) -> Tensor:
    """CLIP's activation x * sigmoid(1.702 x)."""
    return hidden * torch.sigmoid(1.702 * hidden)


class ExpertFeedForward(nn.Module):
    """E feed-forward experts `Linear(D,4D) -> QuickGELU -> Linear(4D,D)` as stacked tensors.

    A pass runs with `coefficients` [E]: a one-hot row is the expert pass, softmax weights the
    merged pass. Weights are mixed, not outputs, so every pass costs one network.

    In evaluation the experts merge with softmax(`fusion_logits`); those are never trained (zeros
    give the plain average) but a checkpoint may hold others. The merged weights are kept until a
    weight changes or training begins.
    """

    fusion_logits: Tensor

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        hidden = EXPANSION * dim
        self.experts = experts
        self.up_weight = nn.Parameter(torch.empty(experts, hidden, dim))
        self.up_bias = nn.Parameter(torch.empty(experts, hidden))
        self.down_weight = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down_bias = nn.Parameter(torch.empty(experts, dim))
        self.register_buffer("fusion_logits", torch.zeros(experts))
        self._merged: tuple[tuple[object, ...], FeedForwardWeights] | None = None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights N(0, 0.02^2), every expert its own draw; biases and fusion logits 0."""
        for weight in (self.up_weight, self.down_weight):
            nn.init.normal_(weight, std=0.02, generator=generator)
        for zero in (self.up_bias, self.down_bias, self.fusion_logits):
            nn.init.zeros_(zero)

    def train(self, mode: bool = True) -> ExpertFeedForward:
        """Switch the mode; forgets the merged weights."""
        self._merged = None
        super().train(mode)
        return self

    def combine(self, coefficients: Tensor) -> FeedForwardWeights:
        """Mix the experts with `coefficients` [P,E] into P networks, in the parameters' dtype.

        One product per tensor, and one for its gradient. Runs outside autocast: mixing in
        bfloat16 would round the master weights before they are used.
        """
        stacked = (self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        passes = coefficients.shape[0]
        if self.experts == 1:  # softmax over one expert is 1
            return FeedForwardWeights(*(w.expand(passes, *w.shape[1:]) for w in stacked))
        with torch.autocast(self.up_weight.device.type, enabled=False):
            rows = coefficients.to(self.up_weight)
            return FeedForwardWeights(
                *((rows @ w.flatten(1)).view(passes, *w.shape[1:]) for w in stacked)
            )

    def evaluation_weights(self) -> FeedForwardWeights:
        """The experts merged for evaluation (P = 1), from memory where nothing changed since."""
        stacked = (self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        coefficients = self.fusion_logits.softmax(0)[None]
        if torch.is_grad_enabled() and any(w.requires_grad for w in stacked):
            return self.combine(coefficients)  # a remembered tensor would pass no gradient on
        device = self.up_weight.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (low, *((w.data_ptr(), w._version, w.dtype) for w in (*stacked, self.fusion_logits)))
        if self._merged is None or self._merged[0] != key:
            merged = self.combine(coefficients)
            if low is not None:  # else autocast would cast again in every forward
                merged = FeedForwardWeights(*(w.to(low) for w in merged))
            self._merged = (key, merged)
        return self._merged[1]

    def forward(self, hidden: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """`hidden` [P or 1, N, D] -> [P,N,D]; `coefficients` [P,E], None for evaluation (P = 1)."""
        evaluate = self.evaluation_weights
        weights = evaluate() if coefficients is None else self.combine(coefficients)
        inner = quick_gelu(_project(hidden, weights.up_weight, weights.up_bias))
        return _project(inner, weights.down_weight, weights.down_bias)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """P linear maps at once: `hidden` [P or 1, N, I], `weight` [P,O,I], `bias` [P,O] -> [P,N,O]."""
    passes = weight.shape[0]
    if passes == 1:
        return functional.linear(hidden, weight.squeeze(0), bias.squeeze(0))
    hidden = hidden.expand(passes, -1, -1)
    return torch.baddbmm(bias[:, None, :], hidden, weight.transpose(1, 2))
