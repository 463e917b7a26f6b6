"""The adapters of MSTA: a narrow network beside every block of both towers, with a shared middle.

B = clips, T = frames, P = patches of a frame, L = tokens, d = width of a tower, r = width inside.

Names of tensors are those of MMA's published code: `{text_adapter,visual_adapter}.{block}.down.0`
and `.up`, `shared_adapter.{block}.0`. Those of the convolution over time are ours:
`temporal_adapter.{block}`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from heads.methods.msta.config import KERNEL, MstaConfig

Tower = Literal["text", "visual"]


class Adapters(nn.Module):
    """All adapters of a configuration whose widths are set; blocks are counted from 1.

    What a block gets is `added`. Attributes: `config`, and four dictionaries of modules by block.
    """

    def __init__(self, config: MstaConfig) -> None:
        super().__init__()
        self.config = config
        r, blocks = config.width, [str(block) for block in config.layers]
        ends = {"text": config.text_width, "visual": config.visual_width}
        self.text_adapter = nn.ModuleDict({b: _ends(ends["text"], r) for b in blocks})
        self.visual_adapter = nn.ModuleDict({b: _ends(ends["visual"], r) for b in blocks})
        self.shared_adapter = nn.ModuleDict(
            {b: nn.Sequential(nn.Linear(r, r), nn.ReLU()) for b in blocks}
        )
        self.temporal_adapter = nn.ModuleDict(
            {b: OverTime(ends["visual"], config.conv_padding) for b in blocks}
            if config.form != "none"
            else {}
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw first weights: Kaiming's normal for a ReLU by the outputs; biases are 0."""
        fan = {"fan-out": KERNEL * self.config.visual_width, "fan-in": KERNEL}
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name.endswith("bias"):
                    value.zero_()
                elif not name.startswith("temporal_adapter."):
                    value.normal_(0, math.sqrt(2 / value.shape[0]), generator=generator)
                elif self.config.conv_init == "zero":
                    value.zero_()
                else:
                    spread = math.sqrt(2 / fan[self.config.conv_init])
                    value.normal_(0, spread, generator=generator)

    def __contains__(self, block: int) -> bool:
        return str(block) in self.shared_adapter

    def text(self, block: int, tokens: Tensor) -> Tensor:
        """Return what is added to the output of the text tower's `block`, [n,L,d].

        `tokens` [n,L,d] are the block's input, through its norm where the configuration says so.
        """
        _, spatial = self._spatial("text", block, tokens)
        return self._given(spatial)

    def video(self, block: int, first: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to the output of the image or video tower's `block`.

        `first` [B,T,1,d] are the class tokens, [B,1,1,d] where a clip has one; `patches`
        [B,T,P,d]. Both are as `text` takes them, and both have their shapes again.
        """
        return self.class_tokens(block, first), self._in_video(block, patches, True)

    def frames(self, block: int, tokens: Tensor) -> Tensor:
        """Return what `video` does for frames [B,T,1+P,d] whose class token is their first.

        It makes fewer copies, and rounds otherwise.
        """
        return self._in_video(block, tokens, True, class_token=self.config.conv_class_token)

    def class_tokens(self, block: int, first: Tensor) -> Tensor:
        """Return what is added to the class tokens alone, as `video` does."""
        return self._in_video(block, first, self.config.conv_class_token)

    def _in_video(
        self, block: int, tokens: Tensor, in_time: bool, class_token: bool = True
    ) -> Tensor:
        """Return what is added to tokens [B,T,P,d]; `in_time`: with the convolution.

        Without `class_token`, the first of every frame's tokens has no convolution.
        """
        config = self.config
        hidden, added = self._spatial("visual", block, tokens)
        if in_time and config.form != "none":
            read = self._taken(tokens) if config.conv_reads == "input" else added
            if config.form == "b":
                read = hidden.repeat_interleave(config.visual_width // config.width, dim=-1)
            moved = self.temporal_adapter[str(block)](read)
            if not class_token:
                moved[:, :, :1] = 0
            added = added + moved
        return self._given(added)

    def _spatial(self, tower: Tower, block: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ends = cast(Any, getattr(self, f"{tower}_adapter")[str(block)])
        shared = cast(Any, self.shared_adapter[str(block)])
        hidden = _line(ends["down"][0], self._taken(tokens)).relu()
        hidden = _line(shared[0], hidden).relu()
        return hidden, _line(ends["up"], hidden)

    def _taken(self, tokens: Tensor) -> Tensor:
        if not self.config.gradient_trick:
            return tokens
        return cast(Tensor, _Damped.apply(tokens, self.config.scale))

    def _given(self, values: Tensor) -> Tensor:
        if not self.config.gradient_trick:
            return self.config.scale * values
        return cast(Tensor, _Undamped.apply(values, self.config.scale))


class OverTime(nn.Module):
    """A convolution over three frames, of each channel by itself: a Conv3d of kernel (3,1,1).

    `weight` [d,1,3] and `bias` [d], as those of a Conv1d with d groups.
    """

    def __init__(self, width: int, padding: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, KERNEL))
        self.bias = nn.Parameter(torch.zeros(width))
        self.repeats = padding == "repeat"

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T,P,d] -> [B,T,P,d], in the type of the tokens."""
        if tokens.dtype != self.weight.dtype:
            return self._in_low(tokens)
        before, here, after = self.weight[:, 0].unbind(-1)
        # Three products, because a library's convolution would want channels before frames.
        earlier, later = before * tokens[:, :-1], after * tokens[:, 1:]
        edges = before * tokens[:, :1], after * tokens[:, -1:]
        if not self.repeats:
            edges = torch.zeros_like(edges[0]), torch.zeros_like(edges[1])
        found: Tensor = here * tokens + self.bias
        found = found + torch.cat([edges[0], earlier], dim=1)
        return found + torch.cat([later, edges[1]], dim=1)

    def _in_low(self, tokens: Tensor) -> Tensor:
        # A library's convolution of whole maps is faster where a type has one.
        maps = tokens.permute(0, 3, 1, 2)  # channels lie side by side, as it likes them
        if self.repeats:
            maps = torch.cat([maps[:, :, :1], maps, maps[:, :, -1:]], dim=2)
        weight, bias = (part.to(tokens.dtype) for part in (self.weight[..., None], self.bias))
        padding = (0 if self.repeats else KERNEL // 2, 0)
        found = functional.conv2d(maps, weight, bias, padding=padding, groups=len(bias))
        return found.permute(0, 2, 3, 1)


class _Damped(torch.autograd.Function):
    """Identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.scale * gradients[0], None


class _Undamped(torch.autograd.Function):
    """A multiplication by a number, whose gradient is as if the number were 1."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        return scale * values

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _line(linear: Any, values: Tensor) -> Tensor:
    """Return what a linear layer makes of values, in their type."""
    weight, bias = (part.to(values.dtype) for part in (linear.weight, linear.bias))
    return functional.linear(values, weight, bias)


def _ends(width: int, inside: int) -> nn.ModuleDict:
    down = nn.Sequential(nn.Linear(width, inside), nn.ReLU())
    return nn.ModuleDict({"down": down, "up": nn.Linear(inside, width)})
