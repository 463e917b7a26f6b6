"""Training and evaluating heads on videos that may show several classes; balanced training."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from featstore import Store, UserError
from heads import (
    HeadConfig,
    TestSet,
    TrainConfig,
    TrainSummary,
    evaluate_store,
    load_head,
    save_head,
    train_head,
)
from heads.evaluation.answers import answer_files
from heads.evaluation.comparing.compare import differences, read_result
from heads.evaluation.results import EvalResult, save_result
from heads.files.portable import merged_head, require_one_class, save_onnx
from heads.files.run_files import read_metrics
from heads.methods.mote.losses import mote_loss
from heads.methods.registry import method, names
from heads.scoring.average_precision import mean_average_precision
from heads.scoring.scores import predict_scores
from heads.training.class_weights import require_possible
from heads.training.judged import Judged, JudgedLabels, Judgement
from heads.training.logit_bias import starting_bias
from heads.training.training_set import choose_training_set
from heads.training.validation import CROSS, choose_validation, dealt
from tests.support.stores.action_store import ACTIONS, action_store

HEAD = HeadConfig(dim=16, layers=1, experts=2)
RECIPE = TrainConfig(epochs=6, warmup_epochs=1, lr=1e-2, batch_size=8, frames=4, seed=5)
BEST = replace(RECIPE, keep_best=True)
EVEN = replace(RECIPE, class_sampling="balanced", class_weights="sqrt", epochs=4)

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from featstore import open_store
from tests.heads.training.test_several_classes import EVEN, train
torch.set_num_threads(1)
def kill(done, total, **details):
    if done >= 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)
train(open_store(Path(sys.argv[1])), Path(sys.argv[2]), EVEN, resume=True, progress=kill)
"""


