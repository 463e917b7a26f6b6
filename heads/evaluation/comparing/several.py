"""Compares several saved results: each with the first, and the training of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from heads.evaluation.comparing.compare import Comparison, SavedResult, compare
from heads.evaluation.comparing.training import TrainingDifference, training_differences
from heads.evaluation.results import GROUPS, Group


@dataclass(frozen=True)
class Row:
    """One line of a table with a column per result."""

    name: str
    group: str
    """The group of the field, or the test set of a number."""
    values: tuple[str, ...]
    """One text per result; of numbers, percent with the difference to A in points."""
    decisive: bool = False
    unknown: bool = False
    """No result is known to differ from A."""


@dataclass(frozen=True)
class Comparisons:
    """Several results, of which the first, A, is compared with each of the others."""

    results: tuple[SavedResult, ...]
    training: tuple[TrainingDifference, ...]
    pairs: tuple[Comparison, ...]
    """One entry for each result but the first."""

    def fields(self) -> list[Row]:
        """Return a row for each field in which a result differs from A, group by group."""
        rows: dict[str, Row] = {}
        for at, pair in enumerate(self.pairs, start=1):
            for d in pair.differences:
                new = Row(d.name, d.group, (d.of_a,) * len(self.results), d.decisive, True)
                row = rows.get(d.name, new)
                values = (*row.values[:at], d.of_b, *row.values[at + 1 :])
                rows[d.name] = replace(row, values=values, unknown=row.unknown and d.unknown)
        return sorted(rows.values(), key=lambda row: GROUPS.index(cast(Group, row.group)))

    def numbers(self) -> list[Row]:
        """Return a row for each accuracy that A and another result have."""
        rows: dict[tuple[str, str], Row] = {}
        for at, pair in enumerate(self.pairs, start=1):
            for n in pair.numbers:
                none = ("-",) * len(self.pairs)
                row = rows.get((n.split, n.measure)) or Row(
                    n.measure, n.split, (f"{n.a:.2f}", *none)
                )
                text = f"{n.b:.2f} ({n.difference:+.2f})"
                values = (*row.values[:at], text, *row.values[at + 1 :])
                rows[n.split, n.measure] = replace(row, values=values)
        return list(rows.values())

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as strict JSON values; `comparable` is null if it is not known.

        Of two results it has the fields of their `Comparison` as well.
        """
        verdicts = [pair.to_json() for pair in self.pairs]
        comparable = [verdict["comparable"] for verdict in verdicts]
        shared = {
            "results": [str(result.path) for result in self.results],
            "comparable": False if False in comparable else None if None in comparable else True,
            "training": [asdict(difference) for difference in self.training],
        }
        return (verdicts[0] if len(verdicts) == 1 else {"comparisons": verdicts}) | shared


def compare_all(results: Sequence[SavedResult]) -> Comparisons:
    """Compare the first of at least two results with each of the others."""
    first, *others = results
    return Comparisons(
        tuple(results),
        training_differences(results),
        tuple(compare(first, other) for other in others),
    )
