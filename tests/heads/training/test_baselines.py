"""The baselines in one call give what training and evaluating their heads gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from heads import TestSet, evaluate_store, load_head
from heads.files.run_files import read_metrics
from heads.methods.registry import method
from heads.training.baselines import BASELINES, baseline_accuracies
from heads.training.config import TrainConfig
from heads.training.train_head import train_head
from tests.support.stores.action_store import action_store


def test_one_call_measures_what_the_heads_measure(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", samples=96, noise=3.0, split_names=("train",))
    rows = store.split("train")
    rows = rows[store.status[store.positions(rows)] == 1]
    learnt, new = rows[:60], rows[60:]

    def labels(of: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return store.labels[store.positions(of)].astype(np.int64)

    found = baseline_accuracies(
        *(store.features(learnt)[:, 0], labels(learnt)),
        *(store.features(new)[:, 0], labels(new)),
        store.class_text("mote28").embeddings,
        seed=7,
    )
    assert set(found) == set(BASELINES) == {"linear", "knn"}
    for kind, top1 in found.items():
        run = tmp_path / kind
        recipe = TrainConfig(frames=8, seed=7)
        summary = train_head(
            *(store, run, method(kind).config(dim=16), recipe),
            rows=learnt,
            prompt_set="mote28",
            device="cpu",
        )
        assert (summary.epochs, summary.n_trained) == (1, 60)
        (record,) = read_metrics(run)
        assert record["samples"] == 60
        result = evaluate_store(
            store,
            load_head(run),
            protocol="closeset",
            dataset="toy",
            tests=[TestSet("new", new)],
            device="cpu",
        )
        assert result.top1 == pytest.approx(top1)
        assert 20 < top1 < 100  # neither chance nor a set that everything gets right


def test_a_finished_fit_is_not_repeated(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    arguments = (store, tmp_path / "run", method("knn").config(dim=16), TrainConfig(frames=4))
    first = train_head(*arguments, rows=store.split("train"), prompt_set="mote28", device="cpu")
    head = (tmp_path / "run" / "head.safetensors").read_bytes()
    again = train_head(
        *arguments, rows=store.split("train"), prompt_set="mote28", device="cpu", resume=True
    )
    assert (first.resumed_from, again.resumed_from) == (0, 1)
    assert (tmp_path / "run" / "head.safetensors").read_bytes() == head
