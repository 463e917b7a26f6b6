"""The rows of the trade-off table: a head in one setting of the score, and its accuracies."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from featstore.errors import UserError
from heads.evaluation.comparing.compare import SavedResult
from heads.evaluation.protocols.choose import PROTOCOLS
from heads.methods.registry import knows_only_its_classes
from pipeline.annotations.known_sets import known_dataset

Role = Literal["closeset", "zeroshot"]

# The score settings that a sweep varies, with their usual values (MoTE's).
_USUAL: Final[Mapping[str, Any]] = {
    "modulation_neighbours": 5,
    "modulation_temperature": 0.05,
    "ensemble": None,
}


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """Return n / (1/a_1 + ... + 1/a_n) of accuracies in percent; 0 when one of them is 0.

    Raises UserError when there are no accuracies, or when one is not a percentage.
    """
    if not accuracies or not all(0 <= accuracy <= 100 for accuracy in accuracies):
        raise UserError(
            f"the harmonic mean of {list(accuracies)} is not defined: it takes accuracies in "
            "percent, from 0 to 100"
        )
    return float(statistics.harmonic_mean(accuracies))


@dataclass(frozen=True, order=True)
class Setting:
    """How scores were computed from a head's features; a head has a row for each setting."""

    modulated: bool
    changes: tuple[str, ...]
    """The settings that differ from the usual ones, such as "temperature 0.1", as in a sweep."""

    @classmethod
    def of(cls, result: SavedResult, prompts: str | None = None) -> Setting:
        """Return the setting of a result; `prompts` is the head's own prompt set, if known.

        A field that an old file lacks counts as usual: it could not be chosen at that time.
        """
        changes = [
            f"{name.removeprefix('modulation_')} {result.values[name]:g}"
            for name, usual in _USUAL.items()
            if result.values.get(name) not in (None, usual)
        ]
        known = PROTOCOLS.get(result.protocol_name or result.role)
        fusion = result.values.get("fusion")
        if known is not None and fusion != known.fusion:
            changes.append(f"fusion {fusion}")
        if prompts is not None and result.values.get("prompt_set") not in (None, prompts):
            changes.append(f"prompts {result.values['prompt_set']}")
        projection = result.values.get("projection")
        if projection not in (None, "on" if result.role == "closeset" else "off"):
            changes.append(f"projection {projection}")
        weights = result.values.get("weights")
        if weights not in (None, "mean"):
            changes.append(f"weights {weights}")
        return cls(bool(result.values.get("modulate", False)), tuple(changes))

    @property
    def text(self) -> str:
        """The setting in words: "on", "off" or "on, temperature 0.1"."""
        return ", ".join(("on" if self.modulated else "off", *self.changes))

    @property
    def options(self) -> str:
        """The options of `mote-cli eval` for the setting, each with a space before it."""
        own = "" if self.modulated else " --no-modulate"
        for change in self.changes:
            own += " --modulation-" if f"modulation_{change.split()[0]}" in _USUAL else " --"
            own += change
        return own


@dataclass(frozen=True)
class TradeoffRow:
    """One head in one setting; accuracies are in percent, unrounded, and None without a result."""

    head: str
    setting: Setting
    results: tuple[SavedResult | None, ...]
    """The close-set result, then one per zero-shot set, in the order of the request."""

    beside: tuple[str, ...] = ()
    """Of a baseline: the heads whose frames it has, if the table has several baselines."""

    @property
    def closed(self) -> bool:
        """Whether the head knows only its own classes, so that it has no zero-shot results."""
        return any(knows_only_its_classes(result.values.get("kind")) for result in self.found)

    @property
    def found(self) -> list[SavedResult]:
        """The results that exist."""
        return [result for result in self.results if result is not None]

    @property
    def complete(self) -> bool:
        """Whether every result exists."""
        return None not in self.results

    @property
    def top1(self) -> list[float | None]:
        """Top-1 of each of `results`."""
        return [None if result is None else result.number for result in self.results]

    @property
    def zeroshot_top1(self) -> float | None:
        """The harmonic mean of the top-1 on the zero-shot sets; None if one is missing."""
        return _mean_of_known(self.top1[1:])

    @property
    def score(self) -> float | None:
        """The trade-off score; None if a result is missing."""
        return _mean_of_known([self.top1[0], self.zeroshot_top1])

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, and the files that they come from, as strict JSON values."""
        closeset, *zeroshot = self.results
        return {
            "head": self.head,
            "modulated": self.setting.modulated,
            "setting": self.setting.text,
            "closeset_top1": self.top1[0],
            "closeset_file": None if closeset is None else str(closeset.path),
            "zeroshot": {
                result.dataset: {"top1": result.number, "file": str(result.path)}
                for result in zeroshot
                if result is not None
            },
            "zeroshot_top1": self.zeroshot_top1,
            "tradeoff": self.score,
        }


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    """Return the harmonic mean of the values; None when one of them is None."""
    known = [value for value in values if value is not None]
    return harmonic_mean(known) if len(known) == len(values) else None


def is_of(result: SavedResult, role: Role, name: str) -> bool:
    """Return whether a result belongs into the column of a role and a data set or protocol.

    Results on videos of several classes have no accuracy, so they belong into none.
    """
    if result.measure != "top1":
        return False
    if result.protocol_name == name:  # a protocol that is named may be half-class
        return (result.role == "closeset") == (role == "closeset")
    return result.role == role and known_dataset(name) == known_dataset(result.dataset)


def eval_option(role: Role, name: str) -> str:
    """Return the option of `mote-cli eval` for a column, with its value."""
    return f"{'--protocol' if name in PROTOCOLS else f'--{role}'} {name}"
