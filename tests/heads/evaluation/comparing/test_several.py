"""Several results: what differed in training and data, and each number beside the first one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heads.evaluation.comparing.compare import SavedResult, read_result
from heads.evaluation.comparing.several import compare_all
from heads.evaluation.comparing.training import training_differences
from tests.support.stores.result_files import write_result

CLASSES = ["jump", "run", "sit"]


def ran(folder: Path, name: str, settings: dict[str, Any] | None, **changes: Any) -> SavedResult:
    """A result of the run `name` that was begun with `settings`; None: the file is missing."""
    result = write_result(folder / name / "eval" / "r.json", head=name, **changes)
    if settings is not None:
        (folder / name / "config.json").write_text(json.dumps(settings))
    return read_result(result)


def settings(lr: float = 5e-5, classes: list[str] = CLASSES, **data: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "head": {"kind": "mote", "layers": 4},
        "training": {"lr": lr, "seed": 1},
        "data": {"n_trained": 90, "sampling": "uniform:8", "class_names": classes, **data},
        "precision": "fp32",
    }


def told(*results: SavedResult) -> dict[str, tuple[Any, ...]]:
    return {d.name: d.values for d in training_differences(results)}


def test_every_setting_that_differs_is_told(tmp_path: Path) -> None:
    a = ran(tmp_path, "a", settings())
    b = ran(tmp_path, "b", settings(lr=1e-3, held_out=9))
    c = ran(tmp_path, "c", settings(classes=["jump", "run", "sit", "swim"], n_trained=120))
    assert told(a, a) == {}
    assert told(a, b) == {"training.lr": (5e-5, 1e-3), "data.held_out": (None, 9)}
    assert told(a, b, c) == {
        "classes": (3, 3, 4),
        "classes unlike A": (0, 0, 1),
        "training.lr": (5e-5, 1e-3, 5e-5),
        "data.n_trained": (90, 90, 120),
        "data.held_out": (None, 9, None),
    }
    other = ran(tmp_path, "other", settings(classes=["jump", "run", "swim"]))
    assert told(a, other) == {"classes unlike A": (0, 1)}  # as many, but not the same
    assert told(other, c) == {
        "classes": (3, 4),
        "classes unlike A": (0, 1),
        "data.n_trained": (90, 120),
    }


def test_what_was_not_trained_and_what_is_not_known(tmp_path: Path) -> None:
    a, b = ran(tmp_path, "a", settings()), ran(tmp_path, "b", settings(lr=1.0))
    mean = ran(tmp_path, "mean", None, kind="mean")
    lost = ran(tmp_path, "lost", None)
    assert told(mean, a, lost) == {"training": ("none: CLIP alone", "trained", "unknown")}
    assert told(mean, a, b)["training.lr"] == (None, 5e-5, 1.0)
    assert told(lost, mean) == {"training": ("unknown", "none: CLIP alone")}
    assert told(mean, mean) == {}
    damaged = ran(tmp_path, "damaged", None)
    (tmp_path / "damaged/config.json").write_text("[1]")
    assert told(a, damaged) == {"training": ("trained", "unknown")}
    long = ran(tmp_path, "long", settings(note="x" * 100))
    (difference,) = training_differences((a, long))
    assert difference.texts == ("-", "x" * 59 + "…")


def test_each_result_is_compared_with_the_first(tmp_path: Path) -> None:
    results = [
        ran(tmp_path, "a", settings(), splits=(50.0, 60.0)),
        ran(tmp_path, "b", settings(), splits=(52.0, 60.0)),
        ran(tmp_path, "c", settings(), splits=(40.0,), views="1x1", device="cuda"),
        ran(tmp_path, "d", settings(), old=True, splits=(70.0, 70.0)),
    ]
    found = compare_all(results)
    rows = {row.name: row for row in found.fields()}
    assert rows["head"].values == ("a", "b", "c", "d")
    assert rows["views"].values == ("3x1", "3x1", "1x1", "3x1")
    assert (rows["views"].decisive, rows["views"].unknown) == (True, False)
    assert rows["device"].values == ("cpu", "cpu", "cuda", "cpu")
    assert rows["sampler"].values == ("clips", "clips", "clips", "unknown")
    assert rows["sampler"].unknown
    numbers = {(row.group, row.name): row.values for row in found.numbers()}
    assert numbers["test1", "top1"] == (
        "50.00",
        "52.00 (+2.00)",
        "40.00 (-10.00)",
        "70.00 (+20.00)",
    )
    assert numbers["test2", "top1"] == ("60.00", "60.00 (+0.00)", "-", "70.00 (+10.00)")
    assert numbers["mean of all test sets", "top1"][2] == "40.00 (-15.00)"
    value = found.to_json()
    assert [pair["comparable"] for pair in value["comparisons"]] == [True, False, None]
    assert value["comparable"] is False
    assert compare_all([results[0], results[3]]).to_json()["comparable"] is None
    two = compare_all(results[:2]).to_json()
    assert two["comparable"] is True
    assert (two["a"], two["b"]) == (str(results[0].path), str(results[1].path))
    assert json.loads(json.dumps(value, allow_nan=False))["training"] == []
