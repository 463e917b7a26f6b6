"""The plain temporal transformer as a registered method; its model is MoTE's with one expert."""

from __future__ import annotations

from heads.methods.mote import OFFICIAL, temporal_head
from heads.methods.mote.config import HeadConfig
from heads.methods.registry import Method

METHOD = Method(
    name="transformer",
    title="temporal transformer",
    config=HeadConfig,
    head=temporal_head,
    losses=("expert", "merged", "feature"),
    official=OFFICIAL,
    multi_label=True,
)
