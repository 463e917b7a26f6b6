"""Scores, protocols and what an evaluation says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore import Store, UserError
from heads import HeadConfig, TemporalHead, TrainConfig, build_head, load_head, train_head
from heads.evaluation.evaluate import evaluate_store
from heads.evaluation.protocols.choose import PROTOCOLS, TestSet, build_test_sets, views_of
from heads.evaluation.protocols.half_class import half_class_accuracy
from heads.evaluation.results import EvalResult
from heads.reporting.figures import tradeoff_plot
from heads.scoring.scores import (
    BlockScores,
    Scoring,
    fuse_views,
    percent,
    predict_scores,
    ranks,
    view_cosines,
)
from heads.scoring.view_summaries import ViewSummaries
from tests.support.stores.action_store import ACTIONS, action_store


def evaluate(store: Store, head: TemporalHead | None, **changes: Any) -> EvalResult:
    arguments: dict[str, Any] = {
        "protocol": "zeroshot",
        "dataset": "toy",
        "tests": build_test_sets(PROTOCOLS["zeroshot"], store),
        "device": "cpu",
    }
    return evaluate_store(store, head, **(arguments | changes))


@pytest.mark.parametrize("case", range(3))
def test_half_class_protocol(golden: Path, case: int) -> None:
    data = np.load(golden / f"halfclass_{case}.npz")
    result = half_class_accuracy(
        torch.from_numpy(data["vis"]), torch.from_numpy(data["text"]), data["labels"]
    )
    np.testing.assert_allclose(result.split_top1, data["split_top1"], atol=1e-4)
    np.testing.assert_allclose(result.split_top5, data["split_top5"], atol=1e-4)
    pairs = (
        (result.mean_top1, "top1_mean"),
        (result.std_top1, "top1_std"),
        (result.mean_top5, "top5_mean"),
        (result.std_top5, "top5_std"),
        (result.full_top1, "full_top1"),
        (result.full_top5, "full_top5"),
    )
    for value, key in pairs:
        assert value == pytest.approx(float(data[key]), abs=1e-4), key


def test_half_class_needs_enough_classes() -> None:
    with pytest.raises(UserError, match="needs at least 5"):
        half_class_accuracy(torch.randn(20, 1, 8), torch.randn(8, 8), torch.arange(20) % 8)


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 12))
def test_ranks_agree_with_sorting(seed: int, videos: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (videos, classes), generator=generator).double()  # many ties
    labels = torch.randint(0, classes, (videos,), generator=generator)
    order = scores.argsort(dim=1, descending=True, stable=True)
    expected = (order == labels[:, None]).int().argmax(1)
    assert torch.equal(ranks(scores, labels), expected)


def test_views_are_fused_as_named() -> None:
    views = torch.randn(3, 4, 8)
    classes = torch.randn(6, 8)
    cosines = torch.nn.functional.cosine_similarity(views[:, :, None], classes, dim=-1)
    block = BlockScores(ViewSummaries(None, views, views), classes, classes)

    def scores(fusion: Any) -> torch.Tensor:
        return block.scores(Scoring(fusion, modulate=False))

    softmax = cosines.double().softmax(-1).mean(1)
    torch.testing.assert_close(scores("softmax"), softmax, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores("cosine"), cosines.double().mean(1), atol=1e-6, rtol=0)
    assert torch.equal(fuse_views(cosines, "cosine"), cosines.double().mean(1))
    mean = torch.nn.functional.cosine_similarity(
        views.mean(1)[:, None].double(), classes.double(), dim=-1
    )
    torch.testing.assert_close(scores("features"), mean, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="fusion 'sum'"):
        scores("sum")


def test_views_are_scored_one_by_one(tmp_path: Path) -> None:
    head = build_head(HeadConfig(dim=8, layers=1), torch.eye(6, 8))
    features = torch.randn(3, 2, 4, 8)
    classes = torch.randn(6, 8)
    got = view_cosines(head, features, classes)
    for video in range(3):
        for view in range(2):
            with torch.no_grad():
                alone = head(features[video, view][None], classes)[0]
            torch.testing.assert_close(got[video, view], alone, atol=1e-6, rtol=0)


def test_counts_and_accuracy(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", views=6, crops=3, failed=(3, 8), noise=0.1)
    result = evaluate(store, None)
    assert (result.n_listed, result.n_evaluated, result.n_failed) == (40, 38, 2)
    assert result.top1 == result.top5 == 100.0
    assert result.views == views_of(store) == "2x3"
    assert result.frames == 8
    assert result.kind == "mean"
    assert not result.modulate
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {"protocol", "dataset", "head", "views", "sampling", "prompt_set"} <= value.keys()
    assert {"encoder_fingerprint", "mean", "std", "modulate", "list_hash"} <= value.keys()
    assert value["per_split"] == [
        {
            "split": "all",
            "n_listed": 40,
            "n_evaluated": 38,
            "n_failed": 2,
            "top1": 100.0,
            "top5": 100.0,
            "n_classes": 8,
        }
    ]


def test_accuracy_is_what_one_counts_by_hand(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", views=3, noise=4.0)
    result = evaluate(store, None)
    text = store.class_text("mote28").embeddings
    ok = np.flatnonzero(store.status == 1)
    features = store.features(store.rows[ok]).astype(np.float64)
    video = features.mean(2)
    cosine = (video / np.linalg.norm(video, axis=-1, keepdims=True)) @ text.T
    best = np.exp(cosine).__truediv__(np.exp(cosine).sum(-1, keepdims=True)).mean(1).argmax(1)
    assert result.top1 == pytest.approx(100 * np.mean(best == store.labels[ok]))
    assert 0 < result.top1 < 100


def test_numbered_test_lists_are_averaged_and_rows_counted_once(tmp_path: Path) -> None:
    names = ("train1", "test1", "test2", "test3")
    store = action_store(tmp_path / "toy.zarr", split_names=names, noise=4.0)
    tests = list(build_test_sets(PROTOCOLS["zeroshot"], store))
    assert [test.name for test in tests] == ["test1", "test2", "test3"]
    more = np.concatenate([tests[2].rows, tests[0].rows[:4]])  # they may overlap
    result = evaluate(store, None, tests=[*tests[:2], TestSet("test3", more)])
    assert [split.n_listed for split in result.per_split] == [10, 10, 14]
    assert result.n_listed == 30
    top1 = [split.top1 for split in result.per_split]
    assert len(set(top1)) > 1
    assert result.top1 == result.mean == pytest.approx(np.mean(top1))
    assert result.std == pytest.approx(np.std(top1))
    assert [test.name for test in build_test_sets(PROTOCOLS["zeroshot"], store, "test2")] == [
        "test2"
    ]


def test_closeset_takes_val_then_test(tmp_path: Path) -> None:
    a = action_store(tmp_path / "a.zarr", split_names=("train", "val", "test"))
    assert [test.name for test in build_test_sets(PROTOCOLS["closeset"], a)] == ["val"]
    b = action_store(tmp_path / "b.zarr", split_names=("train", "test"))
    assert [test.name for test in build_test_sets(PROTOCOLS["closeset"], b)] == ["test"]
    assert [test.name for test in build_test_sets(PROTOCOLS["closeset"], b, "train")] == ["train"]
    c = action_store(tmp_path / "c.zarr", split_names=("everything",))
    with pytest.raises(UserError, match=r"has everything.*--split"):
        build_test_sets(PROTOCOLS["closeset"], c)
    with pytest.raises(UserError, match="choose one of train, test"):
        build_test_sets(PROTOCOLS["closeset"], b, "val")


def trained(store: Store, run: Path) -> TemporalHead:
    train_head(
        store,
        run,
        HeadConfig(dim=16, layers=1, experts=2),
        TrainConfig(epochs=2, lr=1e-3, batch_size=16, frames=4),
        rows=store.split("train"),
        prompt_set="mote28",
        device="cpu",
    )
    return load_head(run)


def test_a_trained_head_uses_its_own_frames_and_prompts(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", noise=3.0)
    head = trained(store, tmp_path / "run")
    result = evaluate(
        store, head, protocol="closeset", tests=build_test_sets(PROTOCOLS["closeset"], store)
    )
    assert result.frames == 4
    assert result.prompt_set == "mote28"
    assert result.modulate
    assert result.n_classes_trained == 8
    features = torch.from_numpy(store.features(store.split("val"), [0, 2, 4, 6])).float()
    ok = store.status[store.positions(store.split("val"))] == 1
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    cosines = view_cosines(head, features[ok], text)
    labels = torch.from_numpy(store.labels[store.positions(store.split("val"))][ok]).long()
    assert result.top1 == percent(ranks(fuse_views(cosines), labels) < 1)
    assert evaluate(store, head, frames=8).frames == 8


def test_head_and_store_must_fit(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    head = trained(store, tmp_path / "run")
    other = action_store(tmp_path / "b.zarr", encoder_fingerprint="ffff", encoder="ViT-L-14/x")
    with pytest.raises(UserError, match=r"ViT-B-32/random \(weights 0123.*ViT-L-14/x \(weights ff"):
        evaluate(other, head)
    wide = action_store(tmp_path / "c.zarr", dim=32)
    with pytest.raises(UserError, match=r"width 16, but c\.zarr holds width 32"):
        evaluate(wide, head)
    renamed = action_store(tmp_path / "d.zarr", class_names=[*ACTIONS[:7], "swim"])
    with pytest.raises(UserError, match="--zeroshot"):
        evaluate(renamed, head, protocol="closeset")
    assert evaluate(renamed, head).n_classes_trained == 7
    with pytest.raises(UserError, match="1x1 views, but 4x3 were asked for"):
        evaluate(store, head, views="4x3")
    with pytest.raises(UserError, match="but none was extracted"):
        evaluate(store, head, tests=[TestSet("broken", np.array([3]))])
    with pytest.raises(UserError, match="prompt set 'video'"):
        evaluate(store, head, prompt_set="video")


def test_fewer_than_five_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = action_store(tmp_path / "toy.zarr", classes=4)
    head = trained(store, tmp_path / "run")
    with pytest.raises(UserError, match=r"4 tested and 4 training classes.*--no-modulate"):
        evaluate(store, head)
    result = evaluate(store, head, modulate=False)
    assert result.top5 is None
    assert result.per_split[0].top5 is None
    json.dumps(result.to_json(), allow_nan=False)
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    features = torch.from_numpy(store.features(store.rows[:1]))[0]
    scores = predict_scores(head, features, text, store.class_names)
    assert "modulation is off" in caplog.text
    assert {name for name, _ in scores} == set(store.class_names)


def test_prediction_scores_are_probabilities_best_first(tmp_path: Path) -> None:
    head = build_head(HeadConfig(dim=16, kind="mean"), logit_scale=20.0)
    classes = torch.nn.functional.normalize(torch.randn(6, 16), dim=-1)
    features = classes[2].expand(2, 4, 16) + 0.1 * torch.randn(2, 4, 16)
    scores = predict_scores(head, features, classes, list("abcdef"))
    assert scores[0][0] == "c"
    assert sum(score for _, score in scores) == pytest.approx(1.0)
    assert [score for _, score in scores] == sorted((s for _, s in scores), reverse=True)
    with pytest.raises(UserError, match="name at least one class"):
        predict_scores(head, features, classes[:0], [])


def test_tradeoff_picture(tmp_path: Path) -> None:
    rows = [
        {"head": "mean", "modulated": False, "closeset_top1": 55.0, "zeroshot_top1": 86.0},
        {"head": "transformer", "modulated": False, "closeset_top1": 83.0, "zeroshot_top1": 66.0},
        {"head": "mote", "modulated": False, "closeset_top1": 84.0, "zeroshot_top1": 76.0},
        {"head": "mote", "modulated": True, "closeset_top1": 84.0, "zeroshot_top1": 86.0},
    ]
    tradeoff_plot(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    tradeoff_plot(rows, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<svg") == 1
    with pytest.raises(UserError, match=r"neither \.png nor \.svg"):
        tradeoff_plot(rows, tmp_path / "a.txt")
    with pytest.raises(UserError, match="no result"):
        tradeoff_plot([], tmp_path / "a.png")
