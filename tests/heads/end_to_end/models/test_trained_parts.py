"""Which part of the model is trained, and gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featstore.errors import UserError
from heads.end_to_end import EndToEndModel
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.models.trained_parts import trained_blocks
from heads.training.config import TrainConfig
from heads.training.schedule import build_optimizer
from tests.support.worlds.tiny_towers import DRAW, class_embeddings, clips, tiny_model, tiny_tower

AFTER = {"ln_post.weight", "ln_post.bias", "proj"}


def trained_of(model: EndToEndModel) -> set[str]:
    return {name for name, p in model.image_tower.named_parameters() if p.requires_grad}


def block_names(*numbers: int) -> set[str]:
    prefixes = tuple(f"transformer.resblocks.{number}." for number in numbers)
    names = (name for name, _ in tiny_tower().named_parameters())
    return {name for name in names if name.startswith(prefixes)}


def test_parts_of_a_vision_transformer() -> None:
    everything = {name for name, _ in tiny_tower().named_parameters()}
    expected = {
        "tower": everything,
        "head": set(),
        "tower-last-1": block_names(2) | AFTER,
        "tower-last-2": block_names(1, 2) | AFTER,
        "tower-last-3": block_names(0, 1, 2) | AFTER,
    }
    for train, names in expected.items():
        model = tiny_model(train=train)
        assert trained_of(model) == names
        assert model.trained == train
        assert model.logit_scale.requires_grad
        assert all(p.requires_grad for p in model.head.parameters())


def test_the_pooling_of_coca_comes_after_its_blocks() -> None:
    names = trained_of(tiny_model("coca", train="tower-last-1"))
    rest = {name for name in names if not name.startswith("transformer.resblocks.2.")}
    assert rest > AFTER
    assert {name.split(".")[0] for name in rest} == {"attn_pool", "ln_post", "proj"}


@pytest.mark.parametrize("train", ["tower", "head", "tower-last-1"])
def test_what_is_frozen_stays_and_costs_nothing(train: str) -> None:
    model = tiny_model(train=train)
    config = TrainConfig(lr=1e-2, logit_scale_lr_ratio=0.5, weight_decay=0.2)
    optimizer = build_optimizer(model.head, model.tower_parameters(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.training_loss(*clips(), class_embeddings(), DRAW).total.backward()
    optimizer.step()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
        assert (parameter in optimizer.state) == (name not in frozen), name
        assert torch.equal(parameter, before[name]) == (name in frozen), name
    tower, head = optimizer.param_groups
    assert tower["params"][-1] is model.logit_scale
    assert len(tower["params"]) == len(trained_of(model)) + 1
    assert len(head["params"]) == len(list(model.head.parameters()))
    assert (tower["lr"], head["lr"]) == (5e-3, 1e-2)
    assert tower["weight_decay"] == head["weight_decay"] == 0.2


def test_a_frozen_tower_runs_without_gradients() -> None:
    frames, _ = clips()
    assert tiny_model().encode(frames).requires_grad
    assert tiny_model(train="tower-last-1").encode(frames).requires_grad
    assert not tiny_model(train="head").encode(frames).requires_grad


@pytest.mark.parametrize(
    ("kind", "train", "message"),
    [
        ("vit", "tower-last-4", "has 3 blocks; choose tower-last-1 to tower-last-3"),
        ("vit", "tower-last-0", "unknown: .*choose tower, head, both-towers or tower-last-N"),
        ("vit", "tower-last-", "unknown"),
        ("vit", "tower-last--1", "unknown"),
        ("vit", "all", "unknown"),
        ("resnet", "tower-last-1", "a ModifiedResNet: single blocks"),
        ("timm", "tower-last-1", "a TimmModel: single blocks"),
    ],
)
def test_parts_that_a_tower_does_not_have(kind: str, train: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_model(kind, train=train)
    if message.startswith("unknown"):
        with pytest.raises(UserError, match=message):
            FinetuneConfig(train=train)


def test_blocks_are_in_order() -> None:
    tower: Any = tiny_tower()
    assert trained_blocks(tower) == list(tower.transformer.resblocks)
    assert trained_blocks(tower, 2) == list(tower.transformer.resblocks)[1:]


def saved_bytes(model: EndToEndModel) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """(loss, gradients, bytes that the forward keeps for the backward beside the parameters)."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    frames, labels = clips(4, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        total = model.training_loss(frames, labels, class_embeddings(), DRAW).total
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return total.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        *((kind, train) for kind in ("vit", "coca", "timm") for train in ("tower", "head")),
        ("vit", "tower-last-2"),
        ("coca", "tower-last-2"),
    ],
)
def test_checkpointing_keeps_the_numbers_and_less_memory(kind: str, train: str) -> None:
    loss, gradients, memory = saved_bytes(tiny_model(kind, train=train))
    loss_again, gradients_again, less = saved_bytes(
        tiny_model(kind, train=train, checkpointing=True)
    )
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        again = gradients_again[name]
        assert again is gradient if gradient is None else torch.equal(again, gradient), name
    assert less == memory if train == "head" else less < 0.75 * memory


def test_checkpointing_where_there_is_none() -> None:
    with pytest.raises(UserError, match="ModifiedResNet, which cannot checkpoint"):
        tiny_model("resnet", checkpointing=True)
    tiny_model("resnet", train="head", checkpointing=True)  # nothing is kept anyway


def test_the_memory_of_a_step_is_foreseen() -> None:
    """Of one frame; a step of four clips of four frames keeps about sixteen times as much."""
    foreseen = {
        train: tiny_model(train=train).kept_bytes() for train in ("tower", "tower-last-1", "head")
    }
    assert foreseen["tower"] > foreseen["tower-last-1"] > foreseen["head"] == 0
    assert tiny_model(checkpointing=True).kept_bytes() < 0.75 * foreseen["tower"]
    kept = saved_bytes(tiny_model())[2] - saved_bytes(tiny_model(train="head"))[2]
    assert 0.7 * kept < 16 * foreseen["tower"] < 1.3 * kept
