"""The epoch that is kept, early stopping, and what a training says at its end."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore import Store
from featstore.segments import segment_positions
from heads import (
    Head,
    HeadConfig,
    TestSet,
    TrainConfig,
    TrainSummary,
    build_head,
    evaluate_store,
    load_head,
    train_head,
)
from heads.files.run_files import read_metrics
from heads.methods.registry import method
from heads.training import selection
from heads.training.baselines import BASELINES
from heads.training.selection import won
from heads.training.validation import Judged, choose_validation
from tests.support.stores.action_store import action_store

HEAD = HeadConfig(dim=16, layers=1, experts=2)
RECIPE = TrainConfig(
    epochs=6, warmup_epochs=1, lr=1e-2, batch_size=8, frames=4, seed=5, keep_best=True
)
WALL_TIME = {"seconds", "samples_per_second"}
SOURCES = ("val", "held-out")  # held-out: so few videos are cross-validated

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from featstore import open_store
from tests.heads.training.test_selection import train
torch.set_num_threads(1)
def kill(done, total, **details):
    if done >= float(sys.argv[4]) * total:
        os.kill(os.getpid(), signal.SIGKILL)
train(open_store(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], resume=True, progress=kill)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return action_store(tmp_path / "toy.zarr", samples=60, classes=5, noise=0.5, confused=0.9)


def train(
    store: Store, run: Path, asked: str | None, training: TrainConfig = RECIPE, **more: Any
) -> TrainSummary:
    trained = store.split("train")
    rows, validation = choose_validation(store, trained, split="train", asked=asked)
    return train_head(
        *(store, run, HEAD, training),
        **(
            {"rows": rows, "prompt_set": "mote28", "device": "cpu", "validation": validation} | more
        ),
    )


def state(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_head(folder).state_dict()


def same(a: Path, b: Path) -> bool:
    one, other = state(a), state(b)
    return all(torch.equal(one[name], other[name]) for name in one)


def records(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name not in WALL_TIME}
        for record in read_metrics(run)
    ]


def judged(right: str) -> Judged:
    return Judged(torch.tensor([letter == "1" for letter in right]), torch.zeros(len(right)))


def test_how_many_more_a_head_got_right_and_the_chance_error() -> None:
    base = judged("1100000000")
    assert won(base, base) == (0, 0)
    assert won(judged("1111000000"), base) == (2, math.sqrt(2))
    assert won(judged("0011100000"), base) == (1, math.sqrt(5))


@torch.no_grad()
def test_a_head_shrinks_towards_the_mean_of_frames() -> None:
    texts = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    features = torch.randn(7, 4, 16)
    head = build_head(HEAD, texts)
    mean = build_head(HeadConfig(dim=16, kind="mean"), texts)
    assert not torch.allclose(head(features, texts), mean(features, texts), atol=1e-4)
    distances = []
    for share in (0, 0.5, 0.5, 1):
        head.shrink(share)
        distances.append(float((head(features, texts) - mean(features, texts)).abs().max()))
    assert distances[0] > 1.5 * distances[1] > 2 * distances[2] > 0
    torch.testing.assert_close(head(features, texts), mean(features, texts))


@pytest.mark.parametrize("source", [*SOURCES, "none"])
def test_the_head_kept_is_shrunk_and_judged_so(tmp_path: Path, store: Store, source: str) -> None:
    seen: dict[int, Head] = {}

    def hook(head: Head, epoch: int) -> dict[str, float]:
        seen[epoch] = copy.deepcopy(head)
        return {}

    summary = train(
        store, tmp_path / "run", source, replace(RECIPE, shrinkage=0.25), after_epoch=hook
    )
    found = summary.validation
    expected = seen[6 if found is None else found["kept_epoch"]]
    expected.shrink(0.25)
    kept = state(tmp_path / "run")
    assert all(torch.equal(kept[name], value) for name, value in expected.state_dict().items())
    if source == "val":
        assert found is not None
        _, validation = choose_validation(store, store.split("train"), split="train", asked="val")
        assert validation is not None
        text = torch.from_numpy(store.class_text("mote28").embeddings)
        features = torch.from_numpy(store.features(validation.rows, None))
        chosen = features[:, :, segment_positions(features.shape[2], 4)].float()
        right = expected.eval()(chosen[:, 0], text, False).argmax(1)
        labels = torch.from_numpy(store.labels[store.positions(validation.rows)])
        assert found["top1"] == pytest.approx(100 * float((right == labels).float().mean()))


def test_measuring_changes_no_bit_and_a_paper_recipe_keeps_the_last_epoch(
    tmp_path: Path, store: Store
) -> None:
    plain = replace(RECIPE, keep_best=False)
    train(store, tmp_path / "plain", "none", plain)
    summary = train(store, tmp_path / "measured", "val", plain)
    assert (tmp_path / "plain/head.safetensors").read_bytes() == (
        tmp_path / "measured/head.safetensors"
    ).read_bytes()
    for name in ("config.json", "training-keys.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "measured" / name
        ).read_bytes()
    assert summary.validation is not None
    assert summary.validation["kept_epoch"] == summary.epochs == 6
    assert "validation" not in records(tmp_path / "plain")[0]
    assert not (tmp_path / "measured/last").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_the_best_epoch_and_the_last_are_kept(tmp_path: Path, store: Store, source: str) -> None:
    seen: dict[int, Mapping[str, torch.Tensor]] = {}

    def hook(head: Head, epoch: int) -> dict[str, float]:
        seen[epoch] = {name: value.clone() for name, value in head.state_dict().items()}
        return {}

    run = tmp_path / "run"
    summary = train(store, run, source, after_epoch=hook)
    found = summary.validation
    assert found is not None
    assert found == json.loads((run / "validation.json").read_text())
    by_epoch = {r["epoch"]: r["validation"] for r in records(run)}
    best = max(by_epoch, key=lambda epoch: (by_epoch[epoch]["top1"], -by_epoch[epoch]["loss"]))
    assert (found["kept_epoch"], found["top1"]) == (best, by_epoch[best]["top1"])
    assert found["top1"] > found["no_head"]
    assert found["learnt"]
    kept = state(run)
    assert all(torch.equal(kept[name], seen[best][name]) for name in kept)
    last = state(run / "last")
    assert all(torch.equal(last[name], seen[6][name]) for name in last)
    assert found["last_top1"] == by_epoch[6]["top1"]
    assert set(found["baselines"]) == set(BASELINES)
    assert all(0 <= top1 <= 100 for top1 in found["baselines"].values())


def test_the_accuracy_is_that_of_an_evaluation(tmp_path: Path, store: Store) -> None:
    summary = train(store, tmp_path / "run", "val")
    assert summary.validation is not None
    result = evaluate_store(
        store,
        load_head(tmp_path / "run"),
        protocol="closeset",
        dataset="toy",
        tests=[TestSet("val", store.split("val"))],
        device="cpu",
    )
    assert result.top1 == pytest.approx(summary.validation["top1"])
    assert result.n_evaluated == summary.validation["n_judged"]


@pytest.mark.parametrize(("source", "share"), [("val", 0.6), ("held-out", 0.5), ("held-out", 0.9)])
def test_a_killed_run_continues_bit_for_bit(
    tmp_path: Path, store: Store, source: str, share: float
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(store, whole, source)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.path), str(broken), source, str(share)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    assert not (broken / "head.safetensors").exists()
    train(store, broken, source, resume=True)
    assert records(broken) == records(whole)
    for file in ("head.safetensors", "last/head.safetensors", "validation.json"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()


def test_early_stopping_repeats_exactly(tmp_path: Path, store: Store) -> None:
    patient = replace(RECIPE, epochs=40, patience=3)
    summary = train(store, tmp_path / "run", "val", patient)
    assert summary.epochs < 40
    by_epoch = [
        (r["validation"]["top1"], r["validation"]["loss"]) for r in records(tmp_path / "run")
    ]
    tops, losses = [top for top, _ in by_epoch], [loss for _, loss in by_epoch]
    last = max(tops.index(max(tops)), losses.index(min(losses)))
    assert summary.epochs == last + 1 + 3
    again = train(store, tmp_path / "run", "val", patient, resume=True)
    assert again.validation == summary.validation
    assert again.epochs == again.resumed_from == summary.epochs


def test_a_baseline_that_is_clearly_better_is_named(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"linear": 100.0, "knn": 30.0}
    monkeypatch.setattr(selection, "baseline_accuracies", lambda *a, **b: found)
    train(store, tmp_path / "still", "val", replace(RECIPE, lr=1e-9))
    assert "--head linear (linear probe) does better on the same features: 100.0 %" in caplog.text
    caplog.clear()
    found["linear"] = 0.0
    train(store, tmp_path / "low", "val", replace(RECIPE, lr=1e-9))
    assert "does better" not in caplog.text


def test_nothing_learnt_is_said_with_the_option_that_would_change_it(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    still = replace(RECIPE, lr=1e-9)
    summary = train(store, tmp_path / "still", "val", still)
    assert summary.validation is not None
    assert (summary.validation["kept_epoch"], summary.validation["learnt"]) == (0, False)
    assert summary.validation["top1"] == summary.validation["no_head"]
    assert "nothing was learnt" in caplog.text
    assert "raise --lr (now 1e-09) or --epochs (now 6)" in caplog.text
    caplog.clear()
    train(store, tmp_path / "named", "val", replace(still, keep_best=False))
    assert "--recipe auto" in caplog.text
    mean = build_head(HeadConfig(dim=16, kind="mean"), torch.zeros(5, 16))
    assert not same(tmp_path / "still", tmp_path / "still/last")
    features = torch.randn(3, 4, 16)
    texts = torch.randn(5, 16)
    torch.testing.assert_close(
        load_head(tmp_path / "still")(features, texts), mean(features, texts)
    )


@pytest.mark.parametrize("each", [2, 6])
def test_a_cross_validation_of_tiny_classes_chooses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, each: int
) -> None:
    """Its heads lack half of two videos: that they lose says nothing of the head of all."""
    few = action_store(tmp_path / "few.zarr", samples=10 * each, classes=5, noise=0.5, failed=())
    summary = train(few, tmp_path / "run", "held-out", replace(RECIPE, lr=0.3, epochs=3))
    assert summary.validation is not None
    assert summary.validation["last_top1"] < summary.validation["no_head"]
    assert summary.validation["kept_epoch"] == (3 if each == 2 else 0)
    assert same(tmp_path / "run", tmp_path / "run/last") == (each == 2)
    assert ("whether anything was learnt is unknown" in caplog.text) == (each == 2)
    assert ("nothing was learnt" in caplog.text) == (each == 6)


def test_training_from_a_head_falls_back_to_that_head(tmp_path: Path, store: Store) -> None:
    train(store, tmp_path / "first", "val")
    first = load_head(tmp_path / "first")
    summary = train(store, tmp_path / "next", "val", replace(RECIPE, lr=1e-9), initial=first)
    assert summary.validation is not None
    assert summary.validation["kept_epoch"] == 0
    assert same(tmp_path / "first", tmp_path / "next")


@pytest.mark.parametrize("kind", ["linear", "knn", "mean"])
def test_heads_that_are_not_trained_in_epochs_are_judged_too(
    tmp_path: Path, store: Store, kind: str
) -> None:
    rows, validation = choose_validation(store, store.split("train"), split="train")
    summary = train_head(
        *(store, tmp_path / "run", method(kind).config(dim=16, kind=kind), RECIPE),
        rows=rows,
        prompt_set="mote28",
        device="cpu",
        validation=validation,
    )
    found = summary.validation
    assert found is not None
    assert found["kept_epoch"] is None
    expected = found["no_head"] if kind == "mean" else found["baselines"][kind]
    assert found["top1"] == pytest.approx(expected)
