"""What a result holds, and the files it is kept in."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore import WorkError
from heads import EvalResult, RunFacts, TestSet, evaluate_store, save_result
from heads.evaluation.details import SplitDetail
from heads.evaluation.evaluate import pixels_text
from heads.evaluation.outcomes import read_outcomes
from heads.evaluation.protocols.choose import PROTOCOLS, build_test_sets
from heads.evaluation.results import RESULT_FORMAT, run_facts
from heads.files.head_file import save_tensors
from heads.files.run_files import TOWER_FILE
from tests.support.stores.action_store import ACTIONS, action_store

FIELDS = {  # what explains the differences between published numbers
    *("protocol", "protocol_name", "source", "trained_on", "test_list", "n_listed", "n_found"),
    *("n_evaluated", "n_failed", "class_names_source", "label_map", "prompt_templates", "sampler"),
    *("resize", "crop", "blend", "epoch", "epoch_choice", "ensemble", "modulation_neighbours"),
    *("modulation_temperature", "class_list_hash", "class_names_hash", "list_hash", "views"),
    *("frames", "sampling", "fusion", "head_fingerprint", "encoder_fingerprint", "prompts_hash"),
    *("result_format", "dataset", "head", "per_split", "mean", "std", "n_trained_on", "notes"),
}


def result_of(path: Path, **options: Any) -> EvalResult:
    store = action_store(path / "toy.zarr", noise=4.0, split_names=("test1", "test2", "rest"))
    given = {
        "protocol": "zeroshot",
        "tests": build_test_sets(PROTOCOLS["zeroshot"], store),
        "dataset": "toy",
    }
    return evaluate_store(store, None, device="cpu", **(given | options))  # type: ignore[arg-type]


def part_rows(split: str) -> list[int]:
    """Rows of a split of `result_of` that did not fail."""
    return [row for row in range({"test1": 0, "test2": 1}[split], 40, 3) if row != 3]


def test_every_field_that_explains_a_number(tmp_path: Path) -> None:
    facts = RunFacts(0.99, 30, "last", "labels.csv", "corrected", ("a video of {}.",), 0)
    value = result_of(tmp_path, facts=facts).to_json()
    assert value.keys() >= FIELDS
    assert not value.keys() & {"details", "class_names"}
    json.dumps(value, allow_nan=False)
    assert value["result_format"] == RESULT_FORMAT == 2
    assert (value["blend"], value["epoch"], value["epoch_choice"]) == (0.99, 30, "last")
    assert (value["class_names_source"], value["label_map"]) == ("labels.csv", "corrected")
    assert value["prompt_templates"] == ["a video of {}."]
    assert (value["sampler"], value["sampling"]) == ("uniform", "uniform:8")
    assert value["modulation_neighbours"] is value["modulation_temperature"] is None
    assert [part["n_classes"] for part in value["per_split"]] == [8, 8]


def test_videos_that_were_not_there_are_not_found(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", failed=(1, 2))
    reasons = list(store.reasons)
    reasons[1] = "no such file in the videos folder"
    vars(store)["reasons"] = reasons
    result = evaluate_store(
        store,
        None,
        protocol="zeroshot",
        dataset="toy",
        tests=build_test_sets(PROTOCOLS["zeroshot"], store),
        device="cpu",
    )
    counts = (result.n_listed, result.n_found, result.n_evaluated, result.n_failed)
    assert counts == (40, 39, 38, 2)


def test_accuracy_per_class_and_confusion_lie_beside_the_result(tmp_path: Path) -> None:
    result = result_of(tmp_path)
    file = save_result(result, tmp_path / "run")
    assert json.loads(file.read_text()) == json.loads(json.dumps(result.to_json()))
    beside = sorted(path.name.partition(".")[2] for path in file.parent.iterdir())
    pictures = ["confusion.csv", "confusion.npz", "confusion.png"]
    assert beside == [*pictures, "json", "outcomes.csv", "per-class.csv", "videos.csv"]
    with file.with_suffix(".per-class.csv").open(encoding="utf-8-sig") as text:
        rows = list(csv.DictReader(text))
    assert [row["class_name"] for row in rows] == [*ACTIONS, *ACTIONS]
    outcomes = read_outcomes(file)
    assert outcomes is not None
    for part, detail in zip(result.per_split, result.details, strict=True):
        places = outcomes[part.split]
        assert 100 * sum(place == 0 for place in places.values()) / len(places) == part.top1
        assert places.keys() == {f"clip{row:03d}" for row in part_rows(part.split)}
        own = [row for row in rows if row["split"] == part.split]
        assert sum(int(row["n_evaluated"]) for row in own) == part.n_evaluated
        weighted = [float(row["top1"]) * int(row["n_evaluated"]) for row in own if row["top1"]]
        assert sum(weighted) / part.n_evaluated == pytest.approx(part.top1, abs=1e-3)
        with np.load(file.with_suffix(".confusion.npz")) as data:
            confusion = data[part.split]
            assert data["class_names"].tolist() == list(ACTIONS)
            assert data[f"{part.split}_labels"].tolist() == list(range(8))
        assert confusion.sum() == part.n_evaluated
        assert 100 * np.trace(confusion) / confusion.sum() == pytest.approx(part.top1)
        for true, said in zip(detail.labels, detail.predicted, strict=True):
            assert confusion[true, said] > 0


def test_confusion_of_candidates_in_any_order() -> None:
    classes = np.array([7, 2, 5])
    detail = SplitDetail(
        "x", classes, np.array([2, 2, 5]), np.array([7, 2, 5]), np.array([1, 0, 0]), ("a", "b", "c")
    )
    assert detail.confusion().tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_one_file_per_measurement(tmp_path: Path) -> None:
    result = result_of(tmp_path)
    first = save_result(result, tmp_path / "run")
    assert save_result(replace(result, top1=1.0), tmp_path / "run") == first
    changes: list[dict[str, Any]] = [
        {"protocol_name": "ucf101-halfclass-full"},
        {"dataset": "other"},
        {"store": "other.zarr"},
        {"views": "4x3"},
        {"sampling": "clips:8x3"},
        {"frames": 4},
        {"prompt_set": "name"},
        {"prompts_hash": "other"},
        {"fusion": "cosine"},
        {"ensemble": 0.5},
        {"ensemble": 0.25},
        {"modulate": True, "modulation_neighbours": 5, "modulation_temperature": 0.05},
        {"modulate": True, "modulation_neighbours": 5, "modulation_temperature": 0.1},
        {"list_hash": "other"},
        {"class_list_hash": "other"},
        {"label_map": "as-published"},
        {"epoch_choice": "best on the test set"},
        {"precision": "bf16"},
        {"per_split": result.per_split[:1]},
    ]
    names = [replace(result, **change).file_name for change in changes]
    assert len({result.file_name, *names}) == len(changes) + 1
    assert all(len(name) < 200 for name in names)
    many = [replace(result.per_split[0], split=f"test{n}") for n in range(1, 40)]
    assert len(replace(result, per_split=tuple(many)).file_name) < 200


def test_what_a_run_says_of_its_weights(tmp_path: Path) -> None:
    def facts(value: object, **known: Any) -> RunFacts:
        (tmp_path / "config.json").write_text(json.dumps(value))
        return run_facts(tmp_path, **known)

    assert facts({"head": {"kind": "mote"}, "training": {"epochs": 30}}) == RunFacts(
        epoch=30, epoch_choice="last"
    )
    assert facts({"head": {"kind": "mean"}, "training": {"epochs": 30}}) == RunFacts()
    assert facts({"imported": {"blend": 0.99, "epoch": 29}}) == RunFacts(0.99, 29)
    tuned = {"blend": 0.5, "epoch": 2, "epoch_choice": "best on val"}  # the file counts from 0
    save_tensors(tmp_path / TOWER_FILE, {"visual.proj": torch.zeros(1)}, tuned)
    assert facts({"mode": "finetune"}) == RunFacts(0.5, 3, "best on val")
    assert facts({"mode": "finetune"}, epoch=2) == RunFacts(0.5, 2, "best on val")
    assert run_facts(tmp_path / "nowhere") == RunFacts()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkError, match="not JSON"):
        run_facts(tmp_path)


@pytest.mark.parametrize(
    ("preprocessing", "crops", "expected"),
    [
        (
            {"size": [224, 224], "interpolation": "bicubic", "resize_mode": "shortest"},
            1,
            ("short side to 224, bicubic", "224x224 centre"),
        ),
        (
            {"size": [224, 336], "interpolation": "bilinear", "resize_mode": "squash"},
            3,
            ("to 224x336, bilinear", "224x336 3 along the long side"),
        ),
        ({"size": 224}, 10, ("short side to 224, unknown interpolation", "224x224 10 crops")),
        ({}, 1, ("short side to unknown, unknown interpolation", "unknown")),
    ],
)
def test_pixels_in_words(
    preprocessing: dict[str, Any], crops: int, expected: tuple[str, str]
) -> None:
    assert tuple(pixels_text(preprocessing, crops).values()) == expected


def test_a_test_set_of_failed_videos_is_refused(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    with pytest.raises(ValueError, match="distinct names"):
        evaluate_store(
            *(store, None),
            protocol="zeroshot",
            dataset="toy",
            tests=[TestSet("a", store.rows), TestSet("a", store.rows)],
        )
