"""The model of end-to-end training: what it computes, what it takes over, what it refuses."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.errors import UserError
from heads.end_to_end import EndToEndModel
from heads.methods.head import build_head
from heads.methods.mote.config import HeadConfig
from heads.methods.mote.losses import mote_loss
from heads.training.config import TrainConfig
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import load_encoder
from tests.support.golden.checks import golden_draw, gradient_error, tensor, whole_model
from tests.support.worlds.tiny_towers import (
    CLASSES,
    DIM,
    DRAW,
    SIZE,
    class_embeddings,
    clips,
    tiny_model,
    tiny_tower,
)

KINDS = ("vit", "resnet", "coca", "timm")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tower_trains_with_the_head(kind: str) -> None:
    model = tiny_model(kind)
    frames, labels = clips()
    terms = model.training_loss(frames, labels, class_embeddings(), DRAW)
    expected = terms.expert + 0.5 * terms.merged + 0.1 * terms.feature
    torch.testing.assert_close(terms.total, expected)
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    config = TrainConfig(lr=1e-5, logit_scale_lr_ratio=0.1)
    build_optimizer(model.head, model.tower_parameters(), config).step()
    assert model.training_loss(frames, labels, class_embeddings(), DRAW).total < terms.total


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_head_on_what_the_encoder_gives(kind: str) -> None:
    model = tiny_model(kind).eval()
    frames, _ = clips()
    output = tiny_tower(kind)(frames.flatten(0, 1))
    features = (output[0] if isinstance(output, tuple) else output).view(3, 2, DIM)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(frames), features, rtol=0, atol=1e-5)
        assert features.norm(dim=-1).sub(1).abs().min() > 1e-3  # not normalised
        for modulate in (True, False):
            expected = model.head(model.encode(frames), class_embeddings(), modulate)
            assert torch.equal(model(frames, class_embeddings(), modulate), expected)
    assert expected.shape == (3, CLASSES)


def test_the_tower_of_a_loaded_encoder_becomes_trainable_float32(
    golden: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for precision in ("fp32", "bf16"):
        caplog.clear()
        encoder = load_encoder(golden / "clip_0_openai_state.pt", precision=precision)
        head = build_head(HeadConfig(dim=encoder.dim, layers=1))
        with caplog.at_level(logging.WARNING):
            model = EndToEndModel(encoder.image_tower, head, encoder.logit_scale)
        assert ("bfloat16" in caplog.text) == (precision == "bf16")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in model.parameters())
        assert model.logit_scale.exp().item() == pytest.approx(encoder.logit_scale)


def test_the_logit_scale_is_a_multiplier_or_clips_parameter() -> None:
    head = build_head(HeadConfig(dim=DIM, layers=1))
    for given in (50.0, torch.tensor(math.log(50)), torch.nn.Parameter(torch.tensor([3.912023]))):
        model = EndToEndModel(tiny_tower(), head, given)
        assert isinstance(model.logit_scale, torch.nn.Parameter)
        assert model.logit_scale.shape == ()
        assert model.logit_scale.item() == pytest.approx(math.log(50))
        assert model.logit_scale is not given  # the caller's stays as it is
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="multiplier"):
            EndToEndModel(tiny_tower(), head, wrong)
    with pytest.raises(ValueError, match="one number"):
        EndToEndModel(tiny_tower(), head, torch.zeros(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_computes_the_same_in_training(kind: str) -> None:
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.image_tower.state_dict().items()}
    frames, _ = clips()
    together = model.train().encode(frames)
    assert not model.image_tower.training
    alone = torch.cat([model.encode(frame[None]) for frame in frames])
    torch.testing.assert_close(alone, together)  # no statistics of the batch
    torch.testing.assert_close(model.eval().encode(frames), together)
    for name, value in model.image_tower.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_a_head_the_tower_trains_alone() -> None:
    model = tiny_model(head={"kind": "mean"})
    terms = model.training_loss(*clips(), class_embeddings(), DRAW)
    torch.testing.assert_close(terms.total, 1.5 * terms.expert)
    optimizer = build_optimizer(model.head, model.tower_parameters(), TrainConfig())
    terms.total.backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups][1] == 0


def test_subsets_of_the_samples_choose_experts() -> None:
    model = tiny_model(head={"routing": "subset"})
    frames, labels = clips()
    with pytest.raises(ValueError, match="needs data subsets"):
        model.training_loss(frames, labels, class_embeddings(), DRAW)
    subsets = torch.tensor([0, 1, 0])
    terms = model.training_loss(frames, labels, class_embeddings(), DRAW, subsets)
    assert terms.total.isfinite()


def test_weights_turn_terms_off() -> None:
    model = tiny_model()
    off = {"expert_weight": 0.0, "merged_weight": 0.0}
    terms = model.training_loss(*clips(), class_embeddings(), DRAW, **off)
    torch.testing.assert_close(terms.total, 0.1 * terms.feature)
    terms.total.backward()
    assert model.logit_scale.grad == 0  # not None, for which processes would wait


def test_the_feature_loss_pulls_on_the_tower(golden: Path) -> None:
    """The authors' gradients hold for features that are not detached, and only for them."""
    data, model = whole_model(golden / "fullmodel_step_0.npz")
    frames, labels, text = (tensor(data[name]) for name in ("frames", "labels", "text"))
    draw = golden_draw(data, 0)
    model.training_loss(frames[0], labels[0], text, draw).total.backward()
    assert gradient_error(model, data) < 5e-6
    model.zero_grad()
    features = model.encode(frames[0])
    passes = model.head.training_pass(features, text, draw)
    scale = model.logit_scale.exp()
    mote_loss(passes, features.detach(), labels[0], scale).total.backward()
    assert gradient_error(model, data) > 1e-3


