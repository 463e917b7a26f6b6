"""The heads that are fitted in one go: what they learn, and that they know no other classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from featstore import UserError, WorkError, open_store
from heads import HeadConfig, TestSet, build_head, evaluate_store, load_head, predict_scores
from heads.files.head_file import load_tensors, save_tensors
from heads.methods.head import Head
from heads.methods.knn import NeighbourConfig
from heads.methods.knn.model import LEAST, NEAREST_VOTE, TEMPERATURE, NeighbourHead
from heads.methods.linear import LinearConfig
from heads.methods.linear.model import SHARE_PENALTY, LinearHead
from heads.methods.own_classes import OwnClassesHead
from heads.methods.registry import method
from heads.training.config import TrainConfig
from heads.training.train_head import train_head
from tests.support.stores.action_store import ACTIONS, action_store

KINDS = ("linear", "knn")
DIM = 24


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def videos(texts: Tensor, each: int, seed: int, noise: float = 0.9) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of `each` videos a class, around the texts."""
    labels = torch.arange(len(texts)).repeat_interleave(each)
    around = texts[labels] + noise * units(len(labels), texts.shape[1], seed=seed)
    return functional.normalize(around, dim=-1), labels


def fitted(kind: str, texts: Tensor, embeddings: Tensor, labels: Tensor, **config: Any) -> Any:
    head = build_head(method(kind).config(dim=texts.shape[1], **config), texts)
    head.fit(embeddings, labels, 0)
    return head


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_texts_do_not_tell_apart_are_learnt(kind: str) -> None:
    looks = units(6, DIM, seed=1)
    head = fitted(kind, units(6, DIM, seed=2), *videos(looks, 12, seed=3))
    new, labels = videos(looks, 10, seed=4)
    assert accuracy(head.own_scores(new), labels) > 0.9
    assert accuracy(new @ head.training_class_embeddings.T, labels) < 0.5


def test_own_classes_are_found_as_a_person_reads_them() -> None:
    texts = units(3, DIM, seed=2)
    head = fitted("linear", texts, *videos(texts, 4, seed=3))
    own = ("brush hair", "caf\u00e9", "brush-hair 2")
    head.origin = SimpleNamespace(class_names=own)
    asked = ("Cafe\u0301", "brush_hair", "brush hair 2", "brush hair")
    head.require_classes(asked)
    scores = head.scorer(texts, asked)(texts)
    torch.testing.assert_close(scores, head.own_scores(texts)[:, [1, 0, 2, 0]])
    with pytest.raises(UserError, match="'sit' is not one of them"):
        head.require_classes((*own, "sit"))


@pytest.mark.parametrize("each", [1, 2, 3])
def test_few_videos_do_not_cost_what_clip_knows(each: int) -> None:
    gains = []
    for seed in range(5):
        texts = units(10, DIM, seed=seed)
        head = fitted("linear", texts, *videos(texts, each, seed=seed + 50, noise=1.3))
        new, labels = videos(texts, 20, seed=seed + 100, noise=1.3)
        gains.append(accuracy(head.own_scores(new), labels) - accuracy(new @ texts.T, labels))
    assert np.mean(gains) > -0.01


def test_the_linear_probe_is_where_its_loss_is_least() -> None:
    """Autograd finds no slope where the written-out gradients led."""
    texts, strength = units(5, DIM, seed=1), 0.01
    embeddings, labels = videos(units(5, DIM, seed=2), 8, seed=3)
    head = fitted("linear", texts, embeddings, labels, regularisation=strength)
    centre = embeddings.mean(0)
    length = (embeddings - centre).square().sum(1).mean().sqrt()
    scale = head.logit_scale.exp()

    # weight = share * scale * text + change / length, with the change that costs least
    def loss(weight: Tensor, bias: Tensor, share: Tensor) -> Tensor:
        change = (weight - share * scale * texts) * length
        offset = bias + (weight - share * scale * texts) @ centre
        fit = functional.cross_entropy(embeddings @ weight.T + bias, labels)
        size = change.square().sum() + offset.square().sum()
        return fit + (strength * size + SHARE_PENALTY * (share - 1).square()) / 2

    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    shares = torch.linspace(-1, 3, 4001)
    losses = torch.stack([loss(weight, bias, share) for share in shares])
    share = shares[losses.argmin()].clone().requires_grad_()
    found = loss(weight, bias, share)
    found.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.norm()) < 5e-3
    assert float(bias.grad.norm()) < 5e-3
    assert float(found.detach()) < float(loss(scale * texts, bias * 0, torch.ones(())).detach())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**16))
