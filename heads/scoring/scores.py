"""Turns view summaries into scores and ranks: modulates the head, fuses views, ranks classes.

N = videos, V = views, T = frames, D = embedding width, C = classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, get_args

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from featstore.errors import UserError, one_of
from heads.methods.head import Head
from heads.methods.mote.config import MODULATION_TEMPERATURE as TEMPERATURE
from heads.methods.mote.config import NEIGHBOURS
from heads.methods.mote.modulation import modulation
from heads.methods.registry import method
from heads.methods.settings import MethodConfig
from heads.methods.text_classifier import class_cosines
from heads.scoring import Fusion as Fusion
from heads.scoring.view_summaries import ViewSummaries, summarise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scoring:
    """How the scores of a video are computed from the summaries of its views."""

    fusion: Fusion = "softmax"
    modulate: bool = True
    modulation_neighbours: int = NEIGHBOURS
    """K of modulation: how many tested and how many trained classes it compares."""
    modulation_temperature: float = TEMPERATURE
    """Temperature of modulation's exponential: the larger, the more the head contributes."""
    ensemble: float | None = None
    """Weight w of CLIP: scores are computed from the cosines (1 - w) * head + w * CLIP. None means
    the head alone. DiST (Qing et al., ICCV 2023) tests zero-shot with 0.5."""
    scaled: bool = False
    """Whether the fusion "softmax" takes that of logits, as DiST publishes, not of cosines."""
    projection: bool = True
    """Whether the head's projection, if it has one (`MethodConfig.projects`), is added to the mean
    of frames."""

    def __post_init__(self) -> None:
        if self.fusion not in get_args(Fusion):
            raise UserError(
                f"fusion {self.fusion!r} is unknown: {one_of(self.fusion, get_args(Fusion))}"
            )
        if self.ensemble is not None and not 0 <= self.ensemble <= 1:
            raise UserError(
                f"ensemble weight {self.ensemble:g} is not between 0 (the head alone) and 1 (CLIP "
                "alone): choose a weight in this range, for example DiST's 0.5"
            )
        k, t = self.modulation_neighbours, self.modulation_temperature
        if self.modulate and not (k >= 1 and 0 < t < math.inf):
            raise UserError(
                f"modulation cannot use {k} neighbours and temperature {t:g}: "
                "give at least 1 neighbour and a finite temperature above 0"
            )

    @classmethod
    def of_head(cls, config: MethodConfig, *, modulate: bool = True, **given: Any) -> Scoring:
        """Return a head's settings, but `given` ones that are not None; 0 turns modulation off.

        Raises UserError for a setting of modulation or a projection that would have no effect.
        """
        require_projection(config, given.get("projection"))
        names, has_it = _OF_MODULATION, method(config.kind).modulated
        for name in names:
            if given.get(name) and not (modulate and has_it):
                why = f"for {method(config.kind).title}, which has no modulation"
                raise UserError(
                    f"--{name.replace('_', '-')} changes nothing "
                    f"{'with --no-modulate' if has_it else why}: leave it out"
                )
        chosen = {name: getattr(config, name) for name in names}
        chosen |= {name: value for name, value in given.items() if value is not None}
        on = modulate and has_it and all(chosen[name] for name in names)
        chosen.setdefault("scaled", method(config.kind).scaled)
        return cls(modulate=on, **chosen)


def require_projection(config: MethodConfig, asked: bool | None) -> None:
    """Raise UserError if it is `asked` whether to use a projection that the head lacks."""
    if asked is not None and not config.projects:
        raise UserError(
            f"--projection {'on' if asked else 'off'} changes nothing for this head "
            f"({method(config.kind).title}), which has no projection: leave it out"
        )


_OF_MODULATION: Final = ("modulation_neighbours", "modulation_temperature")


