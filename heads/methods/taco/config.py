"""The configuration of TACO: its projection, and how a teacher holds the towers in training.

C = embedding width of the CLIP, N = anchors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final

from featstore.errors import UserError
from heads.methods.settings import MethodConfig, within

MOST_ANCHORS: Final = 2**20


@dataclass(frozen=True)
class TacoConfig(MethodConfig):
    """The configuration of a TACO head and its training; the defaults are those of ViT-B/16.

    Raises UserError when a value is out of range.

    Source: TACO (Zhu et al., NeurIPS 2026), its released code and configurations.
    """

    WHAT: ClassVar[str] = "TACO"

    dim: int = field(metadata={"range": (1, 16384)})
    """C, the embedding width of the encoder."""
    kind: str = "taco"
    projection: bool = True
    """Whether the video side has a projection for the known classes; ViT-B/32 has none."""
    anchor_ratio: float = within(200 / 512, 0, 1024)
    """N / C. Through N random unit vectors a cosine shrinks to N / C of itself on average, so the
    ratio is the temperature of the distillation. The released code has 200 anchors at any width."""
    distillation_weight: float = 0.4
    """What the divergence from the teacher counts beside the cross-entropy."""
    teacher_momentum: float = within(0.9998, 0, 1)
    """The share that the teacher keeps of itself at every iteration; 0: it follows from the number
    of iterations (`heads.methods.taco.training.teacher_momentum`)."""
    modulation_neighbours: int = field(default=0, metadata={"range": (0, 0)})
    modulation_temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.anchors <= MOST_ANCHORS:
            raise UserError(
                f"anchor_ratio {self.anchor_ratio:g} gives {self.anchors} anchors at width "
                f"{self.dim}: choose a ratio that gives 1 to {MOST_ANCHORS}, such as 200/512 = "
                "0.390625"
            )

    @property
    def projects(self) -> bool:
        """See `MethodConfig.projects`."""
        return self.projection

    @property
    def anchors(self) -> int:
        """N, the number of anchors."""
        return round(self.anchor_ratio * self.dim)
