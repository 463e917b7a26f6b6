"""The mixture feed-forward layer of MoTE: E experts, stacked, merged by one product.

P = passes run together (1, or 2 in training: expert pass and merged pass), E = experts,
R = routings (1, or 2 where both projections are routed separately), N = tokens (batch x frames),
D = embedding width, H = 4D hidden width.

Source: MoTE (Zhu et al., NeurIPS 2024), sections 3.2 and 3.3, and its released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from heads.methods.mote.config import HeadConfig

EXPANSION = 4  # H / D, as in CLIP's transformers


class FeedForwardWeights(NamedTuple):
    """Weights of P feed-forward networks: up [P,H,D] and [P,H], down [P,D,H] and [P,D]."""

    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


def temperature_weights(temperature: float, experts: int) -> Tensor:
    """Return merging weights [E] float32: softmax((1, ..., E) / temperature); infinity is uniform.

    They are computed in float32 whatever the layer's dtype, as the released code does.
    """
    return (torch.arange(1, experts + 1, dtype=torch.float32) / temperature).softmax(0)


def quick_gelu(hidden: Tensor) -> Tensor:
    """CLIP's activation x * sigmoid(1.702 x)."""
    if not torch.is_grad_enabled():  # nothing is kept for a gradient: one buffer will do
        return (1.702 * hidden).sigmoid_().mul_(hidden)
    return hidden * torch.sigmoid(1.702 * hidden)


class ExpertFeedForward(nn.Module):
    """E feed-forward experts `Linear(D,4D) -> QuickGELU -> Linear(4D,D)` as stacked tensors.

    A pass runs with `coefficients` [P,E]: a one-hot row is the expert pass, softmax weights the
    merged pass. Weights are mixed, not outputs, so every pass costs one network. By the head's
    `placement` a projection may be shared (one stacked entry, whose coefficients are ignored), or
    both may be routed separately, with coefficients [2,P,E] for up and down.

    In evaluation the experts merge with softmax(`fusion_logits`), [E], or [2,E] for separate
    routing; the logits are never trained (zeros give the plain average) but a checkpoint may hold
    other values. The merged weights are kept until a weight changes or training begins. Aggregation
    "outputs" runs all experts instead and averages their outputs.
    """

    fusion_logits: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        dim, hidden, experts = config.dim, EXPANSION * config.dim, config.experts
        up, down = (1 if config.placement == shared else experts for shared in ("down", "up"))
        self.config = config
        self.up_weight = nn.Parameter(torch.empty(up, hidden, dim))
        self.up_bias = nn.Parameter(torch.empty(up, hidden))
        self.down_weight = nn.Parameter(torch.empty(down, dim, hidden))
        self.down_bias = nn.Parameter(torch.empty(down, dim))
        logits = (experts,) if config.routings == 1 else (config.routings, experts)
        self.register_buffer("fusion_logits", torch.zeros(logits))
        self._merged: tuple[tuple[object, ...], FeedForwardWeights] | None = None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weights from N(0, 0.02^2) and set biases and fusion logits to 0.

        Every expert has its own draw, or all have the same one with initialisation "identical".
        """
        for weight in (self.up_weight, self.down_weight):
            drawn = weight if self.config.initialisation == "different" else weight[:1]
            nn.init.normal_(drawn, std=0.02, generator=generator)
            if drawn is not weight:
                with torch.no_grad():
                    weight.copy_(drawn.expand_as(weight))
        for zero in (self.up_bias, self.down_bias, self.fusion_logits):
            nn.init.zeros_(zero)

    def train(self, mode: bool = True) -> ExpertFeedForward:
        """Switch the mode and forget the merged weights."""
        self._merged = None
        super().train(mode)
        return self

    @property
    def _stacked(self) -> FeedForwardWeights:
        return FeedForwardWeights(self.up_weight, self.up_bias, self.down_weight, self.down_bias)

    def combine(self, coefficients: Tensor) -> FeedForwardWeights:
        """Mix the experts with `coefficients` [P,E] or [2,P,E] into P networks.

        Computed in the parameters' dtype, with one product per tensor and one for its gradient, and
        outside autocast, because bfloat16 would round the master weights before they are used.
        """
        with torch.autocast(self.up_weight.device.type, enabled=False):
            rows = coefficients.to(self.up_weight)
            up, down = rows if rows.ndim == 3 else (rows, rows)
            return FeedForwardWeights(
                _mix(self.up_weight, up),
                _mix(self.up_bias, up),
                _mix(self.down_weight, down),
                _mix(self.down_bias, down),
            )

    def evaluation_weights(self) -> FeedForwardWeights:
        """Return the experts merged for evaluation (P = 1), kept from before if nothing changed."""
        stacked = self._stacked
        coefficients = self.fusion_logits.softmax(-1).unsqueeze(-2)
        if torch.is_grad_enabled() and any(w.requires_grad for w in stacked):
            return self.combine(coefficients)  # a kept tensor would not propagate gradients
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
        """`hidden` [P or 1, N, D] -> [P,N,D].

        `coefficients` [P,E], or [2,P,E] for separate routing; None is evaluation (P = 1).
        """
        if coefficients is not None:
            return _feed_forward(hidden, self.combine(coefficients))
        # The average of linear maps is the map of averaged weights: only whole networks differ.
        if self.config.aggregation == "outputs" and self.config.placement == "ffn":
            outputs = _feed_forward(hidden, self._stacked)
            share = self.fusion_logits.softmax(0).to(outputs.dtype)
            return torch.einsum("e,end->nd", share, outputs)[None]
        return _feed_forward(hidden, self.evaluation_weights())


def _mix(stacked: Tensor, rows: Tensor) -> Tensor:
    """P mixtures of a stacked tensor [E,...] or [1,...] (shared) with `rows` [P,E] -> [P,...]."""
    if stacked.shape[0] == 1:  # shares add up to 1
        return stacked.expand(rows.shape[0], *stacked.shape[1:])
    return (rows @ stacked.flatten(1)).view(-1, *stacked.shape[1:])


def _feed_forward(hidden: Tensor, weights: FeedForwardWeights) -> Tensor:
    """P networks on `hidden` [P or 1, N, D] -> [P,N,D]."""
    inner = quick_gelu(_project(hidden, weights.up_weight, weights.up_bias))
    return _project(inner, weights.down_weight, weights.down_bias)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """P linear maps at once: `hidden` [P or 1, N, I], `weight` [P,O,I], `bias` [P,O] -> [P,N,O]."""
    passes = weight.shape[0]
    if passes == 1:
        return functional.linear(hidden, weight.squeeze(0), bias.squeeze(0))
    hidden = hidden.expand(passes, -1, -1)
    return torch.baddbmm(bias[:, None, :], hidden, weight.transpose(1, 2))
