"""Everything that follows from one pass: modulation, candidates, fusion, ensemble, processes."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import heads.scoring.view_summaries
from featstore import Store, UserError
from heads import (
    EvalResult,
    HeadConfig,
    Scoring,
    TemporalHead,
    TestSet,
    TrainConfig,
    build_head,
    evaluate_many,
    evaluate_store,
    load_head,
    save_head,
    train_head,
)
from heads.evaluation.protocols.choose import PROTOCOLS, build_test_sets
from heads.methods.registry import method, names
from heads.scoring.scores import (
    BlockScores,
    best_classes,
    fuse_views,
    ranks,
    view_cosines,
    view_features,
)
from heads.scoring.view_summaries import summarise
from tests.support.stores.action_store import action_store

CLASSES = functional.normalize(
    torch.randn(12, 16, generator=torch.Generator().manual_seed(2)), dim=-1
)
TRAINED = functional.normalize(
    CLASSES[:9] + 0.05 * torch.randn(9, 16, generator=torch.Generator().manual_seed(3)), dim=-1
)
FEATURES = torch.randn(5, 3, 4, 16, generator=torch.Generator().manual_seed(1))


def lively_head(classes: torch.Tensor = TRAINED, **config: Any) -> TemporalHead:
    generator = torch.Generator().manual_seed(0)
    head = build_head(HeadConfig(dim=16, layers=2, **config), classes, generator=generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return head


def block(head: TemporalHead) -> BlockScores:
    return BlockScores(summarise(head, FEATURES), CLASSES, head.training_class_embeddings)


@pytest.mark.parametrize("fusion", ["softmax", "cosine", "features"])
@pytest.mark.parametrize("candidates", [None, [11, 0, 3, 4, 5, 7, 8]])
def test_scores_are_those_of_a_pass_with_these_classes(
    fusion: Any, candidates: list[int] | None
) -> None:
    head = lively_head()
    tested = CLASSES if candidates is None else CLASSES[candidates]
    number = None if candidates is None else torch.tensor(candidates)
    got = block(head).scores(Scoring(fusion), candidates=number)
    if fusion == "features":
        mean = view_features(head, FEATURES, tested).double().mean(1)
        expected = functional.normalize(mean, dim=-1) @ tested.double().T
    else:
        expected = fuse_views(view_cosines(head, FEATURES, tested), fusion)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    some = torch.tensor([3, 1])
    torch.testing.assert_close(
        block(head).scores(Scoring(fusion), some, number), expected[some], atol=1e-6, rtol=0
    )


def test_summaries_give_what_the_head_itself_gives() -> None:
    head = lively_head()
    for scoring, modulate in ((Scoring("cosine"), True), (Scoring("cosine", False), False)):
        with torch.no_grad():
            alone = torch.stack([head(view, CLASSES, modulate) for view in FEATURES.unbind(1)], 1)
        expected = alone.double().mean(1)
        torch.testing.assert_close(block(head).scores(scoring), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("neighbours", "temperature"), [(3, 0.05), (5, 0.5), (9, 0.01)])
def test_modulation_may_be_set_without_another_pass(neighbours: int, temperature: float) -> None:
    head = lively_head()
    other = lively_head(modulation_neighbours=neighbours, modulation_temperature=temperature)
    scoring = Scoring("cosine", True, neighbours, temperature)
    expected = view_cosines(other, FEATURES, CLASSES).double().mean(1)
    torch.testing.assert_close(block(head).scores(scoring), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(block(head).scores(Scoring("cosine")), expected, atol=1e-5)


def test_half_class_modulates_with_all_classes() -> None:
    head = lively_head()
    some = torch.tensor([1, 2, 4, 6, 9])
    got = block(head).scores(Scoring("cosine"), candidates=some, modulate_with_all=True)
    everything = block(head).scores(Scoring("cosine"))
    torch.testing.assert_close(got, everything[:, some], atol=1e-9, rtol=0)


@pytest.mark.parametrize("fusion", ["softmax", "cosine", "features"])
def test_the_ensemble_adds_cosines_of_frames(fusion: Any) -> None:
    head = lively_head()
    units = functional.normalize(FEATURES, dim=-1)
    clip = (units @ CLASSES.T).mean(2)  # [N,V,C]: a mean over frames of cosines
    own = view_cosines(head, FEATURES, CLASSES)
    if fusion == "features":
        mean = view_features(head, FEATURES, CLASSES).double().mean(1)
        head_score = functional.normalize(mean, dim=-1) @ CLASSES.double().T
        expected = 0.7 * head_score + 0.3 * clip.double().mean(1)
    else:
        expected = fuse_views(0.7 * own + 0.3 * clip, fusion)
    got = block(head).scores(Scoring(fusion, ensemble=0.3))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    alone = block(head).scores(Scoring(fusion))
    assert torch.equal(block(head).scores(Scoring(fusion, ensemble=0.0)), alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": 1.5}, "ensemble weight 1.5 is not between 0"),
        ({"fusion": "max"}, "fusion 'max' is unknown"),
        ({"modulation_neighbours": 0}, "modulation cannot use 0 neighbours"),
        ({"modulation_temperature": float("inf")}, "neighbours and temperature inf"),
    ],
)
def test_settings_that_make_no_score(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scoring(**options)


def test_settings_of_a_head() -> None:
    config = HeadConfig(dim=16, modulation_neighbours=7, modulation_temperature=0.1)
    assert Scoring.of_head(config) == Scoring("softmax", True, 7, 0.1)
    assert not Scoring.of_head(config, modulation_neighbours=0).modulate
    assert not Scoring.of_head(config, modulation_temperature=0).modulate
    assert not Scoring.of_head(HeadConfig(dim=16, kind="mean")).modulate
    off = HeadConfig(dim=16, modulation_neighbours=0)
    assert not Scoring.of_head(off).modulate
    assert Scoring.of_head(off, modulation_neighbours=5).modulate


@pytest.mark.parametrize("name", ["modulation_neighbours", "modulation_temperature"])
@pytest.mark.parametrize("kind", [name for name in names() if not method(name).modulated])
def test_settings_of_a_modulation_that_is_not_there(kind: str, name: str) -> None:
    """They would change nothing, so nobody can mean them."""
    config = method(kind).config(dim=16, **({"kind": kind} if kind == "mean" else {}))
    option = f"--{name.replace('_', '-')} changes nothing"
    with pytest.raises(UserError, match=f"{option} for .*, which has no modulation: leave it out"):
        Scoring.of_head(config, **{name: 1})
    with pytest.raises(UserError, match=f"{option} with --no-modulate: leave it out"):
        Scoring.of_head(HeadConfig(dim=16), modulate=False, **{name: 1})
    assert not Scoring.of_head(config, **{name: 0}).modulate


def everything(store: Store, head: TemporalHead, **options: Any) -> list[EvalResult]:
    scorings = [
        Scoring(fusion, ensemble=weight)
        for fusion, weight in itertools.product(("softmax", "cosine", "features"), (None, 0.5))
    ]
    tests = [
        *build_test_sets(PROTOCOLS["zeroshot"], store),
        TestSet("half", store.rows, np.arange(8), "all"),
    ]
    return evaluate_many(
        store, head, scorings, protocol="zeroshot", dataset="toy", tests=tests, **options
    )


def test_many_settings_cost_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = action_store(tmp_path / "toy.zarr", views=3, noise=4.0)
    head = lively_head(torch.from_numpy(store.class_text("mote28").embeddings))
    seen: list[int] = []
    temporal = TemporalHead.temporal

    def counted(self: TemporalHead, features: torch.Tensor) -> Any:
        seen.append(len(features))
        return temporal(self, features)

    monkeypatch.setattr(TemporalHead, "temporal", counted)
    monkeypatch.setattr(heads.scoring.view_summaries, "BATCH_FRAMES", 100)  # blocks of four videos
    results = everything(store, head, device="cpu")
    assert sum(seen) == 39 * 3  # every view once, failed ones never
    assert len(seen) == 10
    for result in results:
        alone = evaluate_store(
            store,
            head,
            protocol="zeroshot",
            dataset="toy",
            tests=build_test_sets(PROTOCOLS["zeroshot"], store),
            fusion=result.fusion,  # type: ignore[arg-type]
            ensemble=result.ensemble,
            device="cpu",
        )
        assert result.per_split[0] == alone.per_split[0]
    assert len({result.file_name for result in results}) == len(results)


def test_clip_features_of_another_store(tmp_path: Path) -> None:
    """A tuned tower's head with CLIP's own features of the same videos."""
    tuned = action_store(tmp_path / "tuned.zarr", noise=4.0, seed=1)
    raw = action_store(tmp_path / "raw.zarr", noise=4.0, seed=2, failed=(3, 11))
    alone = evaluate_of(raw, None, ensemble=1.0)
    mixed = evaluate_of(tuned, None, ensemble=1.0, clip_store=raw)
    assert mixed.per_split == alone.per_split
    assert (mixed.n_evaluated, mixed.n_failed, mixed.clip_store) == (38, 2, "raw.zarr")
    assert evaluate_of(tuned, None, ensemble=1.0).top1 != mixed.top1
    without = evaluate_of(tuned, None, clip_store=raw)
    assert (without.n_failed, without.clip_store) == (1, None)
    views = action_store(tmp_path / "views.zarr", views=3)
    with pytest.raises(UserError, match=r"has 3 views and tuned\.zarr 1"):
        evaluate_of(tuned, None, ensemble=0.5, clip_store=views)
    fewer = action_store(tmp_path / "fewer.zarr", samples=20)
    with pytest.raises(UserError, match="has no sample 'clip020'"):
        evaluate_of(tuned, None, ensemble=0.5, clip_store=fewer)
    names = action_store(tmp_path / "names.zarr", class_names=list("abcdefgh"))
    with pytest.raises(UserError, match="has other classes than"):
        evaluate_of(tuned, None, ensemble=0.5, clip_store=names)


def evaluate_of(store: Store, head: TemporalHead | None, **options: Any) -> EvalResult:
    return evaluate_store(
        *(store, head),
        protocol="zeroshot",
        dataset="toy",
        tests=build_test_sets(PROTOCOLS["zeroshot"], store),
        device="cpu",
        **options,
    )


SCRIPT = """
import json, sys
import torch
from featstore import open_store
from heads import load_head
from heads.training.ranks import together
from tests.heads.scoring.test_block_scores import everything
with together("cpu") as ranks:
    store, head = open_store(sys.argv[1]), load_head(sys.argv[2])
    results = everything(store, head, device="cpu", confident=True)
    out = [
        {**r.to_json(), "said": [[d.best.tolist(), d.confidences.tolist()] for d in r.details]}
        for r in results
    ]
    open(f"{sys.argv[3]}-{ranks.rank}.json", "w").write(json.dumps(out))
