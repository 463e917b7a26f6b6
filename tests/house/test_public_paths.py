"""What other programs import stays where it is (docs/decisions/0022)."""

from __future__ import annotations

from importlib import import_module

import pytest

import heads

PATHS = [
    "featstore.open_store",
    "heads.evaluation.half_class_accuracy",
    "heads.losses.mote_loss",
    "heads.training.build_optimizer",
    "heads.training.learning_rates",
    "heads.end_to_end.EndToEndModel",
    "heads.end_to_end.predict.predict",
    "heads.methods.taco.Projection",
    "heads.methods.taco.relative_structure_loss",
    "pipeline.sampling.parse_sampling",
    "pipeline.sampling.Sampling",
    "pipeline.sampling.test_indices",
    "pipeline.sampling.validation_indices",
    "pipeline.sampling.train_ranges",
    "pipeline.sampling.dense_train_starts",
    "pipeline.sampling.dense_train_indices",
    "pipeline.preprocessing.evaluation_crops",
    "pipeline.clip_encoder.load_encoder",
    "pipeline.decoding.pyav.PyAVDecoder",
]
HEADS = [
    *("EvalResult", "HeadConfig", "HeadOrigin", "ImportedCheckpoint", "LossTerms", "PROTOCOLS"),
    *("ImportedTaco", "import_taco_checkpoint"),
    *("Protocol", "RoutingDraw", "RunFacts", "Scoring", "TemporalHead", "TestSet", "TrainConfig"),
    *("TrainSummary", "TrainingPass", "build_head", "build_test_sets", "evaluate_many"),
    *("evaluate_store", "import_official_checkpoint", "load_head", "mote_loss"),
    *("official_checkpoint", "predict_scores", "save_head", "save_official_checkpoint"),
    *("save_result", "train_head"),
]


@pytest.mark.parametrize("path", [*PATHS, *(f"heads.{name}" for name in HEADS)])
def test_a_public_path_can_be_imported(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert getattr(import_module(module), name) is not None


def test_heads_lists_its_public_names() -> None:
    assert set(HEADS) <= set(heads.__all__)
