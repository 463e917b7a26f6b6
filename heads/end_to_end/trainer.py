"""The steps of end-to-end training: one epoch over clips, on one process or many.

n = samples of this process's part of a batch, N = good samples of the whole batch, W = processes,
T = frames, C = classes.

A video that cannot be decoded leaves its batch smaller: the loss of a step is the mean over the
good samples of all processes. They average gradients, so each weighs its own mean by n * W / N.

Source: MoTE (Zhu et al., NeurIPS 2024) and its released code (schedule, groups, draws).
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from featstore.errors import WorkError, one_line
from featstore.files.durable import write_json
from featstore.files.machine import peak_rss_mb
from featstore.progress import ProgressSink
from heads.arithmetic import autocast, scaler
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.model import EndToEndModel, TrainingStep
from heads.end_to_end.sharding import gradients_shared, spread
from heads.end_to_end.state import Position, all_finite, save_state
from heads.files.run_files import NOT_FINITE_FILE
from heads.methods.registry import method
from heads.training.ranks import Ranks, agreed
from heads.training.schedule import build_optimizer, data_subsets, draw_generator, learning_rates
from pipeline.video_clips.loader import ClipBatch, ClipFailure
from pipeline.video_clips.stream import ClipStream

log = logging.getLogger(__name__)

CHECKPOINT_EVERY_S: Final = 600.0
"""Seconds between checkpoints where no number of steps was asked for."""

LOOK_EVERY: Final = {"cpu": 1, "cuda": 10}
"""Steps between looks at the losses; a GPU waits for each look."""

_NAMED = 6  # keys of a bad batch in the message; the file has all


@dataclass
class _Step:
    """A step whose losses have not been looked at."""

    number: int
    keys: tuple[str, ...]
    losses: Tensor
    """[losses, the total first] float64, this process's share of the sums over samples."""


