"""A block of a frozen tower in a low precision, beside tokens that stay in float32.

N = images, clips or sentences, M = tokens of each, d = width, h = heads, e = d / h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import torch
from einops import rearrange
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional

LONGEST: Final = 512
"""Tokens up to which attention keeps the share that every token has of every other. Forward and
backward, with 197 tokens in bfloat16, that takes 0.4 of the time of the fused call."""

QUICK: Final = 1.702  # QuickGELU is x * sigmoid(QUICK * x)


class FrozenBlock(nn.Module):
    """What a block of open_clip computes, with its products in `dtype`; norms and sums in float32.

    The weights are copies that are converted once; the block is left as it is. Gradients go to
    the tokens alone, so that nothing is kept for those of weights.
    """

    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    wide: Tensor
    wide_bias: Tensor
    narrow: Tensor
    narrow_bias: Tensor

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        source = cast(Any, block)
        quick = isinstance(source.mlp.gelu, QuickGELU)
        # With the factor in the weights, QuickGELU is a function that torch has, in one pass.
        factor = QUICK if quick else 1.0
        self._bend: Callable[[Tensor], Tensor] = functional.silu if quick else functional.gelu
        self.heads: int = source.attn.num_heads
        self.ln_1, self.ln_2 = source.ln_1, source.ln_2
        width: int = source.attn.embed_dim
        # A query's length is divided by sqrt(e) in its weights.
        of_parts = torch.ones(3 * width, 1, device=source.attn.in_proj_weight.device)
        of_parts[:width] = (width // self.heads) ** -0.5
        weights = {
            "qkv": of_parts * source.attn.in_proj_weight,
            "qkv_bias": of_parts[:, 0] * source.attn.in_proj_bias,
            "out": source.attn.out_proj.weight,
            "out_bias": source.attn.out_proj.bias,
            "wide": factor * source.mlp.c_fc.weight,
            "wide_bias": factor * source.mlp.c_fc.bias,
            "narrow": source.mlp.c_proj.weight / factor,
            "narrow_bias": source.mlp.c_proj.bias,
        }
        for name, value in weights.items():
            self.register_buffer(name, value.detach().to(dtype), persistent=False)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Return whether this class knows all that `block` does."""
        if type(block) is not ResidualAttentionBlock:
            return False
        plain = isinstance(block.ls_1, nn.Identity) and isinstance(block.ls_2, nn.Identity)
        bend = cast(Any, block.mlp).gelu
        return plain and (
            isinstance(bend, QuickGELU) or (type(bend) is nn.GELU and bend.approximate == "none")
        )

    def read(self, tokens: Tensor) -> Tensor:
        """Return what attention reads of tokens [N,M,d]: their first norm, in the low precision."""
        return cast(Tensor, self.ln_1(tokens)).to(self.qkv.dtype)

    def forward(self, tokens: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the block's output float32 [N,M,d] for `tokens` [N,M,d]; `read` as above.

        `mask` [M,M] is added to the products of queries and keys.
        """
        parts = rearrange(
            functional.linear(read, self.qkv, self.qkv_bias),
            "n m (c h e) -> c n h m e",
            c=3,
            h=self.heads,
        ).contiguous()
        query, key, value = parts.unbind()
        mask = None if mask is None else mask.to(read.dtype)
        if read.shape[1] > LONGEST:
            mixed = functional.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
        else:
            products = query @ key.mT
            if mask is not None:
                products = products + mask
            mixed = products.softmax(-1) @ value
        return self._after(tokens, rearrange(mixed, "n h m e -> n m (h e)"))

    def class_tokens(self, tokens: Tensor, read: Tensor) -> Tensor:
        """Return the first of the output's tokens alone, [N,1,d]; arguments as of `forward`.

        Keys and values of all tokens are not computed: queries go through the keys' weights, and
        the mean that they ask for goes through the values'. What a key's bias adds to a query's
        products is the same for all tokens, so that it changes nothing.
        """
        of_query, of_key, of_value = rearrange(self.qkv, "(c h e) d -> c h e d", c=3, h=self.heads)
        bias, _, added = rearrange(self.qkv_bias, "(c h e) -> c h e", c=3, h=self.heads)
        query = torch.einsum("nd,hed->nhe", read[:, 0], of_query) + bias
        asked = torch.einsum("nhe,hed->nhd", query, of_key)
        mean = torch.bmm(torch.bmm(asked, read.mT).softmax(-1), read)
        mixed = torch.einsum("nhd,hed->nhe", mean, of_value) + added
        return self._after(tokens[:, :1], rearrange(mixed, "n h e -> n 1 (h e)"))

    def _after(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """Return the output for tokens and what attention mixes of them, both [N,M,d]."""
        tokens = summed(tokens, functional.linear(mixed, self.out, self.out_bias))
        read = cast(Tensor, self.ln_2(tokens)).to(self.wide.dtype)
        inner = self._bend(functional.linear(read, self.wide, self.wide_bias))
        return summed(tokens, functional.linear(inner, self.narrow, self.narrow_bias))


def summed(tokens: Tensor, added: Tensor) -> Tensor:
    """Return tokens float32 and what is added to them, of the same shape in a low precision."""
    return added.to(tokens.dtype).add_(tokens)  # adding types at once would make two copies
