"""The trained part of DiST: a temporal encoder and an integration branch beside a frozen CLIP.

B = clips, T' = dense frames, a = alpha, T = T' / a slow frames, G = patches along a side,
N = G * G, M = N + 1 tokens of a frame (CLS first), d = width of CLIP's image tower, Di and Dt =
integration and temporal width, L = selected layers, P = pooling blocks, E = embedding width,
H = attention heads, S = side of a frame.

Tensors lie channels-last: tokens are [B,T,M,Di], the temporal encoder's maps [B,T',G,G,Dt]. Then
every convolution over time alone is a few matrix products, and nothing is transposed. Parameters
have the names and shapes of the authors' checkpoints, which is the reason for some odd names.

Source: DiST (Qing et al., ICCV 2023); differences from the published code: docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from heads.methods.dist.config import DistConfig

INIT_STD: Final = 0.02  # of the published code, for all but the last projection


class QuickGelu(torch.autograd.Function):
    """x * sigmoid(1.702 x), which keeps x alone for the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sigmoid(1.702 * x).mul_(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        share = torch.sigmoid(1.702 * x)
        slope = (1 - share).mul_(x).mul_(1.702).add_(1).mul_(share)
        return slope.mul_(gradients[0])


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), CLIP's activation, of a floating tensor of any shape."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = QuickGelu.apply(x)
        return found
    return torch.sigmoid(1.702 * x).mul_(x)


