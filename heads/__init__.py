"""Temporal heads over frozen CLIP features: MoTE, its baselines, training and evaluation.

The names below are imported when they are first used: `import heads` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.evaluation.evaluate import evaluate_many as evaluate_many
    from heads.evaluation.evaluate import evaluate_store as evaluate_store
    from heads.evaluation.protocols.choose import PROTOCOLS as PROTOCOLS
    from heads.evaluation.protocols.choose import Protocol as Protocol
    from heads.evaluation.protocols.choose import TestSet as TestSet
    from heads.evaluation.protocols.choose import build_test_sets as build_test_sets
    from heads.evaluation.results import EvalResult as EvalResult
    from heads.evaluation.results import RunFacts as RunFacts
    from heads.evaluation.results import save_result as save_result
    from heads.files.head_file import load_head as load_head
    from heads.files.head_file import save_head as save_head
    from heads.methods.dist.official import ImportedDist as ImportedDist
    from heads.methods.dist.official import import_dist_checkpoint as import_dist_checkpoint
    from heads.methods.head import Head as Head
    from heads.methods.head import build_head as build_head
    from heads.methods.mote.config import HeadConfig as HeadConfig
    from heads.methods.mote.losses import LossTerms as LossTerms
    from heads.methods.mote.losses import TrainingPass as TrainingPass
    from heads.methods.mote.losses import mote_loss as mote_loss
    from heads.methods.mote.model import TemporalHead as TemporalHead
    from heads.methods.mote.official import ImportedCheckpoint as ImportedCheckpoint
    from heads.methods.mote.official import import_official_checkpoint as import_official_checkpoint
    from heads.methods.mote.official import official_checkpoint as official_checkpoint
    from heads.methods.mote.official import save_official_checkpoint as save_official_checkpoint
    from heads.methods.mote.routing import RoutingDraw as RoutingDraw
    from heads.methods.settings import HeadOrigin as HeadOrigin
    from heads.methods.taco.official import ImportedTaco as ImportedTaco
    from heads.methods.taco.official import import_taco_checkpoint as import_taco_checkpoint
    from heads.scoring.scores import Scoring as Scoring
    from heads.scoring.scores import predict_scores as predict_scores
    from heads.training.config import TrainConfig as TrainConfig
    from heads.training.train_head import TrainSummary as TrainSummary
    from heads.training.train_head import train_head as train_head

_HOMES = {
    "heads.evaluation.evaluate": ("evaluate_many", "evaluate_store"),
    "heads.evaluation.protocols.choose": ("PROTOCOLS", "Protocol", "TestSet", "build_test_sets"),
    "heads.evaluation.results": ("EvalResult", "RunFacts", "save_result"),
    "heads.files.head_file": ("load_head", "save_head"),
    "heads.methods.dist.official": ("ImportedDist", "import_dist_checkpoint"),
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
    "heads.methods.taco.official": ("ImportedTaco", "import_taco_checkpoint"),
    "heads.scoring.scores": ("Scoring", "predict_scores"),
    "heads.training.config": ("TrainConfig",),
    "heads.training.train_head": ("TrainSummary", "train_head"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
