"""Temporal heads over frozen CLIP features: MoTE, its baselines, training and evaluation.

The names below are imported when they are first used: `import heads` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.evaluation.evaluate import evaluate_many, evaluate_store
    from heads.evaluation.protocols.choose import PROTOCOLS, Protocol, TestSet, build_test_sets
    from heads.evaluation.results import EvalResult, RunFacts, save_result
    from heads.files.head_file import load_head, save_head
    from heads.methods.head import Head, build_head
    from heads.methods.mote.config import HeadConfig
    from heads.methods.mote.losses import LossTerms, TrainingPass, mote_loss
    from heads.methods.mote.model import TemporalHead
    from heads.methods.mote.official import (
        ImportedCheckpoint,
        import_official_checkpoint,
        official_checkpoint,
        save_official_checkpoint,
    )
    from heads.methods.mote.routing import RoutingDraw
    from heads.methods.settings import HeadOrigin
    from heads.scoring.scores import Scoring, predict_scores
    from heads.training.config import TrainConfig
    from heads.training.train_head import TrainSummary, train_head

_HOMES = {
    "heads.evaluation.evaluate": ("evaluate_many", "evaluate_store"),
    "heads.evaluation.protocols.choose": ("PROTOCOLS", "Protocol", "TestSet", "build_test_sets"),
    "heads.evaluation.results": ("EvalResult", "RunFacts", "save_result"),
    "heads.files.head_file": ("load_head", "save_head"),
    "heads.methods.head": ("Head", "build_head"),
    "heads.methods.mote.config": ("HeadConfig",),
    "heads.methods.mote.losses": ("LossTerms", "TrainingPass", "mote_loss"),
    "heads.methods.mote.model": ("TemporalHead",),
    "heads.methods.mote.official": (
        "ImportedCheckpoint",
        "import_official_checkpoint",
        "official_checkpoint",
        "save_official_checkpoint",
    ),
    "heads.methods.mote.routing": ("RoutingDraw",),
    "heads.methods.settings": ("HeadOrigin",),
    "heads.scoring.scores": ("Scoring", "predict_scores"),
    "heads.training.config": ("TrainConfig",),
    "heads.training.train_head": ("TrainSummary", "train_head"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "EvalResult",
    "Head",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