def shown_of(samples: int = 80, classes: int = 5, seed: int = 4) -> Any:
    rng = np.random.default_rng(seed)
    return rng.random((samples, classes)) < np.linspace(0.5, 0.1, classes)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return action_store(
        tmp_path_factory.mktemp("s") / "several.zarr",
        samples=160, classes=5, several=shown_of(160), noise=0.5, confused=0.9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One class a video, but the classes of `shown_of` by their first: many of one class."""
    return action_store(tmp_path_factory.mktemp("u") / "uneven.zarr", samples=60, classes=5)


def train(
    store: Store, run: Path, training: TrainConfig = RECIPE, head: Any = HEAD, **more: Any
) -> TrainSummary:
    rows = store.split("train")
    asked = more.pop("asked", None)
    if training.keep_best:
        rows, more["validation"] = choose_validation(store, rows, split="train", asked=asked)
    return train_head(
        store,
        run,
        head,
        training,
        **({"rows": rows, "prompt_set": "mote28", "device": "cpu"} | more),
    )


def evaluate(store: Store, run: Path | None, **more: Any) -> EvalResult:
    return evaluate_store(
        store,
        None if run is None else load_head(run),
        protocol="closeset",
        dataset="toy",
        tests=[TestSet("val", store.split("val"))],
        modulate=False,
        **more,
    )


LEARNING = [name for name in names() if method(name).multi_label and method(name).from_store]


@pytest.mark.parametrize("kind", LEARNING)
def test_heads_learn_several_classes(several: Store, tmp_path: Path, kind: str) -> None:
    config = method(kind).config(dim=16, kind=kind)
    config = replace(config, layers=1) if kind in ("mote", "transformer") else config
    summary = train(several, tmp_path / kind, BEST, config)
    found = summary.validation
    assert found is not None
    assert set(found["baselines"]) == {"linear", "knn"}
    head = load_head(tmp_path / kind)
    if kind == "mean":
        assert found["mAP"] == found["no_head"]
    else:
        assert found["mAP"] > found["no_head"] + 3
    result = evaluate(several, tmp_path / kind)
    assert result.mean_ap == pytest.approx(found["mAP"], abs=1e-6)
    assert result.top1 is None
    if kind != "mean":
        assert head.logit_bias is not None
    balance = summary.class_balance
    assert balance["classes"] == 5
    assert balance["most"] > balance["least"]


def test_probabilities_are_independent_and_as_many_as_are_shown(
    several: Store, tmp_path: Path
) -> None:
    train(several, tmp_path / "linear", RECIPE, method("linear").config(dim=16))
    train(several, tmp_path / "mote")
    texts = several.class_text("mote28")
    rows = several.split("val")
    rows = rows[several.status[several.positions(rows)] == 1]
    for run in ("linear", "mote"):
        head = load_head(tmp_path / run)
        found = []
        for features in torch.from_numpy(several.features(rows)).float():
            names = texts.names
            embeddings = torch.from_numpy(texts.embeddings)
            scores = dict(predict_scores(head, features, embeddings, names, modulate=False))
            alone = predict_scores(head, features, embeddings[:2], names[:2], modulate=False)
            assert all(score == pytest.approx(scores[name], abs=1e-4) for name, score in alone)
            found.append([scores[name] for name in names])
        assert np.mean(found) == pytest.approx(several.shown(rows).mean(), abs=0.1)
    with pytest.raises(UserError, match=r"a probability of its own.*--format safetensors or onnx"):
        require_one_class(load_head(tmp_path / "mote"))


def test_an_exported_head_has_the_same_probabilities(several: Store, tmp_path: Path) -> None:
    train(several, tmp_path / "mote")
    head = load_head(tmp_path / "mote")
    save_head(merged_head(head), tmp_path / "merged.safetensors")
    merged = load_head(tmp_path / "merged.safetensors")
    assert merged.config.experts == 1
    features = torch.from_numpy(several.features(several.split("val")[4:8])).float()[:, 0]
    texts = torch.from_numpy(several.class_text("mote28").embeddings)
    with torch.no_grad():
        cosines = head(features, texts)
        expected = head.probabilities(cosines)
        found = merged.probabilities(merged(features, texts))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    save_onnx(head, tmp_path / "head.onnx")
    (note,) = onnx.load(tmp_path / "head.onnx").metadata_props
    facts = json.loads(note.value)
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    fed = {"features": features, "class_embeddings": texts, "modulate": torch.tensor(True)}
    (given,) = session.run(None, {name: value.numpy() for name, value in fed.items()})
    logits = facts["logit_scale"] * given.astype(np.float64) + facts["logit_bias"]
    assert 1 / (1 + np.exp(-logits)) == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_first_bias_expects_as_many_classes_as_there_are() -> None:
    cosines = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.2
    labels = (np.random.default_rng(1).random((50, 7)) < 0.15).astype(np.uint8)
    bias = starting_bias(cosines, labels, 100.0)
    expected = (100.0 * cosines.double() + bias).sigmoid().mean()
    assert float(expected) == pytest.approx(labels.mean(), abs=1e-6)


def test_methods_that_cannot_say_so(several: Store, tmp_path: Path) -> None:
    for kind in (name for name in names() if not method(name).multi_label):
        with pytest.raises(UserError, match="cannot be trained on videos that show several class"):
            require_possible(method(kind), RECIPE, several=True)
    with pytest.raises(UserError, match="--class-weights shape the epochs of a training, and lin"):
        train(
            several, tmp_path / "l", replace(RECIPE, class_weights="sqrt"),
            method("linear").config(dim=16),
        )  # fmt: skip
    rows = several.split("train")
    with pytest.raises(UserError, match="may show several classes, and --shots needs one"):
        choose_training_set(several, rows, split="train", shots=2)
    with pytest.raises(UserError, match="a part of the classes needs one class a video"):
        choose_training_set(several, rows, split="train", half="base")


def test_a_head_of_several_classes_is_no_beginning_for_one(
    several: Store, uneven: Store, tmp_path: Path
) -> None:
    train(several, tmp_path / "first")
    more = {"initial": load_head(tmp_path / "first"), "initial_run": tmp_path / "first"}
    with pytest.raises(UserError, match="leave --from-head out"):
        train(uneven, tmp_path / "second", **more)
    train(several, tmp_path / "third", replace(RECIPE, epochs=1), **more)
    train(uneven, tmp_path / "one")
    more = {"initial": load_head(tmp_path / "one"), "initial_run": tmp_path / "one"}
    train(several, tmp_path / "fourth", replace(RECIPE, epochs=1), **more)
    assert load_head(tmp_path / "fourth").logit_bias is not None


@pytest.mark.parametrize("which", ["several", "uneven"])
def test_a_killed_balanced_run_continues_bit_for_bit(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: Store = request.getfixturevalue(which)
    train(store, tmp_path / "whole", EVEN)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.path), str(tmp_path / "broken")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == -9, child.stderr
    train(store, tmp_path / "broken", EVEN, resume=True)
    heads = [(tmp_path / name / "head.safetensors").read_bytes() for name in ("whole", "broken")]
    assert heads[0] == heads[1]
    for name in ("class_sampling", "class_weights"):
        other = replace(EVEN, **{name: ""})
        with pytest.raises(UserError, match=name):
            train(store, tmp_path / "broken", other, resume=True)


def test_runs_without_the_new_settings_do_not_mention_them(uneven: Store, tmp_path: Path) -> None:
    train(uneven, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert not any("class_" in name for name in config["training"])
    assert not {"class_weights", "multi_label"} & set(config["data"])
    assert "logit_bias" not in load_head(tmp_path / "run").state_dict()


def test_weights_from_a_file(uneven: Store, tmp_path: Path) -> None:
    file = tmp_path / "w.csv"

    def given(text: str) -> TrainConfig:
        file.write_text(text)
        return replace(RECIPE, epochs=1, class_weights=str(file))

    lines = "class,weight\n" + "".join(f"{name},{n + 1}\n" for n, name in enumerate(ACTIONS[:5]))
    other_spelling = lines.replace("sit", "Sit").replace(",", ";")  # of a person, a spreadsheet
    train(uneven, tmp_path / "run", given(other_spelling))
    held = json.loads((tmp_path / "run/config.json").read_text())["data"]["class_weights"]
    weights = np.array(list(map(float, held)))
    assert weights / weights[0] == pytest.approx([1, 2, 3, 4, 5])
    rows = uneven.split("train")
    rows = rows[uneven.status[uneven.positions(rows)] == 1]
    assert weights[uneven.labels[uneven.positions(rows)]].mean() == pytest.approx(1)
    for text, message in (
        (lines.replace("sit", "sitting"), "lacks class 'sit'"),
        (lines + "swim,1\n", "has no class here: 'swim'"),
        (lines + "jump,1\n", "is not `class,weight` with a new class"),
        (lines.replace("run,2", "run,0"), "'run,0' is not `class,weight`"),
        (lines.replace("run,2", "run,nan"), "'run,nan' is not `class,weight`"),
        (lines.replace("run,2", "run"), "'run' is not `class,weight`"),
    ):
        with pytest.raises(UserError, match=message):
            train(uneven, tmp_path / "other", given(text))
    with pytest.raises(UserError, match="class_sampling 'even' is unknown: give balanced"):
        replace(RECIPE, class_sampling="even")
    with pytest.raises(UserError, match="did you mean balanced"):
        train(uneven, tmp_path / "other", replace(RECIPE, class_weights="balance"))


def test_epochs_are_judged_by_mean_average_precision(several: Store, tmp_path: Path) -> None:
    summary = train(several, tmp_path / "run", BEST)
    found = summary.validation
    assert found is not None
    by_epoch = {r["epoch"]: r["validation"]["mAP"] for r in read_metrics(tmp_path / "run")}
    best = max(by_epoch, key=lambda epoch: by_epoch[epoch])
    assert found["mAP"] == by_epoch[found["kept_epoch"]] == by_epoch[best]
    assert found["last_mAP"] == by_epoch[summary.epochs]
    assert "top1" not in found


def test_cross_validation_resumes_with_what_its_parts_found(several: Store, tmp_path: Path) -> None:
    first = train(several, tmp_path / "run", BEST, asked="held-out")
    assert first.validation is not None
    assert first.validation["source"] == CROSS
    head = (tmp_path / "run/head.safetensors").read_bytes()
    (tmp_path / "run/head.safetensors").unlink()
    again = train(several, tmp_path / "run", BEST, asked="held-out", resume=True)
    assert again.validation == first.validation
    assert (tmp_path / "run/head.safetensors").read_bytes() == head


def test_parts_have_every_class(several: Store) -> None:
    rows = several.split("train")
    parts = dealt(several, rows, 4, 1)
    counts = np.bincount(parts[parts >= 0])
    assert counts.max() - counts.min() <= 1
    shown = several.shown(rows)
    of_rarest = np.bincount(parts[shown[:, shown.sum(0).argmin()]], minlength=4)
    assert of_rarest.max() - of_rarest.min() <= 1


def test_a_gain_is_weighed_by_its_error_over_classes() -> None:
    shown = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    nothing = torch.zeros(4)
    good = JudgedLabels(shown.double(), shown, nothing)
    bad = JudgedLabels(-shown.double(), shown, nothing)
    assert (good.quality, bad.quality < 60) == (100, True)
    more, error = good.won(bad)
    assert more == pytest.approx(4 * (100 - bad.quality) / 100)
    assert 0 <= error < more
    assert bad.won(good)[0] == -more
    joined = Judgement.joined([good, bad])
    assert isinstance(joined, JudgedLabels)
    assert joined.videos == 8
    (back,) = Judgement.from_tensors(Judgement.to_tensors([good]))
    assert isinstance(back, JudgedLabels)
    assert back.quality == 100
    one = Judged(torch.tensor([True, False]), torch.ones(2))
    (back_one,) = Judgement.from_tensors(Judgement.to_tensors([one]))
    assert isinstance(back_one, Judged)
    assert (back_one.top1, back_one.loss) == (50, 1)


def test_a_result_holds_every_score(several: Store, tmp_path: Path) -> None:
    result = evaluate(several, None)
    file = save_result(result, tmp_path, {"clip001": "videos/clip001.mp4"})
    value = json.loads(file.read_text())
    assert value["measure"] == "mAP"
    assert value["mean_ap"] == value["mean"] == value["per_split"][0]["mean_ap"]
    assert (value["top1"], value["fusion"]) == (None, "cosine")
    assert read_result(file).number == value["mean_ap"]
    other = tmp_path / "top1.json"
    other.write_text(json.dumps({**value, "measure": None, "top1": 50.0, "per_split": []}))
    unlike = {d.name: d for d in differences(read_result(file), read_result(other))}
    assert (unlike["measure"].of_a, unlike["measure"].of_b) == ("mean_ap", "top1")
    assert unlike["measure"].decisive
    base = file.name.removesuffix(".json")
    scores = np.load(tmp_path / "eval" / f"{base}.scores.npz")
    again = mean_average_precision(scores["val"], scores["val_shown"])
    assert again == pytest.approx(value["mean_ap"])
    rows = list(
        csv.DictReader((tmp_path / "eval" / f"{base}.videos.csv").open(encoding="utf-8-sig"))
    )
    assert len(rows) == value["n_listed"] == 80
    (failed,) = [row for row in rows if row["reason"]]
    assert failed["key"] == "clip003"
    at = {key: n for n, key in enumerate(scores["val_keys"].tolist())}
    for row in rows:
        if row["reason"]:
            continue
        truth = np.flatnonzero(scores["val_shown"][at[row["key"]]])
        assert row["true_classes"] == "; ".join(ACTIONS[c] for c in truth)
        order = np.argsort(-scores["val"][at[row["key"]]])
        assert [row[f"class_{k}"] for k in range(1, 6)] == [ACTIONS[c] for c in order]
        places = {int(c): place for place, c in enumerate(order.tolist(), start=1)}
        assert row["ranks"] == "; ".join(str(places[int(c)]) for c in truth)
    assert rows[0]["path"] == "videos/clip001.mp4"
    classes = list(
        csv.DictReader((tmp_path / "eval" / f"{base}.per-class.csv").open(encoding="utf-8-sig"))
    )
    assert np.mean([float(row["ap"]) for row in classes]) == pytest.approx(
        value["mean_ap"], abs=1e-3
    )
    assert not list((tmp_path / "eval").glob("*confusion*"))
    picture = tmp_path / "eval" / f"{base}.per-class.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert answer_files(file)["per_class_picture"] == picture
    save_result(
        replace(result, details=tuple(replace(d, best=None) for d in result.details)), tmp_path
    )
    assert not picture.exists()  # it would be that of an earlier measurement


def test_protocols_of_one_class_a_video_are_refused(several: Store) -> None:
    with pytest.raises(UserError, match="protocol halfclass needs one class a video"):
        evaluate_store(
            several, None, protocol="halfclass", dataset="toy",
            tests=[TestSet("all", several.rows)],
        )  # fmt: skip


def test_the_loss_of_both_passes_takes_several_classes(several: Store) -> None:
    head = method("mote").head(HEAD, 5)
    head.reset_parameters(torch.Generator().manual_seed(0))
    head.take_several_classes(-3.0)
    features = torch.randn(6, 4, 16)
    labels = torch.from_numpy(shown_of(6)).to(torch.uint8)
    draw = head.draw(torch.Generator().manual_seed(1))
    texts = torch.randn(5, 16)
    terms = head.training_loss(
        features, labels, texts, torch.tensor(2.0), draw, None, RECIPE.loss_weights
    )
    passes = head.training_pass(features, texts, draw)
    expected = mote_loss(
        passes, features, labels, torch.tensor(2.0).exp(), logit_bias=torch.tensor(-3.0)
    )
    torch.testing.assert_close(terms.total, expected.total)
    terms.total.backward()
    assert head.logit_bias is not None
    assert head.logit_bias.grad is not None
