"""Temporal heads over frozen CLIP features: MoTE, its baselines, training and evaluation."""

from __future__ import annotations

from heads.evaluation.evaluate import evaluate_many, evaluate_store
from heads.evaluation.protocols.choose import PROTOCOLS, Protocol, TestSet, build_test_sets
from heads.evaluation.results import EvalResult, RunFacts, save_result
from heads.files.head_file import load_head, save_head
from heads.files.official import (
    ImportedCheckpoint,
    import_official_checkpoint,
    official_checkpoint,
    save_official_checkpoint,
)
from heads.methods.mote.config import HeadConfig, HeadOrigin, RoutingDraw
from heads.methods.mote.losses import LossTerms, mote_loss
from heads.methods.mote.model import TemporalHead, TrainingPass, build_head
from heads.scoring.scores import Scoring, predict_scores
from heads.training.train_head import TrainConfig, TrainSummary, train_head

__all__ = [
    "EvalResult",
    "HeadConfig",
    "HeadOrigin",
    "ImportedCheckpoint",
    "LossTerms",
    "PROTOCOLS",
    "Protocol",
    "RoutingDraw",
    "RunFacts",
    "Scoring",
    "TemporalHead",
    "TestSet",
    "TrainConfig",
    "TrainSummary",
    "TrainingPass",
    "build_head",
    "build_test_sets",
    "evaluate_many",
    "evaluate_store",
    "import_official_checkpoint",
    "load_head",
    "mote_loss",
    "official_checkpoint",
    "predict_scores",
    "save_head",
    "save_official_checkpoint",
    "save_result",
    "train_head",
]