def recomputed(
    cheap: Callable[[Tensor], Tensor], x: Tensor, use: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return use(cheap(x)) and keep x in place of cheap(x), which the backward pass computes again.

    `cheap` takes little time, such as a norm: the values are the same, and the memory is not held.
    """
    made = cheap(x)
    if not torch.is_grad_enabled():
        return use(made)
    own, given = made.untyped_storage().data_ptr(), x.detach() if x.requires_grad else x

    def pack(value: Tensor) -> Tensor | torch.Size:
        return value.shape if value.untyped_storage().data_ptr() == own else value

    def unpack(held: Tensor | torch.Size) -> Tensor:
        if isinstance(held, Tensor):
            return held
        with torch.no_grad():
            return cheap(given).reshape(held)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return use(made)


def over_time(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve along axis 1: `x` [B,T,...,in], `weight` [out,in,k], `bias` [out] -> [B,T,...,out].

    k is odd, and zeros are added at both ends.
    """
    half = weight.shape[-1] // 2
    result = functional.linear(x, weight[..., half], bias)
    for shift in range(1, min(half, x.shape[1] - 1) + 1):
        # Frame t also sees frames t + shift and t - shift. A part of x is copied for the product,
        # and the copy is not kept.
        early, late = slice(None, -shift), slice(shift, None)
        for to, part, tap in ((early, late, half + shift), (late, early, half - shift)):
            flat = partial(_frames_of, part=part)
            product = recomputed(flat, x, partial(functional.linear, weight=weight[..., tap]))
            result[:, to] += product.view(result[:, to].shape)
    return result


def _frames_of(x: Tensor, part: slice) -> Tensor:
    return x[:, part].flatten(0, -2)


def convolved(x: Tensor, convolution: nn.Module) -> Tensor:
    """Apply a convolution whose weight is [out,in,k,1,1] with `over_time`."""
    assert isinstance(convolution, nn.Conv3d)
    return over_time(x, convolution.weight[..., 0, 0], convolution.bias)


class TemporalNet(nn.Module):
    """A convolution over time, QuickGELU, and a convolution over space."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        width, hidden, k = config.temporal_dim, config.temporal_hidden, config.temporal_kernel
        self.c_fc1 = nn.Conv3d(width, hidden, (k, 1, 1), padding=(k // 2, 0, 0))
        self.c_fc2 = nn.Conv3d(hidden, width, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B,T',G,G,Dt], of the same shape as the result."""
        hidden = quick_gelu(convolved(x, self.c_fc1))
        planes = rearrange(hidden, "b t h w c -> (b t) c h w")
        weight = self.c_fc2.weight[:, :, 0]
        found = functional.conv2d(planes, weight, self.c_fc2.bias, padding=1)
        return rearrange(found, "(b t) c h w -> b t h w c", t=x.shape[1])


class TemporalBlock(nn.Module):
    """QuickGELU of (x + the temporal net of its norm)."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.temporal_net = TemporalNet(config)
        self.ln = nn.LayerNorm(config.temporal_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B,T',G,G,Dt], of the same shape as the result."""
        found: Tensor = x + self.temporal_net(self.ln(x))
        return quick_gelu(found)


class ToTemporal(nn.Module):
    """A linear map of the patches to the temporal width, repeated for each slow frame's a frames."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.linear_fuse = nn.Linear(config.integration_dim, config.temporal_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [B,T,M,Di] -> [B,T',G,G,Dt]."""
        patches = self.linear_fuse(tokens[:, :, 1:])
        side = round(patches.shape[2] ** 0.5)
        maps: Tensor = repeat(patches, "b t (h w) c -> b (t a) h w c", h=side, a=self.alpha)
        return maps


class ToIntegration(nn.Module):
    """A convolution over the a frames of each slow frame, and a learned row for the CLS token."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        a, wide = config.alpha, config.integration_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.slow_frames, wide))
        self.linear_fuse = nn.Conv3d(config.temporal_dim, wide, (a, 1, 1), stride=(a, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B,T',G,G,Dt] -> [B,T,M,Di]."""
        weight = rearrange(self.linear_fuse.weight[..., 0, 0], "o c a -> o (a c)")
        a = self.linear_fuse.kernel_size[0]
        joined = rearrange(x, "b (t a) h w c -> b t (h w) (a c)", a=a)
        patches = functional.linear(joined, weight, self.linear_fuse.bias)
        row = repeat(self.cls_token, "1 1 t c -> b t 1 c", b=x.shape[0])
        return torch.cat([row, patches], 2)


class FeedForward(nn.Module):
    """Linear, QuickGELU, linear; `c_fc` and `c_proj` as in CLIP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """`x` [...,width], of the same shape as the result; `norm` comes first."""
        return recomputed(quick_gelu, recomputed(norm, x, self.c_fc), self.c_proj)


class TemporalFeedForward(nn.Module):
    """A feed-forward along time for each token position; the CLS token is one of them."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        wide, hidden = config.integration_dim, config.integration_temporal_hidden
        k = config.temporal_kernel
        self.c_fc1 = nn.Conv3d(wide, hidden, 1)
        self.c_fc2 = nn.Conv3d(hidden, hidden, (k, 1, 1), padding=(k // 2, 0, 0))
        self.c_proj = nn.Conv3d(hidden, wide, 1)

    def forward(self, tokens: Tensor, norm: nn.Module) -> Tensor:
        """`tokens` [B,T,M,Di], of the same shape as the result; `norm` comes first."""
        narrow = recomputed(norm, tokens, lambda x: convolved(x, self.c_fc1))
        hidden = convolved(narrow, self.c_fc2)
        return recomputed(quick_gelu, hidden, lambda x: convolved(x, self.c_proj))


class IntegrationBlock(nn.Module):
    """The sum of a feed-forward and a temporal feed-forward, each with a norm of its own."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.ffn = FeedForward(config.integration_dim, config.integration_hidden)
        self.temporal_ffn = TemporalFeedForward(config)
        self.ln = nn.LayerNorm(config.integration_dim)
        self.ln_temporal = nn.LayerNorm(config.integration_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [B,T,M,Di], of the same shape as the result; there is no skip."""
        found: Tensor = self.ffn(tokens, self.ln) + self.temporal_ffn(tokens, self.ln_temporal)
        return found


class QueryAttention(nn.Module):
    """Attention of one query to K tokens, with the parameters of `torch.nn.MultiheadAttention`.

    With a single query it is cheaper to take the query through the key projection, and the mean of
    the tokens through the value projection, than to project every token twice: K * H * 2 products
    of width Di instead of K * Di * 2. The key's bias adds the same number to every score of a head,
    which the softmax takes away again.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """`query` [n,1,Di], `tokens` [n,K,Di] -> [n,1,Di]."""
        of_query, of_key, of_value = self.in_proj_weight.chunk(3)
        bias, _, value_bias = self.in_proj_bias.chunk(3)
        asked = rearrange(
            functional.linear(query[:, 0], of_query, bias), "n (h c) -> h n c", h=self.heads
        )
        asked = asked * asked.shape[-1] ** -0.5
        keys = rearrange(of_key, "(h c) w -> h c w", h=self.heads)
        wanted = rearrange(asked @ keys, "h n w -> n h w")
        shares = (wanted @ tokens.transpose(1, 2)).softmax(-1)
        seen = rearrange(shares @ tokens, "n h w -> h n w")
        values = rearrange(of_value, "(h c) w -> h w c", h=self.heads)
        found = rearrange(seen @ values, "h n c -> n 1 (h c)") + value_bias
        answer: Tensor = self.out_proj(found)
        return answer


class PoolingAttention(nn.Module):
    """q + attention of norm(q) to norm(tokens), with one norm for both."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.attn = QueryAttention(config.integration_dim, config.attention_heads)
        self.ln_1 = nn.LayerNorm(config.integration_dim)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """`query` [n,1,Di], `tokens` [n,K,Di] -> [n,1,Di]."""
        found: Tensor = query + self.attn(self.ln_1(query), self.ln_1(tokens))
        return found


class PoolingBlock(nn.Module):
    """A query looks at the tokens of each frame, then another one at the frames."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        wide = config.integration_dim
        self.positional_embedding = nn.Parameter(torch.empty(1, config.slow_frames, wide))
        self.temporal_transformer = PoolingAttention(config)
        self.output_map_cls_token = FeedForward(wide, 4 * wide)
        self.ln_out_temp_cls_token = nn.LayerNorm(wide)
        self.spatial_transformer = PoolingAttention(config)
        self.output_map_spatial_cls_token = FeedForward(wide, 4 * wide)
        self.ln_out_spat_cls_token = nn.LayerNorm(wide)

    def forward(self, spatial: Tensor, temporal: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B*T,1,Di] and [B,1,Di], `tokens` [B*T,M,Di] -> both queries."""
        spatial = self.spatial_transformer(spatial, tokens)
        spatial = spatial + self.output_map_spatial_cls_token(spatial, self.ln_out_spat_cls_token)
        frames = rearrange(spatial, "(b t) 1 c -> b t c", b=temporal.shape[0])
        temporal = self.temporal_transformer(temporal, frames + self.positional_embedding)
        temporal = temporal + self.output_map_cls_token(temporal, self.ln_out_temp_cls_token)
        return spatial, temporal


class DistBranch(nn.Module):
    """Everything that DiST trains; `config` has all sizes set (`DistConfig.for_backbone`).

    With `checkpointing`, a layer keeps its inputs alone and computes itself again in the backward
    pass: less memory, the same values.
    """

    checkpointing = False

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow, layers = config.integration_dim, config.temporal_dim, config.selected_layers
        # In this order AdamW's groups list them as the authors' checkpoints do.
        self.proj = nn.Parameter(torch.empty(wide, config.dim))
        self.aggregated_cls_token = nn.Parameter(torch.empty(1, 1, wide))
        self.aggregated_spatial_cls_token = nn.Parameter(torch.empty(1, 1, wide))
        p, k = config.patch, config.stem_kernel
        self.temporal_stem = nn.Conv3d(3, narrow, (k, p, p), (1, p, p), (k // 2, 0, 0))
        self.input_linears = nn.ModuleList(nn.Linear(config.width, wide) for _ in layers)
        self.integration2temporal_nets = nn.ModuleList(ToTemporal(config) for _ in layers)
        self.temporal2integration_nets = nn.ModuleList(ToIntegration(config) for _ in layers)
        self.temporal_nets = nn.ModuleList(TemporalBlock(config) for _ in layers)
        self.integration_nets = nn.ModuleList(IntegrationBlock(config) for _ in layers)
        self.adapooling_nets = nn.ModuleList(
            PoolingBlock(config) for _ in range(config.pooling_layers)
        )
        self.proj_spatial_cls_token = nn.Linear(config.width, wide)
        self.ln_post = nn.LayerNorm(wide)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw first weights as the published code does; `generator` is on the CPU."""
        for name, parameter in self.named_parameters():
            if name == "proj":
                nn.init.normal_(parameter, 0, parameter.shape[0] ** -0.5, generator)
            elif name.endswith("in_proj_weight"):
                nn.init.xavier_uniform_(parameter, generator=generator)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, 0, INIT_STD, generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:  # the scales of norms
                nn.init.ones_(parameter)

    def forward(self, frames: Tensor, tokens: Iterable[Tensor]) -> Tensor:
        """Return video features [B,E], not normalised.

        `frames` [B,T',3,S,S] are preprocessed; `tokens` yields [B*T,M,d] of each selected block, in
        order: what the block gives out after both residuals, of frames 0, a, 2a, ..., in any
        floating type. The branch takes them one by one, so that a generator need not keep them all.
        """
        clips = frames.shape[0]  # `len` would fix it in an exported graph
        dtype = self.proj.dtype

        def copied(values: Tensor) -> Tensor:
            return values.to(dtype, copy=True)  # outside inference mode, for a backward pass

        x = self.stem(frames)
        carried: Tensor | None = None
        seen = joined = frames
        for layer, seen in enumerate(tokens):  # noqa: B007  # the last one is used below
            x = self._computed(self.temporal_nets[layer], x)
            mapped = recomputed(copied, seen, self.input_linears[layer])
            mapped = rearrange(mapped, "(b t) m c -> b t m c", b=clips)
            mapped = mapped if carried is None else mapped + carried
            # Both sides read what the other was before the exchange.
            joined = mapped + self.temporal2integration_nets[layer](x)
            if layer + 1 < len(self.temporal_nets):
                x = x + self.integration2temporal_nets[layer](mapped)
            carried = self._computed(self.integration_nets[layer], joined)
        assert carried is not None
        pooled = self.pooled(carried + joined)
        cls = rearrange(copied(seen[:, 0]), "(b t) c -> b t c", b=clips).mean(1)
        found: Tensor = self.ln_post(pooled + self.proj_spatial_cls_token(cls)) @ self.proj
        return found

    def _computed(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, use_reentrant=False))
        return cast(Tensor, block(x))

    def stem(self, frames: Tensor) -> Tensor:
        """Return the temporal encoder's first map of `frames` [B,T',3,S,S], [B,T',G,G,Dt]."""
        side = self.config.patch
        height, width = (size // side * side for size in frames.shape[-2:])
        patches = rearrange(
            frames[..., :height, :width], "b t c (h p) (w q) -> b t h w (c p q)", p=side, q=side
        )
        weight = rearrange(self.temporal_stem.weight, "o c k p q -> o (c p q) k")
        return over_time(patches, weight, self.temporal_stem.bias)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Pool `tokens` [B,T,M,Di] to one vector per clip, [B,Di]."""
        clips, slow = tokens.shape[:2]
        spatial = repeat(self.aggregated_spatial_cls_token, "1 1 c -> n 1 c", n=clips * slow)
        temporal = repeat(self.aggregated_cls_token, "1 1 c -> n 1 c", n=clips)
        flat = rearrange(tokens, "b t m c -> (b t) m c")
        for block in self.adapooling_nets:
            spatial, temporal = block(spatial, temporal, flat)
        return temporal[:, 0]
