"""What MSTA on a CLIP costs: its trained parameters, and the multiplications of one clip.

T = frames, M = tokens of a frame (class token first), P = M - 1 patches, d = width of the image
tower, r = width of an adapter, D = embedding width.

Multiplications are counted as in `heads.methods.dist.costs`, of the image tower alone: how many
class texts a step has depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

from heads.methods.msta.config import KERNEL, MstaConfig


@dataclass(frozen=True)
class MstaCosts:
    """The costs of a configuration whose widths are set; multiplications are of one clip."""

    trained: int
    """Trained parameters."""
    below: int
    """Multiplications of the image tower below the first adapter, which a store can keep."""
    above: int
    """Multiplications of the rest of the image tower."""
    adapters: int
    """Multiplications of the adapters."""
    block: int
    """Multiplications of the first block with an adapter."""

    @property
    def forward(self) -> int:
        """Multiplications of tower and adapters."""
        return self.below + self.above + self.adapters

    @property
    def cached_step(self) -> int:
        """Multiplications of a training step from stored tokens.

        Frozen blocks pass gradients back, which costs as much as forward, but for the first one
        with an adapter; adapters get gradients, too.
        """
        return 2 * self.above - self.block + 3 * self.adapters

    @property
    def training_step(self) -> int:
        """Multiplications of a training step from pixels."""
        return self.below + self.cached_step


def msta_costs(config: MstaConfig, blocks: int, patch: int, image_size: int = 224) -> MstaCosts:
    """Return the costs of `config` on an image tower of so many `blocks` and patches of a side."""
    d, r, frames = config.visual_width, config.width, config.frames
    patches = (image_size // patch) ** 2
    tokens = patches + 1
    block = frames * tokens * (12 * d * d + 2 * tokens * d)
    # Of the last block the class token alone: the others give it their keys and values.
    last = frames * (10 * d * d + tokens * (2 * d * d + 2 * d))
    below = frames * patches * 3 * patch**2 * d + (config.first - 1) * block
    above = (blocks - config.first) * block + last + frames * d * config.dim
    spatial, conv = frames * (2 * d * r + r * r), frames * patches * KERNEL * d
    whole = len(config.layers) - (config.last == blocks)
    adapters = whole * (tokens * spatial + (0 if config.form == "none" else conv))
    adapters += spatial if config.last == blocks else 0
    begun = last if config.first == blocks else block
    return MstaCosts(config.parameters, below, above, adapters, begun)
