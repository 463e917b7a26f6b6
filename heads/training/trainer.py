"""The loop of every training, from a store and end to end, on one process or many.

n = samples of this process's part of a batch, N = good samples of the whole batch, W = processes,
B = batch, T = frames, D = embedding width, C = classes.

The caller supplies what differs between the two: the source of batches and the losses of a batch.
A video that cannot be decoded makes its batch smaller: the loss of a step is the mean over the good
samples of all processes. Processes average gradients, so each weighs its own mean by n * W / N.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code (schedule, groups, draws).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from featstore.batches.loader import FeatureLoader
from featstore.errors import UserError, WorkError, counted, one_line
from featstore.files.durable import write_json
from featstore.progress import ProgressSink, no_progress
from heads.arithmetic import autocast, resolve_precision, scaler
from heads.files.run_files import NOT_FINITE_FILE, STATE_FILE, write_metrics
from heads.methods.head import Head
from heads.methods.registry import method
from heads.training.config import TrainConfig
from heads.training.ranks import Ranks, agreed
from heads.training.schedule import build_optimizer, data_subsets, draw_generator, learning_rates
from heads.training.state import Position, all_finite, in_shares, restore_state, save_state

log = logging.getLogger(__name__)

CHECKPOINT_EVERY_S: Final = 600.0
"""Seconds between checkpoints where no number of steps was asked for."""

LOOK_EVERY: Final = {"cpu": 1, "cuda": 10}
"""Steps between looks at the losses; a GPU waits for each look."""

_NAMED = 6  # keys of a bad batch in the message; the file has all


@dataclass(frozen=True)
class TrainingBatch:
    """This process's part of one batch; n may be 0 where videos could not be decoded."""

    inputs: Tensor
    """What the losses are computed from: features [n,T,D], or frames [n,T,3,s,s]."""
    labels: Tensor
    """[n] int64."""
    positions: Tensor
    """[n] int64, the position of each sample in the data set."""
    keys: tuple[str, ...] = ()
    """The samples' keys, if messages should name them."""
    failed: Sequence[tuple[str, str]] = ()
    """Key and reason of every video of the batch that could not be decoded."""
    waited: float = 0.0
    """Seconds spent waiting for the batch."""


Batches = Callable[[int, int], Generator[TrainingBatch, None, None]]
"""A function (epoch, step) that yields the batches of an epoch, beginning at a step."""


@dataclass
class _Step:
    """A step whose losses have not been looked at."""

    number: int
    keys: tuple[str, ...]
    losses: Tensor
    """[losses, the total first] float64, this process's share of the sums over samples."""


def batches_of(loader: FeatureLoader) -> Batches:
    """Return the batches of features that `loader` draws from a store."""

    def batches(epoch: int, start: int) -> Generator[TrainingBatch, None, None]:
        for batch in loader.epoch(epoch, start):
            yield TrainingBatch(batch.features, batch.labels, batch.rows)

    return batches


def require_trainable(head: Head, config: TrainConfig, steps_per_epoch: int) -> None:
    """Raise UserError if an epoch is shorter than an optimiser step or the head has no loss on."""
    if config.accumulation > steps_per_epoch:
        raise UserError(
            f"accumulation {config.accumulation} is more than the "
            f"{counted(steps_per_epoch, 'batch', 'batches')} of an epoch: lower the accumulation "
            "or the batch size"
        )
    head.check_loss_weights(config.loss_weights)


