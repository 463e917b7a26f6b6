"""Plans of few-shot and base-to-novel runs, and the epoch that was best on the test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featstore import Store, UserError
from heads import HeadConfig, TemporalHead, TrainConfig
from heads.evaluation.evaluate import evaluate_store
from heads.evaluation.protocols.protocol import TestSet
from heads.evaluation.results import EvalResult, RunFacts
from heads.evaluation.trained.plan import GivenList, ShotPlan
from heads.evaluation.trained.run import BEST_HEAD, ShotOutcome, train_and_test
from tests.support.stores.action_store import action_store

HEAD = HeadConfig(dim=16, layers=1, experts=2)
RECIPE = TrainConfig(epochs=3, warmup_epochs=0, lr=1e-3, batch_size=4, frames=4, seed=5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """48 clips of 8 classes, six each; train and val take turns."""
    return action_store(tmp_path / "toy.zarr", samples=48, failed=(0,))


def keys(store: Store, rows: object) -> set[str]:
    return {store.keys[place] for place in store.positions(np.asarray(rows)).tolist()}


def test_plans(tmp_path: Path, store: Store) -> None:
    plan = ShotPlan(store, store, "train", "val", run_dir=lambda suffix: tmp_path / f"run{suffix}")
    runs = plan.fewshot([1, 2], 4, {2: GivenList("l.txt", ("clip002", "clip004"))})
    assert [run.run_dir.name for run in runs] == ["run-k1-s4", "run-k2-list"]
    assert runs[1].train.words == "the 2 videos of list l.txt, repeated 12 times"
    assert keys(store, runs[1].train.rows) == {"clip002", "clip004"}
    listed = {1: GivenList("s1.txt", ("clip000", "clip002", "clip004"))}
    # a list of one class more than the other half
    (run,) = plan.base_to_novel(16, [1], listed)
    base, novel = run.tests
    assert base.classes is not None
    assert novel.classes is not None
    assert base.classes.tolist() == [0, 2, 4]
    assert novel.classes.tolist() == [1, 3, 5, 6, 7]
    assert run.train.classes is not None
    assert run.train.classes.tolist() == [0, 2, 4]
    with pytest.raises(UserError, match="1 video is trained on and tested"):
        plan.fewshot([2], 1, {2: GivenList("l.txt", ("clip001",))})
    everything = GivenList("all", tuple(store.keys))
    with pytest.raises(UserError, match="so that no class is novel"):
        plan.base_to_novel(16, [1], {1: everything})
    renamed = action_store(
        tmp_path / "r.zarr", class_names=("x", *"abcdefg"), samples=16, failed=()
    )
    with pytest.raises(UserError, match="have different class lists"):
        ShotPlan(store, renamed, "train", "val", run_dir=Path)


def test_the_best_epoch_outlives_an_interruption(tmp_path: Path, store: Store) -> None:
    accuracy = {1: 40.0, 2: 60.0, 3: 60.0}
    calls: list[int | None] = []
    stop_at: set[int] = set()

    def evaluate(
        head: TemporalHead, tests: Sequence[TestSet], facts: RunFacts, name: str
    ) -> EvalResult:
        result = evaluate_store(
            store, head, protocol="fewshot", dataset="toy", tests=tests, head_name=name, facts=facts
        )
        calls.append(facts.epoch)
        if len(calls) in stop_at:
            raise KeyboardInterrupt
        top1 = accuracy[facts.epoch or 0]
        return replace(result, top1=top1, mean=top1)

    def outcome(name: str) -> ShotOutcome:
        plan = ShotPlan(store, store, "train", "val", run_dir=lambda end: tmp_path / f"{name}{end}")
        (run,) = plan.fewshot([2], 1)
        return train_and_test(
            run, store, HEAD, RECIPE, prompt_set="mote28", evaluate=evaluate, device="cpu"
        )

    whole = outcome("whole")
    assert calls == [1, 2, 3, 3, 2]
    assert (whole.last.epoch, whole.last.epoch_choice) == (3, "last")
    assert whole.best is not None
    assert (whole.best.epoch, whole.best.epoch_choice) == (2, "best on the test set")
    assert whole.best.head_fingerprint != whole.last.head_fingerprint
    calls.clear()
    stop_at.update((2, 4))  # while epoch 2 is tested, and again in epoch 3
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            outcome("broken")
    broken = outcome("broken")
    assert calls[:5] == [1, 2, 2, 3, 3]
    assert broken.best is not None
    assert broken.best.head_fingerprint == whole.best.head_fingerprint
    assert broken.last.head_fingerprint == whole.last.head_fingerprint
    files = [(tmp_path / f"{n}-k2-s1" / BEST_HEAD).read_bytes() for n in ("whole", "broken")]
    assert files[0] == files[1]
