"""A test that is repeated every epoch does not warn every time; the last one does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from featstore import Workspace
from heads.evaluation.request import EvaluationRequest
from heads.evaluation.trained import request as trained
from heads.evaluation.trained.request import Training, evaluate_trained
from tests.support.stores.action_store import action_store


def test_warnings_of_a_repeated_test_come_once_whatever_the_logger_is_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    workspace.features_dir("toy").mkdir(parents=True)
    action_store(workspace.features_dir("toy") / "one.zarr")
    own = trained.evaluate_store

    def warning(*arguments: object, **more: object) -> object:
        logging.getLogger("a.room.of.tomorrow").warning("what every test would say")
        return own(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(trained, "evaluate_store", warning)
    request = EvaluationRequest(workspace, "toy", "fewshot", device="cpu", split="val")
    (outcome,) = evaluate_trained(request, Training(shots="2", epochs=3, batch_size=8)).outcomes
    assert outcome.best is not None
    said = [record for record in caplog.records if record.name == "a.room.of.tomorrow"]
    assert len(said) == 1
    assert logging.root.manager.disable == 0
