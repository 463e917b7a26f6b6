"""Nearest neighbours: the training videos that look most like a video vote for their classes.

n = training videos, D = embedding width, S = classes, q = videos asked about.

The weight of a neighbour is exp((cosine - best cosine) / TEMPERATURE). Every class also has a small
vote from its own nearest video, so that the classes of no neighbour are ranked too. Where a video
may show several classes, the share of a class is the weighted mean of what its neighbours show.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import WorkError
from heads.methods.knn import NeighbourConfig
from heads.methods.own_classes import OwnClassesHead

log = logging.getLogger(__name__)

TEMPERATURE: Final = 0.07  # of weighted votes on unit embeddings (Wu et al., CVPR 2018)
CHOICES: Final = (1, 3, 5, 10, 20, 50)  # numbers of neighbours that are tried
LEFT_OUT: Final = 10_000  # at most so many training videos, evenly spaced, are classified to choose
NEAREST_VOTE: Final = 1e-3
LEAST: Final = 1e-30  # the vote of a class without videos; its logarithm must be finite
SURE: Final = 1e-6  # how near to 0 and 1 the share of one of several classes can come
AT_ONCE: Final = 2**24  # cosines that are computed at once: 64 MB


class NeighbourHead(OwnClassesHead):
    """The embeddings of all training videos, and their classes."""

    videos: Tensor
    """[n,D] buffer, unit rows."""
    labels: Tensor
    """[n], or [n,S] of zeros and ones where a video may show several classes; a buffer, floating
    like every tensor of a head file."""

    def __init__(self, config: NeighbourConfig, training_classes: int) -> None:
        super().__init__(config, training_classes)
        self.register_buffer("videos", torch.zeros(config.videos, config.dim))
        self.register_buffer("labels", torch.zeros(config.videos))

    def take_several_classes(self, bias: float = 0.0) -> None:
        """Make this a head for several classes a video, as `Head.take_several_classes`."""
        super().take_several_classes(bias)
        self.labels = self.videos.new_zeros(len(self.videos), self._classes)

    def require_sound(self) -> None:
        """Raise WorkError if a label is not the number of a class, or says neither no nor yes."""
        if self.logit_bias is not None:
            if not bool(((self.labels == 0) | (self.labels == 1)).all()):
                raise WorkError("labels holds numbers that are neither 0 nor 1")
            return
        classes = self.training_class_embeddings.shape[0]
        known = (self.labels >= 0) & (self.labels < classes) & (self.labels == self.labels.floor())
        if not bool(known.all()):
            raise WorkError("labels holds numbers that are none of its classes")

    def own_scores(self, embeddings: Tensor) -> Tensor:
        """Return the logarithm of the votes [...,S], divided by the multiplier of cosines.

        Of several classes a video it is that of the odds: `probabilities` are then the votes.
        """
        flat = embeddings.to(self.videos).reshape(-1, embeddings.shape[-1])
        k = min(max(self.config.neighbours, 1), len(self.videos))
        parts = [
            self._votes(part @ self.videos.T, [k])[0]
            for part in torch.split(flat, self._queries_at_once())
        ]
        votes = torch.cat(parts) if parts else flat.new_zeros(0, self._classes)
        logits = votes.log() if self.logit_bias is None else votes.logit()
        return logits.reshape(*embeddings.shape[:-1], -1) / self.logit_scale.exp()

    @torch.no_grad()
    def fit(self, embeddings: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
        """Keep the videos, as `Head.fit`; k is chosen unless the configuration has it.

        The chosen k is right most often when each video is classified by all the others, and the
        smaller one of equals; with labels [n,S] it has the least cross-entropy. Returns
        `neighbours`, and, if k was chosen, `left_out_top1` in percent, or `left_out_loss` in nats.
        """
        self.videos = embeddings.to(self.videos)
        self.labels = labels.to(self.videos)
        self.config = replace(self.config, videos=len(labels))
        if self.logit_bias is not None:
            self.logit_bias.zero_()  # the neighbours say how likely a class is
        if self.config.neighbours or len(labels) < 2:
            self.config = replace(self.config, neighbours=self.config.neighbours or 1)
            return {"neighbours": self.config.neighbours}
        choices = [k for k in CHOICES if k < len(labels)]
        right = torch.zeros(len(choices), dtype=torch.float64, device=self.videos.device)
        step = -(-len(labels) // LEFT_OUT)
        asked = torch.arange(0, len(labels), step, device=self.videos.device)
        for part in torch.split(asked, self._queries_at_once()):
            cosines = self.videos[part] @ self.videos.T
            cosines[torch.arange(len(part), device=part.device), part] = -torch.inf
            right += torch.stack([self._right(v, part) for v in self._votes(cosines, choices)])
        chosen, best = choices[int(right.argmax())], float(right.max())
        log.info("nearest neighbours: k = %d, chosen on training videos that were left out", chosen)
        self.config = replace(self.config, neighbours=chosen)
        if self.logit_bias is not None:
            return {"neighbours": chosen, "left_out_loss": -best / len(asked)}
        return {"neighbours": chosen, "left_out_top1": 100.0 * best / len(asked)}

    @property
    def _classes(self) -> int:
        return self.training_class_embeddings.shape[0]

    def _queries_at_once(self) -> int:
        shown = 0 if self.logit_bias is None else int(self.labels.sum())
        return max(1, AT_ONCE // max(len(self.videos), self._classes, shown, 1))

    def _right(self, votes: Tensor, rows: Tensor) -> Tensor:
        """Return float64 [] how right `votes` [q,S] are about the training videos `rows` [q]."""
        truth = self.labels[rows]
        if self.logit_bias is None:
            return (votes.argmax(1) == truth).sum().double()
        return -functional.binary_cross_entropy(votes, truth, reduction="sum").double()

    def _votes(self, cosines: Tensor, choices: list[int]) -> list[Tensor]:
        """Return the votes [q,S] for each k of `choices`, which add up to about 1 per video.

        Of several classes a video each is a share from 0 to 1 by itself. `cosines` [q,n] is
        changed; a video with cosine -inf has no vote.
        """
        best = cosines.amax(1, keepdim=True)
        weights = cosines.sub_(best).div_(TEMPERATURE).exp_()
        near, at = weights.topk(min(max(choices), weights.shape[1]), dim=1)
        several = self.logit_bias is not None
        owners, of_owners = self.labels.long(), weights
        if several:  # every class that a video shows, and the weight of that video
            videos, owners = self.labels.nonzero(as_tuple=True)
            of_owners = weights[:, videos]
        nearest = weights.new_zeros(len(weights), self._classes)
        nearest.scatter_reduce_(1, owners.expand_as(of_owners), of_owners, "amax")
        votes = []
        for k in choices:
            counted = NEAREST_VOTE * nearest
            if several:
                kept = torch.zeros_like(weights).scatter_(1, at[:, :k], near[:, :k])
                whole = near[:, :k].sum(1, keepdim=True) + NEAREST_VOTE
                votes.append(((counted + kept @ self.labels) / whole).clamp(SURE, 1 - SURE))
                continue
            counted.scatter_add_(1, owners[at[:, :k]], near[:, :k])
            votes.append((counted / counted.sum(1, keepdim=True)).clamp(min=LEAST))
        return votes
