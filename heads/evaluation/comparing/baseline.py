"""CLIP's mean of the same frames beside the heads of a trade-off table: no head, and no trick."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, Final

from heads.evaluation.comparing.compare import SavedResult, differences
from heads.evaluation.comparing.tradeoff_rows import Role, Setting, TradeoffRow, eval_option, is_of
from heads.methods.registry import MEAN_OF_FRAMES, adapts_its_features

_PLAIN: Final = Setting(False, ())
_FRAMES: Final = ("store", "frames", "prompt_set")
"""Fields of a result that say which frames, and which texts, it stands for."""


def baselines(
    rows: Sequence[TradeoffRow],
    wanted: Sequence[tuple[Role, str]],
    results: Sequence[SavedResult],
    root_option: str,
) -> tuple[list[TradeoffRow], list[str]]:
    """Return the rows of CLIP's mean of the heads' frames, and a line per missing result.

    There is one row, or one for each choice of stores and frames among the heads of `rows`. Heads
    that adapt their encoder have none: the mean of their features is their own answer.
    `wanted` are the columns; `results` are those of CLIP's mean, newest first; `root_option` as for
    `collect`.
    """
    heads = [row for row in rows if row.head != MEAN_OF_FRAMES and not _is_a_mean(row)]
    groups: dict[tuple[Any, ...], list[TradeoffRow]] = {}
    for row in [row for row in heads if not row.setting.changes] or heads:
        groups.setdefault(_frames_of(row), []).append(row)
    # A row with fewer results belongs to one that agrees with it and has more.
    whole = [of for key, of in groups.items() if not any(_within(key, o) for o in groups)]
    made: list[TradeoffRow] = []
    missing: list[str] = []
    for group in whole:
        chosen: list[SavedResult | None] = []
        known = next(result for row in group for result in row.found)
        for column, (role, name) in enumerate(wanted):
            like = next((row.results[column] for row in group if row.results[column]), None)
            fitting = (
                result
                for result in results
                if is_of(result, role, name) and _same_frames(like or known, result, like is None)
            )
            chosen.append(next(fitting, None))
            if like is not None and chosen[-1] is None:
                missing.append(
                    f"CLIP's mean of the same frames has no {role} result on {name}: "
                    f"`mote-cli eval {eval_option(role, name)}{_options(like)}{root_option}`"
                )
        names = tuple(dict.fromkeys(row.head for row in group)) if len(whole) > 1 else ()
        made.append(TradeoffRow(MEAN_OF_FRAMES, _PLAIN, tuple(chosen), names))
    return made, missing


def _is_a_mean(row: TradeoffRow) -> bool:
    return any(adapts_its_features(result.values.get("kind")) for result in row.found)


def _frames_of(row: TradeoffRow) -> tuple[Any, ...]:
    """Return what the results of a row say of their frames; None where there is no result."""
    return tuple(
        None if result is None else tuple(result.values.get(name) for name in _FRAMES)
        for result in row.results
    )


def _within(key: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return whether `other` says all that `key` says, and more."""
    return key != other and all(a in (None, b) for a, b in zip(key, other, strict=True))


def _same_frames(like: SavedResult, mean: SavedResult, other_set: bool) -> bool:
    """Return whether `mean` stands for the same frames as a head's result, without a trick.

    With `other_set` the head has no result on the set of `mean`: then the number of frames decides.
    """
    if Setting.of(mean, like.values.get("prompt_set")) != _PLAIN:
        return False
    if other_set:
        return bool(mean.values.get("frames") == like.values.get("frames"))
    same = all(mean.values.get(name) == like.values.get(name) for name in _FRAMES)
    return same and not any(d.decisive and not d.unknown for d in differences(like, mean))


def _options(like: SavedResult) -> str:
    """Return the options of `mote-cli eval` for CLIP's mean of the frames of a result."""
    said = {name: like.values.get(name) for name in ("frames", "store", "prompt_set")}
    splits = list(like.splits)
    if like.protocol_name in ("closeset", "zeroshot") and len(splits) == 1 and splits != ["all"]:
        said["split"] = splits[0]
    options = {name.replace("prompt_set", "prompts"): value for name, value in said.items()}
    given = [f" --{name} {shlex.quote(str(value))}" for name, value in options.items() if value]
    return f" --head {MEAN_OF_FRAMES}{''.join(given)}"
