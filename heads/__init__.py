"""Temporal heads over frozen CLIP features: MoTE, its baselines, training and evaluation."""

from __future__ import annotations

from heads.checkpoints import load_head, save_head
from heads.config import HeadConfig, HeadOrigin, RoutingDraw
from heads.evaluation import EvalResult, evaluate_store, predict_scores
from heads.losses import LossTerms, mote_loss
from heads.model import TemporalHead, TrainingPass, build_head
from heads.official import (
    ImportedCheckpoint,
    import_official_checkpoint,
    official_checkpoint,
    save_official_checkpoint,
)
from heads.training import TrainConfig, TrainSummary, train_head

__all__ = [
    "EvalResult",
    "HeadConfig",
    "HeadOrigin",
    "ImportedCheckpoint",
    "LossTerms",
    "RoutingDraw",
    "TemporalHead",
    "TrainConfig",
    "TrainSummary",
    "TrainingPass",
    "build_head",
    "evaluate_store",
    "import_official_checkpoint",
    "load_head",
    "mote_loss",
    "official_checkpoint",
    "predict_scores",
    "save_head",
    "save_official_checkpoint",
    "train_head",
]
