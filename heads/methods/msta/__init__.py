"""MSTA: adapters on both towers of a CLIP or a ViCLIP (Chen et al., 2025).

The names below are for training loops of your own; they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heads.methods.lazy_names import lazy_names
from heads.methods.msta.config import MstaConfig
from heads.methods.registry import Method

if TYPE_CHECKING:
    from heads.methods.msta.adapter import Adapters as Adapters
    from heads.methods.msta.head import MstaHead
    from heads.methods.msta.losses import MstaLosses as MstaLosses
    from heads.methods.msta.losses import consistency_loss as consistency_loss
    from heads.methods.msta.losses import msta_losses as msta_losses
    from heads.methods.msta.towers import AdaptedTowers as AdaptedTowers

_HOMES = {
    "Adapters": "adapter",
    "AdaptedTowers": "towers",
    **dict.fromkeys(("MstaLosses", "consistency_loss", "msta_losses"), "losses"),
}


def msta_head(config: MstaConfig, training_classes: int) -> MstaHead:
    """Return the head of a configuration, before its weights are drawn."""
    from heads.methods.msta.head import MstaHead

    return MstaHead(config, training_classes)


METHOD = Method(
    name="msta",
    title="MSTA",
    config=MstaConfig,
    head=msta_head,
    losses=("classification", "consistency"),
    from_store=False,
    adapts=True,
    modulated=False,
    from_elsewhere=(
        *("frames", "visual_width", "text_width"),
        *("modulation_neighbours", "modulation_temperature"),  # it has none
    ),
    recipe="msta",
    prompts="video",
    official="heads.methods.msta.official",
)


__getattr__ = lazy_names(__name__, _HOMES)
