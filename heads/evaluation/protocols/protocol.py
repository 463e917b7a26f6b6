"""Defines an evaluation protocol: one object that evaluation runs and the documents print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from featstore.format.schema import RowArray
from heads.methods.settings import AsJson

if TYPE_CHECKING:  # scores need torch, which the list of protocols does not
    from heads.scoring.scores import Fusion

Kind = Literal["closeset", "zeroshot", "halfclass", "fewshot", "base-to-novel"]

Lists = Literal["val", "tests", "test1", "all", "usual", "given"]
"""Which videos are tested. "val": the split val, else test; "tests": each of test1, test2, ...;
"test1": test1 alone; "all": the whole store; "usual": test1, test2, ... if there are several, else
the whole store; "given": lists made elsewhere (Kinetics-600, few-shot, base-to-novel)."""

LabelIds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TestSet:
    """Videos of a store that are tested together against one list of candidate classes.

    `rows` are array rows, including those whose extraction failed. `classes` are the int64 label
    ids of the candidates, in the order of their scores; None means every class of the store. It is
    an error if the class of a video is no candidate. Modulation looks for neighbours among the
    candidates, or among all classes if `modulation_classes` is "all" (half-class, as released).
    """

    __test__: ClassVar[bool] = False  # otherwise pytest would take this for a class of tests

    name: str
    rows: RowArray
    classes: LabelIds | None = None
    modulation_classes: Literal["candidates", "all"] = "candidates"
    drawn_from: tuple[str, int] | None = None
    """Name and number of videos of the published list that the videos were drawn from; None if
    they are a whole list."""


@dataclass(frozen=True)
class Expected(AsJson):
    """The number of videos per test set in one publication."""

    counts: Mapping[str, int]
    """Counts by name of the test set (in half-class, of the list that is drawn from)."""
    source: str


@dataclass(frozen=True)
class Protocol(AsJson):
    """One way to measure, with everything two numbers must share to be comparable."""

    name: str
    title: str
    kind: Kind
    dataset: str | None
    """The packed data set that the protocol is defined on; None for any."""
    trained_on: str
    test_list: str
    """The tested videos and classes, in words; `lists` is the rule that evaluation follows."""
    lists: Lists
    metric: str
    spread: str
    """The meaning of the number behind the plus-minus sign, with its formula."""
    source: str
    expected: tuple[Expected, ...] = ()
    """Published counts of videos; several if publications have different lists."""
    n_classes: int | None = None
    """The number of candidates per test set; None if the data set decides."""
    views: tuple[str, ...] = ()
    """The views (clips x crops) that publications report; empty for any."""
    prompts: str = "mote28 (MoTE); publications differ"
    fusion: Fusion = "softmax"
    differences: tuple[str, ...] = field(default=(), repr=False)
    """How the evaluation here differs from the papers', one sentence per difference."""
