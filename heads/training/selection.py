"""Which epoch of a training is kept, when it stops early, and what was gained at its end.

n = training videos, m = validation videos, V = views, F = stored frames, T = frames of a view,
D = embedding width, C = classes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.balance import class_counts
from featstore.batches.loader import FeatureLoader, resident
from featstore.files.durable import write_bytes, write_json
from featstore.format.schema import RowArray
from featstore.progress import ProgressSink
from featstore.reading.store import Store
from featstore.segments import segment_positions
from featstore.workspace import LAST_EPOCH
from heads.compatibility import mean_head
from heads.files.head_file import load_tensors, save_head, save_tensors
from heads.files.run_files import (
    BEST_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    KEYS_FILE,
    METRICS_FILE,
    PART_FILE,
    VALIDATION_FILE,
)
from heads.methods.head import Head
from heads.methods.registry import method
from heads.training.baselines import baseline_accuracies
from heads.training.config import TrainConfig
from heads.training.judged import Judgement
from heads.training.state import Position, restore_best, save_best
from heads.training.trainer import Trainer, batches_of
from heads.training.training_set import renumbered
from heads.training.validation import (
    CROSS,
    PARTS,
    Judge,
    Validation,
    as_frames,
    judged_features,
)

log = logging.getLogger(__name__)

MOST_IN_BASELINES: Final = 20_000
"""Training videos that the cheap baselines are fitted to at most; evenly chosen from more."""
_TOO_BAD: Final = 2.0  # standard errors
_ENOUGH: Final = 4  # videos of the usual class, from which a cross-validation may choose


def won(head: Judgement, base: Judgement) -> tuple[float, float]:
    """Return how many more of the same m videos `head` did well than `base`, and its chance error.

    Both are judgements of one kind (`Judgement.won`).
    """
    return head.won(base)


def clearly_above(quality: float, head: Judgement) -> bool:
    """Return whether `quality` in per cent is above a head's by more than two standard errors."""
    share = min(max(quality / 100, 0.0), 1.0)
    error = 100 * math.sqrt(max(share * (1 - share), 1 / head.videos) / head.videos)
    return quality - head.quality > 2 * error + 1e-6  # not where they are equal


def shrunk(head: Head, share: float) -> Head:
    """Return the head that is kept of `head`: itself, or a copy without `share` of what it adds."""
    if share:
        head = copy.deepcopy(head)
        head.shrink(share)
    return head


