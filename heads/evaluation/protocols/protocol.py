"""What an evaluation protocol is: one object that evaluation runs and the documents print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from featstore.format.schema import RowArray
from heads.methods.settings import AsJson
from heads.scoring.scores import Fusion

Kind = Literal["closeset", "zeroshot", "halfclass", "fewshot", "base-to-novel"]

Lists = Literal["val", "tests", "test1", "all", "usual", "given"]
"""Which videos are listed: the split val, else test; every one of test1, test2, ...; test1 alone;
all of the store; test1, test2, ... if there are several, else all; or lists of the protocol's own
(Kinetics-600, few-shot, base-to-novel)."""

LabelIds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TestSet:
    """Videos of a store that are tested together against one list of candidate classes.

    `rows` are array rows, failed ones included. `classes` int64 label ids of the candidates, in
    the order of their scores; None is every class of the store. A video whose class is no
    candidate is an error. Modulation looks for neighbours among the candidates, or among all
    classes if `modulation_classes` says so (half-class, as released).
    """

    __test__: ClassVar[bool] = False  # pytest takes it for a class of tests

    name: str
    rows: RowArray
    classes: LabelIds | None = None
    modulation_classes: Literal["candidates", "all"] = "candidates"
    drawn_from: tuple[str, int] | None = None
    """Name and number of videos of the published list it was drawn from; None for a list of its
    own."""


@dataclass(frozen=True)
class Expected(AsJson):
    """Videos per test set in one published list."""

    counts: Mapping[str, int]
    """By the name of the test set (for half-class: of the list the draws are taken from)."""
    source: str


@dataclass(frozen=True)
class Protocol(AsJson):
    """One way to measure, with everything two numbers must share to be comparable."""

    name: str
    title: str
    kind: Kind
    dataset: str | None
    """Data set it is defined on, by the name of the packed set; None for any."""
    trained_on: str
    test_list: str
    """The tested videos and classes, in words; `lists` is the rule evaluation follows."""
    lists: Lists
    metric: str
    spread: str
    """What stands behind the plus-minus sign, with its formula."""
    source: str
    expected: tuple[Expected, ...] = ()
    """Published counts; several where publications have different lists."""
    n_classes: int | None = None
    """Candidates per test set; None if the data set decides."""
    views: tuple[str, ...] = ()
    """Clips x crops it is reported with; empty for any."""
    prompts: str = "mote28 (MoTE); publications differ"
    fusion: Fusion = "softmax"
    differences: tuple[str, ...] = field(default=(), repr=False)
    """How the evaluation here differs from the papers', a sentence each."""
