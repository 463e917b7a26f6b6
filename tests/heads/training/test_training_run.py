"""Training runs: files, resume after kill -9 bit for bit, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore import Store, UserError, WorkError
from heads import HeadConfig, TrainConfig, TrainSummary, load_head, train_head
from heads.files.head_file import load_tensors, save_tensors
from tests.support.stores.action_store import action_store

HEAD = HeadConfig(dim=16, layers=2, experts=3)
# 19 trained rows in batches of 4 give 5 batches, so a remainder crosses every epoch
RECIPE = TrainConfig(
    epochs=4, warmup_epochs=1, lr=1e-3, batch_size=4, frames=4, seed=5, accumulation=2
)
WALL_TIME = {"seconds", "samples_per_second"}

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from featstore import open_store
from heads import train_head
from tests.heads.training.test_training_run import HEAD, RECIPE
torch.set_num_threads(1)
store = open_store(Path(sys.argv[1]))
def kill(done, total, **details):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
train_head(store, Path(sys.argv[2]), HEAD, RECIPE, rows=store.split("train"), prompt_set="mote28",
           resume=True, device="cpu", progress=kill)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return action_store(tmp_path / "toy.zarr", failed=(4,))


def train(store: Store, run: Path, **changes: Any) -> TrainSummary:
    arguments: dict[str, Any] = {
        "head": HEAD,
        "training": RECIPE,
        "rows": store.split("train"),
        "prompt_set": "mote28",
        "device": "cpu",
    }
    arguments |= changes
    return train_head(store, run, arguments.pop("head"), arguments.pop("training"), **arguments)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in WALL_TIME}
        for line in lines
    ]


def run_and_kill(store: Store, run: Path, at: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.path), str(run), str(at)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == -9, child.stderr


def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, store: Store) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(store, whole)
    run_and_kill(store, broken, at=8)  # in the middle of epoch 2
    assert not (broken / "head.safetensors").exists()
    state, card = load_tensors(broken / "state/last.safetensors")
    assert (card["position"]["epoch"], card["position"]["step"]) == (0, 5)
    assert any(name.startswith("gradient.") for name in state)
    summary = train(store, broken, resume=True)
    assert summary.resumed_from == 1
    assert summary.epochs == 4
    assert metrics(broken) == metrics(whole)
    a, b = load_head(whole).state_dict(), load_head(broken).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "head.safetensors").read_bytes() == (broken / "head.safetensors").read_bytes()


def test_a_state_of_the_first_format_is_continued_bit_for_bit(tmp_path: Path, store: Store) -> None:
    """Version 1 kept the epochs done as a tensor and the records beside the card's format."""
    train(store, tmp_path / "whole")
    run_and_kill(store, tmp_path / "run", at=8)
    file = tmp_path / "run/state/last.safetensors"
    tensors, card = load_tensors(file)
    done = metrics(tmp_path / "whole")[:1]
    records = [record | {"seconds": 1.0, "samples_per_second": 19.0} for record in done]
    assert card["position"]["step"] == 5
    save_tensors(file, tensors | {"epoch": torch.tensor(1)}, {"format": 1, "metrics": records})
    assert train(store, tmp_path / "run", resume=True).resumed_from == 1
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    heads = [(tmp_path / name / "head.safetensors").read_bytes() for name in ("run", "whole")]
    assert heads[0] == heads[1]


def test_a_run_killed_before_its_first_state_starts_again(tmp_path: Path, store: Store) -> None:
    run_and_kill(store, tmp_path / "run", at=4)
    assert train(store, tmp_path / "run", resume=True).resumed_from == 0


