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
from tests.support.worlds.tiny_world import CLIP, VICLIP, WORDS, make_encoder, make_viclip

FRAMES = torch.randn(5, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 5, 1, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("clip"))


def model_of(
    folder: Path | str,
    prompts: str = "video",
    checkpointing: bool = False,
    precision: str = "fp32",
    **changes: Any,
) -> tuple[AdapterModel, Encoder]:
    encoder = load_encoder(folder, "fp32")
    given = {"first": 1, "last": 1, "width": 8, "scale": 0.1, **changes}
    config = adapter_head_config(MstaConfig(dim=32, **given), FinetuneConfig(frames=4), encoder)
    classes = torch.zeros(len(WORDS), 32)
    head = build_head(config, classes, generator=torch.Generator().manual_seed(0))
    named = WORDS, as_prompt_set(prompts)
    scale = torch.tensor(4.6)
    joined: dict[str, Any] = {"checkpointing": checkpointing, "precision": precision}
    model = guided_model(encoder, head, scale, *named, **joined).model
    model.train()
    return model, encoder


def step(model: AdapterModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = model.training_loss(FRAMES, LABELS, torch.zeros(len(WORDS), 32), None)
    losses.total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [float(value.detach()) for value in losses], gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_changes_no_gradient(
    folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, gradients = step(model_of(folder, "mote28", precision=precision)[0])
    monkeypatch.setattr(adapter_model, "SENTENCES_KEPT", 7)
    monkeypatch.setattr(AdapterModel, "_at_once", 2)
    found = [step(model_of(folder, "mote28", again, precision)[0]) for again in (False, True)]
    # Computed twice, the numbers are the same; in other parts, their sums round otherwise.
    assert found[0][0] == found[1][0]
    rounding = 1e-5 if precision == "fp32" else 2**-7
    for losses, others in found:
        assert losses == pytest.approx(usual, rel=rounding)
        assert others.keys() == gradients.keys()
        for name, value in others.items():
            assert torch.equal(value, found[0][1][name]), name
            assert distance(value, gradients[name]) < 10 * rounding, name


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far a gradient is from another one, relative to its length."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


TWO_BLOCKS: dict[str, Any] = {"text_cfg": {**CLIP["text_cfg"], "layers": 2}}


@pytest.mark.parametrize("kind", ["clip", "viclip"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"form": "b"}, {"conv_padding": "repeat", "conv_class_token": True}, {"norm": False}],
)
def test_a_step_in_bfloat16_learns_what_one_in_float32_learns(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "clip":
        place: Path | str = make_encoder(tmp_path / "clip", **TWO_BLOCKS)
    else:
        monkeypatch.setitem(VICLIP["text_cfg"], "layers", 2)
        place = f"viclip:{make_viclip(tmp_path / 'v.safetensors')}"
    layers = {"first": 1, "last": 2, **changes}
    usual, wanted = step(model_of(place, **layers)[0])
    model, _ = model_of(place, precision="bf16", **layers)
    losses, found = step(model)
    assert losses != usual
    assert losses == pytest.approx(usual, rel=2**-6)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.dtype == model.get_parameter(name).dtype == torch.float32
        assert distance(gradient, wanted[name]) < 0.1, name


def test_a_run_in_bfloat16_ends_where_one_in_float32_ends(tmp_path: Path) -> None:
    """Loss, and accuracy on other clips, after 40 steps on dark, grey and bright clips."""
    folder = make_encoder(tmp_path / "clip", **TWO_BLOCKS)
    found: dict[str, tuple[float, float]] = {}
    labels = torch.arange(36) % 3
    noise = torch.randn(36, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    clips = 0.5 * noise + 2.0 * (labels - 1)[:, None, None, None, None]
    classes = torch.zeros(len(WORDS), 32)
    for precision in ("fp32", "bf16"):
        changes: dict[str, Any] = {"first": 1, "last": 2, "scale": 1.0, "alpha": 0.0}
        model, _ = model_of(folder, precision=precision, **changes)
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
        for _ in range(40):
            loss = model.training_loss(clips[:12], labels[:12], classes, None).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            cosines = model.eval()(clips[12:], model.class_embeddings(classes))
        right = (cosines.argmax(1) == labels[12:]).float().mean()
        found[precision] = float(loss.detach()), float(right)
    (loss_in_full, accuracy), (loss_in_low, other_accuracy) = found["fp32"], found["bf16"]
    assert loss_in_full < 1  # from 6.2
    assert loss_in_low == pytest.approx(loss_in_full, abs=0.2)
    assert accuracy > 0.85
    assert other_accuracy == pytest.approx(accuracy, abs=0.13)


class Held:
    """A tensor that is kept for the backward pass; `now` and `most` count bytes of all of them."""

    now = most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        Held.now += tensor.nbytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.tensor.nbytes


def test_a_step_in_bfloat16_keeps_one_clip_whatever_the_batch(folder: Path) -> None:
    def growth(precision: str, checkpointing: bool = False) -> int:
        """Bytes that five clips keep beyond those that one keeps."""
        most = []
        for clips in (1, 5):
            model, _ = model_of(folder, "video", checkpointing, precision)
            Held.now = Held.most = 0
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
                given = FRAMES[:clips], LABELS[:clips], torch.zeros(len(WORDS), 32)
                model.training_loss(*given, None)
            most.append(Held.most)
        return most[1] - most[0]

    usual = growth("fp32")
    assert usual > 0
    assert growth("bf16") < 0.1 * usual
    assert growth("bf16", checkpointing=True) < 0.1 * usual
    assert model_of(folder, precision="bf16")[0].kept_bytes() == 0


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_from_tokens_is_the_step_from_pixels(precision: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "clip", **TWO_BLOCKS)
    model, _ = model_of(folder, precision=precision, first=2, last=2)
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
