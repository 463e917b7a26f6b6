"""Saves the outcome of every video beside a result, and compares the outcomes of two results.

`NAME.outcomes.csv` lies beside `NAME.json` and has the columns split, key and place. The place is
the rank of the true class among the candidates, 0 for a right answer; failed videos are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from featstore.errors import UserError
from featstore.files.durable import write_bytes
from featstore.files.tables import csv_bytes, csv_rows

OUTCOMES_LIMIT: Final = 2**28  # bytes; a million videos are about 40 MB
_HEADER: Final = ["split", "key", "place"]

Outcomes = dict[str, dict[str, int]]
"""For every test set, the rank of the true class of every video by its key."""


@dataclass(frozen=True)
class Paired:
    """Two results, A and B, compared on the same n videos of one test set.

    `p` comes from the exact two-sided binomial test on the videos that only one has right (exact
    McNemar's test): the probability of a division at least as uneven if both are equally good.
    """

    split: str
    n: int
    only_a: int
    """How many videos A has right and B wrong."""
    only_b: int
    p: float


def outcomes_file(result: Path) -> Path:
    """Return the path of the outcomes that belong to a result file."""
    return result.with_name(result.name.removesuffix(".json") + ".outcomes.csv")


def write_outcomes(result: Path, outcomes: Mapping[str, Mapping[str, int]]) -> Path:
    """Save outcomes beside their result file; return the path."""
    of_all = outcomes.items()
    rows = ([split, key, place] for split, places in of_all for key, place in places.items())
    path = outcomes_file(result)
    write_bytes(path, csv_bytes(_HEADER, rows))
    return path


def read_outcomes(result: Path) -> Outcomes | None:
    """Read the outcomes beside a result file; None without a file, UserError if it is damaged."""
    path = outcomes_file(result)
    try:
        with open(path, "rb") as file:
            raw = file.read(OUTCOMES_LIMIT + 1)
    except FileNotFoundError:
        return None
    try:
        if len(raw) > OUTCOMES_LIMIT:
            raise ValueError(f"more than {OUTCOMES_LIMIT} bytes")
        header, *rows = csv_rows(raw)
        if header != _HEADER:
            raise ValueError(f"its columns are {header}")
        found: Outcomes = {}
        for split, key, place in rows:
            found.setdefault(split, {})[key] = int(place)
    except ValueError as error:
        raise UserError(f"{path} is no file of outcomes ({error}): evaluate again") from error
    return found


def paired_outcomes(a: Path, b: Path) -> list[Paired]:
    """Compare two results on every test set with equal videos; [] if one has no outcomes."""
    of_a, of_b = read_outcomes(a) or {}, read_outcomes(b) or {}
    found = []
    for split, places in of_a.items():
        others = of_b.get(split, {})
        if others.keys() == places.keys():
            only_a = sum(places[key] == 0 and others[key] != 0 for key in places)
            only_b = sum(places[key] != 0 and others[key] == 0 for key in places)
            p = binomial_p(only_a, only_b)
            found.append(Paired(split, len(places), only_a, only_b, p))
    return found


def binomial_p(one: int, other: int) -> float:
    """Return the two-sided p of two counts whose events are equally likely; 1 if both are 0."""
    n, tail = one + other, 0
    term = 1  # n choose k, k = 0, 1, ...: exact whole numbers
    for k in range(min(one, other) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    # Both whole numbers can exceed the range of floats, but their quotient does not.
    return min(1.0, 2 * tail / 2**n) if n else 1.0
