"""From views to scores to accuracy: fusing views, modulating, ranking classes.

N = videos, V = views, T = frames, D = embedding width, C = classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.head import Head
from heads.methods.mote.config import MODULATION_TEMPERATURE as TEMPERATURE
from heads.methods.mote.config import NEIGHBOURS
from heads.methods.mote.modulation import modulation
from heads.methods.registry import method
from heads.methods.settings import MethodConfig
from heads.methods.text_classifier import class_cosines
from heads.scoring.view_summaries import ViewSummaries, summarise

log = logging.getLogger(__name__)

Fusion = Literal["softmax", "cosine", "features"]
"""How views become one score: mean of softmax over cosines (MoTE, X-CLIP, ViFi-CLIP), mean of
cosines, or cosines of the mean video feature (Text4Vis)."""

TOP_K = 5


@dataclass(frozen=True)
class Scoring:
    """How scores of a video are computed from the summaries of its views."""

    fusion: Fusion = "softmax"
    modulate: bool = True
    modulation_neighbours: int = NEIGHBOURS
    """K of modulation, classes compared on either side."""
    modulation_temperature: float = TEMPERATURE
    """Of modulation's exponential: the larger it is, the more the head contributes."""
    ensemble: float | None = None
    """Weight w of CLIP: scores come from (1 - w) * head + w * CLIP, both cosines; None for the
    head alone. DiST (Qing et al., ICCV 2023) tests zero-shot with 0.5."""

    def __post_init__(self) -> None:
        if self.fusion not in get_args(Fusion):
            raise UserError(
                f"fusion {self.fusion!r} is unknown: choose one of {', '.join(get_args(Fusion))}"
            )
        if self.ensemble is not None and not 0 <= self.ensemble <= 1:
            raise UserError(
                f"ensemble weight {self.ensemble:g} is not a share: 0 is the head alone, 1 CLIP "
                "alone, 0.5 as DiST"
            )
        k, t = self.modulation_neighbours, self.modulation_temperature
        if self.modulate and not (k >= 1 and 0 < t < math.inf):
            raise UserError(
                f"modulation with {k} neighbours and temperature {t:g} is none: "
                "give at least 1 and a number above 0"
            )

    @classmethod
    def of_head(cls, config: MethodConfig, *, modulate: bool = True, **given: Any) -> Scoring:
        """The settings of a head, except `given` ones that are not None; 0 turns modulation off."""
        names = ("modulation_neighbours", "modulation_temperature")
        chosen = {name: getattr(config, name) for name in names}
        chosen |= {name: value for name, value in given.items() if value is not None}
        on = modulate and method(config.kind).modulated and all(chosen[name] for name in names)
        return cls(modulate=on, **chosen)


class BlockScores:
    """Scores of the N videos of one block under any settings; what these share is computed once.

    `class_embeddings` [C,D] are all classes of the store, `training_class_embeddings` [S,D] those
    that modulation compares with. If the head's features are those of a tuned tower, `clip` are the
    summaries for CLIP's part of an ensemble and their class texts [C,D].
    """

    def __init__(
        self,
        summaries: ViewSummaries,
        class_embeddings: Tensor,
        training_class_embeddings: Tensor,
        clip: tuple[ViewSummaries, Tensor] | None = None,
    ) -> None:
        self.summaries = summaries
        self.classes = class_embeddings
        self.training_classes = training_class_embeddings
        self._clip, self._clip_classes = clip or (summaries, class_embeddings)
        self._kept: dict[object, Tensor] = {}

    def scores(
        self,
        scoring: Scoring,
        videos: Tensor | slice = slice(None),
        candidates: Tensor | None = None,
        modulate_with_all: bool = False,
    ) -> Tensor:
        """Scores [n, candidates] float64 of `videos` (int64 [n]) among `candidates` (None: all).

        Modulation looks for neighbours among the candidates, or among all classes.
        """
        mean = scoring.fusion == "features"
        cosines = self._cosines(scoring, None if modulate_with_all else candidates, mean)
        weight = scoring.ensemble or 0.0
        if weight:
            clip = self._clip_cosines.double().mean(1) if mean else self._clip_cosines
            cosines = (1 - weight) * cosines + weight * clip
        cosines = cosines[videos][..., slice(None) if candidates is None else candidates]
        return cosines if mean else fuse_views(cosines, scoring.fusion)

    @cached_property
    def _clip_cosines(self) -> Tensor:
        """[N,V,C] CLIP's own cosines."""
        return class_cosines(self._clip.units, self._clip_classes)

    def _cosines(self, scoring: Scoring, tested: Tensor | None, mean: bool) -> Tensor:
        """[N,V,C] cosines of views; with `mean` [N,C] float64, of the mean video feature."""

        def compute() -> Tensor:
            features = self.video_features(scoring, tested)
            features = features.double().mean(1) if mean else features
            return class_cosines(functional.normalize(features, dim=-1), self.classes)

        key: tuple[object, ...] = ("mean" if mean else "views",)
        if scoring.modulate and self.summaries.hidden is not None:
            key += (_list_key(tested), scoring.modulation_neighbours)
            key += (scoring.modulation_temperature,)
        return self._once(key, compute)

    def video_features(self, scoring: Scoring, tested: Tensor | None = None) -> Tensor:
        """Video features of views [N,V,D], not normalised; `tested` as `candidates` above."""
        scale = None
        if scoring.modulate and self.summaries.hidden is not None:
            key = ("near", _list_key(tested), scoring.modulation_neighbours)
            near = self._once(key, lambda: self._similarity(tested, scoring.modulation_neighbours))
            scale = torch.exp(-(1 - near) / scoring.modulation_temperature)
        return self.summaries.video_features(scale)

    def _similarity(self, tested: Tensor | None, neighbours: int) -> Tensor:
        """[N,V] `Modulation.similarity`, which no temperature changes."""
        features = self.summaries.features
        found = modulation(
            rearrange(features, "n v d -> (n v) 1 d"),
            self.classes if tested is None else self.classes[tested],
            self.training_classes,
            neighbours,
        )
        return rearrange(found.similarity, "(n v) -> n v", v=features.shape[1])

    def _once(self, key: object, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]


