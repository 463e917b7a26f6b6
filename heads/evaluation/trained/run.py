"""Protocols that train before they test: few-shot, and base to novel classes.

Each training is a run of its own under heads/ and continues where it stopped. The reported number
comes from the last epoch. X-CLIP, ViFi-CLIP and MSTA report the epoch that is best on the test set.
That epoch is measured too, with a label that says so, because choosing it uses the answers.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from featstore.files.documents import found_object
from featstore.files.durable import write_json
from featstore.reading.store import Store
from heads.evaluation.protocols.protocol import TestSet
from heads.evaluation.results import EvalResult, RunFacts, run_facts
from heads.files.head_file import load_head, save_head
from heads.files.run_files import CONFIG_FILE, read_metrics
from heads.methods.head import Head
from heads.methods.registry import method
from heads.methods.settings import MethodConfig
from heads.training.config import TrainConfig
from heads.training.train_head import train_head
from heads.training.training_set import TrainingSet
from pipeline.annotations.known_sets import known_dataset

log = logging.getLogger(__name__)

LAST: Final = "last"
BEST: Final = "best on the test set"
BEST_HEAD: Final = "best-on-test.safetensors"
BEST_NOTE: Final = "best-on-test.json"
TEST_TOP1: Final = "test_top1"

SHOTS: Final = {"fewshot": (2, 4, 8, 16), "base-to-novel": (16,)}
DRAW_SEEDS: Final = {"fewshot": (1,), "base-to-novel": (1, 2, 3)}
_EPOCHS: Final = {"fewshot": 10, "base-to-novel": 11, ("fewshot", "ssv2"): 2}
"""The epochs unless a recipe or a user sets them. For few-shot they are MoTE's, where the training
set is repeated to the size of the full one. For base-to-novel they are ViFi-CLIP's, which takes the
shots once per epoch; here they are repeated too, as a new head learns nothing in thirty steps."""

Evaluate = Callable[[Head, Sequence[TestSet], RunFacts, str], EvalResult]
"""Tests a head on test sets; the other arguments are the facts and the name of its run."""


def usual_epochs(kind: str, dataset: str) -> int:
    """Return the epochs of a `kind` of protocol on a data set if no recipe or user sets them."""
    return _EPOCHS.get((kind, known_dataset(dataset)), _EPOCHS[kind])


@dataclass(frozen=True)
class ShotRun:
    """One training run: its training videos and the test sets of its head."""

    run_dir: Path
    shots: int
    draw: int
    """The seed of the draw, or the number of the published list."""
    train: TrainingSet
    tests: tuple[TestSet, ...]
    overlap: int = 0
    """How many tested videos are also training videos."""
    copied: int = 0
    """How many of these have the bytes of a training video, under another key."""


@dataclass(frozen=True)
class ShotOutcome:
    """The results of a run; `best` is None if the best epoch was not wanted or is not known.

    `in_training` is the best epoch by the evaluations of a fine-tuning, with its epoch, split and
    measure; None for other runs and without such evaluations.
    """

    run: ShotRun
    n_trained: int
    last: EvalResult
    best: EvalResult | None
    in_training: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as strict JSON values."""
        return {
            "run": self.run.run_dir.name,
            "shots": self.run.shots,
            "draw": self.run.draw,
            "trained_on": self.run.train.words,
            "n_trained": self.n_trained,
            "last": self.last.to_json(),
            "best": None if self.best is None else self.best.to_json(),
            **({} if self.in_training is None else {"best_in_training": dict(self.in_training)}),
        }


