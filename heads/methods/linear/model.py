"""A linear probe: logistic regression on the mean of the frames, which starts from class texts.

n = videos, D = embedding width, S = classes.

The vector of a class is `share * text + change`. The penalty is on the change alone, so that with
a strong one, or with few videos, what remains is CLIP's own classifier. How strong it should be is
found on training videos that are left out of a fit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from heads.methods.linear import LinearConfig
from heads.methods.own_classes import OwnClassesHead

log = logging.getLogger(__name__)

STRENGTHS: Final = tuple(10.0**-power for power in range(7))
"""Penalties that are tried, strongest first: from CLIP's own classifier to almost no penalty."""
FOLDS: Final = 5
SMALL_SET: Final = 2000
"""Up to so many videos every fold is left out in turn; in larger sets one fold says enough."""
WORSE: Final = 2  # after so many penalties worse than the best, weaker ones are not tried
PATH_STEPS, FINAL_STEPS = 15, 60  # iterations of L-BFGS for a penalty that is tried, and the last
SHARE_PENALTY: Final = 0.01  # keeps the texts' share finite where it separates all videos
AT_ONCE: Final = 2**24  # scores that are computed at once: 64 MB


class LinearHead(OwnClassesHead):
    """A linear probe: one vector and one offset for each class."""

    weight: Tensor
    """[S,D] buffer."""
    bias: Tensor
    """[S] buffer."""

    def __init__(self, config: LinearConfig, training_classes: int) -> None:
        super().__init__(config, training_classes)
        self.register_buffer("weight", torch.zeros(training_classes, config.dim))
        self.register_buffer("bias", torch.zeros(training_classes))

    def own_scores(self, embeddings: Tensor) -> Tensor:
        """Return logits [...,S] of embeddings [...,D], divided by the multiplier of cosines."""
        return (embeddings.to(self.weight) @ self.weight.T + self.bias) / self.logit_scale.exp()

    @torch.no_grad()
    def fit(self, embeddings: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
        """Learn the classes, as `Head.fit`; the penalty is chosen unless the configuration has it.

        With labels [n,S] of several classes a video, every class has a logistic regression of its
        own. Returns the last `loss` (mean cross-entropy in nats, without the penalty) and the
        penalty, `regularisation`.
        """
        embeddings = embeddings.to(self.weight)
        texts = functional.normalize(self.training_class_embeddings, dim=-1)
        texts = self.logit_scale.exp() * texts
        if labels.ndim == 2:
            labels = labels.to(embeddings)
        strength = self.config.regularisation or _best_strength(embeddings, labels, texts, seed)
        regression = _Regression(embeddings, labels, texts)
        regression.solve(strength, FINAL_STEPS)
        weight, bias = regression.classes()
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if self.logit_bias is not None:
            self.logit_bias.zero_()  # the classes' own offsets say it all
        self.config = replace(self.config, regularisation=strength)
        loss = _cross_entropy(embeddings, labels, weight, bias)
        return {"loss": loss, "regularisation": strength}


def _best_strength(embeddings: Tensor, labels: Tensor, texts: Tensor, seed: int) -> float:
    """Return the penalty with the least cross-entropy on videos that are left out of a fit."""
    folds = _folds(labels, len(texts), seed)
    tried = range(FOLDS if len(labels) <= SMALL_SET else 1)
    losses = [0.0] * len(STRENGTHS)
    for fold in tried:
        out = folds == fold
        if not out.any():
            continue
        regression = _Regression(embeddings[~out], labels[~out], texts)
        found: list[float] = []
        for strength in STRENGTHS:
            regression.solve(strength, PATH_STEPS)
            weight, bias = regression.classes()
            loss = _cross_entropy(embeddings[out], labels[out], weight, bias)
            found.append(loss * int(out.sum()))
            if len(found) - found.index(min(found)) > WORSE:
                break
        found += [math.inf] * (len(STRENGTHS) - len(found))
        losses = [sum(pair) for pair in zip(losses, found, strict=True)]
    best = STRENGTHS[losses.index(min(losses))]
    log.info("linear probe: penalty %g, chosen on training videos that were left out", best)
    return best


def _folds(labels: Tensor, classes: int, seed: int) -> Tensor:
    """Divide the videos of every class among the folds, int64 [n]; -1 for the only one of a class.

    Videos of several classes are divided at random.
    The only video of a class is never left out, because nothing could be learnt of that class.
    """
    where = labels.cpu()
    order = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed))
    if where.ndim == 2:
        return (order % FOLDS).to(labels.device)
    order = order[torch.argsort(where[order], stable=True)]
    counts = torch.bincount(where, minlength=classes)
    number = torch.arange(len(where)) - (counts.cumsum(0) - counts)[where[order]]
    folds = torch.empty_like(where)
    folds[order] = torch.where(counts[where[order]] > 1, (number + where[order]) % FOLDS, -1)
    return folds.to(labels.device)


