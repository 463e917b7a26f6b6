"""One head trained from batches of features: steps, epochs, and the state between them.

B = batch, T = frames, D = embedding width, S = training classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featstore.errors import UserError, WorkError
from heads.arithmetic import autocast, resolve_precision
from heads.methods.head import Head
from heads.methods.registry import method
from heads.training.config import TrainConfig
from heads.training.schedule import build_optimizer, data_subsets, draw_generator, learning_rates


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
        head: Head,
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
        head.check_loss_weights(config.loss_weights)
        if config.accumulation > steps_per_epoch:
            raise UserError(
                f"accumulation {config.accumulation} is more than the {steps_per_epoch} batches "
                "of an epoch: lower the accumulation or the batch size"
            )
        self.device = device or torch.device("cpu")
        self.head = head.to(self.device)
        self.config = config
        self.losses = method(head.config.kind).losses
        self.precision = resolve_precision(config.precision, head.config.dim, self.device)
        classes = head.training_class_embeddings if class_embeddings is None else class_embeddings
        self.class_embeddings = classes.to(self.device)
        self.logit_scale = nn.Parameter(head.logit_scale.detach().clone())
        self.optimizer = build_optimizer(head, [self.logit_scale], config)
        self.rates = learning_rates(config, steps_per_epoch)
        self.epoch = 0
        """Epochs done."""

    def step(
        self, features: Tensor, labels: Tensor, draw: Any, subsets: Tensor | None = None
    ) -> Any:
        """Forward and backward of one batch; gradients add up until `update`.

        `draw` and `subsets` [B] as `Head.training_loss` takes them, whose losses are returned.
        """
        config = self.config
        with autocast(self.precision, self.device):
            terms = self.head.training_loss(
                features,
                labels,
                self.class_embeddings,
                self.logit_scale,
                draw,
                subsets,
                config.loss_weights,
            )
        (terms.total / config.accumulation).backward()
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
        sums = torch.zeros(1 + len(self.losses), dtype=torch.float64, device=self.device)
        samples, done, began = 0, 0, time.perf_counter()
        rates = self.rates[self.epoch]
        report_every = 1 if self.device.type == "cpu" else 10  # a GPU waits for each look
        for done, batch in enumerate(batches, start=1):
            features = batch.features.to(self.device, torch.float32, non_blocking=True)
            labels = batch.labels.to(self.device, non_blocking=True)
            terms = self.step(features, labels, self.head.draw(draws), self._subsets(batch))
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
        means = (sums / samples).tolist()
        self.epoch += 1
        self.head.eval()
        self.head.logit_scale.copy_(self.logit_scale.detach())
        return {
            "epoch": self.epoch,
            "loss": means[0],
            **{f"{name}_loss": v for name, v in zip(self.losses, means[1:], strict=True)},
            "lr": float(rates[-1, 1]),
            "logit_scale": math.exp(self.logit_scale.item()),
            "samples": samples,
            "samples_per_second": samples / seconds,
            "seconds": seconds,
        }

    def _subsets(self, batch: TrainingBatch) -> Tensor | None:
        count = self.head.data_subsets
        return data_subsets(batch.rows, count, self.config.seed).to(self.device) if count else None

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
