"""An evaluation asked for in one call from Python, and results of an earlier version."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from featstore import UserError, Workspace, opening
from featstore.reading.store import Store
from heads.evaluation.comparing.compare import compare, read_result
from heads.evaluation.request import EvaluationRequest, ScoreSettings, evaluate
from heads.evaluation.results import EvalResult, SplitResult
from heads.evaluation.sweeps import parse_sweeps
from heads.evaluation.trained.request import Training, evaluate_trained
from tests.support.stores.action_store import action_store

EARLIER = Path(__file__).parents[2] / "data" / "results"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    found = Workspace(tmp_path)
    folder = found.features_dir("toy")
    folder.mkdir(parents=True)
    action_store(folder / "one.zarr")
    return found


def ask(workspace: Workspace, **more: object) -> EvaluationRequest:
    return EvaluationRequest(
        workspace,
        "toy",
        "closeset",
        head="mean",
        device="cpu",
        **more,  # type: ignore[arg-type]
    )


def test_one_call_measures_and_another_keeps(workspace: Workspace) -> None:
    evaluation = evaluate(ask(workspace))
    ((result, run_dir),) = evaluation.measured
    assert (result.protocol, result.dataset, result.head) == ("closeset", "toy", "mean")
    assert not run_dir.exists(), "measuring writes nothing"
    (file,) = evaluation.save()
    assert json.loads(file.read_text()) == json.loads(json.dumps(result.to_json()))


def test_a_store_is_opened_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counting(path: Path) -> Store:
        opened.append(path)
        return open_store(path)

    open_store = opening.open_store
    monkeypatch.setattr(opening, "open_store", counting)
    evaluate(ask(workspace))
    assert len(opened) == 1


def test_a_sweep_in_one_call(workspace: Workspace) -> None:
    swept = parse_sweeps(["fusion=softmax,cosine"])
    evaluation = evaluate(ask(workspace, swept=swept))
    assert [result.fusion for result, _ in evaluation.measured] == ["softmax", "cosine"]
    with pytest.raises(UserError, match="contradict"):
        evaluate(ask(workspace, swept=swept, score=ScoreSettings(fusion="cosine")))


def test_few_shot_in_one_call(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    request = EvaluationRequest(workspace, "toy", "fewshot", device="cpu", split="val")
    how = Training(shots="2", epochs=1, batch_size=8, best_epoch=False)
    with caplog.at_level("INFO"):
        done = evaluate_trained(request, how)
    assert caplog.text.count("features of toy: ") == 1  # it is trained on and tested
    assert [outcome.run.shots for outcome in done.outcomes] == [2]
    assert all(file.is_file() for file in done.files)


@pytest.mark.parametrize("file", sorted(EARLIER.glob("*.json")), ids=lambda file: file.name[:20])
def test_an_earlier_result_has_the_name_it_would_get_today(file: Path) -> None:
    values = json.loads(file.read_text())
    values["per_split"] = tuple(SplitResult(**part) for part in values["per_split"])
    beside = {"details", "class_names", "measure", "mean_ap"}  # of several classes a video
    beside |= {"tower_frames", "class_names_as"}  # of heads that look at pixels; of rephrased names
    beside |= {"weights", "projection"}  # of TACO
    values["n_copied"] = None  # came later
    assert set(values) == {field.name for field in fields(EvalResult)} - beside
    result = EvalResult(**values)
    assert f"{result.file_name}.json" == file.name
    found = compare(read_result(file), read_result(file))
    assert all(difference.unknown for difference in found.differences)
    assert found.to_json()["comparable"] is True