def test_the_same_seed_gives_the_same_head_and_another_seed_another(
    tmp_path: Path, store: Store
) -> None:
    for name in ("a", "b"):
        train(store, tmp_path / name)
    train(store, tmp_path / "c", training=replace(RECIPE, seed=6))
    a, b, c = (load_head(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["transformer.positions"], c["transformer.positions"])


def test_summary_counts_what_failed(tmp_path: Path, store: Store) -> None:
    summary = train(store, tmp_path / "run")
    assert (summary.n_listed, summary.n_trained, summary.n_failed) == (20, 19, 1)
    assert all(record["samples"] == 19 for record in metrics(tmp_path / "run"))
    json.dumps(summary.to_json(), allow_nan=False)


def test_a_head_learns_and_carries_its_origin(tmp_path: Path, store: Store) -> None:
    recipe = replace(RECIPE, epochs=40, lr=3e-3, accumulation=1)
    train(store, tmp_path / "run", training=recipe)
    # Halves of the run: with random routing and five batches one epoch says little.
    record = metrics(tmp_path / "run")
    losses = [line["loss"] for line in record]
    assert sum(losses[20:]) < 0.8 * sum(losses[:20])
    head = load_head(tmp_path / "run" / "head.safetensors")
    assert head.config == HEAD
    assert head.origin is not None
    assert head.origin.class_names == tuple(store.class_names)
    assert head.origin.encoder_fingerprint == store.provenance.encoder_fingerprint
    assert head.origin.frames == 4
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    assert torch.equal(head.training_class_embeddings, text)
    assert float(head.logit_scale.exp()) == pytest.approx(record[-1]["logit_scale"])


def test_a_finished_run_is_left_alone(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(store, tmp_path / "run")
    before = (tmp_path / "run" / "head.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        again = train(store, tmp_path / "run", resume=True)
    assert "finished already" in caplog.text
    assert again.resumed_from == 4
    assert replace(again, resumed_from=0) == first
    assert (tmp_path / "run" / "head.safetensors").stat().st_mtime_ns == before


def test_an_existing_run_is_not_overwritten(tmp_path: Path, store: Store) -> None:
    train(store, tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train(store, tmp_path / "run")


def test_a_head_from_elsewhere_is_not_touched(tmp_path: Path, store: Store) -> None:
    train(store, tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "run/head.safetensors").rename(other / "head.safetensors")
    with pytest.raises(UserError, match="holds a head that was not trained here"):
        train(store, other)
    assert [path.name for path in other.rglob("*")] == ["head.safetensors"]


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path, store: Store) -> None:
    def second(done: float, total: float, **details: object) -> None:
        with pytest.raises(WorkError, match=f"pid {os.getpid()}.* is training"):
            train(store, tmp_path / "run", resume=True)

    train(store, tmp_path / "run", training=replace(RECIPE, epochs=1), progress=second)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"training": replace(RECIPE, lr=1e-2)}, "training.lr is 0.001 in the run, asked for 0.01"),
        ({"head": HeadConfig(dim=16, layers=3, experts=3)}, "head.layers is 2"),
        ({"rows": [0, 2, 6]}, "data.n_listed is 20 in the run, asked for 3"),
    ],
)
def test_resume_with_other_settings_names_them(
    tmp_path: Path, store: Store, changes: dict[str, Any], difference: str
) -> None:
    train(store, tmp_path / "run")
    with pytest.raises(UserError, match=difference):
        train(store, tmp_path / "run", resume=True, **changes)


def test_resume_on_another_store_names_the_difference(tmp_path: Path, store: Store) -> None:
    train(store, tmp_path / "run")
    other = action_store(tmp_path / "other.zarr", failed=(4,), encoder_fingerprint="ffff")
    with pytest.raises(UserError, match=r"data\.encoder_fingerprint"):
        train(other, tmp_path / "run", resume=True)


def test_a_loss_that_is_no_number_keeps_the_last_good_state(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import heads.methods.mote.model as module

    real, calls = module.mote_loss, []

    def spoilt(*arguments: Any, **options: Any) -> Any:
        terms = real(*arguments, **options)
        calls.append(1)
        return terms if len(calls) <= 7 else terms._replace(total=terms.total * float("nan"))

    monkeypatch.setattr(module, "mote_loss", spoilt)
    with pytest.raises(WorkError, match="became nan in epoch 2"):
        train(store, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "head.safetensors").exists()
    assert train(store, tmp_path / "run", resume=True).resumed_from == 1
    train(store, tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["transformer", "mean"])
def test_baselines_train_through_the_same_call(tmp_path: Path, store: Store, kind: Any) -> None:
    summary = train(store, tmp_path / kind, head=HeadConfig(dim=16, kind=kind, layers=1))
    assert summary.head == kind
    assert summary.epochs == (0 if kind == "mean" else 4)
    assert load_head(tmp_path / kind).config.kind == kind


def test_wrong_input_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match="32 wide and the store's embeddings 16"):
        train(store, tmp_path / "a", head=HeadConfig(dim=32))
    with pytest.raises(UserError, match="none of 1 training sample"):
        train(store, tmp_path / "b", rows=[4])
    with pytest.raises(UserError, match="none of 0 training samples"):
        train(store, tmp_path / "c", rows=[])
    with pytest.raises(UserError, match="accumulation 6"):
        train(store, tmp_path / "d", training=replace(RECIPE, accumulation=6))
    with pytest.raises(UserError, match="prompt set"):
        train(store, tmp_path / "e", prompt_set="other")


def test_fewer_stored_frames_than_asked_for_are_all_used(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    train(store, tmp_path / "run", training=replace(RECIPE, frames=16, epochs=1))
    assert "the store has 8: training on those" in caplog.text
    head = load_head(tmp_path / "run")
    assert head.origin is not None
    assert head.origin.frames == 8


@pytest.mark.parametrize("value", [{"epochs": 0}, {"lr": float("nan")}, {"precision": "fp8"}])
def test_a_recipe_out_of_range_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        TrainConfig(**value)
