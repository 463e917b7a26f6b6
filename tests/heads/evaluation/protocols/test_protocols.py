"""Named protocols: what they say, which one a data set takes, and the test sets they make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore import Store, UserError
from heads import HeadConfig, TestSet, build_head, build_test_sets, evaluate_store
from heads.evaluation.protocols.choose import (
    PROTOCOLS,
    count_notes,
    known_dataset,
    listed_rows,
    protocol_named,
    usual_protocol,
)
from heads.evaluation.protocols.half_class import half_class_accuracy
from heads.evaluation.results import EvalResult
from heads.scoring.scores import view_features
from tests.support.stores.action_store import ACTIONS, action_store

OFFICIAL_TESTS = ("train1", "test1", "test2", "test3")


def evaluate(store: Store, name: str, **options: Any) -> EvalResult:
    protocol = PROTOCOLS[name]
    given = {"tests": build_test_sets(protocol, store), "dataset": "toy", "device": "cpu"}
    return evaluate_store(store, None, protocol=protocol, **(given | options))


def wide_store(path: Path, **options: Any) -> Store:
    """Twelve classes: half of them are enough for top-5."""
    names = [*ACTIONS, "clap", "dive", "golf", "hug"]
    return action_store(path, classes=12, class_names=names, samples=120, noise=5.0, **options)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_says_what_it_measures(name: str) -> None:
    protocol = protocol_named(name)
    value = json.loads(json.dumps(protocol.to_json(), allow_nan=False))
    for field in ("title", "trained_on", "test_list", "metric", "spread", "source", "prompts"):
        assert value[field], field
    assert value["name"] == name
    assert value["differences"]
    assert value["fusion"] in ("softmax", "cosine", "features")
    if protocol.dataset is not None:
        assert name.startswith(f"{protocol.dataset}-")
        assert value["expected"]
        assert known_dataset(protocol.dataset) == protocol.dataset


def test_the_published_counts() -> None:
    def counts(name: str) -> list[dict[str, int]]:
        return [dict(expected.counts) for expected in PROTOCOLS[name].expected]

    assert counts("ucf101-zeroshot-3splits") == [{"test1": 3783, "test2": 3734, "test3": 3696}]
    assert counts("hmdb51-zeroshot-3splits") == [dict.fromkeys(("test1", "test2", "test3"), 1530)]
    assert counts("hmdb51-zeroshot-full") == [{"all": 6766}, {"all": 5100}]
    assert counts("ucf101-halfclass-full") == [{"all": 13320}]
    assert counts("ucf101-halfclass-test1") == [{"test1": 3783}]
    assert {"val": 19877} in counts("k400-closeset-4x3")
    assert len(counts("k600-zeroshot-220")) == 5
    assert counts("ssv2-closeset-1x1") == [{"val": 24777}]
    assert counts("hmdb51-base-to-novel") == [{"base": 780, "novel": 750}]


def test_an_unknown_protocol_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'ucf-zeroshot' is unknown.*ucf101-zeroshot-3splits"):
        protocol_named("ucf-zeroshot")


@pytest.mark.parametrize(
    ("kind", "dataset", "options", "expected"),
    [
        ("closeset", "clips", {}, "closeset"),
        ("closeset", "k400", {"views": "4x3"}, "k400-closeset-4x3"),
        ("closeset", "Kinetics-400", {"views": "1x1"}, "k400-closeset-1x1"),
        ("closeset", "k400", {"views": "5x1"}, "closeset"),
        ("closeset", "k400", {"views": "4x3", "split": "test"}, "closeset"),
        ("closeset", "ssv2", {"views": "2x3"}, "ssv2-closeset-2x3"),
        ("zeroshot", "hmdb51", {"split_names": OFFICIAL_TESTS}, "hmdb51-zeroshot-3splits"),
        ("zeroshot", "HMDB-51", {"split_names": OFFICIAL_TESTS}, "hmdb51-zeroshot-3splits"),
        ("zeroshot", "hmdb51", {"split_names": ("train", "val")}, "hmdb51-zeroshot-full"),
        ("zeroshot", "ucf101", {"split": "test1"}, "zeroshot"),
        ("zeroshot", "clips", {}, "zeroshot"),
        ("zeroshot", "k600", {}, "k600-zeroshot-220"),
        ("fewshot", "ucf101", {}, "ucf101-fewshot"),
        ("fewshot", "clips", {}, "fewshot"),
        ("base-to-novel", "k400", {}, "k400-base-to-novel"),
    ],
)
def test_the_usual_protocol(
    kind: Any, dataset: str, options: dict[str, Any], expected: str
) -> None:
    assert usual_protocol(kind, dataset, **options).name == expected


def test_lists_of_a_protocol(tmp_path: Path) -> None:
    store = wide_store(tmp_path / "toy.zarr", split_names=OFFICIAL_TESTS)
    lists = {name: listed_rows(PROTOCOLS[name], store) for name in PROTOCOLS if "shot-" in name
             and PROTOCOLS[name].lists != "given"}  # fmt: skip
    assert list(lists["hmdb51-zeroshot-3splits"]) == ["test1", "test2", "test3"]
    assert {name: len(rows) for name, rows in lists["ucf101-zeroshot-full"].items()} == {"all": 120}
    (first,) = listed_rows(PROTOCOLS["ucf101-halfclass-test1"], store).values()
    assert first.tolist() == store.split("test1").tolist()
    with pytest.raises(UserError, match=r"is defined by its list.*leave --split out"):
        listed_rows(PROTOCOLS["ucf101-zeroshot-full"], store, "test1")
    plain = action_store(tmp_path / "plain.zarr")
    with pytest.raises(UserError, match="has the splits train, val: pack the data set with its"):
        listed_rows(PROTOCOLS["hmdb51-zeroshot-3splits"], plain)


def test_ten_test_lists_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"test{n}" for n in range(1, 12)]
    store = action_store(tmp_path / "toy.zarr", split_names=names)
    assert [test.name for test in build_test_sets(PROTOCOLS["zeroshot"], store)] == names


def test_half_class_is_the_released_protocol(tmp_path: Path) -> None:
    """Against `half_class_accuracy`, which the golden files check, modulation and all."""
    # Five splits of rows in turn and twelve classes in turn: every split has every class.
    names = (*OFFICIAL_TESTS, "test4")
    store = wide_store(tmp_path / "toy.zarr", split_names=names, failed=(), views=3)
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    head = build_head(HeadConfig(dim=16, layers=1), text[:9] + 0.3)
    for name, rows in (
        ("ucf101-halfclass-full", store.rows),
        ("ucf101-halfclass-test1", store.split("test1")),
    ):
        protocol = PROTOCOLS[name]
        result = evaluate_store(
            store,
            head,
            protocol=protocol,
            dataset="toy",
            tests=build_test_sets(protocol, store),
            device="cpu",
        )
        views = view_features(head, torch.from_numpy(store.features(rows)).float(), text)
        labels = store.labels[store.positions(rows)].astype(np.int64)
        expected = half_class_accuracy(views, text, labels)
        assert [part.top1 for part in result.per_split] == pytest.approx(expected.split_top1)
        assert [part.top5 for part in result.per_split] == pytest.approx(expected.split_top5)
        assert (result.mean, result.std) == pytest.approx((expected.mean_top1, expected.std_top1))
        assert (result.protocol, result.protocol_name, result.fusion) == (
            *("halfclass", name),
            "cosine",
        )
        assert [part.split for part in result.per_split] == [f"draw{s}" for s in range(10)]
        assert all(part.n_classes <= 6 for part in result.per_split)
        assert result.n_listed <= len(rows)


def test_half_class_needs_enough_classes(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    with pytest.raises(UserError, match="videos of 4 classes: the protocol needs at least 5"):
        build_test_sets(PROTOCOLS["halfclass"], store)


def test_candidates_of_a_test_set(tmp_path: Path) -> None:
    """Labels are numbered anew among the candidates, which stand in any order."""
    store = action_store(tmp_path / "toy.zarr", noise=4.0, failed=())
    rows = store.rows[np.isin(store.labels, (1, 3, 4, 5, 6))]
    classes = np.array([6, 1, 4, 3, 5])
    result = evaluate(store, "zeroshot", tests=[TestSet("some", rows, classes)])
    text = store.class_text("mote28").embeddings[classes]
    video = store.features(rows).astype(np.float64).mean((1, 2))
    best = classes[((video / np.linalg.norm(video, axis=1, keepdims=True)) @ text.T).argmax(1)]
    labels = store.labels[store.positions(rows)]
    assert result.top1 == pytest.approx(100 * np.mean(best == labels))
    assert 0 < result.top1 < 100
    assert result.n_classes == result.per_split[0].n_classes == 5
    assert result.top5 == 100.0
    (detail,) = result.details
    assert detail.predicted.tolist() == best.tolist()
    assert result.class_list_hash != result.class_names_hash
    full = evaluate(store, "zeroshot")
    assert full.class_list_hash == full.class_names_hash


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 1, 2, 3, 4], r"clip005 is of class 'wave', which is not among its 5 candidates"),
        ([0, 1, 2, 3, 4, 5, 6, 8], "label 8 is not among them"),
        ([0, 0, 1, 2, 3, 4, 5, 6, 7], "it names a class twice"),
    ],
)
def test_a_class_list_must_match(tmp_path: Path, classes: list[int], message: str) -> None:
    store = action_store(tmp_path / "toy.zarr")
    with pytest.raises(UserError, match=message):
        evaluate(store, "zeroshot", tests=[TestSet("some", store.rows, np.array(classes))])


def test_other_counts_than_published_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    protocol = PROTOCOLS["hmdb51-zeroshot-full"]
    assert count_notes(protocol, {"all": 5100})[1] == []
    assert "Open-VCLIP" in count_notes(protocol, {"all": 5100})[0][0]
    agreeing, notes = count_notes(protocol, {"all": 6700})
    assert not agreeing
    assert notes[0].startswith("all lists 6,700 videos, published lists have 6,766 (Text4Vis")
    mixed = count_notes(
        PROTOCOLS["k600-zeroshot-220"], {"split1": 14131, "split2": 14750, "split3": 7261}
    )
    assert mixed == ([], ["the lists have counts of different publications"])
    assert count_notes(PROTOCOLS["zeroshot"], {"all": 3}) == ([], [])
    store = action_store(tmp_path / "toy.zarr", split_names=OFFICIAL_TESTS)
    result = evaluate(store, "hmdb51-zeroshot-3splits")
    assert result.published_counts == []
    assert [note.split()[0] for note in result.notes] == ["test1", "test2", "test3", "1x1", "8"]
    assert result.notes[-1] == "8 classes, published with 51"
    assert "test2 lists 10 videos, published lists have 1,530 (official lists)" in caplog.text


def test_closeset_takes_the_split_of_any_views(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", views=6, crops=3, noise=3.0)
    result = evaluate(store, "closeset", tests=build_test_sets(PROTOCOLS["closeset"], store))
    assert (result.views, result.protocol_name, result.n_found) == ("2x3", "closeset", 20)
    assert "3 along the long side" in result.crop


def test_videos_in_no_split_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = action_store(tmp_path / "toy.zarr", split_names=("train", "val", "spare"))
    result = evaluate(store, "closeset", tests=build_test_sets(PROTOCOLS["closeset"], store))
    assert result.notes == []
    store._metadata = replace(store._metadata, split_names=("train", "val"))
    result = evaluate(store, "closeset", tests=build_test_sets(PROTOCOLS["closeset"], store))
    assert result.notes == ["13 of 40 videos are in no split: clip002, clip005, clip008, ..."]
    assert "13 of 40 videos are in no split" in caplog.text
    assert (
        evaluate(store, "zeroshot", tests=build_test_sets(PROTOCOLS["zeroshot"], store)).notes == []
    )


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("noisy") / "toy.zarr"
    return action_store(path, views=2, noise=6.0, samples=60, failed=(3, 8, 21))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 59), min_size=1),
            st.none() | st.permutations(range(8)).map(lambda order: order[:6]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["softmax", "cosine", "features"]),
    st.integers(8, 200),
)
def test_any_test_sets_give_what_a_plain_loop_counts(
    noisy: Store, chosen: list[tuple[list[int], list[int] | None]], fusion: Any, block: int
) -> None:
    """Lists that overlap, repeat videos and hold failed ones, with any candidates and blocks."""
    tests = []
    for number, (places, classes) in enumerate(chosen):
        rows = noisy.rows[places]
        candidates = None if classes is None else np.array(classes)
        if candidates is not None:
            rows = rows[np.isin(noisy.labels[places], candidates)]
        if len(set(places) - {3, 8, 21}) and np.any(noisy.status[noisy.positions(rows)] == 1):
            tests.append(TestSet(f"set{number}", rows, candidates))
    if not tests:
        return
    with mock.patch("heads.scoring.view_summaries.BATCH_FRAMES", block):
        result = evaluate(noisy, "zeroshot", tests=tests, fusion=fusion)
    for test, part, detail in zip(tests, result.per_split, result.details, strict=True):
        rows = np.unique(test.rows)
        classes = np.arange(8) if test.classes is None else test.classes
        text = noisy.class_text("mote28").embeddings[classes].astype(np.float64)
        hits, failed = [], 0
        for row in rows.tolist():
            if noisy.status[row] != 1:
                failed += 1
                continue
            views = noisy.features([row])[0].astype(np.float64).mean(1)
            if fusion == "features":
                views = views.mean(0, keepdims=True)
            cosine = (views / np.linalg.norm(views, axis=1, keepdims=True)) @ text.T
            score = np.exp(cosine) / np.exp(cosine).sum(1, keepdims=True)
            best = (score if fusion == "softmax" else cosine).mean(0).argmax()
            hits.append(classes[best] == noisy.labels[row])
        assert (part.n_listed, part.n_failed) == (len(rows), failed)
        assert part.n_evaluated == len(hits) == len(detail.keys)
        assert part.top1 == pytest.approx(100 * np.mean(hits))
    union = {row for test in tests for row in test.rows.tolist()}
    assert result.n_listed == len(union)
