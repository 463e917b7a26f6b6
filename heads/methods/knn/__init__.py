"""The nearest neighbours as a registered method; its model is imported when a head is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from heads.methods.registry import Method
from heads.methods.settings import MethodConfig, within

if TYPE_CHECKING:
    from heads.methods.knn.model import NeighbourHead


@dataclass(frozen=True)
class NeighbourConfig(MethodConfig):
    """The configuration of nearest neighbours. Raises UserError when a value is out of range."""

    WHAT: ClassVar[str] = "nearest neighbours"

    dim: int = field(metadata={"range": (1, 65536)})
    """D, the embedding width of the encoder."""
    kind: Literal["knn"] = "knn"
    neighbours: int = 0
    """k, how many training videos vote; 0 chooses it on the training videos, and a fitted head
    says here what was chosen."""
    videos: int = within(0, 0, 2**31)
    """n, training videos that a fitted head keeps."""
    modulation_neighbours: int = within(0, 0, 0)
    modulation_temperature: float = 0.05


def neighbour_head(config: NeighbourConfig, training_classes: int) -> NeighbourHead:
    """Return the head of a configuration, before it is fitted."""
    from heads.methods.knn.model import NeighbourHead

    return NeighbourHead(config, training_classes)


METHOD = Method(
    name="knn",
    title="nearest neighbours",
    config=NeighbourConfig,
    head=neighbour_head,
    fitted=True,
    open_vocabulary=False,
    end_to_end=False,
    modulated=False,
    portable=False,
    multi_label=True,
)
