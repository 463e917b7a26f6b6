"""Published figures, and which of them stand for the same protocol as a result of ours.

The figures are data (`published.toml`). One is printed beside ours only where its protocol, data
set, views, frames, backbone, prompts and fusion are known and the same, and its number of videos is
ours or unknown; everything else is at most near, and what makes it differ is said.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError
from heads.evaluation.protocols.choose import PROTOCOLS, known_dataset

PUBLISHED_FILE: Final = Path(__file__).with_name("published.toml")

SURE: Final = ("README", "paper", "log", "third-party notes", "third-party table")
MEASURES: Final = ("top1", "base", "novel", "harmonic mean", "tradeoff")
# The fields that must agree, in the order in which a difference weighs, with a result's names.
COMPARED: Final = {
    **{"dataset": "dataset", "protocol": "protocol_name", "shots": "shots", "backbone": "encoder"},
    **{"views": "views", "frames": "frames", "prompts": "prompt_set", "fusion": "fusion"},
}
TRADEOFF: Final = "tradeoff"  # composite scores: no protocol of one test
UNKNOWN: Final = "unknown"
_VIEWS = re.compile(r"[1-9]\d?x[1-9]\d?")
_VIT = re.compile(r"vit[-_]?(b|l|h|g)[-_/]?(14|16|32)(?!\d)")


@dataclass(frozen=True)
class Published:
    """One published figure; None and "" where the publication does not say."""

    method: str
    backbone: str
    """Architecture of the image tower, "ViT-B/16"."""
    trained_on: str
    protocol: str
    """Name of a protocol, "closeset" or the like where its details are not known, or "tradeoff"."""
    dataset: str
    value: float
    """Per cent; what it is says `measure`."""
    source: str
    sure: str
    measure: str = "top1"
    top5: float | None = None
    std: float | None = None
    shots: int | None = None
    views: str = ""
    frames: int | None = None
    prompts: str = ""
    fusion: str = ""
    videos: str = ""
    """Whose list of videos."""
    n: tuple[int, ...] | None = None
    """Videos listed per test set."""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return {**asdict(self), "n": None if self.n is None else list(self.n)}


@dataclass(frozen=True)
class Near:
    """A figure on the same data set that is not comparable, with what keeps it from being so."""

    figure: Published
    differs: tuple[str, ...]
    """One phrase per field: "views: published 4x3, ours 1x1"."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return {**self.figure.to_json(), "differs": list(self.differs)}


@cache
def published_figures(path: Path = PUBLISHED_FILE) -> tuple[Published, ...]:
    """All figures of the file. Raises UserError, with the place, when one breaks the rules."""
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no file of published figures: {error}") from error
    sources = value.get("source")
    if set(value) != {"source"} or not isinstance(sources, list):
        raise UserError(f"{path} must hold [[source]] tables and nothing else")
    found: list[Published] = []
    for number, source in enumerate(sources, start=1):
        shared = {name: entry for name, entry in source.items() if name != "figures"}
        figures = source.get("figures")
        if not isinstance(figures, list) or not figures:
            raise UserError(f"{path}, source {number}: it has no figures")
        for place, figure in enumerate(figures, start=1):
            found.append(_figure({**shared, **figure}, f"{path}, source {number}, figure {place}"))
    told = ("method", *COMPARED, "measure", "trained_on", "source")
    keys = [tuple(getattr(figure, name) for name in told) for figure in found]
    for key, figure in zip(keys, found, strict=True):
        if figure.measure != "tradeoff" and keys.count(key) > 1:
            raise UserError(f"{path}: {figure.method} on {figure.dataset} is there twice: {key}")
    return tuple(found)


def published_of(protocol: str) -> list[Published]:
    """The figures of a protocol, whatever they were measured with, by its name."""
    return [figure for figure in published_figures() if figure.protocol == protocol]


def comparable(result: Mapping[str, Any], backbone: str | None = None) -> list[Published]:
    """Published figures with the protocol of a result (`EvalResult.to_json()`, or a result file).

    The mapping holds `measure` where its number is not a top-1 ("harmonic mean" of base-to-novel).
    `backbone` is the architecture of its image tower, "ViT-B/16", by default read from the
    encoder's name. Whoever prints them prints `count_note` and their `note` as well.
    """
    return [f for f in published_figures() if not differs(f, result, backbone)]


def nearest(result: Mapping[str, Any], backbone: str | None = None, limit: int = 3) -> list[Near]:
    """Figures on the result's data set that differ from it in the fewest fields, at most `limit`.

    Those of its protocol and its number of shots come first.

    None where figures are comparable, or the data set has none.
    """
    ours = _ours(result, backbone)
    near = [
        Near(figure, tuple(differs(figure, result, backbone)))
        for figure in published_figures()
        if figure.dataset == ours["dataset"] and figure.measure == ours["measure"]
    ]
    if any(not one.differs for one in near):
        return []

    def distance(one: Near) -> tuple[bool, bool, int]:
        figure = one.figure
        other = figure.protocol != ours["protocol"], figure.shots != ours["shots"]
        return *other, len(one.differs)

    return sorted(near, key=distance)[:limit]


