"""Learning rates, AdamW's parameter groups, and the random draws of epochs and samples.

B = batch.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code and configurations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heads.methods.head import Head
from heads.training.config import TrainConfig

FLOOR: Final = 0.01
"""Share of the rate at which the schedule "floored-wave" ends (MSTA, Chen et al., CVPR 2025)."""


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> npt.NDArray[np.float64]:
    """Return the rates at every optimiser step, float64 [epochs, optimiser steps, 2].

    The last axis holds the two groups of `build_optimizer`. `steps_per_epoch` counts iterations
    (batches); with `accumulation` A every A-th of them is an optimiser step. The rate is
    base * t / warm-up, then base * (1 + cos(pi * (t - warm-up) / (epochs - warm-up))) / 2, with t
    in epochs, refreshed at iteration 0 of an epoch and every `lr_refresh`-th one. With the schedule
    "whole-wave" it is that of `heads.methods.dist.training.RateSchedule`. With "floored-wave" it
    is, after the warm-up, base * (FLOOR + (1 - FLOOR) * (1 + cos(pi * t / epochs)) / 2).
    """
    iteration = np.arange(steps_per_epoch)
    period = config.lr_refresh
    # the last iteration i <= this one with i = 0 or (i + 1) a multiple of the period
    refreshed = np.maximum((iteration + 1) // period * period - 1, 0)
    t = np.arange(config.epochs)[:, None] + refreshed / steps_per_epoch
    cosine = np.minimum((t - config.warmup) / (config.epochs - config.warmup), 1.0)
    factor = 0.5 * (1.0 + np.cos(np.pi * cosine))
    if config.warmup > 0:
        factor = np.where(t < config.warmup, t / config.warmup, factor)
    if config.schedule == "whole-wave":
        from heads.methods.dist.training import RateSchedule

        start = config.warmup_start / config.lr if config.lr else 0.0
        course = RateSchedule(1.0, config.epochs, config.warmup, start)
        factor = np.vectorize(course.rate)(t)
    if config.schedule == "floored-wave":
        wave = FLOOR + (1 - FLOOR) * 0.5 * (1.0 + np.cos(np.pi * t / config.epochs))
        factor = np.where(t < config.warmup, t / max(config.warmup, 1e-9), wave)
    factor = factor[:, config.accumulation - 1 :: config.accumulation]
    bases = np.array([config.lr * config.logit_scale_lr_ratio, config.lr])
    rates: npt.NDArray[np.float64] = factor[..., None] * bases
    return rates


def build_optimizer(
    head: Head, tower_parameters: Iterable[nn.Parameter], config: TrainConfig
) -> torch.optim.AdamW:
    """Make AdamW (betas 0.9 and 0.999, epsilon 1e-8) over the groups of tower and head.

    Group 0: `tower_parameters` at `lr * logit_scale_lr_ratio`, with weight decay; in training from
    a store, this is only the logit scale. There is no such group if there are no such parameters.
    Then come the head's groups (`Head.parameter_groups`; one, with decay, unless the method says
    otherwise) at `lr`. Those of the tower are marked as `tower`.
    """
    groups: list[dict[str, Any]] = []
    if tower := list(tower_parameters):
        rate = config.lr * config.logit_scale_lr_ratio
        groups.append({"params": tower, "lr": rate, "tower": True})
    for group in head.parameter_groups(config.weight_decay):
        groups.append({**group, "lr": config.lr, "tower": False})
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True
    )


def draw_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the CPU generator for the routing draws of one epoch."""
    word = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def data_subsets(rows: Tensor, subsets: int, seed: int) -> Tensor:
    """Return the data subset of every sample: `rows` [B] int64 -> [B] int64 in 0..subsets-1.

    "subset" routing splits the samples of a data set into as many parts as there are experts, by a
    draw that depends only on the seed and the sample's row: a sample keeps the same expert
    in every epoch, in every batch and after a resume. Parts are equal up to chance. The draw is one
    step of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    with np.errstate(over="ignore"):
        key = np.random.SeedSequence([seed]).generate_state(1, np.uint64)
        state = key + rows.cpu().numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return torch.from_numpy((state % np.uint64(subsets)).astype(np.int64))
