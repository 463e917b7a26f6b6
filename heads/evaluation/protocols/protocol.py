"""What an evaluation protocol is, as one object that evaluation runs on and the documents print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from featstore.format.schema import RowArray
from heads.scoring.scores import Fusion

Kind = Literal["closeset", "zeroshot", "halfclass", "fewshot", "base-to-novel"]

Lists = Literal["val", "tests", "test1", "all", "usual", "given"]
"""Which videos are listed: the split val, else test; every one of test1, test2, ...; test1 alone;
all of the store; test1, test2, ... where there are several, else all; or lists that are made for
the purpose (Kinetics-600, few-shot, base-to-novel)."""

LabelIds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TestSet:
    """Videos of a store that are tested together against one list of candidate classes.

    `rows` are array rows, failed ones included. `classes` int64 label ids of the candidates, in
    the order their scores take; None is every class of the store. A video whose class is no
    candidate is an error. Modulation looks for neighbours among the candidates, or among
    `modulation_classes` where a protocol says so (half-class: all classes, as released).
    """

    __test__: ClassVar[bool] = False  # pytest takes it for a class of tests

    name: str
    rows: RowArray
    classes: LabelIds | None = None
    modulation_classes: Literal["candidates", "all"] = "candidates"
    drawn_from: tuple[str, int] | None = None
    """Name and number of videos of the list it was drawn from, whose count is published; None
    where it is a list of its own."""


@dataclass(frozen=True)
class Expected:
    """Videos listed per test set, as one published list has them."""

    counts: Mapping[str, int]
    """By the name of the test set (for half-class: of the list the draws are taken from)."""
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", MappingProxyType(dict(self.counts)))

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return {"counts": dict(self.counts), "source": self.source}


@dataclass(frozen=True)
class Protocol:
    """One way to measure, with everything two numbers must share to be comparable."""

    name: str
    title: str
    kind: Kind
    dataset: str | None
    """Data set it is defined on, by the name its videos are packed under; None for any."""
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
    """Candidates per test set; None where the data set decides."""
    views: tuple[str, ...] = ()
    """Clips x crops it is reported with; empty for any."""
    prompts: str = "mote28 (MoTE); publications differ"
    fusion: Fusion = "softmax"
    differences: tuple[str, ...] = field(default=(), repr=False)
    """How what is run here differs from what the papers ran, a sentence each."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **plain,
            "expected": [expected.to_json() for expected in self.expected],
            "views": list(self.views),
            "differences": list(self.differences),
        }
