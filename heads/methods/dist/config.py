"""The configuration of DiST: sizes of the temporal encoder, the integration branch and the pooling.

T' = dense frames of a clip, a = alpha, T = T' / a slow frames, D = embedding width of the CLIP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

from featstore.errors import UserError, one_line
from heads.methods.settings import MethodConfig, within

HEAD_WIDTH: Final = 64  # of one attention head, in CLIP and in the pooling
MOST_PARAMETERS: Final = 2**31  # 8 GiB in fp32; the paper's largest branch (ViT-L/14) has 4.0e7


@dataclass(frozen=True)
class DistConfig(MethodConfig):
    """The configuration of a DiST branch; the defaults are the published ones for ViT-B/16.

    `width` and `patch` are the backbone's; 0 takes them from it (`for_backbone`), and so does an
    empty `selected_layers`, which means every block. Raises UserError when a value is out of range.

    Source: DiST (Qing et al., ICCV 2023).
    """

    WHAT: ClassVar[str] = "DiST"

    dim: int = field(metadata={"range": (1, 65536)})
    """D, the embedding width of the encoder."""
    kind: str = "dist"
    dense_frames: int = within(16, 1, 4096)
    """T', the frames that the temporal encoder looks at."""
    alpha: int = within(2, 1, 4096)
    """a: CLIP looks at every a-th frame, beginning with the first."""
    width: int = within(0, 0, 65536)
    """Width of the image tower."""
    patch: int = within(0, 0, 4096)
    """Side of the image tower's patches, which is that of the temporal stem too."""
    selected_layers: tuple[int, ...] = ()
    """The blocks of the image tower, from 0, whose tokens the branch reads, in order."""
    integration_dim: int = within(384, 1, 65536)
    """Di, the width of the integration branch and the pooling."""
    temporal_dim: int = within(96, 1, 65536)
    """Dt, the channels of the temporal encoder."""
    pooling_layers: int = within(4, 0, 64)
    """P, pooling blocks: 4 for Kinetics-400, 2 for Something-Something V2."""
    stem_kernel: int = within(5, 1, 4095)
    """Frames that the temporal stem looks at together; odd."""
    temporal_kernel: int = within(3, 1, 4095)
    """Frames that the other temporal convolutions look at together; odd."""
    temporal_ratio: float = 1.0
    """Hidden width of a temporal block, relative to Dt, rounded down."""
    integration_ratio: float = 1.0
    """Hidden width of an integration block's feed-forward, relative to Di, rounded down."""
    integration_temporal_ratio: float = 0.25
    """Hidden width of its temporal feed-forward, relative to Di, rounded down."""
    modulation_neighbours: int = field(default=0, metadata={"range": (0, 0)})
    modulation_temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = self.selected_layers
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in chosen)
        if not whole or any(v < 0 for v in chosen) or sorted(set(chosen)) != list(chosen):
            raise UserError(
                f"selected_layers {one_line(repr(list(chosen)), 60)} are no blocks of a tower: "
                "list whole numbers from 0 up, each once, in rising order"
            )
        if self.dense_frames % self.alpha:
            raise UserError(
                f"{self.dense_frames} frames are not divisible by alpha {self.alpha}: CLIP looks "
                "at every alpha-th frame; choose a multiple"
            )
        for name in ("stem_kernel", "temporal_kernel"):
            if getattr(self, name) % 2 == 0:
                raise UserError(f"{name} {getattr(self, name)} is even: it must be odd")
        heads = self.attention_heads
        if self.integration_dim % heads:
            raise UserError(
                f"integration_dim {self.integration_dim} is not divisible by its {heads} attention "
                f"heads (one for {HEAD_WIDTH} numbers): choose a multiple of {HEAD_WIDTH}"
            )
        for name in ("temporal_hidden", "integration_hidden", "integration_temporal_hidden"):
            if not 1 <= getattr(self, name) <= 2**20:
                ratio = name.replace("hidden", "ratio")
                raise UserError(
                    f"{ratio} {getattr(self, ratio):g} gives a hidden width of "
                    f"{getattr(self, name)}: it must be from 1 to {2**20}"
                )
        if (count := self._about()) > MOST_PARAMETERS:
            raise UserError(
                f"a DiST branch of these sizes has about {count:.1e} parameters, more than "
                f"{MOST_PARAMETERS:.1e}: choose smaller numbers"
            )

    @property
    def slow_frames(self) -> int:
        """T, the frames that CLIP looks at."""
        return self.dense_frames // self.alpha

    @property
    def attention_heads(self) -> int:
        """Attention heads of the pooling: Di // 64, at least 1."""
        return max(1, self.integration_dim // HEAD_WIDTH)

    @property
    def temporal_hidden(self) -> int:
        """Hidden channels of a temporal block."""
        return int(self.temporal_dim * self.temporal_ratio)

    @property
    def integration_hidden(self) -> int:
        """Hidden width of an integration block's feed-forward."""
        return int(self.integration_dim * self.integration_ratio)

    @property
    def integration_temporal_hidden(self) -> int:
        """Hidden width of an integration block's temporal feed-forward."""
        return int(self.integration_dim * self.integration_temporal_ratio)

    def require_dense(self, frames: int, what: str) -> None:
        """Raise UserError unless a view of `frames` frames, which `what` takes, fits the branch."""
        if frames == self.dense_frames:
            return
        odd = f", which alpha {self.alpha} does not divide" if frames % self.alpha else ""
        raise UserError(
            f"{what} takes {frames} frames{odd}, the head needs {self.dense_frames}: use "
            f"{self.dense_frames} frames (dist:{self.dense_frames}xV)"
        )

    def for_backbone(self, width: int, patch: int, blocks: int, dim: int) -> DistConfig:
        """Return this configuration for an image tower of so many `blocks`, with all sizes set.

        Raises UserError if the tower has other sizes than are set, or lacks a selected block.
        """
        sizes = {"width": width, "patch": patch, "dim": dim}
        for name, found in sizes.items():
            wanted = getattr(self, name)
            if wanted not in (0, found):
                what = {"dim": "embedding width"}.get(name, name)
                raise UserError(
                    f"the CLIP has {what} {found}, the DiST branch was made for {what} {wanted}: "
                    "use the CLIP that it was trained with"
                )
        chosen = self.selected_layers or tuple(range(blocks))
        if chosen[-1] >= blocks:
            raise UserError(
                f"selected layer {chosen[-1]} is out of range: the image tower has {blocks} "
                f"blocks, 0 to {blocks - 1}"
            )
        return replace(self, width=width, patch=patch, selected_layers=chosen)

    def _about(self) -> int:
        """Return about how many parameters the branch has."""
        wide, narrow = self.integration_dim, self.temporal_dim
        layer = wide * (self.width + 2 * self.integration_hidden + (1 + self.alpha) * narrow)
        layer += self.integration_temporal_hidden * (
            2 * wide + self.temporal_kernel * self.integration_temporal_hidden
        )
        layer += narrow * self.temporal_hidden * (self.temporal_kernel + 9)
        layer += self.slow_frames * wide
        stem = 3 * narrow * self.stem_kernel * self.patch**2
        pooling = self.pooling_layers * (24 * wide**2 + self.slow_frames * wide)
        return len(self.selected_layers) * layer + stem + pooling + wide * (self.width + self.dim)


def ratio_of(hidden: int, width: int) -> float:
    """Return the ratio for which int(width * ratio) is `hidden`."""
    ratio = hidden / width
    while int(width * ratio) < hidden:  # by a rounding of the division
        ratio = math.nextafter(ratio, math.inf)
    return ratio
