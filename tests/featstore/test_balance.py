"""Balanced orders, class weights and counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from featstore.balance import (
    Balance,
    balanced_order,
    class_counts,
    members_of,
    weights_by_rule,
)
from featstore.batches.loader import FeatureLoader
from heads.methods.classification import classification_loss

LABELS = np.repeat([0, 1, 2, 4], [50, 9, 3, 1])  # class 3 has no videos
NAMES = ("many", "some", "few", "none", "one")


def test_every_class_comes_equally_often_and_so_does_every_video_of_a_class() -> None:
    members = members_of(LABELS)
    assert [len(of_class) for of_class in members] == [50, 9, 3, 1]
    order = balanced_order(members, 63, np.random.default_rng(1))
    counts = class_counts(LABELS[order], 5)
    assert sorted(counts.tolist()) == [0, 15, 16, 16, 16]
    for of_class in members:
        times = np.bincount(order, minlength=63)[of_class]
        assert times.max() - times.min() <= 1
    drawn = [balanced_order(members, 63, np.random.default_rng((1, e))) for e in range(40)]
    assert set(np.concatenate(drawn).tolist()) == set(range(63))  # no video is left out for ever
    again = balanced_order(members, 63, np.random.default_rng((1, 7)))
    assert again.tolist() == drawn[7].tolist() != drawn[8].tolist()


def test_a_set_smaller_than_its_classes_is_drawn_too() -> None:
    members = members_of(np.arange(6))
    order = balanced_order(members, 4, np.random.default_rng(0))
    assert len(set(order.tolist())) == 4


def test_several_classes_come_equally_often_and_videos_without_one_are_kept() -> None:
    shown = np.array([[1, 0], [1, 0], [1, 0], [1, 1], [0, 0], [1, 0]])
    members = members_of(shown)
    assert [of_class.tolist() for of_class in members] == [[0, 1, 2, 3, 5], [3], [4]]
    order = balanced_order(members, 300, np.random.default_rng(0))
    assert np.count_nonzero(order == 4) == 100
    assert np.count_nonzero(order == 3) == 120  # all of its class, and a fifth of the other


def test_a_loader_gives_balanced_epochs_that_any_step_can_begin() -> None:
    features = torch.arange(len(LABELS)).half()[:, None, None, None].expand(-1, 1, 4, 3)
    shape = {"batch_size": 8, "frames": 2, "seed": 3}
    loader = FeatureLoader(features, LABELS, **shape, balanced=True)
    batches = list(loader.epoch(2))
    assert sum(len(batch.labels) for batch in batches) == len(LABELS)
    labels = torch.cat([batch.labels for batch in batches])
    assert sorted(class_counts(labels.numpy(), 5).tolist()) == [0, 15, 16, 16, 16]
    for batch in batches:
        assert batch.labels.tolist() == LABELS[batch.samples].tolist()
        assert batch.features[:, 0, 0].tolist() == batch.samples.tolist()
    for mine, whole in zip(loader.epoch(2, start=3), batches[3:], strict=True):
        assert torch.equal(mine.features, whole.features)
    plain = [b.samples.tolist() for b in FeatureLoader(features, LABELS, **shape).epoch(2)]
    order = np.random.default_rng((3, 2, 0)).permutation(len(LABELS))  # as it always was
    assert [at for batch in plain for at in batch] == order.tolist()


def test_labels_of_several_classes_travel_with_their_samples() -> None:
    shown = np.random.default_rng(0).integers(0, 2, (20, 3))
    loader = FeatureLoader(torch.zeros(20, 1, 4, 3).half(), shown, batch_size=6, frames=2, seed=0)
    for batch in loader.epoch(0):
        assert batch.labels.dtype == torch.uint8
        assert batch.labels.tolist() == shown[batch.samples].tolist()


def test_weights_count_as_repeated_videos_would() -> None:
    """Class 2 three times as heavy: the loss and its gradient are those of a set with it thrice."""
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    cosines = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    weights = torch.tensor([1.0, 1.0, 3.0])
    weighted = classification_loss(cosines, labels, 10.0, None, weights / weights[labels].mean())
    (gradient,) = torch.autograd.grad(weighted, cosines)
    repeated = [0, 1, 2, 2, 2, 3, 4, 5]
    plain = functional.cross_entropy(10.0 * cosines[repeated], labels[repeated])
    (expected,) = torch.autograd.grad(plain, cosines)
    torch.testing.assert_close(weighted, plain)
    torch.testing.assert_close(gradient, expected)


def test_weights_of_several_classes_count_as_repeated_terms_of_shown_classes() -> None:
    shown = torch.tensor([[1, 0], [0, 0], [1, 1]])
    cosines = torch.tensor([[0.1, -0.2], [0.3, 0.2], [-0.1, 0.4]])
    loss = classification_loss(cosines, shown, 10.0, torch.tensor([-1.0]), torch.tensor([1.0, 5.0]))
    p = (10 * cosines - 1).sigmoid()
    terms = -torch.where(shown.bool(), p.log() * torch.tensor([1.0, 5.0]), (1 - p).log())
    torch.testing.assert_close(loss, terms.sum(1).mean())


@pytest.mark.parametrize("rule", ["balanced", "sqrt"])
def test_rules_of_weights(rule: str) -> None:
    weights = weights_by_rule(LABELS, 5, rule)
    assert weights[LABELS].mean() == pytest.approx(1)
    power = 1 if rule == "balanced" else 0.5
    assert weights[1] / weights[0] == pytest.approx((50 / 9) ** power)
    assert weights[4] / weights[2] == pytest.approx(3**power)
    several = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = weights_by_rule(several, 3, rule)
    assert found.tolist() == pytest.approx([(1 / 3) ** power, 3**power, 1])


def test_counts_say_how_uneven_a_set_is() -> None:
    found = Balance.of(LABELS, NAMES)
    assert (found.classes, found.without_videos) == (4, 1)
    assert (found.most, found.most_class, found.least, found.least_class) == (50, "many", 1, "one")
    assert (found.median, found.ratio) == (6, 50)
    assert found.words == ("4 with 1 to 50 videos, median 6, ratio 50.0; 1 without videos")
    assert Balance.of(np.array([0, 1, 1, 0]), ("a", "b")).words == "2 with 2 videos each"
    several = Balance.of(np.array([[1, 0], [1, 1]]), ("a", "b"))
    assert several.classes_per_video == 1.5
    assert "1.5 classes a video" in several.words
    assert "classes_per_video" not in found.to_json()