def _list_key(classes: Tensor | None) -> tuple[int, ...] | None:
    return None if classes is None else tuple(classes.tolist())


@torch.no_grad()
def view_features(
    head: Head, features: Tensor, class_embeddings: Tensor, modulate: bool = True
) -> Tensor:
    """Video feature of every view, [N,V,T,D] -> [N,V,D], not normalised, on the head's device."""
    scoring = Scoring.of_head(head.config, modulate=modulate)
    summaries = summarise(head, features)
    classes = class_embeddings.to(summaries.features)
    return BlockScores(summaries, classes, head.training_class_embeddings).video_features(scoring)


def view_cosines(
    head: Head, features: Tensor, class_embeddings: Tensor, modulate: bool = True
) -> Tensor:
    """Cosine of every view with every class, [N,V,T,D] and [C,D] -> [N,V,C]."""
    embeddings = functional.normalize(
        view_features(head, features, class_embeddings, modulate), dim=-1
    )
    return class_cosines(embeddings, class_embeddings)


def fuse_views(cosines: Tensor, how: Fusion = "softmax") -> Tensor:
    """Scores [N,C] float64 from the cosines of views [N,V,C].

    "softmax": mean over views of softmax over classes, without a logit scale, as the released
    code does (its second softmax changes no ranking and is left out). float64, because in float32
    the almost uniform scores of 400 classes tie.
    """
    if how == "softmax":
        return cosines.double().softmax(-1).mean(1)
    if how == "cosine":
        return cosines.double().mean(1)
    raise ValueError(
        f"cosines cannot be fused by {how!r}: it needs the features, use `BlockScores`"
    )


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Place of the true class, 0 = best, int64 [N], from scores [N,C] and labels [N].

    In a tie the class of lower index comes first, so that the result does not depend on a sort.
    """
    truth = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > truth) | ((scores == truth) & lower)).sum(1)


def percent(hits: Tensor) -> float:
    """Share of true values in percent."""
    return 100.0 * float(hits.double().mean())


def can_modulate(head: Head, named: int) -> bool:
    """Whether modulation is possible with `named` tested classes; a warning says why not."""
    trained = head.training_class_embeddings.shape[0]
    needed = head.config.modulation_neighbours
    if not head.config.modulates or min(named, trained) >= needed:
        return True
    log.warning(
        "modulation is off: it compares the %d nearest classes, and %d were named, %d trained on",
        *(needed, named, trained),
    )
    return False


def predict_scores(
    head: Head,
    features: Tensor,
    class_embeddings: Tensor,
    class_names: Sequence[str],
    modulate: bool = True,
) -> list[tuple[str, float]]:
    """Classes of one video, best first, with scores that add up to 1.

    `features` [V,T,D], `class_embeddings` [C,D] in the order of `class_names`. A score is the
    softmax over classes of (logit scale * cosine), averaged over views; unlike the scores of
    evaluation it uses the logit scale, so that it reads as the model's confidence. With fewer than
    five classes, named or trained on, modulation is skipped and that is logged.
    """
    if not class_names or len(class_names) != class_embeddings.shape[0]:
        raise UserError(
            f"{len(class_names)} class names for {class_embeddings.shape[0]} class embeddings: "
            "name at least one class, each with its embedding"
        )
    modulate = modulate and can_modulate(head, len(class_names))
    cosines = view_cosines(head, features[None], class_embeddings, modulate)[0]
    scale = head.logit_scale.double().exp()
    scores = (scale * cosines.double()).softmax(-1).mean(0).tolist()
    named = zip(class_names, scores, strict=True)
    return sorted(named, key=lambda pair: -pair[1])
