"""Two results: in what they differ, which of it makes them incomparable, and then the numbers."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from heads.evaluation.comparing.compare import (
    FIELDS,
    Comparison,
    compare,
    newest_result,
    read_result,
)
from heads.evaluation.outcomes import binomial_p, read_outcomes, write_outcomes
from heads.evaluation.results import EvalResult
from tests.support.stores.result_files import result, write_result


def compared(folder: Path, a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    one = write_result(folder / "a.json", **a)
    other = write_result(folder / "b.json", **b)
    return compare(read_result(one), read_result(other))


def test_equal_results_are_comparable(tmp_path: Path) -> None:
    found = compared(tmp_path, {"splits": (50.0,)}, {"splits": (52.5,)})
    assert found.differences == ()
    assert found.to_json()["comparable"] is True
    (number, top5) = found.numbers
    assert (number.split, number.measure, number.difference) == ("test1", "top1", 2.5)
    assert (top5.measure, top5.difference) == ("top5", 0.0)
    assert found.paired == ()  # no outcomes beside them: no claim


def test_every_field_of_a_result_has_its_group() -> None:
    numbers = {"top1", "top5", "mean", "std", "mean_top5", "std_top5", "per_split", "details",
               "mean_ap"}  # fmt: skip
    remarks = {"source", "published_counts", "notes", "result_format", "class_names", "n_copied",
               "tower_frames"}  # fmt: skip
    named = {field.name for field in fields(EvalResult)} - numbers - remarks
    assert named - FIELDS.keys() == set(), "give them a group in EvalResult"


def test_fields_come_in_groups_and_some_forbid_the_comparison(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {"views": "3x1", "list_hash": "aa11", "head": "first", "device": "cpu"},
        {"views": "1x1", "list_hash": "ff99", "head": "second", "device": "cuda"},
    )
    assert [(d.name, d.group, d.decisive, d.unknown) for d in found.differences] == [
        ("list_hash", "what was tested", True, False),
        ("views", "how", True, False),
        ("head", "with what", False, False),
        ("device", "arithmetic", False, False),
    ]
    assert found.incomparable == ("list_hash", "views")
    assert found.to_json()["comparable"] is False
    assert len(found.numbers) == 2  # shown all the same, under the verdict


@pytest.mark.parametrize(
    ("changes", "decisive"),
    [
        ({"dataset": "ucf101"}, True),
        ({"protocol_name": "hmdb51-zeroshot-full"}, True),
        ({"n_evaluated": 1527}, True),
        ({"sampler": "dense"}, True),
        ({"frames": 16}, True),
        ({"resize": "short side to 256, bicubic"}, True),
        ({"fusion": "features"}, True),
        ({"prompts_hash": "0"}, True),
        ({"class_names_as": "rephrased"}, True),
        ({"label_map": "as-published"}, True),
        ({"label_map": None}, True),
        ({"epoch_choice": "best on the test set"}, True),
        ({"trained_on": "k600"}, True),
        ({"weights": "mean"}, False),  # beside a head that has one kind of weights
        ({"projection": "off"}, False),  # beside a head without one
        ({"blend": 0.5}, False),
        ({"ensemble": 0.5}, False),
        ({"modulation_temperature": 0.1}, False),
        ({"encoder_fingerprint": "0"}, False),
        ({"precision": "bf16"}, False),
        ({"something_new": 1}, False),
    ],
)
def test_what_forbids_a_comparison(tmp_path: Path, changes: dict[str, Any], decisive: bool) -> None:
    found = compared(tmp_path, {"something_new": 0}, {"something_new": 0, **changes})
    (difference,) = found.differences
    assert difference.name == next(iter(changes))
    assert (difference.decisive, difference.unknown) == (decisive, False)
    assert found.to_json()["comparable"] is (not decisive)


def test_weights_and_projections_of_one_method_are_not_compared_as_equals(tmp_path: Path) -> None:
    own = {"kind": "taco", "weights": "mean", "projection": "on"}
    for name, value in (("weights", "teacher"), ("projection", "off")):
        found = compared(tmp_path, own, {**own, name: value})
        assert found.incomparable == (name,)
        assert compared(tmp_path, own, own).to_json()["comparable"] is True
    unnamed = {"kind": "taco", "projection": "on"}  # a file whose name does not say its weights
    assert compared(tmp_path, own, unnamed).unsure == ("weights",)
    assert compared(tmp_path, unnamed, unnamed).to_json()["comparable"] is None


def test_entries_of_objects_are_named_alone(tmp_path: Path) -> None:
    other = {"size": [224, 224], "interpolation": "bilinear"}
    found = compared(tmp_path, {}, {"preprocessing": other})
    (difference,) = found.differences
    assert (difference.name, difference.of_a, difference.of_b) == (
        "preprocessing interpolation",
        "bicubic",
        "bilinear",
    )


def test_what_an_old_file_lacks_is_unknown_not_equal(tmp_path: Path) -> None:
    found = compared(tmp_path, {"old": True}, {"old": False})
    unknown = {d.name: (d.of_a, d.of_b) for d in found.differences if d.unknown}
    assert unknown["sampler"] == ("unknown", "clips")
    assert unknown["label_map"] == ("unknown", "corrected")
    assert unknown["ensemble"] == ("unknown", "none")
    assert found.incomparable == ()
    assert "sampler" in found.unsure
    assert found.to_json()["comparable"] is None
    both = compared(tmp_path, {"old": True}, {"old": True})
    assert {d.name: (d.of_a, d.of_b) for d in both.differences}["crop"] == ("unknown", "unknown")


def test_null_is_unknown_where_it_cannot_mean_none(tmp_path: Path) -> None:
    found = compared(tmp_path, {"trained_on": None}, {"trained_on": None})
    (difference,) = found.differences
    assert difference.unknown
    assert found.to_json()["comparable"] is None


def test_several_test_sets(tmp_path: Path) -> None:
    found = compared(tmp_path, {"splits": (50.0, 60.0, 70.0)}, {"splits": (51.0, 58.0)})
    top1 = [(n.split, n.difference) for n in found.numbers if n.measure == "top1"]
    assert top1 == [("test1", 1.0), ("test2", -2.0), ("mean of all test sets", pytest.approx(-5.5))]
    assert (found.only_a, found.only_b) == (("test3",), ())
    assert "splits test3" in [d.name for d in found.differences]
    draws = [{"split": f"draw{n}", "n_listed": 5, "top1": 50.0} for n in range(10)]
    found = compared(tmp_path, {}, {"per_split": draws})
    (splits,) = [d for d in found.differences if d.name.startswith("splits")]
    assert (splits.of_a, splits.of_b[:12]) == ("test1", "draw0, draw1")
    assert found.to_json()["comparable"] is False


def test_outcomes_beside_both_results_are_paired(tmp_path: Path) -> None:
    a, b = write_result(tmp_path / "a.json"), write_result(tmp_path / "b.json")
    right_a = {f"clip, {i}": i % 2 for i in range(10)}  # 0, 2, 4, 6, 8 right
    right_b = {key: 0 if place == 0 or i < 4 else 3 for i, (key, place) in
               enumerate(right_a.items())}  # fmt: skip
    write_outcomes(a, {"test1": right_a})
    assert compare(read_result(a), read_result(b)).paired == ()
    write_outcomes(b, {"test1": right_b})
    assert read_outcomes(b) == {"test1": right_b}
    (pair,) = compare(read_result(a), read_result(b)).paired
    assert (pair.n, pair.only_a, pair.only_b, pair.p) == (10, 0, 2, 0.5)
    (pair,) = compare(read_result(b), read_result(a)).paired
    assert (pair.only_a, pair.only_b) == (2, 0)
    other = write_result(tmp_path / "c.json", list_hash="ff99")
    write_outcomes(other, {"test1": right_b})
    assert compare(read_result(a), read_result(other)).paired == ()


def test_the_exact_test_by_hand() -> None:
    assert binomial_p(0, 0) == 1.0
    assert binomial_p(1, 1) == 1.0
    assert binomial_p(0, 5) == 2 / 32
    assert binomial_p(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert 0 < binomial_p(9_000, 11_000) < 1e-40  # beyond floats on the way


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_exact_test_is_a_probability(one: int, other: int) -> None:
    assert 0 < binomial_p(one, other) <= 1
    assert binomial_p(one, other) == binomial_p(other, one)


def test_the_newest_result_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = write_result(run / "eval" / "z.json", time=1)
    new = write_result(run / "eval" / "a.json", time=2, dataset="ucf101")
    (run / "eval" / "summary.json").write_text("{}")  # no result
    assert newest_result(run).path == new
    assert newest_result(run, read_result(old)).path == old
    with pytest.raises(UserError, match="has no results: run `mote-cli eval"):
        newest_result(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "\x00", '{"protocol": 1}', json.dumps({**result(), "top1": "high"}),
     json.dumps({**result(), "per_split": [{}]}), "[" * 100_000],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(UserError, match="is not a result of"):
        read_result(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path / "none.json")


def test_damaged_outcomes_are_refused(tmp_path: Path) -> None:
    file = write_result(tmp_path / "a.json")
    (tmp_path / "a.outcomes.csv").write_text("split,key,place\ntest1,clip,first\n")
    with pytest.raises(UserError, match="is no file of outcomes"):
        read_outcomes(file)
