"""CLIP's mean of frames as a registered method; its model is MoTE's without the transformer."""

from __future__ import annotations

from heads.methods.mote import temporal_head
from heads.methods.mote.config import HeadConfig
from heads.methods.registry import MEAN_OF_FRAMES, Method

METHOD = Method(
    name=MEAN_OF_FRAMES,
    title="CLIP mean of frames",
    config=HeadConfig,
    head=temporal_head,
    losses=("expert", "merged", "feature"),
    trains=False,
    modulated=False,
    multi_label=True,
)