@dataclass
class Finetuner:
    """Trains a model on a stream of clips; `position` says how far it is.

    The model must be on its device. Build it once per process, then `restore`, then epochs.
    """

    model: EndToEndModel
    config: FinetuneConfig
    clips: ClipStream
    class_embeddings: Tensor
    """[C,D] on the model's device."""
    precision: str
    ranks: Ranks
    shard: bool
    state_file: Path
    checkpoint_every: int | None = None
    progress: ProgressSink | None = None
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        """Spread the model, build optimiser and schedule."""
        config, steps = self.config, self.clips.steps_per_epoch
        step = TrainingStep(self.model, **config.loss_weights)
        self.module: nn.Module = spread(step, self.ranks, self.shard)
        self.optimizer = _optimizer(self.model, config, self.shard)
        self.scaler = scaler(self.precision, self.ranks.device)
        self.rates = learning_rates(config, steps)
        self.losses = method(self.model.head.config.kind).losses
        self.position.sums = self.position.sums or [0.0] * (1 + len(self.losses))
        self.failures: list[tuple[ClipFailure, str]] = []
        self._unseen: list[_Step] = []
        self._saved = (self.position.step, time.monotonic())
        self._changed = False  # since the state was written
        self._said = 0.0
        self._moment = time.perf_counter()  # when the step under way began

    def restored(self, position: Position) -> None:
        """Continue from `position`, to which the weights belong."""
        self.position = position
        self._saved = (position.step, time.monotonic())

    def run_epoch(self) -> None:
        """Train what is left of the epoch and save the state; the epoch is not closed yet.

        Raises WorkError when the loss stops being a number or no video can be decoded.
        """
        position, config = self.position, self.config
        steps = self.clips.steps_per_epoch
        seed = config.seed + (self.ranks.rank if config.draws == "per-rank" else 0)
        draws = draw_generator(seed, position.epoch)
        head = self.model.head
        for _ in range(position.step):
            head.draw(draws)
        self.model.train()
        with closing(self.clips.epoch(position.epoch, position.step)) as batches:
            self._moment = time.perf_counter()
            for batch in batches:
                due = self._step(batch, head.draw(draws))
                if due and position.step < steps:
                    self.save()
                    self._moment = time.perf_counter()  # it does not count as training
        self._look()
        if not position.samples:
            reasons = self.merged_failures()
            first = next(iter(reasons.values()), {"reason": "unknown"})["reason"]
            raise agreed(
                WorkError(
                    f"none of the {self.clips.n_listed} training videos could be decoded "
                    f"({one_line(first, 160)}): pack them again, or see the reasons in failures.csv"
                ),
                self.ranks.first,
            )
        if self._changed:
            self.save()
        self.model.eval()

    def next_epoch(self) -> None:
        """The epoch is done, its evaluation included."""
        self.position.next_epoch()
        self._saved = (0, self._saved[1])

    def _step(self, batch: ClipBatch, draw: Any) -> bool:
        """Train on one batch; returns whether a checkpoint is due now."""
        position, config, ranks = self.position, self.config, self.ranks
        number = position.step + 1
        complete = number % config.accumulation == 0
        facts = [len(batch.keys), len(batch.failed), self._checkpoint_due(number)]
        good, failed, due = ranks.summed(torch.tensor(facts, dtype=torch.int64)).tolist()
        terms = self._backward(batch, draw, good, complete or number == self.clips.steps_per_epoch)
        position.pending += good
        if complete:
            if position.pending:  # else weight decay would be all that a step does
                self._update(number // config.accumulation - 1)
            self.optimizer.zero_grad(set_to_none=True)
            position.pending = 0
        losses = torch.stack(terms).detach().double() * (good / ranks.world_size)
        self._unseen.append(_Step(number, batch.keys, losses))
        self.failures += [(failure, "train") for failure in batch.failed]
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
        return bool(due) and complete

    def _backward(self, batch: ClipBatch, draw: Any, good: int, share: bool) -> Any:
        device, config = self.ranks.device, self.config
        subsets, count = None, self.model.head.data_subsets
        if count:
            subsets = data_subsets(batch.positions, count, config.seed).to(device)
        weight = len(batch.keys) * self.ranks.world_size / max(good, 1)
        with gradients_shared(self.module, share):
            with autocast(self.precision, device):
                frames = batch.frames.to(device, non_blocking=True)
                terms = self.module(
                    frames, batch.labels, self.class_embeddings, draw, subsets, weight
                )
            self.scaler.scale(terms.total / config.accumulation).backward()
        return terms

    def _update(self, step: int) -> None:
        tower, head = self.rates[self.position.epoch, step].tolist()
        for group, rate in zip(self.optimizer.param_groups, (tower, head, tower), strict=False):
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _checkpoint_due(self, number: int) -> bool:
        """Whether the first process wants a checkpoint; the others follow."""
        if not self.ranks.first:
            return False
        step, moment = self._saved
        if self.checkpoint_every is not None:
            return number - step >= self.checkpoint_every
        return time.monotonic() - moment >= CHECKPOINT_EVERY_S

    def _look(self) -> None:
        """Add up the losses of the steps since the last look; WorkError when one is no number."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        position = self.position
        rows = self.ranks.summed(torch.stack([step.losses for step in unseen]).cpu()).tolist()
        for step, row in zip(unseen, rows, strict=True):
            if not math.isfinite(row[0]):
                self._stop(step, f"the loss became {row[0] / max(position.samples, 1)}")
            # One by one: the sum must not depend on how often one looks.
            position.sums = [total + value for total, value in zip(position.sums, row, strict=True)]
        self._report()

    def _stop(self, step: _Step, what: str) -> None:
        keys = [key for part in self.ranks.gathered(step.keys) for key in part]
        epoch = self.position.epoch + 1
        note = self.state_file.parent.parent / NOT_FINITE_FILE
        if self.ranks.first:
            write_json(note, {"epoch": epoch, "step": step.number, "keys": keys})
        named = ", ".join(keys[:_NAMED])
        if len(keys) > _NAMED:
            named += f" and {len(keys) - _NAMED} more"
        kept = "the last good checkpoint" if self.state_file.is_file() else "nothing"
        raise agreed(
            WorkError(
                f"{what} in epoch {epoch}, step {step.number}, with the videos {named or 'none'} "
                f"(all in {note}): {kept} is kept; lower --lr (now {self.config.lr:g}) in a new run"
            ),
            self.ranks.first,
        )

    def save(self) -> None:
        """Write the state, unless a weight is no number (WorkError); every process comes here."""
        last = (
            self._unseen[-1]
            if self._unseen
            else _Step(self.position.step, (), torch.zeros(1 + len(self.losses)))
        )
        self._look()
        if not all_finite(self.model, self.ranks):
            self._stop(last, "a weight stopped being a number")
        self.merged_failures()
        save_state(
            self.state_file, self.model, self.optimizer, self.scaler, self.position, self.ranks
        )
        self._saved = (self.position.step, time.monotonic())
        self._changed = False

    def merged_failures(self) -> dict[str, dict[str, Any]]:
        """All failures so far, of all processes, by key; every process comes here."""
        new, self.failures = self.failures, []
        epoch = self.position.epoch + 1
        for part in self.ranks.gathered([(f.key, f.reason, split) for f, split in new]):
            for key, reason, split in part:
                known = self.position.failures
                known.setdefault(key, {"epoch": epoch, "split": split, "reason": reason})
        return self.position.failures

    def _report(self) -> None:
        """Tell the progress sink, at most ten times a second."""
        now = time.monotonic()
        if self.progress is None or now - self._said < 0.1:
            return
        self._said = now
        position, steps = self.position, self.clips.steps_per_epoch
        seconds = max(position.seconds, 1e-9)
        failed = {"failed": position.failed} if position.failed else {}
        self.progress(
            position.epoch * steps + position.step,
            self.config.epochs * steps,
            epoch=position.epoch + 1,
            loss=round(position.sums[0] / max(position.samples, 1), 4),
            clips_per_second=round(position.samples / seconds, 2),
            waiting=f"{position.waited / seconds:.0%}",
            memory=memory_words(self.ranks.device),
            **failed,
        )

    def record(
        self, evaluation: dict[str, Any] | None, evaluation_seconds: float
    ) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl; every process comes here."""
        position, samples = self.position, max(self.position.samples, 1)
        means = [total / samples for total in position.sums]
        rates = self.rates[position.epoch, -1].tolist()
        seconds = max(position.seconds, 1e-9)
        left = self.config.epochs - position.epoch - 1
        waited = self.ranks.largest(position.waited / seconds)
        return {
            "epoch": position.epoch + 1,
            "loss": means[0],
            **{f"{name}_loss": v for name, v in zip(self.losses, means[1:], strict=True)},
            "tower_lr": rates[0],
            "lr": rates[1],
            "logit_scale": math.exp(self.model.logit_scale.item()),
            "samples": position.samples,
            "failed": position.failed,
            "seconds": position.seconds,
            "clips_per_second": position.samples / seconds,
            "waiting": waited,
            "peak_rss_mb": round(self.ranks.largest(peak_rss_mb()), 1),
            "peak_gpu_mb": self._peak_gpu_mb(),
            "seconds_left": round(left * (position.seconds + evaluation_seconds), 1),
            "evaluation": evaluation,
        }

    def _peak_gpu_mb(self) -> float | None:
        if self.ranks.device.type != "cuda":
            return None
        return round(self.ranks.largest(_gpu_mb(self.ranks.device)), 1)


def memory_words(device: torch.device) -> str:
    """The most memory this process has held so far, in words."""
    words = f"{peak_rss_mb() / 1000:.1f} GB"
    return words if device.type != "cuda" else f"{words}, GPU {_gpu_mb(device) / 1000:.1f} GB"


def _gpu_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e6


def _optimizer(model: EndToEndModel, config: FinetuneConfig, shard: bool) -> torch.optim.AdamW:
    """AdamW over tower and head; the whole logit scale cannot share a group with shares."""
    optimizer = build_optimizer(model.head, model.tower_parameters(), config)
    group = optimizer.param_groups[0]
    if shard and len(group["params"]) > 1:
        group["params"] = [p for p in group["params"] if p is not model.logit_scale]
        optimizer.add_param_group({**group, "params": [model.logit_scale]})
    return optimizer