@dataclass
class Selection:
    """Follows one training on its validation videos."""

    validation: Validation
    training: TrainConfig
    run_dir: Path
    untrained: Head
    """Epoch 0: the head that training starts from or, for a new head, one that changes nothing."""
    start: Judgement
    """How `untrained` did."""
    no_head: Judgement
    """How CLIP's mean of frames did."""
    judge: Callable[[int, Head], Judgement]
    """A function of the number of epochs done and the head."""
    baselines: Callable[[], dict[str, float]]
    """Fits the cheap baselines; returns their accuracies in per cent."""
    parts: int = 0
    """Parts of a cross-validation."""
    tells: bool = True
    """Whether it can tell a better epoch from a worse one; then it chooses."""

    def measured(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        """Judge the head after `epoch` epochs and keep the best; return entries for the record."""
        found, position = self.judge(epoch, trainer.head), trainer.position
        best = position.best
        if self.training.keep_best and (
            best is None or (found.quality, -found.loss) > (best[found.measure], -best["loss"])
        ):
            more, error = won(found, self.start)
            position.best = {"epoch": epoch, found.measure: found.quality, "loss": found.loss}
            position.best |= {"won": more, "error": error}
            save_best(self.run_dir / BEST_FILE, trainer.parameters, epoch, trainer.ranks)
        log.info(
            "epoch %d of %d: loss %.3f, validation %.1f %% (no head %.1f %%)",
            *(epoch, self.training.epochs, position.sums[0] / max(position.samples, 1)),
            *(found.quality, self.no_head.quality),
        )
        entries = {found.measure: found.quality, "loss": found.loss}
        return {"validation": entries | {"no_head": self.no_head.quality}}

    def finished(self, position: Position) -> bool:
        """Return whether accuracy and loss have not improved for `patience` epochs.

        After a cross-validation all epochs are trained: it has looked at all of them already.
        """
        if self.parts or not self.training.patience:
            return False
        seen = [(0, self.start.quality, self.start.loss)]
        for record in position.metrics:
            found = record["validation"]
            seen.append((record["epoch"], found[self.start.measure], found["loss"]))
        highest = max(seen, key=lambda entry: entry[1])[0]
        lowest = min(seen, key=lambda entry: entry[2])[0]
        return position.epoch - max(highest, lowest) >= self.training.patience

    def close(self, model: Head, trainer: Trainer | None) -> Head:
        """Return the head to keep at the end; write what was gained, and the last epoch if kept.

        `trainer` is None for a head that was not trained in epochs.
        """
        metrics = [] if trainer is None else trainer.position.metrics
        last = self.judge(len(metrics), model)
        share = self.training.shrinkage
        kept, epoch, found = shrunk(model, share), len(metrics), last
        best = None if trainer is None else trainer.position.best
        if trainer is not None and best is not None:
            self._save_last_epoch(kept)
            epoch = self._kept_epoch(best, last, len(metrics))
            if epoch == 0:
                kept, found = self.untrained, self.start
            elif epoch == best["epoch"]:
                restore_best(self.run_dir / BEST_FILE, trainer.parameters, epoch)
                model.logit_scale.copy_(trainer.logit_scale.detach().reshape(()))
                kept, found = shrunk(model, share), self.judge(epoch, model.eval())
        baselines = self.baselines()
        gained = {
            "source": self.validation.source,
            "videos": self.validation.words,
            "n_listed": self.validation.n_listed,
            "n_failed": self.validation.n_failed,
            "n_judged": found.videos,
            "kept_epoch": None if trainer is None else epoch,
            found.measure: found.quality,
            f"last_{found.measure}": last.quality,
            "no_head": self.no_head.quality,
            "baselines": baselines,
        }
        learnt = won(found, self.no_head)[0] > 0
        advice = "" if learnt or trainer is None else self._advice(metrics)
        if advice and not self.tells and epoch:
            log.warning(
                "whether anything was learnt is unknown: cross-validated heads lack half of such "
                "small classes (%.1f %% of %d videos, no head %.1f %%); the head of all is kept; "
                "to know more, %s",
                *(found.quality, found.videos, self.no_head.quality, advice),
            )
        elif advice:
            log.warning(
                "nothing was learnt: no head is as good (%.1f %% of %d videos)%s; %s",
                *(self.no_head.quality, found.videos),
                *("" if epoch else ", and the head kept answers like none", advice),
            )
        simpler = max(baselines, key=baselines.__getitem__, default="")
        if trainer is not None and simpler and clearly_above(baselines[simpler], found):
            log.warning(
                "--head %s (%s) does better on the same features: %.1f %% against %.1f %%; it "
                "names only the classes that it was trained on",
                *(simpler, method(simpler).title, baselines[simpler], found.quality),
            )
        write_json(self.run_dir / VALIDATION_FILE, gained | {"learnt": learnt, "advice": advice})
        return kept

    def _kept_epoch(self, best: Mapping[str, Any], last: Judgement, epochs: int) -> int:
        """Return the epoch to keep: the best, the last of `epochs`, or 0 for the untrained head."""
        if not self.parts:
            return int(best["epoch"]) if best["won"] > 0 else 0
        # Each head of a cross-validation lacks videos of just the classes it is asked for. With two
        # or three videos a class it did worse than no head where training on all gave 6 points
        # more, so it has no say there, and its best epoch is often best by chance: only what is
        # clear counts.
        if not self.tells:
            return epochs
        found = self.judge(best["epoch"], self.untrained)  # it looks at the epoch alone
        more, error = won(found, last)
        kept, seen = (best["epoch"], found) if more > error else (epochs, last)
        more, error = won(seen, self.start)
        return kept if more >= -_TOO_BAD * error else 0

    def _save_last_epoch(self, model: Head) -> None:
        """Keep the last epoch as a head of its own, with the records that belong to it."""
        folder = self.run_dir / LAST_EPOCH
        for name in (CONFIG_FILE, KEYS_FILE, METRICS_FILE):
            write_bytes(folder / name, (self.run_dir / name).read_bytes())
        save_head(model, folder / HEAD_FILE)

    def _advice(self, metrics: list[dict[str, Any]]) -> str:
        """Return the option that would change a training that did not help."""
        losses = [record["loss"] for record in metrics]
        half = (len(losses) + 1) // 2  # a single epoch depends much on its random draws
        early, late = sum(losses[:half]), sum(losses[-half:])
        lr, epochs = self.training.lr, self.training.epochs
        if self.training.shrinkage == 1:
            return "add a second video of each class, or keep what was learnt with --shrinkage 0"
        if not self.training.keep_best:
            return "--recipe auto fits rate, batch and epochs to these videos"
        if late > 0.8 * early:
            return f"the loss hardly fell: raise --lr (now {lr:.2g}) or --epochs (now {epochs})"
        if not self.tells:
            return "add videos of each class, or test on videos that no training saw"
        return "the training videos were learnt, others were not: add videos, or try --layers 1"


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a training has before its first step."""

    model: Head
    continues: bool
    """Whether the model has the weights of an earlier head."""
    store: Store
    rows: RowArray
    """[n] array rows trained on."""
    labels: RowArray
    """[n] indices into the model's training classes."""
    classes: npt.ArrayLike | None
    """Label ids of the training classes in their order, None for all."""
    training: TrainConfig
    repeats: int
    run_dir: Path
    device: torch.device
    precision: str

    def judge(self, features: Tensor, labels: Tensor) -> Judge:
        """Return a judge on the features [m,V,T,D] and labels [m] of videos."""
        origin = self.model.origin
        names = None if origin is None else origin.class_names
        texts = self.model.training_class_embeddings.clone()
        return Judge(features, labels, texts, names, self.precision)

    def baselines(self, known: Tensor, labels: RowArray, judge: Judge) -> dict[str, float]:
        """Fit the cheap baselines to features [n,V,T,D]; return their accuracies in per cent."""
        before = logging.root.manager.disable
        logging.disable(max(before, logging.INFO))  # what they chose matters for `--head` only
        try:
            return baseline_accuracies(
                *(as_frames(known), labels, as_frames(judge.features), judge.labels, judge.classes),
                logit_scale=float(self.model.logit_scale.exp()),
            )
        finally:
            logging.disable(before)


def begin_selection(validation: Validation, start: Beginning, progress: ProgressSink) -> Selection:
    """Load the validation videos, cross-validate if that is the way, and judge epoch 0.

    A cross-validation that was stopped continues with the first unfinished part.
    """
    model, frames = start.model, start.training.frames
    if validation.source == CROSS:
        judge, judge_epoch, baselines, parts = _cross_validated(validation, start, progress)
    else:
        features, rows = judged_features(validation.store, validation.rows, frames)
        labels = renumbered(validation.store, rows, start.classes)
        judge, parts = start.judge(features, torch.from_numpy(labels)), 0

        def judge_epoch(epoch: int, head: Head) -> Judgement:
            return judge(shrunk(head, start.training.shrinkage))

        def baselines() -> dict[str, float]:
            some = segment_positions(len(start.rows), min(len(start.rows), MOST_IN_BASELINES))
            known, kept = judged_features(start.store, start.rows[some], frames)
            of = start.labels[np.isin(start.rows, kept)]
            return start.baselines(known, of, judge)

    counts = class_counts(start.labels, len(model.training_class_embeddings))
    usual = float(np.median(counts[counts > 0]))  # videos of a class
    mean = mean_head(model.config.dim, float(model.logit_scale.exp()))
    untrained = copy.deepcopy(model) if method(model.config.kind).in_epochs else mean
    if model.logit_bias is not None:
        mean.take_several_classes(model.logit_bias.item())
    if not start.continues:
        untrained.shrink(1)
    return Selection(
        *(validation, start.training, start.run_dir, untrained, judge(untrained), judge(mean)),
        *(judge_epoch, baselines, parts),
        tells=not parts or start.continues or usual >= _ENOUGH,
    )


def _cross_validated(
    validation: Validation, start: Beginning, progress: ProgressSink
) -> tuple[Judge, Callable[[int, Head], Judgement], Callable[[], dict[str, float]], int]:
    """Train a head for each part on the other parts, and judge all its epochs on the part.

    Returns a judge on the videos of all parts, the judgement by epoch, the baselines and the number
    of parts.
    """
    rows, labels, training = start.rows, start.labels, start.training
    features = resident(start.store, rows)
    shown = features[:, :, segment_positions(start.store.schema.frames, training.frames)]
    truth, parts = torch.from_numpy(labels), validation.parts
    assert parts is not None
    assert len(parts) == len(rows)
    members = [found for part in range(PARTS) if len(found := np.flatnonzero(parts == part))]
    judges = [start.judge(shown[held], truth[held]) for held in members]
    rests = [np.setdiff1d(np.arange(len(rows)), held) for held in members]

    def curve(number: int) -> list[Judgement]:
        rest = rests[number]
        loader = FeatureLoader(
            features[rest],
            labels[rest],
            batch_size=training.batch_size,
            frames=training.frames,
            seed=training.seed,
            rows=rows[rest],
            repeats=start.repeats,
            balanced=bool(training.class_sampling),
        )

        def report(done: float, total: float, **details: float | int | str) -> None:
            whole = (len(members) + 1) * total
            progress(done + number * total, whole, part=f"{number + 1}/{len(members)}", **details)

        file = start.run_dir / PART_FILE.format(number + 1)
        model = copy.deepcopy(start.model)
        return _curve(file, model, judges[number], loader, training, start.device, report)

    curves = [curve(number) for number in range(len(members))]
    by_epoch = [Judgement.joined(epoch) for epoch in zip(*curves, strict=True)]

    def baselines() -> dict[str, float]:
        total: dict[str, float] = {}
        for rest, judge in zip(rests, judges, strict=True):
            share = len(judge.labels) / len(whole.labels)
            for name, top1 in start.baselines(shown[rest], labels[rest], judge).items():
                total[name] = total.get(name, 0.0) + share * top1
        return total

    order = np.concatenate(members)
    whole = start.judge(shown[order], truth[order])
    return whole, lambda epoch, head: by_epoch[epoch], baselines, len(members)


def _curve(
    file: Path,
    head: Head,
    judge: Judge,
    loader: FeatureLoader,
    training: TrainConfig,
    device: torch.device,
    progress: ProgressSink,
) -> list[Judgement]:
    """Train `head` on what `loader` gives, judged after 0, 1, ... epochs; `file` keeps that."""
    if file.is_file():
        tensors, _ = load_tensors(file)
        return Judgement.from_tensors(tensors)
    trainer = Trainer.on_features(
        head,
        training,
        len(loader),
        device=device,
        run_dir=file.parents[1],
        batches=batches_of(loader),
        progress=progress,
        kept=False,
    )

    def after_epoch(epoch: int) -> dict[str, Any]:
        judged.append(judge(shrunk(head, training.shrinkage)))
        return {}

    judged: list[Judgement] = []
    after_epoch(0)

    trainer.train(after_epoch)
    save_tensors(file, Judgement.to_tensors(judged), {})
    return judged
