"""How a head did on validation videos, and whether another one did better.

m = videos, C = classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor

from heads.scoring.average_precision import average_precisions, mean_average_precision
from heads.scoring.scores import percent


class Judgement(ABC):
    """How a head did on m validation videos: a dataclass of tensors with one row a video."""

    measure: ClassVar[str]
    """The name of `quality` in records."""

    losses: Tensor
    """[m] float64, the negative logarithm of the probability of each video's labels."""

    @property
    @abstractmethod
    def quality(self) -> float:
        """What epochs are chosen by, in per cent."""

    @abstractmethod
    def won(self, base: Self) -> tuple[float, float]:
        """Return how many more of the same videos this head did well than `base`, and the error.

        The error is what chance alone makes of it (one standard error).
        """

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.losses.mean())

    @property
    def videos(self) -> int:
        """m."""
        return len(self.losses)

    @staticmethod
    def joined(parts: Sequence[Judgement]) -> Judgement:
        """Return the judgements of several sets of videos as one."""
        kind: Any = type(parts[0])
        return cast(
            Judgement,
            kind(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(kind)}),
        )

    @staticmethod
    def to_tensors(epochs: Sequence[Judgement]) -> dict[str, Tensor]:
        """Return the judgements of several epochs as tensors, which `from_tensors` reads."""
        kind: Any = type(epochs[0])
        found = {f.name: torch.stack([getattr(e, f.name) for e in epochs]) for f in fields(kind)}
        return {n: t.to(torch.uint8) if t.dtype == torch.bool else t for n, t in found.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> list[Judgement]:
        """Return the judgement of every epoch."""
        kind = JudgedLabels if "scores" in tensors else Judged
        flags = {n: t.bool() if t.dtype == torch.uint8 else t for n, t in tensors.items()}
        return [
            kind(**{name: values[epoch] for name, values in flags.items()})
            for epoch in range(len(flags["losses"]))
        ]


@dataclass(frozen=True, eq=False)
class Judged(Judgement):
    """How a head did on videos of one class each."""

    measure: ClassVar[str] = "top1"

    right: Tensor
    """[m] bool, whether the first of the classes was the true one."""
    losses: Tensor

    @property
    def top1(self) -> float:
        """Accuracy in per cent."""
        return percent(self.right)

    @property
    def quality(self) -> float:
        """The accuracy."""
        return self.top1

    def won(self, base: Self) -> tuple[float, float]:
        """Return how many more videos were right, and the error.

        Of the videos that only one of the two got right, each would be either's with equal chance
        (McNemar, 1947): the difference then has the square root of their number as standard error.
        """
        better = int((self.right & ~base.right).sum())
        worse = int((~self.right & base.right).sum())
        return better - worse, math.sqrt(better + worse)


@dataclass(frozen=True, eq=False)
class JudgedLabels(Judgement):
    """How a head did on videos that may show several classes."""

    measure: ClassVar[str] = "mAP"

    scores: Tensor
    """[m,C] float64, the score of every class."""
    shown: Tensor
    """[m,C] bool, which classes a video shows."""
    losses: Tensor

    @property
    def quality(self) -> float:
        """The mean average precision."""
        return mean_average_precision(self.scores.numpy(), self.shown.numpy())

    def won(self, base: Self) -> tuple[float, float]:
        """Return the gain in mean average precision as a share of the m videos, and its error.

        The error is the standard error of the mean gain over the classes that are shown.
        """
        gains = average_precisions(self.scores.numpy(), self.shown.numpy())
        gains -= average_precisions(base.scores.numpy(), base.shown.numpy())
        gains = gains[~np.isnan(gains)]
        if not len(gains):
            return 0.0, 0.0
        error = float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return self.videos * float(gains.mean()), self.videos * error