def train_and_test(
    run: ShotRun,
    store: Store,
    head: MethodConfig,
    training: TrainConfig,
    *,
    evaluate: Evaluate,
    best_epoch: bool = True,
    **options: Any,
) -> ShotOutcome:
    """Train `run` from `store` or continue it, unless it is finished; then test its last epoch.

    With `best_epoch` every epoch is tested, and the head of the best epoch (by mean top-1 of the
    test sets; the earliest of equal epochs) is kept as best-on-test.safetensors. `options` are
    passed on to `train_head`. Raises the errors of `train_head` and of `evaluate`.
    """
    watch = _BestEpoch(run, evaluate) if best_epoch else None
    summary = train_head(
        store,
        run.run_dir,
        head,
        training,
        rows=run.train.rows,
        classes=run.train.classes,
        trained_on=run.train.words,
        repeats=run.train.repeats,
        after_epoch=watch,
        resume=(run.run_dir / CONFIG_FILE).is_file(),
        **options,
    )
    name = run.run_dir.name
    trained = load_head(run.run_dir)
    last = evaluate(trained, run.tests, run_facts(run.run_dir), name)
    best = None
    if watch is not None and method(head.kind).trains:
        found = watch.found(summary.epochs)
        if found is None:
            log.warning(
                "%s was trained without a test after every epoch: its best epoch is not known", name
            )
        else:
            chosen = trained if found == summary.epochs else load_head(run.run_dir / BEST_HEAD)
            facts = run_facts(run.run_dir, epoch=found, epoch_choice=BEST)
            with _no_warnings():
                best = evaluate(chosen, run.tests, facts, name)
    return ShotOutcome(run, summary.n_trained, last, best)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence warnings of repeated tests; the test of the last epoch logs the same ones."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class _BestEpoch:
    """Tests the head after every epoch and keeps the best one so far, even across a resume."""

    _run: ShotRun
    _evaluate: Evaluate

    def __call__(self, head: Head, epoch: int) -> Mapping[str, float]:
        facts = RunFacts(epoch=epoch, epoch_choice=LAST)
        with _no_warnings():
            top1 = self._evaluate(head, self._run.tests, facts, self._run.run_dir.name).mean
        best = self._read()
        # An epoch that is repeated after a kill finds its own equal note and does not replace it.
        if best is None or top1 > best[TEST_TOP1]:
            save_head(head, self._run.run_dir / BEST_HEAD)
            write_json(self._run.run_dir / BEST_NOTE, {"epoch": epoch, TEST_TOP1: top1})
        return {TEST_TOP1: top1}

    def found(self, epochs: int) -> int | None:
        """Return the best epoch; None unless all `epochs` epochs were tested."""
        tested = sum(TEST_TOP1 in record for record in read_metrics(self._run.run_dir))
        best = self._read()
        return int(best["epoch"]) if best is not None and tested == epochs else None

    def _read(self) -> dict[str, float] | None:
        value = found_object(self._run.run_dir / BEST_NOTE) or {}
        try:
            return {"epoch": int(value["epoch"]), TEST_TOP1: float(value[TEST_TOP1])}
        except (ValueError, KeyError, TypeError):
            return None


def base_to_novel(outcomes: Sequence[ShotOutcome], *, best: bool = False) -> dict[str, Any] | None:
    """Return base and novel accuracy in percent over the runs of all seeds, ready for JSON.

    With `best` the numbers are from the best epochs; None if a run has no best epoch. The first
    test set of every run is base, the second is novel. `harmonic_mean` is taken of the two means
    over seeds; papers do not say how they take it, and `mean_of_harmonic_means` is the other
    reading. Values are unrounded, and standard deviations are the population's.
    """
    results = [outcome.best if best else outcome.last for outcome in outcomes]
    found = [result for result in results if result is not None]
    if len(found) < len(results) or not found:
        return None
    seeds = [
        {
            "draw": outcome.run.draw,
            "base": base,
            "novel": novel,
            "harmonic_mean": statistics.harmonic_mean([base, novel]),
        }
        for outcome, result in zip(outcomes, found, strict=True)
        for base, novel in [[part.top1 or 0.0 for part in result.per_split]]
    ]
    columns = {name: [seed[name] for seed in seeds] for name in ("base", "novel", "harmonic_mean")}
    base, novel, means = map(statistics.fmean, columns.values())
    return {
        "base": base,
        "novel": novel,
        "harmonic_mean": statistics.harmonic_mean([base, novel]),
        "mean_of_harmonic_means": means,
        "base_std": statistics.pstdev(columns["base"]),
        "novel_std": statistics.pstdev(columns["novel"]),
        "epoch_choice": BEST if best else LAST,
        "per_seed": seeds,
    }
