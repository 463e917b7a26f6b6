"""The linear probe as a registered method; its model is imported when a head is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from heads.methods.registry import Method
from heads.methods.settings import MethodConfig, within

if TYPE_CHECKING:
    from heads.methods.linear.model import LinearHead


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """The configuration of a linear probe. Raises UserError when a value is out of range."""

    WHAT: ClassVar[str] = "linear probe"

    dim: int = field(metadata={"range": (1, 65536)})
    """D, the embedding width of the encoder."""
    kind: Literal["linear"] = "linear"
    regularisation: float = 0.0
    """Weight of the penalty on what is learnt; 0 chooses it on training videos, and a fitted head
    says here what was chosen."""
    modulation_neighbours: int = within(0, 0, 0)
    modulation_temperature: float = 0.05


def linear_head(config: LinearConfig, training_classes: int) -> LinearHead:
    """Return the head of a configuration, before it is fitted."""
    from heads.methods.linear.model import LinearHead

    return LinearHead(config, training_classes)


METHOD = Method(
    name="linear",
    title="linear probe",
    config=LinearConfig,
    head=linear_head,
    fitted=True,
    open_vocabulary=False,
    end_to_end=False,
    modulated=False,
    portable=False,
    multi_label=True,
)
