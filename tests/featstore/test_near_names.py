"""A name that is not known is answered with those that were probably meant, and the choices."""

from __future__ import annotations

import pytest

from featstore.errors import meant, one_of

KNOWN = ["frozen-store", "end-to-end", "demo", "Brush hair"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("frozen_store", "did you mean frozen-store? "),
        ("FROZEN-STORE", "did you mean frozen-store? "),
        ("store", "did you mean frozen-store? "),
        ("brush_hair", "did you mean 'Brush hair'? "),
        ("xyz", ""),
        ("", ""),
        ("demo", ""),
        ("gpu", "did you mean demo? "),
    ],
)
def test_near_names(name: str, near: str) -> None:
    assert meant(name, KNOWN, {"gpu": "demo"}) == near


def test_the_choices_follow() -> None:
    assert one_of("dmeo", ["demo", "first"]) == "did you mean demo? choose one of demo, first"
    assert one_of("dmeo", []) == "there is none to choose"
