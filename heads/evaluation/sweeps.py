"""Sweeps: many settings of the score measured in one pass, and towers with other blends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from featstore.commands import Extraction, command
from featstore.errors import UserError, WorkError, meant, one_of
from featstore.workspace import WEIGHTS, Workspace
from heads.files.run_files import read_config
from heads.methods.registry import method
from heads.methods.settings import MethodConfig
from heads.scoring import Fusion

if TYPE_CHECKING:
    from heads.scoring.scores import Scoring

NEIGHBOURS: Final = "modulation-neighbours"
TEMPERATURE: Final = "modulation-temperature"
ENSEMBLE: Final = "ensemble"
FUSION: Final = "fusion"
PROJECTION: Final = "projection"
BLEND: Final = "blend"
NAMES: Final = (TEMPERATURE, NEIGHBOURS, ENSEMBLE, FUSION, PROJECTION, BLEND)

Values = dict[str, list[Any]]


@dataclass(frozen=True)
class BlendedRun:
    """The run whose tower is blended with `share`; `run_dir` is None if there is no such run."""

    share: float
    run_dir: Path | None
    remedy: str
    """The command that makes the missing head or store."""


def parse_sweeps(given: Sequence[str]) -> Values:
    """Parse sweeps such as "ensemble=0,0.5" into {"ensemble": [0.0, 0.5]}.

    "fusion=all" means all fusions; "none" for a setting of modulation means 0, which turns
    modulation off. UserError for text of another form.
    """
    values: Values = {}
    for text in given:
        name, equals, listed = text.partition("=")
        words = [word.strip() for word in listed.split(",") if word.strip()]
        if name not in NAMES or not equals or not words:
            raise UserError(
                f"--sweep {text!r} is not understood: {meant(name, NAMES)}write NAME=VALUE,VALUE "
                f"with one of {', '.join(NAMES)}, for example --sweep ensemble=0,0.25,0.5"
            )
        if name in values:
            raise UserError(f"--sweep {name} is given twice: write its values once, with commas")
        values[name] = list(dict.fromkeys(v for word in words for v in _values(name, word)))
    return values


def parse_weights(text: str | None) -> tuple[str, ...]:
    """Parse "mean,teacher" or "all" into names of weights; none given: no names.

    UserError for a name that no weights have.
    """
    if text is None:
        return ()
    words = WEIGHTS if text == "all" else tuple(dict.fromkeys(map(str.strip, text.split(","))))
    for word in words:
        if word not in WEIGHTS:
            raise UserError(f"--weights {word!r} is unknown: {one_of(word, (*WEIGHTS, 'all'))}")
    return words


def settings(
    config: MethodConfig, fixed: Mapping[str, Any], swept: Values, **usual: Any
) -> list[Scoring]:
    """Return the score settings for every combination of swept values; `fixed` holds the others,
    and `usual` those that are taken where `fixed` has None.

    Combinations with the same effect (modulation off, with any neighbours) are returned once.
    UserError when a swept setting is fixed as well or has no effect on this head.
    """
    from heads.scoring.scores import Scoring  # loads torch, reading the options does not

    names = [name for name in NAMES if name in swept and name != BLEND]
    fields = [name.replace("-", "_") for name in names]
    for name, of_scoring in zip(names, fields, strict=True):
        if fixed.get(of_scoring) is not None:
            raise UserError(f"--sweep {name} and --{name} contradict each other: give one")
        if name in (TEMPERATURE, NEIGHBOURS) and (
            not method(config.kind).modulated or not fixed["modulate"]
        ):
            raise UserError(f"--sweep {name} changes nothing without modulation: leave it out")
    found: dict[Scoring, Scoring] = {}
    for values in itertools.product(*(swept[name] for name in names)):
        chosen = {**fixed, **dict(zip(fields, values, strict=True))}
        chosen |= {name: value for name, value in usual.items() if chosen.get(name) is None}
        scoring = Scoring.of_head(config, **chosen)
        same = replace(scoring, modulation_neighbours=1, modulation_temperature=1)
        found.setdefault(scoring if scoring.modulate else same, scoring)
    return list(found.values())


def value_of(name: str, text: str | None) -> Any:
    """Return the value of an option, None if it was not given; "none" means 0 (modulation off)."""
    if text is None:
        return None
    values = _values(name, text)
    return values[0] if len(values) == 1 else list(values)


def blended_runs(
    place: Workspace, run_dir: Path, shares: Sequence[float], making: Extraction
) -> list[BlendedRun]:
    """Find a run for each of `shares`: the tuned tower of `run_dir`, blended with that share.

    `making` is the extraction that the tower of `run_dir` itself would need. UserError when the run
    in `run_dir` has no tuned tower of its own.
    """
    own = require_tuned(run_dir)
    others = {run: _tuned(run) for run in (run_dir, *place.trained_runs())}
    found = []
    for share in shares:
        wanted = replace(own, blend=share)
        same = next((run for run, other in others.items() if other == wanted), None)
        if same is not None:
            remedy = f"`{replace(making, encoder=same.name).command(place.root)}`"
        else:
            name = f"{run_dir.name}-blend{round(100 * share):d}"
            file, first = own.file, ""
            words: dict[str, Any]
            if file is None:
                file = f"{run_dir.name}.pt"
                words = {"format": "official", "out": file, "root": place.root}
                first = f"`{command('export', run_dir.name, **words)}`, then "
            words = {"name": name, "blend": f"{share:g}", **own.options, "root": place.root}
            remedy = (
                f"{first}`{command('import-checkpoint', file, **words)}`, then "
                f"`{replace(making, encoder=name).command(place.root)}`"
            )
        found.append(BlendedRun(share, same, remedy))
    return found


@dataclass(frozen=True)
class _Tuned:
    """The tuned tower of a run; its encoder has the name of the run."""

    tower: str
    """Hash of the tower's weights before blending."""
    blend: float
    file: str | None = field(compare=False)
    """Name of the checkpoint that the tower was imported from; None if it was tuned here."""
    options: dict[str, Any] = field(compare=False)
    """The options that import-checkpoint needs for the tower, besides the share."""