def test_neighbours_vote_as_counted_by_hand(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    known, asked = units(n, 4, seed=seed), units(3, 4, seed=seed + 1)
    labels = torch.randint(0, 5, (n,), generator=generator)
    head = fitted("knn", units(5, 4, seed=2), known, labels, neighbours=k)
    assert isinstance(head, NeighbourHead)
    for query, scores in zip(asked, head.own_scores(asked), strict=True):
        cosines = (known @ query).double()
        order = cosines.argsort(descending=True)[:k].tolist()
        weights = ((cosines - cosines.max()) / TEMPERATURE).exp()
        votes = torch.zeros(5, dtype=torch.float64)
        for label in range(5):
            own = weights[labels == label]
            votes[label] = NEAREST_VOTE * (own.max() if len(own) else 0)
            votes[label] += sum(float(weights[i]) for i in order if labels[i] == label)
        expected = (votes / votes.sum()).clamp(min=LEAST).log() / 100
        torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**16))
def test_the_share_of_a_class_is_what_the_neighbours_show_on_average(
    n: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    known, asked = units(n, 4, seed=seed), units(3, 4, seed=seed + 1)
    shown = (torch.rand(n, 5, generator=generator) < 0.4).long()
    head = build_head(NeighbourConfig(4, neighbours=k), units(5, 4, seed=2))
    head.take_several_classes(-3.0)
    head.fit(known, shown, 0)
    assert isinstance(head, NeighbourHead)
    for query, found in zip(asked, head.probabilities(head.own_scores(asked)), strict=True):
        cosines = (known @ query).double()
        near = cosines.argsort(descending=True)[:k]
        weights = ((cosines[near] - cosines.max()) / TEMPERATURE).exp()
        mean = (weights[:, None] * shown[near]).sum(0) / weights.sum()
        torch.testing.assert_close(found, mean, atol=2 * NEAREST_VOTE, rtol=0)
    everything = head.probabilities(head.own_scores(known[:1]))[0]
    if k == 1:  # the video itself is its nearest neighbour
        torch.testing.assert_close(everything, shown[0].double(), atol=2 * NEAREST_VOTE, rtol=0)


def test_the_number_of_neighbours_of_several_classes_has_the_least_loss() -> None:
    known, labels = videos(units(4, DIM, seed=1), 15, seed=2, noise=2.0)
    shown = functional.one_hot(labels, 4) | (torch.arange(60) % 3 == 0)[:, None].long()

    def fitted_on(rows: Tensor, **config: Any) -> Head:
        head = build_head(NeighbourConfig(DIM, **config), units(4, DIM, seed=3))
        head.take_several_classes()
        head.fit(known[rows], shown[rows], 0)
        return head

    losses = {}
    for k in (1, 3, 5, 10, 20, 50):
        losses[k] = 0.0
        for left_out in range(len(known)):
            alone = fitted_on(torch.arange(len(known)) != left_out, neighbours=k)
            assert isinstance(alone, NeighbourHead)
            found = alone.probabilities(alone.own_scores(known[left_out]))
            losses[k] += float(functional.binary_cross_entropy(found, shown[left_out].double()))
    chosen = fitted_on(torch.arange(len(known))).config.neighbours
    assert chosen == min(losses, key=lambda k: losses[k])
    assert chosen > 1


def test_the_number_of_neighbours_is_the_best_of_all_left_out_ones() -> None:
    known, labels = videos(units(4, DIM, seed=1), 15, seed=2, noise=2.0)
    texts = units(4, DIM, seed=3)
    head = fitted("knn", texts, known, labels)
    hits = {}
    for k in (1, 3, 5, 10, 20, 50):
        right = 0
        for left_out in range(len(known)):
            others = torch.arange(len(known)) != left_out
            alone = fitted("knn", texts, known[others], labels[others], neighbours=k)
            right += int(alone.own_scores(known[left_out]).argmax() == labels[left_out])
        hits[k] = right
    assert head.config.neighbours == max(hits, key=lambda k: hits[k])


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sets_have_finite_scores(kind: str) -> None:
    texts = units(3, DIM)
    one = fitted(kind, texts, units(1, DIM, seed=1), torch.tensor([1]))
    assert one.own_scores(units(1, DIM, seed=1)).argmax() == 1
    same = fitted(kind, texts, units(1, DIM).expand(4, DIM), torch.tensor([0, 0, 2, 2]))
    alone = fitted(kind, texts[:1], *videos(texts[:1], 3, seed=1))
    rare = fitted(kind, texts, units(101, DIM, seed=5), torch.tensor([0] * 100 + [1]))
    for head in (one, same, alone, rare):
        scores = head.own_scores(units(2, 4, DIM, seed=9))
        assert scores.shape == (2, 4, len(head.training_class_embeddings))
        assert scores.isfinite().all()


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Two trained heads of each kind, of the same seed."""
    store = action_store(tmp_path / "toy.zarr", samples=64, split_names=("train",), views=2)
    made = {}
    for kind in KINDS:
        for turn in "ab":
            made[kind + turn] = tmp_path / "heads" / f"{kind}{turn}"
            train_head(
                *(store, made[kind + turn], method(kind).config(dim=16), TrainConfig(frames=4)),
                rows=store.split("train")[:48],
                prompt_set="mote28",
                device="cpu",
            )
    return {"store": store.path, **made}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_head_is_evaluated_and_refuses_other_classes(
    kind: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    one, other = (runs[kind + turn] / "head.safetensors" for turn in "ab")
    assert one.read_bytes() == other.read_bytes()
    head = load_head(runs[kind + "a"])
    assert isinstance(head, OwnClassesHead)
    store = open_store(runs["store"])
    new = store.split("train")[48:]
    known: dict[str, Any] = {"dataset": "toy", "device": "cpu"}
    result = evaluate_store(store, head, protocol="closeset", tests=[TestSet("new", new)], **known)
    assert (result.top1, result.modulate, result.kind) == (100.0, False, kind)
    # Classes are found by their names, in any order and number.
    turned = action_store(
        tmp_path / "turned.zarr",
        samples=64,
        views=2,
        split_names=("train",),
        class_names=(*ACTIONS[4:], *ACTIONS[:4]),
    )
    asked = store.features(new[:1])[0]
    texts = torch.from_numpy(store.class_text("mote28").embeddings)
    first = predict_scores(head, torch.from_numpy(asked), texts, store.class_names)
    assert first[0][0] == store.class_names[int(store.labels[48])]
    assert sum(score for _, score in first) == pytest.approx(1)
    names = turned.class_names
    again = predict_scores(head, torch.from_numpy(asked), texts[[4, 5, 6, 7, 0, 1, 2, 3]], names)
    assert again[0] == (first[0][0], pytest.approx(first[0][1]))
    few = [0, int(store.labels[48])]
    subset = TestSet("few", new[np.isin(store.labels[48:], few)], np.unique(few))
    assert evaluate_store(store, head, protocol="zeroshot", tests=[subset], **known).top1 == 100
    words = "knows only the 8 classes .* 'swim' is not one of them: .* such as --head mean"
    with pytest.raises(UserError, match=words):
        predict_scores(head, torch.from_numpy(asked), texts[:1], ["swim"])
    strange = action_store(
        tmp_path / "strange.zarr", split_names=("train",), class_names=("swim", *ACTIONS[1:])
    )
    for protocol in ("zeroshot", "closeset"):
        with pytest.raises(UserError, match=words):
            evaluate_store(
                strange,
                head,
                protocol=protocol,
                tests=[TestSet("all", strange.split("train"))],
                **known,
            )


def test_what_is_fitted_starts_from_no_other_head(runs: dict[str, Path], tmp_path: Path) -> None:
    store = open_store(runs["store"])
    first = load_head(runs["lineara"])
    with pytest.raises(UserError, match="linear probe cannot be trained from another head's"):
        train_head(
            *(store, tmp_path / "run", first.config, TrainConfig()),
            rows=store.split("train"),
            prompt_set="mote28",
            initial=first,
        )


def test_damaged_labels_are_found_when_a_head_is_loaded(runs: dict[str, Path]) -> None:
    file = runs["knna"] / "head.safetensors"
    tensors, card = load_tensors(file)
    for wrong in (-1.0, 8.0, 1e9, 0.5):
        tensors["labels"][3] = wrong
        save_tensors(file, tensors, card)
        with pytest.raises(WorkError, match="is damaged: labels holds numbers"):
            load_head(file)
    card["head"]["videos"] = 10**9
    save_tensors(file, tensors, card)
    with pytest.raises(UserError, match="does not fit its own configuration"):
        load_head(file)  # and nothing of that size was made


def test_settings_that_make_no_sense_are_refused() -> None:
    for config in (LinearConfig, NeighbourConfig):
        with pytest.raises(UserError, match="modulation_neighbours is 5"):
            config(dim=4, modulation_neighbours=5)
    with pytest.raises(UserError, match="this head has no classes yet"):
        LinearHead(LinearConfig(dim=4), 0)(torch.zeros(1, 2, 4), torch.zeros(1, 4))
    assert HeadConfig(dim=4).kind == "mote"
