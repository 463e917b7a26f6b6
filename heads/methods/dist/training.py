"""The parts of a DiST training step: mixing, soft targets, loss, parameter groups, learning rate.

B = clips of a batch, C = classes, H, W = height and width of frames.

Source: DiST (Qing et al., ICCV 2023) and its released code and configurations; where ours differs:
docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.dist.model import DistModel

MIXUP_ALPHA: Final = 0.8
CUTMIX_ALPHA: Final = 1.0
SMOOTHING: Final = 0.1
WEIGHT_DECAY: Final = 1e-4
RATE_MULTIPLIER: Final = 10.0
"""Of the base learning rate, in every group of the branch."""
MIRRORED: Final = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
"""Labels of Something-Something V2 that change when a clip is mirrored: left becomes right."""


class Mix(NamedTuple):
    """How the clips of a batch are mixed with those of the reversed batch."""

    share: float
    """Share of a clip itself; the rest is its partner's."""
    box: tuple[int, int, int, int] | None = None
    """For cutmix the rows and columns that come from the partner: top, bottom, left, right (the
    ends excluded); None for mixup."""


def cut(share: float, height: int, width: int, row: int, column: int) -> Mix:
    """Return the cutmix with a box around (`row`, `column`) that leaves about `share` of a frame.

    The box is clipped to the frame, and its true area corrects the share.
    """
    side = math.sqrt(1 - share)
    half_rows, half_columns = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(row - half_rows, 0), min(row + half_rows, height)
    left, right = max(column - half_columns, 0), min(column + half_columns, width)
    area = (bottom - top) * (right - left)
    return Mix(1 - area / float(height * width), (top, bottom, left, right))


def draw_mix(
    random: np.random.RandomState,
    height: int,
    width: int,
    *,
    mixup: float = MIXUP_ALPHA,
    cutmix: float = CUTMIX_ALPHA,
    probability: float = 1.0,
    cutmix_probability: float = 0.5,
) -> Mix | None:
    """Draw the mixing of a batch from numpy's generator, in the order of the released code.

    `mixup` and `cutmix` are the alphas of the Beta distributions of the share; 0 turns one off.
    Returns None for a batch that is not mixed.
    """
    if not (mixup > 0 or cutmix > 0) or random.rand() >= probability:
        return None
    both = mixup > 0 and cutmix > 0
    cuts = random.rand() < cutmix_probability if both else cutmix > 0
    alpha = cutmix if cuts else mixup
    share = float(random.beta(alpha, alpha))
    if not cuts:
        return Mix(share)
    return cut(share, height, width, int(random.randint(height)), int(random.randint(width)))


def mixed(frames: Tensor, mix: Mix | None) -> Tensor:
    """Mix `frames` floating [B,...,H,W] with themselves in reversed order, as `mix` says."""
    if mix is None:
        return frames
    if mix.box is None:
        return frames * mix.share + frames.flip(0) * (1 - mix.share)
    top, bottom, left, right = mix.box
    result = frames.clone()
    result[..., top:bottom, left:right] = frames.flip(0)[..., top:bottom, left:right]
    return result


def soft_targets(labels: Tensor, classes: int, smoothing: float, mix: Mix | None = None) -> Tensor:
    """Return targets float32 [B,C] of `labels` int64 [B], smoothed and mixed.

    Raises UserError for labels outside 0..C-1. `smoothing` is spread evenly over all classes. Without either they are one-hot, and
    `soft_cross_entropy` is the ordinary cross-entropy.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(
            f"labels from {int(labels.min())} to {int(labels.max())} do not fit a list of {classes} "
            "classes: give the class texts that the labels count"
        )
    low = smoothing / classes
    shape = (len(labels), classes)
    targets = torch.full(shape, low, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + low)
    return targets if mix is None else targets * mix.share + targets.flip(0) * (1 - mix.share)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over clips of the cross-entropy of `logits` [B,C] with `targets` [B,C]."""
    return -(targets.to(logits) * functional.log_softmax(logits, -1)).sum(-1).mean()


