"""The tables and the picture beside a result: every video, every class, every confusion."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore import Store
from featstore.files.tables import csv_rows
from heads import EvalResult, TestSet, evaluate_many, evaluate_store, predict_scores, save_result
from heads.compatibility import mean_head
from heads.evaluation.answers import answer_files
from heads.evaluation.details import (
    ClassSummary,
    Confusion,
    NotEvaluated,
    SplitDetail,
    class_outcomes,
    confusions,
    merged,
)
from heads.evaluation.protocols.choose import PROTOCOLS, build_test_sets
from heads.scoring.scores import Scoring
from tests.support.stores.action_store import action_store

# As they may stand in a list: a formula, accents, a comma, other letters, a bell, a long name.
NAMES = ("=HYPERLINK(1)", "café à emporter", "cut, chop", "跳舞", "ring \x07 \u202ebell")
NAMES += ("Pretending to put something that is very long into something else", "@home", "-run")
TESTS = ("test1", "test2", "rest")


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        return list(csv.DictReader(text))


def made(path: Path, **options: Any) -> tuple[Store, EvalResult]:
    settings: dict[str, Any] = {"noise": 6.0, "views": 3, "split_names": TESTS}
    store = action_store(path / "toy.zarr", **settings, class_names=NAMES)
    tests = build_test_sets(PROTOCOLS["zeroshot"], store)
    given = {"protocol": "zeroshot", "dataset": "toy", "tests": tests, "device": "cpu"}
    return store, evaluate_store(store, None, **(given | options))


def test_a_row_for_every_video_of_every_test_set(tmp_path: Path) -> None:
    store, result = made(tmp_path)
    paths = {key: f"vidéos/{key}, a.mp4" for key in store.keys} | {"clip004": "=cmd.mp4"}
    file = save_result(result, tmp_path / "run", paths)
    raw = answer_files(file)["videos"].read_bytes()
    assert raw.startswith(b"\xef\xbb\xbfkey,path,split,true_class,correct,rank,class_1,score_1,")
    header, *cells = csv_rows(raw)
    rows = [dict(zip(header, row, strict=True)) for row in cells]
    assert Counter(row["split"] for row in rows) == {"test1": 14, "test2": 13}
    shown = [name.replace("\x07", "\\x07").replace("\u202e", "\\u202e") for name in NAMES]
    for part in result.per_split:
        own = {row["key"]: row for row in rows if row["split"] == part.split}
        assert len(own) == part.n_listed
        right = [row for row in own.values() if row["correct"] == "yes"]
        assert 100 * len(right) / part.n_evaluated == pytest.approx(part.top1)
        among = [row for row in own.values() if row["rank"] and int(row["rank"]) <= 5]
        assert 100 * len(among) / part.n_evaluated == pytest.approx(part.top5)
    for row in rows:
        number = int(row["key"].removeprefix("clip"))
        assert row["path"] == paths[row["key"]]
        assert row["true_class"] == shown[number % 8]
        if number == 3:
            assert (row["correct"], row["rank"], row["class_1"], row["score_5"]) == ("",) * 4
            assert row["reason"] == "no video stream"
            continue
        said = [row[f"class_{k}"] for k in range(1, 6)]
        assert len(set(said)) == 5
        assert row["reason"] == ""
        assert (row["correct"] == "yes") == (said[0] == row["true_class"]) == (row["rank"] == "1")
        if int(row["rank"]) <= 5:
            assert said.index(row["true_class"]) == int(row["rank"]) - 1
    defused = [line for line in raw.decode("utf-8-sig").splitlines() if line.startswith("clip004")]
    assert defused[0].startswith("clip004,'=cmd.mp4,test2,")
    assert b"'=HYPERLINK(1)" in raw
    assert b"\x07" not in raw


def test_a_score_is_the_confidence_of_predict(tmp_path: Path) -> None:
    """The same numbers as `predict`, for the classes that evaluation puts first."""
    store, result = made(tmp_path)
    head = mean_head(16, store.provenance.logit_scale)
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    names = [str(label) for label in range(8)]
    for part in result.details:
        assert part.best is not None
        assert part.confidences is not None
        assert (part.best[:, 0] == part.predicted).all()
        for key, best, sure in zip(part.keys, part.best, part.confidences, strict=True):
            features = torch.from_numpy(store.features(np.array([store.row(key)]))).float()[0]
            expected = dict(predict_scores(head, features, text, names))
            assert sure == pytest.approx([expected[str(label)] for label in best])
            assert 0 < sum(sure) <= 1 + 1e-9


@pytest.mark.parametrize("fusion", ["softmax", "cosine", "features"])
def test_scores_of_one_view_fall_with_the_rank(tmp_path: Path, fusion: str) -> None:
    store = action_store(tmp_path / "toy.zarr", noise=6.0)
    tests = [TestSet("few", store.rows[store.labels < 3], np.arange(3)), TestSet("all", store.rows)]
    result = evaluate_store(
        *(store, None),
        protocol="zeroshot",
        dataset="toy",
        tests=tests,
        fusion=fusion,  # type: ignore[arg-type]
        device="cpu",
    )
    assert [part.best.shape[1] for part in result.details if part.best is not None] == [3, 5]
    for part in result.details:
        assert part.confidences is not None
        assert (np.diff(part.confidences, axis=1) <= 0).all()
    few = result.details[0].confidences
    assert few is not None
    assert few.sum(1) == pytest.approx(1)  # three candidates, all of them named
    rows = table(answer_files(save_result(result, tmp_path))["videos"])
    assert {(row["class_4"], row["score_5"]) for row in rows if row["split"] == "few"} == {("", "")}


def test_classes_and_confusions_agree_with_the_arrays(tmp_path: Path) -> None:
    _, result = made(tmp_path)
    file = save_result(result, tmp_path / "run")
    files = answer_files(file)
    assert list(files) == ["videos", "per_class", "confusion", "confusion_picture"]
    assert files["confusion_picture"].read_bytes().startswith(b"\x89PNG")
    with np.load(file.with_suffix(".confusion.npz")) as data:
        counts = data["test1"] + data["test2"]
    header, *cells = csv_rows(files["confusion"].read_bytes())
    shown = [name.replace("\x07", "\\x07").replace("\u202e", "\\u202e") for name in NAMES]
    assert header[1:] == [row[0] for row in cells] == shown
    assert [[int(cell) for cell in row[1:]] for row in cells] == counts.tolist()
    for part in result.details:
        own = [row for row in table(files["per_class"]) if row["split"] == part.split]
        wrong = part.confusion()
        np.fill_diagonal(wrong, 0)
        for row, line in zip(own, wrong, strict=True):
            assert int(row["n_confused"]) == line.max()
            assert (row["most_confused_with"] == "") == (line.max() == 0)
        assert sum(int(row["n_failed"]) for row in own) == len(part.failed)


def test_a_sweep_keeps_no_answers_and_none_of_an_earlier_measurement(tmp_path: Path) -> None:
    store, result = made(tmp_path)
    file = save_result(result, tmp_path / "run")
    head = mean_head(16, store.provenance.logit_scale)
    (swept,) = evaluate_many(
        *(store, head, [Scoring(modulate=False)]),
        protocol="zeroshot",
        dataset="toy",
        tests=build_test_sets(PROTOCOLS["zeroshot"], store),
        device="cpu",
    )
    assert swept == result
    assert save_result(swept, tmp_path / "run") == file
    assert list(answer_files(file)) == ["per_class"]


def detail(true: list[int], said: list[int], **more: Any) -> SplitDetail:
    """Five classes; whoever is not right has its class at rank 5."""
    labels, predicted = np.array(true), np.array(said)
    places = np.where(labels == predicted, 0, 4)
    keys = tuple(f"v{n}" for n in range(len(true)))
    return SplitDetail("a", np.arange(5), labels, predicted, places, keys, **more)


def test_outcomes_worked_out_by_hand() -> None:
    part = detail([0, 0, 0, 1, 1, 3], [0, 2, 2, 1, 1, 0], failed=(NotEvaluated("x", 4, "gone"),))
    found = {outcome.name: outcome for outcome in class_outcomes(part, "abcde")}
    assert (found["a"].videos, found["a"].top1, found["a"].top5) == (3, pytest.approx(100 / 3), 100)
    assert (found["a"].taken_for, found["a"].times) == ("c", 2)
    assert (found["b"].top1, found["b"].taken_for, found["b"].times) == (100, None, 0)
    assert (found["c"].videos, found["c"].top1, found["c"].top5) == (0, None, None)
    assert (found["e"].failed, found["d"].failed) == (1, 0)
    assert confusions(part, "abcde") == [Confusion("a", "c", 2, 3), Confusion("d", "a", 1, 1)]
    both = merged([part, replace(part, split="b")])
    assert confusions(both, "abcde", 1) == [Confusion("a", "c", 4, 6)]
    summary = ClassSummary.of([part], "abcde")
    assert [outcome.name for outcome in summary.best_classes] == ["b", "a", "d"]
    assert (summary.classes_tested, summary.worst_classes) == (3, ())


def test_the_best_and_the_worst_of_many_classes() -> None:
    """Class k of 20 has k + 1 videos, of which k % 4 are right."""
    true = [k for k in range(20) for _ in range(k + 1)]
    said = [k if i < k % 4 else 0 for k in range(20) for i in range(k + 1)]
    labels, predicted = np.array(true), np.array(said)
    part = SplitDetail(
        *("a", np.arange(20), labels, predicted, np.where(labels == predicted, 0, 1)),
        tuple(map(str, range(len(true)))),
    )
    summary = ClassSummary.of([part], [f"class {k}" for k in range(20)])
    assert summary.classes_tested == 20
    # Class 0 is always right; then 3 of 4, 2 of 3, 1 of 2, 3 of 8.
    assert [found.label for found in summary.best_classes] == [0, 3, 2, 1, 7]
    assert [found.label for found in summary.worst_classes] == [16, 12, 8, 4, 17]
    times = [(c.name, c.taken_for, c.times, c.videos) for c in summary.confusions]
    assert times[:2] == [("class 16", "class 0", 17, 17), ("class 17", "class 0", 17, 18)]