"""


def test_two_processes_count_every_video_once(tmp_path: Path) -> None:
    """37 usable videos do not divide by two: nothing is padded, repeated or left out."""
    store = action_store(tmp_path / "toy.zarr", samples=38, noise=4.0)
    head = lively_head(torch.from_numpy(store.class_text("mote28").embeddings))
    save_head(head, tmp_path / "head.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(store.path), str(tmp_path / "head.safetensors"), str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone = everything(store, head, device="cpu", confident=True)
    for result, value in zip(alone, first, strict=True):
        assert value["n_evaluated"] == 37
        assert [part["n_evaluated"] for part in value["per_split"]] == [37, 37]
        said = value.pop("said")
        assert value == json.loads(json.dumps(result.to_json()))
        for detail, (best, confidences) in zip(result.details, said, strict=True):
            assert detail.best is not None
            assert best == detail.best.tolist()
            assert detail.confidences is not None
            assert np.array(confidences) == pytest.approx(detail.confidences, abs=1e-5)


def test_the_best_classes_agree_with_the_ranks() -> None:
    """Whole numbers tie often: in a tie the class with the lower index is better."""
    scores = torch.randint(0, 4, (200, 9), generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 5, 9, 12):
        best = best_classes(scores, k)
        assert best.shape == (200, min(k, 9))
        for label in range(9):
            place = ranks(scores, torch.full((200,), label))
            at = (best == label).nonzero()
            assert (place[at[:, 0]] == at[:, 1]).all()
            assert len(at) == int((place < k).sum())


def test_a_head_of_another_text_tower_is_refused(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    train_head(
        *(store, tmp_path / "run", HeadConfig(dim=16, layers=1, experts=2)),
        TrainConfig(epochs=1, batch_size=16, frames=4),
        rows=store.split("train"),
        prompt_set="mote28",
        device="cpu",
    )
    head = load_head(tmp_path / "run")
    assert evaluate_of(store, head).top1 is not None
    with torch.no_grad():
        head.training_class_embeddings.copy_(head.training_class_embeddings.roll(1, 0))
    with pytest.raises(UserError, match=r"class text of '\w+' in prompt set mote28 is not the one"):
        evaluate_of(store, head)
    assert head.origin is not None
    head.origin = replace(head.origin, class_names=tuple("abcdefgh"))
    evaluate_of(store, head)  # no class in common: nothing to compare