def _cross_entropy(embeddings: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Return the mean cross-entropy of videos in nats."""
    loss = 0.0
    for part, truth in _parts(embeddings, labels, len(weight)):
        logits = part @ weight.T + bias
        entropy: Any = functional.cross_entropy
        if truth.ndim == 2:
            entropy = functional.binary_cross_entropy_with_logits
        loss += float(entropy(logits, truth, reduction="sum"))
    return loss / len(labels)


def _sum_of_bits(logits: Tensor, truth: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum")


def _parts(embeddings: Tensor, labels: Tensor, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, AT_ONCE // max(classes, 1))
    yield from zip(torch.split(embeddings, size), torch.split(labels, size), strict=True)


class _Regression:
    """The regression of `labels` [n] on `embeddings` [n,D], with `texts` [S,D] to start from.

    Labels are [n,S] where a video may have several classes.
    It works on embeddings that are moved to mean 0 and scaled to mean square length 1, so that a
    penalty means the same for every encoder.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, texts: Tensor) -> None:
        self.embeddings, self.labels, self.texts = embeddings, labels, texts
        self.mean = embeddings.mean(0)
        length = (embeddings - self.mean).square().sum(1).mean().sqrt()
        self.length = length.clamp(min=1e-6)
        self.change = torch.zeros_like(texts)
        self.offset = texts.new_zeros(len(texts))
        if labels.ndim == 2:
            self.offset -= (embeddings @ texts.T).mean(0)  # else all classes would be certain
        self.share = texts.new_ones(())

    def classes(self) -> tuple[Tensor, Tensor]:
        """Return the vectors [S,D] and offsets [S] of the classes for embeddings as they are."""
        change = self.change / self.length
        return self.share * self.texts + change, self.offset - change @ self.mean

    @torch.no_grad()
    def solve(self, strength: float, steps: int) -> None:
        """Take at most `steps` steps of L-BFGS from the present state, under a penalty."""
        state = [self.change, self.offset, self.share]
        optimizer = torch.optim.LBFGS(
            state,
            max_iter=steps,
            tolerance_grad=1e-5,
            tolerance_change=1e-6,
            line_search_fn="strong_wolfe",
        )
        n, each = len(self.labels), torch.arange(len(self.labels), device=self.labels.device)

        def loss() -> Tensor:
            # The gradients are written out: autograd takes several times as long on small sets.
            weight, bias = self.classes()
            total = self.share.new_zeros(())
            of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
            for part, truth in _parts(self.embeddings, self.labels, len(weight)):
                logits = part @ weight.T + bias
                if truth.ndim == 2:
                    total += _sum_of_bits(logits, truth) / n
                    difference = logits.sigmoid_().sub_(truth).div_(n)
                else:
                    logs = logits.log_softmax(1)
                    at = (each[: len(truth)], truth)
                    total -= logs[at].sum() / n
                    difference = logs.exp_().div_(n)
                    difference[at] -= 1 / n
                of_weight += difference.T @ part
                of_bias += difference.sum(0)
            moved = (of_weight - of_bias[:, None] * self.mean) / self.length
            self.change.grad = moved + strength * self.change
            self.offset.grad = of_bias + strength * self.offset
            away = self.share - 1
            self.share.grad = (of_weight * self.texts).sum() + SHARE_PENALTY * away
            size = self.change.square().sum() + self.offset.square().sum()
            return total + (strength * size + SHARE_PENALTY * away.square()) / 2

        optimizer.step(loss)  # type: ignore[no-untyped-call]
