"""The outcome of every video beside a result, and what two of them say together.

`NAME.outcomes.csv` beside `NAME.json`: columns split, key, place; place 0 is a right answer, the
place of the true class among the candidates; videos that failed are left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from featstore.errors import UserError
from featstore.files.durable import write_bytes

OUTCOMES_SUFFIX: Final = ".outcomes.csv"
OUTCOMES_LIMIT: Final = 2**28  # bytes; a million videos are about 40 MB
_HEADER: Final = ["split", "key", "place"]

Outcomes = dict[str, dict[str, int]]
"""Place of the true class by key, by test set."""


@dataclass(frozen=True)
class Paired:
    """Two results on the same videos of one test set.

    `p` is that of the exact two-sided binomial test on the videos where one is right and the other
    wrong (McNemar's test, exact): how likely a split at least as uneven is when both are equally
    good.
    """

    split: str
    n: int
    only_a: int
    """Videos that A has right and B wrong."""
    only_b: int
    p: float


def outcomes_file(result: Path) -> Path:
    """Where the outcomes of a result file lie."""
    return result.with_name(result.name.removesuffix(".json") + OUTCOMES_SUFFIX)


def write_outcomes(result: Path, outcomes: Mapping[str, Mapping[str, int]]) -> Path:
    """Keep the outcomes of a result beside it; returns their file."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_HEADER)
    for split, places in outcomes.items():
        table.writerows([split, key, place] for key, place in places.items())
    path = outcomes_file(result)
    write_bytes(path, text.getvalue().encode())
    return path


def read_outcomes(result: Path) -> Outcomes | None:
    """The outcomes beside a result file, None when there are none; UserError for another file."""
    path = outcomes_file(result)
    try:
        with open(path, "rb") as file:
            raw = file.read(OUTCOMES_LIMIT + 1)
    except FileNotFoundError:
        return None
    try:
        if len(raw) > OUTCOMES_LIMIT:
            raise ValueError(f"more than {OUTCOMES_LIMIT} bytes")
        header, *rows = csv.reader(io.StringIO(raw.decode(), newline=""))
        if header != _HEADER:
            raise ValueError(f"its columns are {header}")
        found: Outcomes = {}
        for split, key, place in rows:
            found.setdefault(split, {})[key] = int(place)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} holds no outcomes of videos ({error}): evaluate again") from error
    return found


def paired_outcomes(a: Path, b: Path) -> list[Paired]:
    """The test sets whose videos are the same in both results; none where outcomes are missing."""
    of_a, of_b = read_outcomes(a), read_outcomes(b)
    if of_a is None or of_b is None:
        return []
    return [
        paired(
            split, [places[key] == 0 for key in places], [of_b[split][key] == 0 for key in places]
        )
        for split, places in of_a.items()
        if split in of_b and of_b[split].keys() == places.keys()
    ]


def paired(split: str, right_a: Sequence[bool], right_b: Sequence[bool]) -> Paired:
    """Count the videos on which two results disagree; the same videos in the same order."""
    pairs = list(zip(right_a, right_b, strict=True))
    only_a = sum(a and not b for a, b in pairs)
    only_b = sum(b and not a for a, b in pairs)
    return Paired(split, len(pairs), only_a, only_b, binomial_p(only_a, only_b))


def binomial_p(one: int, other: int) -> float:
    """Two-sided p of `one` against `other` when both are equally likely; 1 without any."""
    n, tail = one + other, 0
    term = 1  # n choose k, k = 0, 1, ...: exact whole numbers
    for k in range(min(one, other) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    # Beyond the range of floats both are whole numbers, and their quotient is one again.
    return min(1.0, 2 * tail / 2**n) if n else 1.0
