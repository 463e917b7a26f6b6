"""What classes count in training, and how many videos they have.

n = training videos, S = training classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.balance import Balance, weights_by_rule, with_mean_one
from featstore.errors import UserError, meant, one_line, quoted
from featstore.files.documents import LISTS_LIMIT, read_document
from featstore.files.tables import csv_rows
from featstore.format.schema import RowArray
from featstore.spelling import comparable
from heads.methods.registry import Method
from heads.training.config import TrainConfig

log = logging.getLogger(__name__)

RULES: Final = ("balanced", "sqrt")
"""Weights that are computed from the numbers of training videos."""


def say_balance(class_names: Sequence[str], labels: RowArray) -> Balance:
    """Count the videos of the classes, log the counts, and return them; labels [n] or [n,S]."""
    found = Balance.of(labels, class_names)
    ends = f" (most: {found.most_class!r}, least: {found.least_class!r})"
    log.info("classes: %s%s", found.words, ends if found.least < found.most else "")
    return found


def class_weights(rule: str, labels: RowArray, class_names: Sequence[str]) -> Tensor | None:
    """Return the weight of every class, float32 [S]; None if all count the same.

    `rule` is "", one of `RULES`, or the path of a CSV `class,weight`; labels are [n], or [n,S] of
    several classes a video (`featstore.balance.weights_by_rule`). Weights from a file are scaled to
    mean 1 over the videos where a video has one class. Raises UserError for a file that lacks a
    class or holds something else.
    """
    if not rule:
        return None
    if rule in RULES:
        weights = weights_by_rule(labels, len(class_names), rule)
    else:
        weights = _from_file(rule, class_names)
        if labels.ndim == 1:
            weights = with_mean_one(weights, labels)
    return torch.from_numpy(weights).float()


def _from_file(name: str, class_names: Sequence[str]) -> npt.NDArray[np.float64]:
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--class-weights {name!r}: {meant(name, RULES)}give balanced, sqrt or the path of a "
            "CSV class,weight"
        )
    remedy = "give each class a line class,weight"
    try:
        rows = csv_rows(read_document(path, remedy, limit=LISTS_LIMIT), "weight")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name!r} is no table ({one_line(error, 80)}): {remedy}") from error
    rows = [[cell.strip() for cell in row] for row in rows if any(map(str.strip, row))]
    if rows and [cell.lower() for cell in rows[0]] == ["class", "weight"]:
        rows = rows[1:]
    found: dict[str, float] = {}
    named: list[str] = []
    for row in rows:
        try:
            class_name, weight = row[0], float(row[1])
        except (IndexError, ValueError):
            weight, class_name = -1.0, row[0]
        if len(row) != 2 or not 0 < weight < 1e6 or comparable(class_name) in found:
            raise UserError(
                f"{name!r}: the line {quoted(','.join(row), 60)} is not `class,weight` with a "
                "new class and a weight above 0 and below 1,000,000: correct it"
            )
        found[comparable(class_name)] = weight
        named.append(class_name)
    known = [*map(comparable, class_names)]
    lacking = [name for name, form in zip(class_names, known, strict=True) if form not in found]
    strange = [name for name in named if comparable(name) not in known]
    if lacking or strange:
        what = f"lacks class {lacking[0]!r}" if lacking else f"has no class here: {strange[0]!r}"
        raise UserError(
            f"{name!r} {what}: give a weight for each of the {len(class_names)} classes, by the "
            f"names that the data set has ({meant((lacking or strange)[0], [*named, *class_names])}"
            "`mote-cli inspect` lists them)"
        )
    return np.array([found[form] for form in known])


def require_possible(chosen: Method, training: TrainConfig, several: bool) -> None:
    """Raise UserError for settings of classes, or for labels, that the method cannot follow."""
    if several:
        what = "trained on videos that show several classes"
        chosen.require(what, chosen.multi_label, "train another method")
    chosen.require(
        "trained with class weights",
        chosen.multi_label or not training.class_weights,
        "leave --class-weights out, or train another method",
    )
    given = {
        "--class-sampling": training.class_sampling,
        "--class-weights": training.class_weights,
    }
    options = " and ".join(option for option, value in given.items() if value)
    if options and not chosen.in_epochs:
        raise UserError(
            f"{options} shape the epochs of a training, and {chosen.title} has none: leave it out, "
            "or choose another --head"
        )