class BlockScores:
    """Computes scores of the N videos of one block under any settings, shared parts only once.

    `class_embeddings` [C,D] are all classes of the store, which `scorer` (`Head.scorer`) scores, by
    default by their cosines; `logit_scale` is the factor for scores that are `scaled`;
    `training_class_embeddings` [S,D] are the classes that modulation
    compares them with. If the head's features come from a tuned tower,
    `clip` holds the summaries for CLIP's part of an ensemble and its class texts [C,D].
    """

    def __init__(
        self,
        summaries: ViewSummaries,
        class_embeddings: Tensor,
        training_class_embeddings: Tensor,
        clip: tuple[ViewSummaries, Tensor] | None = None,
        scorer: Callable[[Tensor], Tensor] | None = None,
        logit_scale: Tensor | None = None,
    ) -> None:
        self.summaries = summaries
        self._scale = logit_scale
        self.classes = class_embeddings
        self._scorer = scorer or (lambda embeddings: class_cosines(embeddings, self.classes))
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
        """Return scores float64 [n, candidates] of `videos` (int64 [n]); `candidates` None: all.

        Modulation looks for neighbours among the candidates, or, with `modulate_with_all`, among
        all classes.
        """
        if scoring.scaled and scoring.fusion == "softmax" and self._scale is not None:
            return self.confidences(self._scale, scoring, videos, candidates, modulate_with_all)
        cosines = self._chosen(scoring, videos, candidates, modulate_with_all)
        return cosines if scoring.fusion == "features" else fuse_views(cosines, scoring.fusion)

    def confidences(
        self,
        logit_scale: Tensor,
        scoring: Scoring,
        videos: Tensor | slice = slice(None),
        candidates: Tensor | None = None,
        modulate_with_all: bool = False,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return what reads as the model's confidence, float64 [n, candidates]; rows add up to 1.

        It is the softmax over candidates of (logit scale * cosine) where `scores` has the cosine
        alone: for the fusion "softmax" the mean over views of it, as in `predict_scores`, for the
        others that of the fused cosine. `logit_scale` is the factor itself, not its logarithm. With
        the `bias` of a head for several classes a video, it is the sigmoid of (logit scale * cosine
        + bias), and rows do not add up to 1.
        """
        cosines = self._chosen(scoring, videos, candidates, modulate_with_all).double()
        if scoring.fusion == "cosine":
            cosines = fuse_views(cosines, scoring.fusion)
        logits = logit_scale.double() * cosines
        shares = logits.softmax(-1) if bias is None else (logits + bias.double()).sigmoid()
        return shares.mean(1) if scoring.fusion == "softmax" else shares

    def _chosen(
        self,
        scoring: Scoring,
        videos: Tensor | slice,
        candidates: Tensor | None,
        modulate_with_all: bool,
    ) -> Tensor:
        """Return cosines of views [n,V,candidates]; with mean features float64 [n,candidates]."""
        mean = scoring.fusion == "features"
        cosines = self._cosines(scoring, None if modulate_with_all else candidates, mean)
        weight = scoring.ensemble or 0.0
        if weight:
            clip = self._clip_cosines.double().mean(1) if mean else self._clip_cosines
            cosines = (1 - weight) * cosines + weight * clip
        return cosines[videos][..., slice(None) if candidates is None else candidates]

    @cached_property
    def _clip_cosines(self) -> Tensor:
        """[N,V,C] CLIP's own cosines."""
        return class_cosines(self._clip.units, self._clip_classes)

    def _cosines(self, scoring: Scoring, tested: Tensor | None, mean: bool) -> Tensor:
        """Return the cosines of views [N,V,C]; with `mean`, of mean features, float64 [N,C]."""

        def compute() -> Tensor:
            features = self.video_features(scoring, tested)
            features = features.double().mean(1) if mean else features
            return self._scorer(functional.normalize(features, dim=-1))

        key: tuple[object, ...] = ("mean" if mean else "views", scoring.projection)
        if scoring.modulate and self.summaries.hidden is not None:
            key += (_list_key(tested), scoring.modulation_neighbours)
            key += (scoring.modulation_temperature,)
        return self._once(key, compute)

    def video_features(self, scoring: Scoring, tested: Tensor | None = None) -> Tensor:
        """Return the video features of views [N,V,D], not normalised.

        Modulation looks for neighbours among the classes `tested` (None: all).
        """
        if not scoring.projection:
            return self.summaries.features
        scale = None
        if scoring.modulate and self.summaries.hidden is not None:
            key = ("near", _list_key(tested), scoring.modulation_neighbours)
            near = self._once(key, lambda: self._similarity(tested, scoring.modulation_neighbours))
            scale = torch.exp(-(1 - near) / scoring.modulation_temperature)
        return self.summaries.video_features(scale)

    def _similarity(self, tested: Tensor | None, neighbours: int) -> Tensor:
        """Return `Modulation.similarity` [N,V], which does not depend on the temperature."""
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
    """Return unnormalised video features of views, [N,V,T,D] -> [N,V,D], on the head's device."""
    scoring = Scoring.of_head(head.config, modulate=modulate)
    summaries = summarise(head, features)
    classes = class_embeddings.to(summaries.features)
    return BlockScores(summaries, classes, head.training_class_embeddings).video_features(scoring)


def view_cosines(
    head: Head,
    features: Tensor,
    class_embeddings: Tensor,
    modulate: bool = True,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """Return the score (`Head.scorer`) of every view and class, [N,V,T,D], [C,D] -> [N,V,C]."""
    embeddings = functional.normalize(
        view_features(head, features, class_embeddings, modulate), dim=-1
    )
    return head.scorer(class_embeddings, class_names)(embeddings)


def view_probabilities(
    head: Head,
    features: Tensor,
    class_embeddings: Tensor,
    modulate: bool = True,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """Return the confidence of every class in every view, [N,V,T,D] and [C,D] -> [N,V,C] float64.

    It is the softmax over classes of (logit scale * cosine), or independent probabilities of
    classes for a head of several classes a video (`Head.probabilities`).
    """
    cosines = view_cosines(head, features, class_embeddings, modulate, class_names)
    return head.probabilities(cosines)


def fuse_views(cosines: Tensor, how: Fusion = "softmax") -> Tensor:
    """Fuse the cosines of views [N,V,C] into scores [N,C] float64.

    "softmax" is the mean over views of the softmax over classes, without a logit scale, as in the
    released code (its second softmax changes no ranking and is left out). Scores are float64,
    because the almost uniform scores of 400 classes would tie in float32.
    """
    if how == "softmax":
        return cosines.double().softmax(-1).mean(1)
    if how == "cosine":
        return cosines.double().mean(1)
    raise ValueError(
        f"cosines cannot be fused by {how!r}, which needs the features: use `BlockScores`"
    )


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of the true class, 0 = best, int64 [N], from scores [N,C] and labels [N].

    In a tie the class with the lower index comes first: the result does not depend on a sort.
    """
    truth = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > truth) | ((scores == truth) & lower)).sum(1)


def best_classes(scores: Tensor, k: int) -> Tensor:
    """Return the `k` best classes of every row of scores [N,C], best first, int64 [N, min(k, C)].

    In a tie the class with the lower index comes first, as in `ranks`.
    """
    left = scores
    found: list[Tensor] = []
    for number in range(min(k, scores.shape[1])):
        if number == 1:
            left = scores.clone()
        if number:
            left.scatter_(1, found[-1], -math.inf)
        found.append(left.argmax(1, keepdim=True))  # the first of equal ones
    return torch.cat(found, 1)


def percent(hits: Tensor) -> float:
    """Return the share of true values in percent."""
    return 100.0 * float(hits.double().mean())


def can_modulate(head: Head, named: int) -> bool:
    """Return whether modulation is possible with `named` tested classes; if not, log why."""
    trained = head.training_class_embeddings.shape[0]
    needed = head.config.modulation_neighbours
    if not head.config.modulates or min(named, trained) >= needed:
        return True
    log.warning(
        "modulation is off: it compares the %d nearest classes, of %d named and %d trained on",
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
    """Return the classes of one video, best first, with scores that add up to 1.

    `features` [V,T,D], `class_embeddings` [C,D] in the order of `class_names`. A score is the
    softmax over classes of (logit scale * cosine), averaged over views. Unlike the scores of
    evaluation it uses the logit scale, so that it reads as the model's confidence. If fewer than
    five classes are named or were trained on, modulation is skipped with a warning.
    """
    if not class_names or len(class_names) != class_embeddings.shape[0]:
        raise UserError(
            f"{len(class_names)} class names for {class_embeddings.shape[0]} class embeddings: "
            "name at least one class, each with its embedding"
        )
    head.require_classes(class_names)
    modulate = modulate and can_modulate(head, len(class_names))
    scores = view_probabilities(head, features[None], class_embeddings, modulate, class_names)
    scores = scores[0].mean(0)
    named = zip(class_names, scores.tolist(), strict=True)
    return sorted(named, key=lambda pair: -pair[1])