def test_biases_of_keys_have_no_gradient_but_rounding() -> None:
    """Softmax over keys does not see a shift of all of them: Adam's steps there are noise."""
    model = tiny_model()
    model.training_loss(*clips(), class_embeddings(), DRAW).total.backward()
    biases = [p for n, p in model.named_parameters() if n.endswith(("in_proj_bias", "qkv_bias"))]
    assert len(biases) == 3 + 2
    for bias in biases:
        query, key, value = bias.grad.chunk(3)
        assert key.abs().max() < 1e-4 * max(query.abs().max(), value.abs().max())


def test_tower_and_head_of_different_widths() -> None:
    head = build_head(HeadConfig(dim=32, layers=1))
    for kind in KINDS:
        with pytest.raises(UserError, match=r"width 24, the head takes 32"):
            EndToEndModel(tiny_tower(kind), head, 100.0)


_FRAMES, _LABELS = clips()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": _FRAMES[0]}, rf"\[B,T,3,{SIZE},{SIZE}\], not \[2,"),
        ({"frames": _FRAMES[:, :, :2]}, "must be"),
        ({"frames": _FRAMES[..., :16]}, "must be"),
        ({"frames": _FRAMES[:0], "labels": _LABELS[:0]}, "must be"),
        ({"frames": _FRAMES.to(torch.uint8)}, "preprocessed"),
        ({"frames": torch.zeros(3, 5, 3, SIZE, SIZE)}, "5 frames per view .* 4 positions"),
        ({"labels": _LABELS[:2]}, r"labels must be int64 \[3\]"),
        ({"labels": _LABELS.float()}, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, CLASSES])}, "label 7 is none of the 7 classes"),
        ({"labels": torch.tensor([0, -1, 1])}, "label -1 is none"),
        ({"class_embeddings": torch.zeros(CLASSES, DIM + 1)}, "class embeddings of shape"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(changed: dict[str, Any], message: str) -> None:
    model = tiny_model(head={"positions": 4})
    given = {"frames": _FRAMES, "labels": _LABELS, "class_embeddings": class_embeddings()}
    with pytest.raises(ValueError, match=message) as error:
        model.training_loss(**(given | changed), draw=DRAW)
    assert "\n" not in str(error.value)
    if "frames" in changed:
        with pytest.raises(ValueError, match=message):
            model(changed["frames"], class_embeddings())


def test_heads_alone_imports_nothing_of_pipeline_but_its_lists_of_names() -> None:
    """Annotations are text: what knows a pixel or an encoder stays away."""
    code = (
        "import heads, sys\n"
        "found = {m.split('.')[1] for m in sys.modules if m.startswith('pipeline.')}\n"
        "sys.exit(bool(found - {'annotations'}) or 'open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