@dataclass
class Trainer:
    """Trains a model on batches; `position` holds the progress.

    The model must be on its device. Build it once per process, then `resume`, then `train`. Draws
    depend on (seed, epoch) only, so that an epoch repeats exactly from any state inside it.
    """

    model: nn.Module
    """The model trained together with `logit_scale`: the head, or the head with the tower."""
    head: Head
    logit_scale: nn.Parameter
    """Natural logarithm of the multiplier of cosines."""
    losses: Callable[[Tensor, Tensor, Tensor, Any, Tensor | None, float], Any]
    """(inputs, labels, class_embeddings, draw, subsets, weight) -> the losses of
    `Head.training_loss`, each times `weight`."""
    tower_parameters: list[nn.Parameter]
    """Parameters trained at the rate of tower and logit scale; already spread over processes."""
    config: TrainConfig
    steps_per_epoch: int
    precision: str
    class_embeddings: Tensor | None = None
    """[C,D]; None means the embeddings of the head's training classes."""
    ranks: Ranks = field(default_factory=Ranks)
    run_dir: Path = Path()
    batches: Batches | None = None
    n_listed: int = 0
    checkpoint_every: int | None = None
    """Steps between checkpoints inside an epoch; None means every ten minutes."""
    draw_seed: int | None = None
    """Seed of the draws; None means the seed of the recipe."""
    progress: ProgressSink = no_progress
    kept: bool = True
    """Whether state and records are written to `run_dir`."""
    finished: Callable[[Position], bool] = lambda position: False
    """A function that says, after an epoch, whether training stops early."""
    details: Callable[[Position], Mapping[str, Any]] = lambda position: {}
    """A function that gives what progress reports besides epoch and loss."""
    further: Mapping[str, Tensor] = field(default_factory=dict)
    """What the next step depends on besides the trained parameters, by its name in the state."""
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        require_trainable(self.head, self.config, self.steps_per_epoch)
        own = {"logit_scale": self.logit_scale, **dict(self.model.named_parameters())}
        classes = self.class_embeddings
        classes = self.head.training_class_embeddings.clone() if classes is None else classes
        self.classes = classes.to(self.ranks.device)
        self.parameters = {name: value for name, value in own.items() if value.requires_grad}
        self.optimizer = build_optimizer(self.head, self.tower_parameters, self.config)
        group = self.optimizer.param_groups[0]
        if any(map(in_shares, group["params"])):  # the logit scale is whole and needs its own group
            group["params"] = [p for p in group["params"] if p is not self.logit_scale]
            self.optimizer.add_param_group({**group, "params": [self.logit_scale]})
        self.scaler = scaler(self.precision, self.ranks.device)
        self.rates = learning_rates(self.config, self.steps_per_epoch)
        self.loss_names = method(self.head.config.kind).losses
        self.position.sums = [0.0] * (1 + len(self.loss_names))
        self.failures: list[tuple[str, str, str]] = []  # key, reason and split of each
        self.state_file = self.run_dir / STATE_FILE
        self._unseen: list[_Step] = []
        self._saved = (0, time.monotonic())
        self._changed = False  # since the state was written
        self._said = 0.0
        self._moment = time.perf_counter()  # when the step under way began

    @classmethod
    def on_features(
        cls,
        head: Head,
        config: TrainConfig,
        steps_per_epoch: int,
        *,
        device: torch.device | None = None,
        **more: Any,
    ) -> Trainer:
        """Make a trainer of one head on features [B,T,D], with the logit scale in group 0.

        `more` are further fields of the trainer.
        """
        device = device or torch.device("cpu")
        head = head.to(device)
        scale = nn.Parameter(head.logit_scale.detach().clone())

        def losses(
            features: Tensor,
            labels: Tensor,
            classes: Tensor,
            draw: Any,
            subsets: Any,
            weight: float,
        ) -> Any:
            labels = labels.to(device, non_blocking=True)
            terms = head.training_loss(
                features.to(scale.dtype), labels, classes, scale, draw, subsets, config.loss_weights
            )
            return terms._make(weight * term for term in terms)

        return cls(
            model=head,
            head=head,
            logit_scale=scale,
            losses=losses,
            tower_parameters=[scale],
            config=config,
            steps_per_epoch=steps_per_epoch,
            precision=resolve_precision(config.precision, head.config.dim, device),
            ranks=Ranks(device=device),
            **more,
        )

    @property
    def epochs_trained(self) -> int:
        """Epochs whose steps are all done."""
        return self.position.epoch + (self.position.step == self.steps_per_epoch)

    def resume(self) -> bool:
        """Continue from the saved state, if there is one; every process must call this.

        Raises WorkError when the state is damaged or does not fit.
        """
        if not self.ranks.only_first(self.state_file.is_file):
            return False
        with self.ranks.agreeing():
            self.position = restore_state(
                self.state_file, self.parameters, self.optimizer, self.scaler, self.further
            )
        self.position.sums = self.position.sums or [0.0] * (1 + len(self.loss_names))
        self.head.logit_scale.copy_(self.logit_scale.detach().reshape(()))
        self._saved = (self.position.step, time.monotonic())
        log.info(
            "continuing %s in epoch %d after step %d of %d",
            *(self.run_dir.name, self.position.epoch + 1, self.position.step, self.steps_per_epoch),
        )
        return True

    def train(self, after_epoch: Callable[[int], Mapping[str, Any]]) -> None:
        """Train the remaining epochs, or until `finished`; every process must call this.

        `after_epoch` is called with the number of epochs done and the model in evaluation mode;
        its return value is added to the epoch's record in metrics.jsonl. Errors as `run_epoch`.
        """
        while self.position.epoch < self.config.epochs and not self.finished(self.position):
            self.run_epoch()
            more = after_epoch(self.position.epoch + 1)
            self.position.metrics.append({**self._record(), **more})
            if self.kept:
                self.ranks.only_first(lambda: write_metrics(self.run_dir, self.position.metrics))
            self.next_epoch()

    def run_epoch(self) -> None:
        """Train the rest of the epoch and save the state; `next_epoch` closes the epoch.

        Raises WorkError when the loss stops being a number or no video can be decoded.
        """
        position, config = self.position, self.config
        seed = config.seed if self.draw_seed is None else self.draw_seed
        draws = draw_generator(seed, position.epoch)
        for _ in range(position.step):
            self.head.draw(draws)
        self.model.train()
        assert self.batches is not None
        with closing(self.batches(position.epoch, position.step)) as batches:
            self._moment = time.perf_counter()
            for batch in batches:
                due = self._train_on(batch, self.head.draw(draws))
                if due and position.step < self.steps_per_epoch:
                    self.save()
                    self._moment = time.perf_counter()  # it does not count as training
        self._look()
        self._report(last=True)
        if not position.samples:
            reasons = self.merged_failures()
            first = next(iter(reasons.values()), {"reason": "unknown"})["reason"]
            raise agreed(
                WorkError(
                    f"none of {counted(self.n_listed, 'training video')} could be decoded "
                    f"({one_line(first, 160)}): pack them again, or see the reasons in failures.csv"
                ),
                self.ranks.first,
            )
        if self._changed:
            self.save()
        self.model.eval()
        self.head.logit_scale.copy_(self.logit_scale.detach().reshape(()))

    def next_epoch(self) -> None:
        """Mark the epoch as done, including its evaluation."""
        self.position.next_epoch()
        self._saved = (0, self._saved[1])

    def _train_on(self, batch: TrainingBatch, draw: Any) -> bool:
        """Train on one batch; returns whether a checkpoint is due now."""
        position, config, ranks = self.position, self.config, self.ranks
        number, mine = position.step + 1, len(batch.labels)
        complete = number % config.accumulation == 0
        facts = [mine, len(batch.failed), self._checkpoint_due(number)]
        good, failed, due = ranks.summed(torch.tensor(facts, dtype=torch.int64)).tolist()
        subsets, count = None, self.head.data_subsets
        if count:
            subsets = data_subsets(batch.positions, count, config.seed).to(ranks.device)
        weight = mine * ranks.world_size / max(good, 1)
        with gradients_shared(self.losses, complete or number == self.steps_per_epoch):
            terms = self.step(batch.inputs, batch.labels, draw, subsets, weight)
        position.pending += good
        if complete:
            if position.pending:  # else weight decay would be all that a step does
                self.update(self.rates[position.epoch, number // config.accumulation - 1])
            self.optimizer.zero_grad(set_to_none=True)
            position.pending = 0
        losses = torch.stack(terms).detach().double() * (good / ranks.world_size)
        self._unseen.append(_Step(number, batch.keys, losses))
        self.failures += [(*failure, "train") for failure in batch.failed]
        self._changed = True
        position.step = number
        position.samples += good
        position.failed += failed
        position.waited += batch.waited
        now = time.perf_counter()
        position.seconds += now - self._moment
        self._moment = now
        if len(self._unseen) >= LOOK_EVERY[ranks.device.type]:
            self._look()
            self._report()
        return bool(due) and complete

    def step(
        self,
        inputs: Tensor,
        labels: Tensor,
        draw: Any,
        subsets: Tensor | None = None,
        weight: float = 1.0,
    ) -> Any:
        """Forward and backward of one batch; gradients add up until `update`.

        `draw` and `subsets` [B] as `Head.training_loss` takes them, whose losses are returned.
        """
        with autocast(self.precision, self.ranks.device):
            inputs = inputs.to(self.ranks.device, non_blocking=True)
            terms = self.losses(inputs, labels, self.classes, draw, subsets, weight)
        self.scaler.scale(terms.total / self.config.accumulation).backward()
        return terms

    def update(self, rates: Any) -> None:
        """One optimiser step at `rates` [2] of tower and head; clears the gradients."""
        tower, head = rates.tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = tower if group["tower"] else head
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _checkpoint_due(self, number: int) -> bool:
        """Whether the first process wants a checkpoint; the others follow."""
        if not self.ranks.first:
            return False
        step, moment = self._saved
        if self.checkpoint_every is not None:
            return number - step >= self.checkpoint_every
        return time.monotonic() - moment >= CHECKPOINT_EVERY_S

    def _look(self) -> None:
        """Add up the losses of the steps since the last look; WorkError if one is not finite."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        position = self.position
        rows = self.ranks.summed(torch.stack([step.losses for step in unseen]).cpu()).tolist()
        for step, row in zip(unseen, rows, strict=True):
            if not math.isfinite(row[0]):
                self._stop(step, f"the loss became {row[0] / max(position.samples, 1)}")
            # Add them one by one, so that the sum does not depend on how often this runs.
            position.sums = [total + value for total, value in zip(position.sums, row, strict=True)]

    def _stop(self, step: _Step, what: str) -> None:
        keys = [key for part in self.ranks.gathered(step.keys) for key in part]
        epoch = self.position.epoch + 1
        note = self.run_dir / NOT_FINITE_FILE
        if self.ranks.first:
            write_json(note, {"epoch": epoch, "step": step.number, "keys": keys})
        named = ", ".join(keys[:_NAMED])
        if len(keys) > _NAMED:
            named += f" and {len(keys) - _NAMED} more"
        videos = f", with the videos {named} (all in {note})" if keys else ""
        kept = "the last good checkpoint" if self.state_file.is_file() else "nothing"
        raise agreed(
            WorkError(
                f"{what} in epoch {epoch}, step {step.number}{videos}: {kept} is kept; lower --lr "
                f"(now {self.config.lr:g}) in a new run"
            ),
            self.ranks.first,
        )

    def save(self) -> None:
        """Write the state; WorkError if a weight is not finite. Every process must call this."""
        nothing = _Step(self.position.step, (), torch.zeros(0))
        last = self._unseen[-1] if self._unseen else nothing
        self._look()
        if not all_finite(self.parameters, self.ranks):
            self._stop(last, "a weight stopped being a number")
        self.merged_failures()
        if self.kept:
            save_state(
                *(self.state_file, self.parameters, self.optimizer, self.scaler),
                *(self.position, self.ranks, self.further),
            )
        self._saved = (self.position.step, time.monotonic())
        self._changed = False

    def merged_failures(self) -> dict[str, dict[str, Any]]:
        """Return the failures of all processes so far, by key; every process must call this."""
        new, self.failures = self.failures, []
        epoch = self.position.epoch + 1
        for part in self.ranks.gathered(new):
            for key, reason, split in part:
                known = self.position.failures
                known.setdefault(key, {"epoch": epoch, "split": split, "reason": reason})
        return self.position.failures

    def _report(self, last: bool = False) -> None:
        """Report progress at most ten times a second and at the end of an epoch."""
        now = time.monotonic()
        if not last and now - self._said < 0.1:
            return
        self._said = now
        position, steps = self.position, self.steps_per_epoch
        self.progress(
            position.epoch * steps + position.step,
            self.config.epochs * steps,
            epoch=position.epoch + 1,
            loss=round(position.sums[0] / max(position.samples, 1), 4),
            **self.details(position),
        )

    def _record(self) -> dict[str, Any]:
        """Return the entries of the epoch's line in metrics.jsonl that both modes have."""
        position = self.position
        means = [total / max(position.samples, 1) for total in position.sums]
        return {
            "epoch": position.epoch + 1,
            "loss": means[0],
            **{f"{name}_loss": v for name, v in zip(self.loss_names, means[1:], strict=True)},
            "lr": float(self.rates[position.epoch, -1, 1]),
            "logit_scale": math.exp(self.logit_scale.item()),
            "samples": position.samples,
            "seconds": position.seconds,
        }


@contextmanager
def gradients_shared(module: object, now: bool) -> Iterator[None]:
    """Average the gradients of the backward pass inside over the processes if `now`, else later."""
    if now or not isinstance(module, nn.parallel.DistributedDataParallel):
        yield  # sharded gradients are averaged at once: whole ones would need the memory saved
    else:
        with module.no_sync():
            yield
