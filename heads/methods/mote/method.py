"""MoTE, as the registry has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heads.methods.mote.config import HeadConfig
from heads.methods.registry import CheckpointFormat, Method

if TYPE_CHECKING:
    from torch import Tensor

    from heads.methods.head import Head
    from heads.methods.mote.model import TemporalHead
    from heads.methods.mote.official import OfficialCheckpoint


def temporal_head(config: HeadConfig, training_classes: int) -> TemporalHead:
    """The head for a configuration, its weights not drawn."""
    from heads.methods.mote.model import TemporalHead

    return TemporalHead(config, training_classes)


def _is_of(content: Mapping[str, Any]) -> bool:
    return "fusion_model_state_dict" in content


def _read(file: Path) -> OfficialCheckpoint:
    from heads.methods.mote.official import OfficialCheckpoint

    return OfficialCheckpoint.read(file)


def _write(path: Path, head: Head, tower_state: Mapping[str, Tensor], epoch: int) -> None:
    from heads.methods.mote.official import save_official_checkpoint

    save_official_checkpoint(path, head, tower_state, epoch)


CHECKPOINT = CheckpointFormat(_is_of, _read, _write)

METHOD = Method(
    name="mote",
    title="MoTE",
    config=HeadConfig,
    head=temporal_head,
    losses=("expert", "merged", "feature"),
    checkpoint=CHECKPOINT,
)
