"""Pre-norm transformer over the frames of a view, with mixtures of experts as feed-forwards.

P = passes run together (1, or 2 in training), B = batch, T = frames, D = embedding width,
H = attention heads, L = layers, E = experts.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code, whose quirks are kept: LayerNorm
epsilon 1e-12, no final LayerNorm, positions added once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from heads.methods.mote.config import HeadConfig
from heads.methods.mote.experts import ExpertFeedForward

LAYER_NORM_EPSILON = 1e-12  # the released head's own LayerNorm, not PyTorch's 1e-5


class SelfAttention(nn.Module):
    """Full attention over T frames with a packed query-key-value projection and biases everywhere.

    It is written as two products and a softmax: at T = 8 on a CPU (D = 512, forward and backward)
    that takes a quarter of the time of `scaled_dot_product_attention` in bfloat16; in float32 it
    takes 1.7 times as long, under 2 % of a training step of that width. This also avoids the fused
    kernels' non-deterministic backward pass on GPUs.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.qkv_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_weight = nn.Parameter(torch.empty(dim, dim))
        self.out_bias = nn.Parameter(torch.empty(dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Packed projection Xavier-uniform over [3D,D], output N(0, 0.02^2), biases 0."""
        nn.init.xavier_uniform_(self.qkv_weight, generator=generator)
        nn.init.normal_(self.out_weight, std=0.02, generator=generator)
        nn.init.zeros_(self.qkv_bias)
        nn.init.zeros_(self.out_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [...,T,D] -> [...,T,D]."""
        packed = functional.linear(hidden, self.qkv_weight, self.qkv_bias)
        query, key, value = rearrange(
            packed, "... t (three h d) -> three ... h t d", three=3, h=self.heads
        )
        affinity = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        mixed = affinity.softmax(-1).to(value.dtype) @ value
        joined = rearrange(mixed, "... h t d -> ... t (h d)")
        return functional.linear(joined, self.out_weight, self.out_bias)


class Block(nn.Module):
    """`h + attention(norm(h))`, then `h + feed_forward(norm(h))`."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPSILON)
        self.attention = SelfAttention(config.dim, config.attention_heads)
        self.feed_forward_norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPSILON)
        self.feed_forward = ExpertFeedForward(config)

    def forward(self, hidden: Tensor, coefficients: Tensor | None) -> Tensor:
        """`hidden` [P or 1, B,T,D] -> [P,B,T,D]; `coefficients` as `ExpertFeedForward` takes."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        tokens = rearrange(self.feed_forward_norm(hidden), "p b t d -> p (b t) d")
        added: Tensor = self.feed_forward(tokens, coefficients)
        return hidden + rearrange(added, "p (b t) d -> p b t d", t=hidden.shape[2])


class TemporalTransformer(nn.Module):
    """Position table and L blocks; `config` of kind "mote" or "transformer"."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(config.positions, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as the released code does; norms are ones and zeros already."""
        nn.init.normal_(self.positions, std=0.02, generator=generator)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.reset_parameters(generator)
            block.feed_forward.reset_parameters(generator)

    def forward(self, features: Tensor, coefficients: Sequence[Tensor] | None = None) -> Tensor:
        """`features` [B,T,D] -> [P,B,T,D].

        `coefficients` holds, per layer, those that `ExpertFeedForward` takes; the passes share
        everything up to the first feed-forward. None means the merged evaluation pass (P = 1).
        """
        hidden = (features + self.positions[: features.shape[1]])[None]
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, None if coefficients is None else coefficients[layer])
        return hidden