def require_tuned(run_dir: Path) -> _Tuned:
    """Return the tuned tower of a run; UserError if it has none of its own."""
    own = _tuned(run_dir)
    if own is None:
        raise UserError(
            f"{run_dir.name} has no tuned tower to blend with CLIP's: --sweep blend is for heads "
            "whose image tower alone was trained, by finetune or before import-checkpoint"
        )
    return own


def _tuned(run_dir: Path) -> _Tuned | None:
    from heads.files.imported_run import tower_facts, tower_hash  # as in `settings`

    try:
        value = read_config(run_dir) or {}
        facts = tower_facts(run_dir) or {}
    except (OSError, WorkError):
        return None
    imported = value.get("imported")
    file: str | None = None
    options: dict[str, Any] = {}
    if isinstance(imported, dict):
        facts, file = imported, str(imported.get("file") or "FILE")
        if imported.get("clip"):
            options = {"clip": imported["clip"]}
    elif facts:
        options = {"clip": value["data"]["encoder"], "frames": value["data"]["frames"]}
        options["attention_heads"] = value["head"]["attention_heads"]
    if facts.get("blend") is None or facts.get("text_tower"):
        return None
    tower = tower_hash(run_dir) or str(facts.get("sha256") or run_dir.name)
    return _Tuned(tower, float(facts["blend"]), file, options)


def _values(name: str, word: str) -> Sequence[Any]:
    if name == FUSION:
        known = get_args(Fusion)
        if word == "all":
            return known
        if word not in known:
            raise UserError(f"fusion {word!r} is unknown: {one_of(word, known)} or all")
        return [word]
    if name == PROJECTION:
        known = ("on", "off")
        if word not in known:
            raise UserError(f"projection {word!r} is unknown: {one_of(word, known)}")
        return [word == "on"]
    if word in ("none", "off") and name in (TEMPERATURE, NEIGHBOURS):
        return [0]
    try:
        value = int(word) if name == NEIGHBOURS else float(word)
    except ValueError:
        kind = "whole number" if name == NEIGHBOURS else "number"
        raise UserError(f"{name} {word!r} is not a {kind}: give one from 0 up") from None
    if not 0 <= value < float("inf") or (name == BLEND and value > 1):
        raise UserError(
            f"{name} {word} is out of range: give a number from 0 "
            f"{'to 1' if name in (BLEND, ENSEMBLE) else 'up'}"
        )
    return [value]