def differs(figure: Published, result: Mapping[str, Any], backbone: str | None = None) -> list[str]:
    """What keeps a figure from standing beside a result, a phrase per field; empty for nothing.

    A field that one of the two does not know is a difference: it is not known to agree. Only the
    number of videos listed may be unknown of a publication, which `count_note` says.
    """
    ours = _ours(result, backbone)
    phrases = []
    if figure.measure != ours["measure"]:
        phrases.append(f"measure: published {figure.measure}, ours {ours['measure']}")
    for name in COMPARED:
        theirs, own = getattr(figure, name), ours[name]
        if name == "fusion" and figure.views == ours["views"] == "1x1":
            continue  # one view: there is nothing to fuse
        if name == "shots" and theirs is None and own is None:
            continue
        if theirs in (None, "") or own in (None, ""):
            phrases.append(f"{name}: published {theirs or UNKNOWN}, ours {own or UNKNOWN}")
        elif theirs != own:
            phrases.append(f"{name}: published {theirs}, ours {own}")
    listed = [part.get("n_listed") for part in result.get("per_split", [])]
    if figure.n is not None and list(figure.n) != listed:
        phrases.append(f"n: published {_counts(list(figure.n))}, ours {_counts(listed)}")
    return phrases


def count_note(figure: Published, result: Mapping[str, Any]) -> str:
    """The numbers of videos in words: both lists', or that the published one is unknown."""
    parts = result.get("per_split", [])
    listed, evaluated = ([part.get(name) for part in parts] for name in ("n_listed", "n_evaluated"))
    said = f"{_counts(listed)} listed" + (
        "" if listed == evaluated else f", {_counts(evaluated)} evaluated"
    )
    return f"{said}; published: " + ("unknown" if figure.n is None else _counts(list(figure.n)))


def architecture(encoder: str) -> str | None:
    """The architecture that an encoder's name speaks of: "ViT-B-16/openai" is "ViT-B/16".

    None for names that do not say.
    """
    match = _VIT.search(encoder.lower())
    return None if match is None else f"ViT-{match[1].upper()}/{match[2]}"


def _ours(result: Mapping[str, Any], backbone: str | None) -> dict[str, Any]:
    """The compared fields of a result; None where its file does not say."""
    return {
        **{name: result.get(field) for name, field in COMPARED.items()},
        "dataset": known_dataset(str(result.get("dataset", ""))),
        "backbone": backbone or architecture(str(result.get("encoder", ""))),
        "measure": result.get("measure", "top1"),
    }


def _counts(counts: list[Any]) -> str:
    return " / ".join(f"{n:,}" if isinstance(n, int) else UNKNOWN for n in counts) or UNKNOWN


def _figure(value: dict[str, Any], where: str) -> Published:
    known = {field.name: str(field.type) for field in fields(Published)}
    if unknown := sorted(set(value) - set(known)):
        raise UserError(f"{where}: unknown fields {', '.join(unknown)}: see the head of the file")
    needed = ("method", "backbone", "trained_on", "protocol", "dataset", "value", "source", "sure")
    if missing := [name for name in needed if name not in value]:
        raise UserError(f"{where}: it lacks {', '.join(missing)}")
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "float": (int, float), "int": (int,)}
    for name, entry in value.items():
        allowed = kinds.get(known[name].removesuffix(" | None"), (list,))
        if not isinstance(entry, allowed) or isinstance(entry, bool):
            raise UserError(f"{where}: {name} is {entry!r}, not a {allowed[-1].__name__}")
    numbers = [value["value"], *(value[name] for name in ("top5", "std") if name in value)]
    rules = {
        "protocol must be one of `mote-cli protocols list`, or tradeoff": value["protocol"]
        in (*PROTOCOLS, TRADEOFF),
        f"sure must be one of {', '.join(SURE)}": value["sure"] in SURE,
        f"measure must be one of {', '.join(MEASURES)}": value.get("measure", "top1") in MEASURES,
        "accuracies are per cent, above 0 and up to 100": all(0 < n <= 100 for n in numbers),
        "views are CLIPSxCROPS": "views" not in value or bool(_VIEWS.fullmatch(value["views"])),
        "n are whole numbers above 0": all(type(n) is int and n > 0 for n in value.get("n", [1])),
        "no text is empty": all(entry for entry in value.values() if isinstance(entry, str)),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise UserError(f"{where}: {'; '.join(broken)}")
    return Published(**{**value, "n": tuple(value["n"]) if "n" in value else None})


def published_beside(result: Mapping[str, Any], backbone: str | None) -> dict[str, Any]:
    """Published figures that stand for the protocol of a result, or the nearest that do not.

    `result` is the JSON object of a result, `backbone` the architecture of its image tower, such as
    "ViT-B/16"; None where only the encoder's name tells it. JSON-ready: `published`, each with
    `count_note`; `nearest`, each with what `differs`.
    """
    return {
        "published": [
            {**figure.to_json(), "count_note": count_note(figure, result)}
            for figure in comparable(result, backbone)
        ],
        "nearest": [near.to_json() for near in nearest(result, backbone)],
    }
