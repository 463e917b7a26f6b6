"""The parts of a TACO training step: class features, anchors, losses, teacher, mean of weights.

B = videos of a batch, T = frames, C = embedding width, n = training classes, N = anchors,
P = prompts of a class.

Nothing here runs a tower or an optimiser. In every iteration a loop encodes frames and class texts,
moves the teacher with `update_teacher`, encodes both with the teacher without gradients, and takes
its losses from `training_step_parts`. Learning rates and groups are MoTE's (`learning_rates` and
`build_optimizer` of `heads.training`).

Source: TACO (Zhu et al., NeurIPS 2026) and its released code; where ours differs: docs/methods.md.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.taco.head import TacoHead
from heads.methods.text_classifier import class_cosines


def class_features(embeddings: Tensor) -> Tensor:
    """Return the features of classes, unit rows [n,C], of their sentences' embeddings [P,n,C].

    It is the mean of the embeddings as they are, where MoTE scales each to length 1 first.
    """
    return functional.normalize(embeddings.mean(0), dim=-1)


def relations(video: Tensor, text: Tensor, anchors: Tensor) -> Tensor:
    """Return how alike videos [B,C] and class texts [n,C], of any length, lie to the anchors [N,C].

    The result [B,n] holds the products of their cosines with the anchors, summed over anchors and
    not divided by N. Computed in float32 (or wider) outside autocast.
    """
    with torch.autocast(video.device.type, enabled=False):
        video = functional.normalize(_at_least_float32(video), dim=-1)
        anchors = anchors.to(video)
        text = functional.normalize(text.to(video), dim=-1)
        return (video @ anchors.T) @ (text @ anchors.T).T


def structure_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over videos of KL(softmax(teacher) || softmax(student)), logits [B,n].

    The teacher's logarithms come from log_softmax, so a probability that is 0 in float32 has a
    gradient (0). Where torch differentiates the probability itself, it gives NaN.
    """
    with torch.autocast(student.device.type, enabled=False):
        return functional.kl_div(
            functional.log_softmax(student, -1),
            functional.log_softmax(teacher, -1),
            reduction="batchmean",
            log_target=True,
        )


def relative_structure_loss(
    video: Tensor,
    text: Tensor,
    teacher_video: Tensor,
    teacher_text: Tensor,
    anchors: Tensor,
    logit_scale: Tensor,
) -> Tensor:
    """Return how far the student's relations through the anchors are from the teacher's, [].

    `video` [B,C] is the student's with its projection, `teacher_video` [B,C] the teacher's without
    one; `text` and `teacher_text` [n,C] are class texts; all of any length. `anchors` [N,C].
    `logit_scale` [] is the logarithm of the student's multiplier. It multiplies both sides and,
    as published, has a gradient through both; teacher's features have none. Raises UserError for
    shapes that do not fit and for fewer than two classes.
    """
    _require_fitting(video, text, teacher_video, teacher_text, anchors)
    scale = logit_scale.exp()
    held = relations(teacher_video.detach(), teacher_text.detach(), anchors)
    return structure_divergence(scale * relations(video, text, anchors), scale * held)


class StepParts(NamedTuple):
    """What a training step consists of, up to its loss; logits are [B,n], losses []."""

    video: Tensor
    """[B,C] unit features of the videos, with the projection."""
    logits: Tensor
    """The cosines times the multiplier."""
    student: Tensor
    """The relations of the student times the multiplier."""
    teacher: Tensor
    """The relations of the teacher times the student's multiplier."""
    ce: Tensor
    kl: Tensor
    total: Tensor
    """The cross-entropy and the weighted divergence; divide it by the steps of an accumulation."""