class StepParts(NamedTuple):
    """What a training step consists of, up to its loss."""

    frames: Tensor
    """[B,T',3,H,W] the mixed clips."""
    targets: Tensor
    """[B,C] float32."""
    logits: Tensor
    """[B,C]."""
    loss: Tensor
    """[] the mean over clips."""


def training_step_parts(
    model: DistModel,
    frames: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    mix: Mix | None = None,
    smoothing: float = SMOOTHING,
) -> StepParts:
    """Return the parts of one training step; call `backward` on the loss, then step an optimiser.

    `frames` floating [B,T',3,S,S], preprocessed; `labels` int64 [B]; `class_embeddings` [C,E];
    `mix` as `draw_mix` gives it. Make the optimiser of `parameter_groups`, and set its rates with
    `set_rates`. Raises UserError as the model does.
    """
    frames = mixed(frames, mix)
    targets = soft_targets(labels, len(class_embeddings), smoothing, mix)
    logits = model(frames, class_embeddings)
    return StepParts(frames, targets, logits, soft_cross_entropy(logits, targets))


def parameter_groups(
    branch: nn.Module,
    weight_decay: float = WEIGHT_DECAY,
    rate_multiplier: float = RATE_MULTIPLIER,
) -> list[dict[str, Any]]:
    """Return AdamW's groups of the parameters of a branch, in the order of the released code.

    Queries, CLS rows and positional embeddings have no decay; then come the pooling blocks, then
    the rest, each in two groups: matrices with decay, biases and norms without. A group has
    `params`, their `names`, `weight_decay` and `rate_multiplier`.
    """
    groups: list[tuple[list[str], float]] = [([], 0.0) for _ in range(5)]
    for number, decay in ((1, weight_decay), (3, weight_decay)):
        groups[number] = ([], decay)
    named = {name: p for name, p in branch.named_parameters() if p.requires_grad}
    for name, parameter in named.items():
        if name.endswith(("cls_token", "positional_embedding")):
            groups[0][0].append(name)
            continue
        flat = parameter.ndim <= 1 or name.endswith("bias")
        first = 1 if name.startswith("adapooling_nets.") else 3
        groups[first + flat][0].append(name)
    return [
        {
            "params": [named[name] for name in names],
            "names": names,
            "weight_decay": decay,
            "rate_multiplier": rate_multiplier,
        }
        for names, decay in groups
        if names
    ]


@dataclass(frozen=True)
class RateSchedule:
    """The course of the learning rate, in epochs; the defaults are the published ones."""

    base: float = 3.2e-5
    epochs: float = 36.0
    warmup: float = 6.0
    start: float = 8e-8

    def rate(self, epoch: float) -> float:
        """Return the base rate at `epoch`, which need not be whole: before group multipliers.

        After the warm-up it is half a cosine wave down to 0 at the end. The warm-up is a straight
        line from `start` to where the wave is when it ends, a little below `base`.
        """
        if epoch < self.warmup:
            return self.start + epoch * (self._wave(self.warmup) - self.start) / self.warmup
        return self._wave(epoch)

    def _wave(self, epoch: float) -> float:
        return self.base * (math.cos(math.pi * epoch / self.epochs) + 1) / 2


def set_rates(groups: list[Mapping[str, Any]] | list[dict[str, Any]], rate: float) -> None:
    """Set `lr` of an optimiser's groups to `rate` times each group's `rate_multiplier`."""
    for group in groups:
        assert isinstance(group, dict)
        group["lr"] = rate * group["rate_multiplier"]


def pass_order(length: int, passes: int, ranks: int, rank: int, epoch: int) -> list[int]:
    """Return the samples of one rank in the released code's loader epoch: several passes in one.

    Every pass is shuffled by a generator of its own; all together are padded from their head and
    dealt out to the ranks. mote itself makes one pass an epoch (`pipeline.video_clips.order`), with
    any number of processes.
    """
    order: list[int] = []
    for number in range(passes):
        generator = torch.Generator().manual_seed(epoch + number)
        order += torch.randperm(length, generator=generator).tolist()
    return (order + order[: -len(order) % ranks])[rank::ranks]
