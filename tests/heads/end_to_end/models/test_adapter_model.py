"""Adapters on both towers as one model that trains: the same numbers whatever is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from heads import build_head
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.models import adapter_model
from heads.end_to_end.models.adapter_model import AdapterModel, adapter_head_config, guided_model
from heads.methods.msta.config import MstaConfig
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.prompts import as_prompt_set
from tests.support.worlds.tiny_world import CLIP, WORDS, make_encoder

FRAMES = torch.randn(5, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 5, 1, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("clip"))


def model_of(
    folder: Path, prompts: str = "video", checkpointing: bool = False, **changes: Any
) -> tuple[AdapterModel, Encoder]:
    encoder = load_encoder(folder, "fp32")
    given = {"first": 1, "last": 1, "width": 8, "scale": 0.1, **changes}
    config = adapter_head_config(MstaConfig(dim=32, **given), FinetuneConfig(frames=4), encoder)
    classes = torch.zeros(len(WORDS), 32)
    head = build_head(config, classes, generator=torch.Generator().manual_seed(0))
    named = WORDS, as_prompt_set(prompts)
    scale = torch.tensor(4.6)
    model = guided_model(encoder, head, scale, *named, checkpointing=checkpointing).model
    model.train()
    return model, encoder


def step(model: AdapterModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = model.training_loss(FRAMES, LABELS, torch.zeros(len(WORDS), 32), None)
    losses.total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [float(value.detach()) for value in losses], gradients


def test_what_is_kept_changes_no_gradient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, gradients = step(model_of(folder, "mote28")[0])
    monkeypatch.setattr(adapter_model, "SENTENCES_KEPT", 7)
    monkeypatch.setattr(adapter_model, "CLIPS_AT_ONCE", 2)
    for again in (False, True):
        losses, others = step(model_of(folder, "mote28", again)[0])
        assert losses == pytest.approx(usual, rel=1e-5)
        assert others.keys() == gradients.keys()
        for name, value in others.items():
            assert torch.allclose(value, gradients[name], rtol=1e-3, atol=1e-5), name


def test_adapters_alone_are_trained(folder: Path) -> None:
    model, _ = model_of(folder)
    _, gradients = step(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == gradients.keys()
    assert all(name.startswith("head.adapters.") for name in trained)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert model.tower_parameters() == []
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert held == model.towers.config.parameters


@pytest.mark.parametrize("prompts", ["video", "mote28"])
def test_class_texts_are_those_of_the_tower_with_adapters(folder: Path, prompts: str) -> None:
    model, encoder = model_of(folder, prompts, scale=0.0)
    wanted = encoder.class_embeddings(WORDS, prompts)
    with torch.no_grad():
        found = model.class_embeddings(wanted)
    assert torch.allclose(found, wanted, atol=1e-6)
    other, _ = model_of(folder, prompts)
    with torch.no_grad():
        assert not torch.allclose(other.class_embeddings(wanted), wanted, atol=1e-3)


def test_the_second_loss_can_be_turned_off(folder: Path) -> None:
    on, gradients = step(model_of(folder)[0])
    off, others = step(model_of(folder, alpha=0.0)[0])
    assert on[2] > 0 == off[2]
    assert off[0] == off[1] == pytest.approx(on[1])
    name = "head.adapters.text_adapter.1.up.weight"
    assert not torch.allclose(gradients[name], others[name], atol=1e-6)


def test_steps_lower_the_loss_and_draw_texts_near_descriptions(folder: Path) -> None:
    model, _ = model_of(folder, alpha=50.0)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    found = []
    for _ in range(15):
        losses, _ = step(model)
        optimizer.step()
        optimizer.zero_grad()
        found.append(losses)
    assert found[-1][0] < found[0][0]
    assert found[-1][2] < found[0][2]


def test_a_step_from_tokens_is_the_step_from_pixels(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "clip", text_cfg={**CLIP["text_cfg"], "layers": 2})
    model, _ = model_of(folder, first=2, last=2)
    pixels, gradients = step(model)
    model.zero_grad()
    kept = model.towers.tokens_before(FRAMES)
    losses = model.training_loss(kept, LABELS, torch.zeros(len(WORDS), 32), None)
    losses.total.backward()
    assert [float(value.detach()) for value in losses] == pixels
    for name, value in gradients.items():
        assert torch.equal(value, model.get_parameter(name).grad), name  # type: ignore[arg-type]
    for wrong in (kept[..., :16], kept[:0], kept.long(), kept[:, :, 0, :, None, None]):
        with pytest.raises(ValueError, match=r"tokens|frames"):
            model.encode(wrong)
