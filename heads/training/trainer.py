"""How a head is optimised: the recipe's numbers, learning rates, AdamW groups, one epoch.

B = batch, T = frames, D = embedding width, S = training classes.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code and configurations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featstore.errors import UserError, WorkError
from heads.arithmetic import Precision, autocast, resolve_precision
from heads.methods.mote.config import RoutingDraw, known_fields
from heads.methods.mote.losses import LossTerms, mote_loss
from heads.methods.mote.model import TemporalHead

AUTHORS_LR_REFRESH = 10
"""The released code refreshes the rate every tenth iteration only, so its first nine iterations
of a warm-up run at rate 0."""


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe; defaults are the released ViT-B/16 Kinetics-400 configuration.

    Raises UserError when a value is out of range.
    """

    PRECISIONS: ClassVar[tuple[str, ...]] = get_args(Precision)

    epochs: int = 30
    warmup_epochs: float = 5.0
    """Linear warm-up; one as long as the whole run or longer counts as a sixth of the run."""
    lr: float = 5e-5
    """Base learning rate of the head."""
    logit_scale_lr_ratio: float = 0.07
    """Rate of the logit scale (and of the tower, end to end) relative to `lr`."""
    weight_decay: float = 0.2
    """On every tensor, biases and norms included."""
    batch_size: int = 192
    frames: int = 8
    """T, frames per view drawn from the stored ones."""
    seed: int = 1024
    accumulation: int = 1
    """Batches per optimiser step; a remainder is carried into the next epoch."""
    lr_refresh: int = 1
    """Iterations between refreshes of the learning rate; 10 is the authors' quirk."""
    expert_weight: float = 1.0
    """Weight of the expert pass's cross-entropy; of all three weights, 0 turns the term off."""
    merged_weight: float = 0.5
    """Weight of the merged pass's cross-entropy."""
    feature_weight: float = 0.1
    """Weight of the distance between the merged pass's features and the encoder's."""
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "frames", "accumulation", "lr_refresh"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number from 1 up")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"seed is {self.seed!r}: it must be a whole number from 0 up")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(field.default, float):
                continue
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise UserError(f"{field.name} is {value!r}: it must be a number from 0 up")
            object.__setattr__(self, field.name, float(value))
        if not self.expert_weight + self.merged_weight + self.feature_weight:
            raise UserError("all three loss weights are 0: there is nothing to train")
        if self.precision not in self.PRECISIONS:
            raise UserError(
                f"precision {self.precision!r} is unknown: choose one of "
                f"{', '.join(self.PRECISIONS)}"
            )

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in force (the recipe's share of the run where the run is short)."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 6

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_json`; UserError names fields this version does not know."""
        return cls(**known_fields(cls, value, "training"))


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> npt.NDArray[np.float64]:
    """Rates in force at every optimiser step, float64 [epochs, optimiser steps, 2].

    The last axis is the two groups of `build_optimizer`. `steps_per_epoch` counts iterations
    (batches); with `accumulation` A every A-th of them is an optimiser step. The rate is
    base * t / warm-up, then base * (1 + cos(pi * (t - warm-up) / (epochs - warm-up))) / 2, with t
    in epochs, refreshed at iteration 0 of an epoch and every `lr_refresh`-th one.
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
    factor = factor[:, config.accumulation - 1 :: config.accumulation]
    bases = np.array([config.lr * config.logit_scale_lr_ratio, config.lr])
    rates: npt.NDArray[np.float64] = factor[..., None] * bases
    return rates


def build_optimizer(
    head: nn.Module, tower_parameters: Iterable[nn.Parameter], config: TrainConfig
) -> torch.optim.AdamW:
    """AdamW (betas 0.9 and 0.999, epsilon 1e-8) over two groups, weight decay on everything.

    Group 0: `tower_parameters` at `lr * logit_scale_lr_ratio`; training from a store these are
    the logit scale alone. Group 1: the head's trainable parameters at `lr`.
    """
    groups = [
        {"params": list(tower_parameters), "lr": config.lr * config.logit_scale_lr_ratio},
        {"params": [p for p in head.parameters() if p.requires_grad], "lr": config.lr},
    ]
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True
    )


class TrainingBatch(Protocol):
    """What `Trainer.run_epoch` takes: `featstore.batches.loader.Batch` has it."""

    @property
    def features(self) -> Tensor:
        """[B,T,D] floating."""

    @property
    def labels(self) -> Tensor:
        """[B] int64."""

    @property
    def rows(self) -> Tensor:
        """[B] int64, which sample of the data set each is."""


StepReport = Callable[[int, float, float], None]
"""Called with (batches done in this epoch, mean loss so far, samples per second)."""


def _no_report(step: int, loss: float, rate: float) -> None:
    pass


class Trainer:
    """Trains one head from batches of features; its whole state is a dict of tensors.

    The logit scale starts at the head's and is trained beside it (group 0). Routing draws depend
    on (seed, epoch) only, so an epoch repeats exactly from the state before it.
    """

    def __init__(
        self,
        head: TemporalHead,
        config: TrainConfig,
        steps_per_epoch: int,
        *,
        class_embeddings: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`class_embeddings` [S,D] default to the head's training classes.

        Raises UserError when an epoch has fewer batches than one optimiser step takes, or no loss
        term that the head has is on.
        """
        if head.config.kind == "transformer" and not config.expert_weight:
            raise UserError(
                "expert_weight is 0, and a plain transformer has no other loss: choose another "
                "weight or --head mote"
            )
        if config.accumulation > steps_per_epoch:
            raise UserError(
                f"accumulation {config.accumulation} is more than the {steps_per_epoch} batches "
                "of an epoch: lower the accumulation or the batch size"
            )
        self.device = device or torch.device("cpu")
        self.head = head.to(self.device)
        self.config = config
        self.precision = resolve_precision(config.precision, head.config.dim, self.device)
        classes = head.training_class_embeddings if class_embeddings is None else class_embeddings
        self.class_embeddings = classes.to(self.device)
        self.logit_scale = nn.Parameter(head.logit_scale.detach().clone())
        self.optimizer = build_optimizer(head, [self.logit_scale], config)
        self.rates = learning_rates(config, steps_per_epoch)
        self.epoch = 0
        """Epochs done."""

    def step(
        self,
        features: Tensor,
        labels: Tensor,
        draw: RoutingDraw,
        subsets: Tensor | None = None,
    ) -> LossTerms:
        """Forward and backward of one batch; gradients add up until `update`.

        `subsets` [B] as `TemporalHead.training_pass` takes them.
        """
        config = self.config
        with autocast(self.precision, self.device):
            passes = self.head.training_pass(features, self.class_embeddings, draw, subsets)
        terms = mote_loss(
            passes,
            features,
            labels,
            self.logit_scale.exp(),
            expert_weight=config.expert_weight,
            merged_weight=config.merged_weight,
            feature_weight=config.feature_weight,
        )
        (terms.total / config.accumulation).backward()  # type: ignore[no-untyped-call]
        return terms

    def update(self, rates: npt.NDArray[np.float64]) -> None:
        """One optimiser step at the two groups' `rates` [2]; clears the gradients."""
        for group, rate in zip(self.optimizer.param_groups, rates.tolist(), strict=True):
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run_epoch(
        self, batches: Iterable[TrainingBatch], report: StepReport = _no_report
    ) -> dict[str, float | int]:
        """Train on `batches`; returns the epoch's record for metrics.jsonl.

        Losses are means over samples. Raises WorkError when the loss stops being a number; the
        weights are spoilt then, and the state before the epoch is the last good one.
        """
        self.head.train()
        draws = draw_generator(self.config.seed, self.epoch)
        sums = torch.zeros(len(LossTerms._fields), dtype=torch.float64, device=self.device)
        samples, done, began = 0, 0, time.perf_counter()
        rates = self.rates[self.epoch]
        report_every = 1 if self.device.type == "cpu" else 10  # a GPU waits for each look
        for done, batch in enumerate(batches, start=1):
            features = batch.features.to(self.device, torch.float32, non_blocking=True)
            labels = batch.labels.to(self.device, non_blocking=True)
            draw = RoutingDraw.sample(self.head.config, draws)
            terms = self.step(features, labels, draw, self._subsets(batch))
            sums += torch.stack(terms).detach() * len(labels)
            samples += len(labels)
            if done % self.config.accumulation == 0:
                self.update(rates[done // self.config.accumulation - 1])
            if done % report_every == 0:
                loss = self._mean_loss(sums, samples)
                report(done, loss, samples / (time.perf_counter() - began))
        loss = self._mean_loss(sums, samples)
        seconds = time.perf_counter() - began
        report(done, loss, samples / seconds)
        means = dict(zip(LossTerms._fields, (sums / samples).tolist(), strict=True))
        self.epoch += 1
        self.head.eval()
        self.head.logit_scale.copy_(self.logit_scale.detach())
        return {
            "epoch": self.epoch,
            "loss": means["total"],
            "expert_loss": means["expert"],
            "merged_loss": means["merged"],
            "feature_loss": means["feature"],
            "lr": float(rates[-1, 1]),
            "logit_scale": math.exp(self.logit_scale.item()),
            "samples": samples,
            "samples_per_second": samples / seconds,
            "seconds": seconds,
        }

    def _subsets(self, batch: TrainingBatch) -> Tensor | None:
        if self.head.config.routing != "subset":
            return None
        return data_subsets(batch.rows, self.head.config.experts, self.config.seed).to(self.device)

    def _mean_loss(self, sums: Tensor, samples: int) -> float:
        loss = float(sums[0]) / samples
        if not math.isfinite(loss):
            raise WorkError(
                f"the loss became {loss} in epoch {self.epoch + 1}: the weights after epoch "
                f"{self.epoch} are kept; lower --lr (now {self.config.lr:g}) and start a new run"
            )
        return loss

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in the optimiser's order."""
        return {"logit_scale": self.logit_scale, **dict(self.head.named_parameters())}

    def state(self) -> dict[str, Tensor]:
        """Everything the next epoch depends on, besides configuration and data."""
        tensors = {"epoch": torch.tensor(self.epoch)}
        for name, parameter in self.parameters().items():
            tensors[f"parameter.{name}"] = parameter.detach()
            if parameter.grad is not None:  # a remainder of accumulated batches
                tensors[f"gradient.{name}"] = parameter.grad
            for field, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{field}.{name}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave; WorkError when a tensor is missing."""
        try:
            self.epoch = int(tensors["epoch"])
            for name, parameter in self.parameters().items():
                with torch.no_grad():
                    parameter.copy_(tensors[f"parameter.{name}"])
                gradient = tensors.get(f"gradient.{name}")
                parameter.grad = None if gradient is None else gradient.to(self.device)
                self.optimizer.state[parameter] = {
                    field: tensors[f"{field}.{name}"].to(self.device)
                    for field in ("step", "exp_avg", "exp_avg_sq")
                }
        except (KeyError, RuntimeError) as error:
            raise WorkError(
                f"the saved state does not fit this head ({error}): delete the run and train again"
            ) from error
        self.head.logit_scale.copy_(self.logit_scale.detach())


def draw_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator of one epoch's routing draws."""
    word = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def data_subsets(rows: Tensor, subsets: int, seed: int) -> Tensor:
    """The data subset of every sample: `rows` [B] int64 -> [B] int64 in 0..subsets-1.

    "subset" routing splits the samples of a data set into as many parts as there are experts, by a
    draw that depends on the seed and the sample's row alone: a sample is with the same expert
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
