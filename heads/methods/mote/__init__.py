"""MoTE as a registered method; its model is imported when a head is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from heads.methods.mote.config import HeadConfig
from heads.methods.registry import Method

if TYPE_CHECKING:
    from heads.methods.mote.model import TemporalHead

OFFICIAL: Final = "heads.methods.mote.official"


def temporal_head(config: HeadConfig, training_classes: int) -> TemporalHead:
    """Return the head of a configuration, before its weights are drawn."""
    from heads.methods.mote.model import TemporalHead

    return TemporalHead(config, training_classes)


METHOD = Method(
    name="mote",
    title="MoTE",
    config=HeadConfig,
    head=temporal_head,
    losses=("expert", "merged", "feature"),
    official=OFFICIAL,
    multi_label=True,
)
