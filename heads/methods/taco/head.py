"""TACO's head: a linear projection of the mean of frames, added in training and for known classes.

B = videos, T = frames, C = embedding width, N = anchors.

Names in the state dict beside those of every head (`projection.*` only where there is one):

| name | shape |
|---|---|
| `projection.linear_A.weight`, `.bias` | [2C,C], [2C] |
| `projection.linear_B.weight`, `.bias` | [C,2C], [C] |

Source: TACO (Zhu et al., NeurIPS 2026), its released code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from heads.methods.head import Head
from heads.methods.taco.config import TacoConfig


def draw_anchors(count: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` random directions, float32 [count,dim] with unit rows, on the CPU.

    Without a `generator` (CPU) they come from torch's own, as in the released code.
    """
    return functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


class Projection(nn.Module):
    """The residual x_t + p(m), where p(m) = B (A m + a) + b and m is the mean of the frames x_t.

    A new one adds exactly nothing, because B and b are 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_A = nn.Linear(dim, 2 * dim)
        self.linear_B = nn.Linear(2 * dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw A and a evenly within 1/sqrt(C) of 0; `generator` is on the CPU."""
        nn.init.kaiming_uniform_(self.linear_A.weight, a=math.sqrt(5), generator=generator)
        if generator is not None:  # else it is drawn already, as the released code draws it
            bound = 1 / math.sqrt(self.linear_A.in_features)
            nn.init.uniform_(self.linear_A.bias, -bound, bound, generator=generator)
        nn.init.zeros_(self.linear_B.weight)
        nn.init.zeros_(self.linear_B.bias)

    def added(self, means: Tensor) -> Tensor:
        """Return p(m) of the means of frames [...,C], also [...,C]."""
        projected: Tensor = self.linear_B(self.linear_A(means))
        return projected

    def forward(self, frames: Tensor) -> Tensor:
        """Return frames [B,T,C] with p of their mean added to each, [B,T,C]."""
        return frames + self.added(frames.mean(-2, keepdim=True))


class TacoHead(Head):
    """The projection as a head, or no more than the mean of frames if the configuration has none.

    With the projection it is for the classes it was trained on; without it (`shrink(1)`, or the
    head `mean`) the encoder is a CLIP for any classes.
    """

    def __init__(self, config: TacoConfig, training_classes: int) -> None:
        super().__init__(config, training_classes)
        self.config: TacoConfig = config
        self.projection = Projection(config.dim) if config.projection else None

    def hidden(self, features: Tensor) -> Tensor | None:
        """See `Head.hidden`: p of the mean, the same for every frame."""
        if self.projection is None:
            return None
        return self.projection.added(features.mean(1, keepdim=True)).expand_as(features)

    def draw(self, generator: torch.Generator) -> Tensor:
        """See `Head.draw`: the anchors [N,C] of a step, float32 with unit rows."""
        return draw_anchors(self.config.anchors, self.config.dim, generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the first weights of the projection."""
        if self.projection is not None:
            self.projection.reset_parameters(generator)

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        """Take `share` of what the projection adds away."""
        if self.projection is not None:
            for parameter in self.projection.linear_B.parameters():
                parameter.mul_(1 - share)