def training_step_parts(
    head: TacoHead,
    frames: Tensor,
    text: Tensor,
    teacher_frames: Tensor,
    teacher_text: Tensor,
    labels: Tensor,
    anchors: Tensor,
    logit_scale: Tensor,
) -> StepParts:
    """Return the parts of one training step; call `backward` on `total`.

    `frames` and `teacher_frames` [B,T,C] are embeddings of the same frames by student and teacher,
    as the towers give them; `text` [n,C] the student's class features (`class_features`) and
    `teacher_text` [n,C] the teacher's; `labels` int64 [B]; `anchors` [N,C]; `logit_scale` [] the
    logarithm of the student's multiplier. Losses are computed in float32 (or wider). Raises
    UserError for shapes that do not fit, labels outside 0..n-1 and fewer than two classes.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(text):
        raise UserError(
            f"labels from {int(labels.min())} to {int(labels.max())} do not fit a list of "
            f"{len(text)} classes: give the class texts that the labels count"
        )
    means, teacher_means = (_at_least_float32(x).mean(1) for x in (frames, teacher_frames.detach()))
    _require_fitting(means, text, teacher_means, teacher_text, anchors)
    if head.projection is not None:
        means = means + head.projection.added(means)
    with torch.autocast(means.device.type, enabled=False):
        video = functional.normalize(_at_least_float32(means), dim=-1)
        scale = logit_scale.exp()
        logits = scale * class_cosines(video, text)
        student = scale * relations(video, text, anchors)
        teacher = scale * relations(teacher_means, teacher_text.detach(), anchors)
        ce = functional.cross_entropy(logits, labels)
        kl = structure_divergence(student, teacher)
        total = ce + head.config.distillation_weight * kl
    return StepParts(video, logits, student, teacher, ce, kl, total)


def teacher_momentum(steps: int, epochs: int) -> float:
    """Return the share that a teacher keeps of itself, for `epochs` epochs of `steps` iterations.

    The teacher's memory, 1 / (1 - momentum) iterations, is 4/15 of the training, as in the released
    configurations: 0.9998 over 15 epochs of Kinetics-400, about 1,250 iterations each. Fewer
    iterations with that number would leave the teacher where it began. Raises UserError where
    there are none.
    """
    if steps < 1 or epochs < 1:
        raise UserError(
            f"{epochs} epochs of {steps} iterations have no teacher: give at least one of each"
        )
    return max(0.0, 1 - 15 / 4 / (steps * epochs))


@torch.no_grad()
def update_teacher(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], momentum: float
) -> None:
    """Move the teacher's parameters in place: `momentum` of themselves, the rest the student's.

    Both hold all parameters of the two towers and the logit scale by name, of the same names and
    shapes; the head has no teacher. Call it in every iteration before the teacher encodes, also
    where gradients are only added up.
    """
    for name, value in teacher.items():
        value.mul_(momentum).add_(student[name].to(value), alpha=1 - momentum)


class WeightMean:
    """The plain mean of the weights at the start and after every epoch, of towers and head."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.weights = {name: value.detach().clone() for name, value in start.items()}
        self.points = 1
        """How many weights it is the mean of."""

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after one more epoch, of the same names."""
        for name, value in self.weights.items():
            value.mul_(self.points).add_(weights[name].to(value)).div_(self.points + 1)
        self.points += 1

    def state(self) -> dict[str, Any]:
        """Return all that a training which continues needs: `points` and the `weights` by name."""
        return {"points": self.points, "weights": self.weights}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> WeightMean:
        """Invert `state`, without a copy of the weights."""
        found = cls({})
        found.weights, found.points = dict(state["weights"]), int(state["points"])
        return found


def few_shot_positions(
    labels: Sequence[int], shots: int, seed: int, class_names: Sequence[str] | None = None
) -> list[int]:
    """Return the positions in a list of videos that the released code trains on in one epoch.

    `shots` videos of each class are drawn, classes in the order of their first appearance in
    `labels`. The choice is repeated as often as it goes into the list. Choices for different
    `shots` are not nested. Raises UserError, naming the class, where one has fewer videos.
    """
    of_class: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        of_class.setdefault(label, []).append(position)
    draws = random.Random(seed)
    chosen: list[int] = []
    for label, positions in of_class.items():
        if not 1 <= shots <= len(positions):
            name = f"class {label}" if class_names is None else repr(class_names[label])
            raise UserError(
                f"{shots} videos per class cannot be drawn: {name} has {len(positions)}; choose a "
                "number from 1 to that of the smallest class, or leave the class out"
            )
        chosen += draws.sample(positions, shots)
    return chosen * (len(labels) // len(chosen)) if chosen else []


def _require_fitting(
    video: Tensor, text: Tensor, teacher_video: Tensor, teacher_text: Tensor, anchors: Tensor
) -> None:
    shapes = [list(x.shape) for x in (video, text, teacher_video, teacher_text, anchors)]
    width = shapes[0][-1:]
    if (
        any(len(shape) != 2 or shape[-1:] != width for shape in shapes)
        or shapes[0] != shapes[2]
        or shapes[1] != shapes[3]
    ):
        raise UserError(
            f"videos {shapes[0]} and {shapes[2]}, class texts {shapes[1]} and {shapes[3]} and "
            f"anchors {shapes[4]} do not fit: they must be [B,C] twice, [n,C] twice and [N,C]"
        )
    if len(text) < 2:
        raise UserError(
            f"TACO needs at least 2 classes, not {len(text)}: it learns how classes lie to each "
            "other"
        )


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
