from __future__ import annotations

import json

import pytest

from featstore import Provenance, UserError
from tests.support.stores.sample_stores import make_provenance


def test_json_round_trip_is_exact() -> None:
    made = make_provenance(logit_scale=99.99999237060547)
    assert Provenance.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_split_is_told_only_where_there_is_one() -> None:
    assert "split" not in make_provenance().to_json()
    one = make_provenance(split="val")
    assert Provenance.from_json(one.to_json()) == one
    assert make_provenance().differences(one) == ["split: store has none, asked for val"]


def test_equal_provenance_has_no_differences() -> None:
    assert make_provenance().differences(make_provenance()) == []


def test_name_of_the_encoder_and_versions_are_informative() -> None:
    other = make_provenance(encoder="/elsewhere/vit", versions={"mote-video": "0.2.0"})
    assert make_provenance().differences(other) == []


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"sampling": "uniform:8"}, "sampling: store has uniform:4, asked for uniform:8"),
        ({"crops": 3}, "crops: store has 1, asked for 3"),
        ({"precision": "bf16"}, "precision: store has fp32, asked for bf16"),
        ({"decoder": "dali"}, "decoder: store has pyav, asked for dali"),
        ({"dataset_fingerprint": "f00d"}, "dataset_fingerprint: store has feed, asked for f00d"),
        (
            {"preprocessing": {"size": 336, "mean": [0.48, 0.46, 0.41]}},
            "preprocessing size: store has 224, asked for 336",
        ),
        (
            {"encoder": "B/other", "encoder_fingerprint": "ffff"},
            "encoder: store has ViT-B-32/random (weights 0123456789abcdef), "
            "asked for B/other (weights ffff)",
        ),
    ],
)
def test_each_difference_is_named(change: dict[str, object], phrase: str) -> None:
    assert make_provenance().differences(make_provenance(**change)) == [phrase]


def test_tuples_compare_as_the_lists_json_makes_of_them() -> None:
    tuples = make_provenance(preprocessing={"size": 224, "mean": (0.48, 0.46, 0.41)})
    assert make_provenance().differences(tuples) == []


def test_a_scale_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="logit scale nan"):
        make_provenance(logit_scale=float("nan"))


@pytest.mark.parametrize("value", [None, [], {}, {"encoder": "x"}])
def test_foreign_json_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="provenance holds"):
        Provenance.from_json(value)


def test_a_field_of_another_type_is_named() -> None:
    value = make_provenance().to_json() | {"crops": "three"}
    with pytest.raises(UserError, match="crops is 'three': it must be of type int"):
        Provenance.from_json(value)
