"""Finds the published figures that were measured by the same protocol as one of our results.

The figures are data (`published.toml`). A figure is printed beside a result only if its protocol,
data set, views, frames, backbone, prompts and fusion are known and the same, and its number of
videos is the same or unknown. Others are at most near, and are shown with their differences.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from featstore.commands import ADAPTED_BY
from heads.methods.settings import AsJson
from pipeline.annotations.known_sets import known_dataset

PUBLISHED_FILE: Final = Path(__file__).with_name("published.toml")

# The fields that must agree, the most important first, each with its name in a result.
COMPARED: Final = {
    **{"dataset": "dataset", "protocol": "protocol_name", "shots": "shots", "backbone": "encoder"},
    **{"views": "views", "frames": "frames", "prompts": "prompt_set", "fusion": "fusion"},
}
UNKNOWN: Final = "unknown"
_VIT = re.compile(r"vit[-_]?(b|l|h|g)[-_/]?(14|16|32)(?!\d)")
_VICLIP = re.compile(r"viclip[-_]?(b|l)(?![a-z])")
_VICLIPS: Final = {"b": "ViCLIP-B/16", "l": "ViCLIP-L/14"}


@dataclass(frozen=True)
class Published(AsJson):
    """One published figure; a field is None or "" if the publication does not state it."""

    method: str
    backbone: str
    """Architecture of the image tower, for example "ViT-B/16"."""
    trained_on: str
    protocol: str
    """Name of a protocol, or its kind such as "closeset" if the details are not known, or
    "tradeoff", a composite score of several tests."""
    dataset: str
    value: float
    """The number in per cent; `measure` says what it measures."""
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
    """Who published the list of videos."""
    n: list[int] | None = None
    """The number of listed videos per test set."""
    note: str = ""


@dataclass(frozen=True)
class Near:
    """A figure on the same data set that is not comparable, with the reasons."""

    figure: Published
    differs: tuple[str, ...]
    """One phrase per field: "views: published 4x3, ours 1x1"."""


@cache
def published_figures() -> tuple[Published, ...]:
    """Return all figures of the file; each includes the keys that its source gives for them all."""
    return tuple(
        Published(**{k: v for k, v in source.items() if k != "figures"} | figure)
        for source in tomllib.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))["source"]
        for figure in source["figures"]
    )


def published_of(protocol: str) -> list[Published]:
    """Return all figures of the protocol with that name."""
    return [figure for figure in published_figures() if figure.protocol == protocol]


def comparable(result: Mapping[str, Any], backbone: str | None = None) -> list[Published]:
    """Return the published figures that are comparable with a result.

    `result` is `EvalResult.to_json()` or the content of a result file; it has a key `measure` if
    its number is not a top-1 ("harmonic mean" for base-to-novel). `backbone` is the architecture of
    the image tower, such as "ViT-B/16"; by default it is taken from the encoder's name. Print a
    figure together with its `count_note` and its `note`.
    """
    return [f for f in published_figures() if not differs(f, result, backbone)]


def nearest(result: Mapping[str, Any], backbone: str | None = None, limit: int = 3) -> list[Near]:
    """Return the figures on the result's data set that differ in the fewest fields, up to `limit`.

    Figures with the result's protocol and number of shots come first. The list is empty if any
    figure is comparable, or if there are no figures on the data set.
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
    """Return why a figure is not comparable with a result, one phrase per field; empty if it is.

    A field that is unknown on either side counts as a difference. Only the publication's number of
    listed videos may be unknown; `count_note` mentions that.
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
    if figure.n is not None and figure.n != listed:
        phrases.append(f"n: published {_counts(figure.n)}, ours {_counts(listed)}")
    return phrases


def count_note(figure: Published, result: Mapping[str, Any]) -> str:
    """State the result's numbers of videos and the published ones, or that these are unknown."""
    parts = result.get("per_split", [])
    listed, evaluated = ([part.get(name) for part in parts] for name in ("n_listed", "n_evaluated"))
    said = f"{_counts(listed)} listed" + (
        "" if listed == evaluated else f", {_counts(evaluated)} evaluated"
    )
    return f"{said}; published: " + ("unknown" if figure.n is None else _counts(figure.n))


def architecture(encoder: str) -> str | None:
    """Find the architecture in an encoder's name: "ViT-B/16" in "ViT-B-16/openai"; None without.

    The name of a run that adapts an encoder says nothing of it.
    """
    if encoder.startswith(ADAPTED_BY):
        return None
    if video := _VICLIP.search(encoder.lower()):
        return _VICLIPS[video[1]]
    match = _VIT.search(encoder.lower())
    return None if match is None else f"ViT-{match[1].upper()}/{match[2]}"


def _ours(result: Mapping[str, Any], backbone: str | None) -> dict[str, Any]:
    """Return the compared fields of a result; None for fields that its file lacks."""
    return {
        **{name: result.get(field) for name, field in COMPARED.items()},
        "dataset": known_dataset(str(result.get("dataset", ""))),
        "backbone": backbone or architecture(str(result.get("encoder", ""))),
        "frames": result.get("tower_frames") or result.get("frames"),
        "measure": result.get("measure", "top1"),
    }


def _counts(counts: list[Any]) -> str:
    return " / ".join(f"{n:,}" if isinstance(n, int) else UNKNOWN for n in counts) or UNKNOWN


def published_beside(result: Mapping[str, Any], backbone: str | None) -> dict[str, Any]:
    """Return the `published` figures that are comparable with a result, or else the `nearest` ones.

    The value is ready for JSON. `result` and `backbone` as for `comparable`. Comparable figures
    come with their `count_note`, the nearest ones with the list `differs`.
    """
    return {
        "published": [
            {**figure.to_json(), "count_note": count_note(figure, result)}
            for figure in comparable(result, backbone)
        ],
        "nearest": [
            {**near.figure.to_json(), "differs": list(near.differs)}
            for near in nearest(result, backbone)
        ],
    }
