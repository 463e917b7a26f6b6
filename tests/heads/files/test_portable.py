"""Merged heads give the cosines of the heads they were made of, in torch and in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from featstore import UserError
from heads import HeadConfig, TemporalHead, build_head, load_head, save_head
from heads.files.portable import merged_head, save_onnx
from heads.methods.dist.head import DistHead
from heads.methods.head import Head
from heads.methods.taco.config import TacoConfig
from tests.support.golden.dist.model import clips_of, model_of, stored
from tests.support.golden.head import golden_head
from tests.support.worlds.tiny_towers import tiny_tower

DESIGNS = {
    "mote": HeadConfig(dim=24, layers=2, experts=3, attention_heads=2),
    "separate": HeadConfig(dim=24, layers=1, placement="separate"),
    "down": HeadConfig(dim=24, layers=1, placement="down", aggregation="outputs"),
    "transformer": HeadConfig(dim=24, layers=1, kind="transformer", positions=9),
    "plain": HeadConfig(dim=24, layers=1, modulation_neighbours=0),
    "three": HeadConfig(dim=24, layers=1, modulation_neighbours=3, modulation_temperature=0.2),
    "mean": HeadConfig(dim=24, kind="mean"),
}


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def lively(config: HeadConfig) -> TemporalHead:
    """A head whose experts, norms and fusion weights all show in its output."""
    generator = torch.Generator().manual_seed(3)
    head = build_head(config, unit(11, config.dim, 1), generator=generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3, generator=generator)
        for name, buffer in head.named_buffers():
            if name.endswith("fusion_logits"):
                buffer.normal_(generator=generator)
    return head


def cosines(head: Head, x: Tensor, classes: Tensor, modulate: bool) -> np.ndarray:
    with torch.no_grad():
        return head(x, classes, modulate=modulate).numpy()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_merged_head_is_the_same_head(design: str, tmp_path: Path) -> None:
    head = lively(DESIGNS[design])
    save_head(merged_head(head), tmp_path / "merged.safetensors")
    merged = load_head(tmp_path / "merged.safetensors")
    assert merged.config.experts <= 1
    x, classes = torch.randn(5, 8, 24, generator=torch.Generator().manual_seed(0)), unit(7, 24, 2)
    for modulate in (True, False):
        difference = cosines(merged, x, classes, modulate) - cosines(head, x, classes, modulate)
        assert np.abs(difference).max() <= 1e-6


@pytest.mark.parametrize("projection", [True, False])
def test_tacos_head_is_one_linear_map_for_other_programs(projection: bool, tmp_path: Path) -> None:
    """docs/methods.md: the named tensors of the file make one matrix and one vector."""
    generator = torch.Generator().manual_seed(3)
    head = build_head(TacoConfig(dim=24, projection=projection), unit(11, 24, 1))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3, generator=generator)
    save_head(merged_head(head), tmp_path / "taco.safetensors")
    with safe_open(tmp_path / "taco.safetensors", framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    matrix, vector = torch.eye(24), torch.zeros(24)
    if projection:
        b = held["projection.linear_B.weight"]
        matrix = matrix + b @ held["projection.linear_A.weight"]
        vector = b @ held["projection.linear_A.bias"] + held["projection.linear_B.bias"]
    save_onnx(head, tmp_path / "taco.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "taco.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "taco.onnx")
    for batch, frames, count in ((1, 1, 2), (3, 19, 40)):
        x, classes = torch.randn(batch, frames, 24, generator=generator), unit(count, 24, count)
        by_hand = functional.normalize(x.mean(1) @ matrix.T + vector, dim=-1) @ classes.T
        inputs = {"features": x.numpy(), "class_embeddings": classes.numpy()}
        (graph,) = session.run(None, {**inputs, "modulate": np.array(False)})
        for found in (by_hand.numpy(), graph):
            assert np.abs(found - cosines(head, x, classes, False)).max() <= 2e-6


def test_averaged_outputs_cannot_be_merged() -> None:
    head = build_head(HeadConfig(dim=8, layers=1, experts=2, aggregation="outputs"))
    with pytest.raises(UserError, match="no single network gives"):
        merged_head(head)


def test_the_file_needs_no_mote(golden: Path, tmp_path: Path) -> None:
    """docs/checkpoints.md: plain torch on the named tensors gives the authors' cosines."""
    data = np.load(golden / "head_3.npz")
    save_head(merged_head(golden_head(data, torch.float32)), tmp_path / "merged.safetensors")
    with safe_open(tmp_path / "merged.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["mote"])["head"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    x = torch.from_numpy(data["x"])
    h = x + tensors["transformer.positions"][: x.shape[1]]
    for layer in range(config["layers"]):
        block = {
            name.removeprefix(f"transformer.blocks.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"transformer.blocks.{layer}.")
        }

        def norm(h: Tensor, name: str, block: dict[str, Tensor] = block) -> Tensor:
            weight, bias = block[f"{name}.weight"], block[f"{name}.bias"]
            return functional.layer_norm(h, h.shape[-1:], weight, bias, eps=1e-12)

        mixed, _ = functional.multi_head_attention_forward(
            *[norm(h, "attention_norm").transpose(0, 1)] * 3,
            h.shape[-1],
            config["attention_heads"],
            block["attention.qkv_weight"],
            block["attention.qkv_bias"],
            None,
            None,
            False,
            0.0,
            block["attention.out_weight"],
            block["attention.out_bias"],
        )
        h = h + mixed.transpose(0, 1)
        inner = norm(h, "feed_forward_norm") @ block["feed_forward.up_weight"][0].T
        inner = inner + block["feed_forward.up_bias"][0]
        inner = inner * torch.sigmoid(1.702 * inner)
        outer = inner @ block["feed_forward.down_weight"][0].T
        h = h + outer + block["feed_forward.down_bias"][0]
    plain = functional.normalize((h + x).mean(1), dim=-1)
    classes = functional.normalize(torch.from_numpy(data["gen_cls"]), dim=-1)
    assert np.abs((plain @ classes.T).numpy() - data["logits_plain_f32"]).max() <= 1e-6


@pytest.mark.parametrize("design", DESIGNS)
def test_onnx_agrees_with_torch(design: str, tmp_path: Path) -> None:
    head = lively(DESIGNS[design])
    save_onnx(head, tmp_path / "head.onnx")
    model = onnx.load(tmp_path / "head.onnx")
    onnx.checker.check_model(model, full_check=True)
    note = json.loads({entry.key: entry.value for entry in model.metadata_props}["mote"])
    assert note["head"]["dim"] == 24
    assert note["logit_scale"] == pytest.approx(100.0)
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("features", ["batch", "frames", 24], "tensor(float)"),
        ("class_embeddings", ["classes", 24], "tensor(float)"),
        ("modulate", [], "tensor(bool)"),
    ]
    most = min(head.config.positions, 16)
    generator = torch.Generator().manual_seed(0)
    for batch, frames, count in ((1, 1, 5), (3, most, 400), (2, 8, 6), (2, 8, 2), (1, 8, 1)):
        x, classes = torch.randn(batch, frames, 24, generator=generator), unit(count, 24, count)
        for modulate in (True, False):
            (got,) = session.run(
                None,
                {
                    "features": x.numpy(),
                    "class_embeddings": classes.numpy(),
                    "modulate": np.array(modulate),
                },
            )
            if modulate and head.config.modulates and count < head.config.modulation_neighbours:
                assert np.isnan(got).all()
            else:
                assert np.abs(got - cosines(head, x, classes, modulate)).max() <= 1e-6


def test_a_head_with_too_few_classes_of_its_own(tmp_path: Path) -> None:
    """It cannot modulate, and its ONNX file says so instead of giving a number."""
    head = build_head(HeadConfig(dim=8, layers=1, positions=1), unit(4, 8, 1))
    save_onnx(head, tmp_path / "head.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    inputs = {"features": np.ones((2, 1, 8), np.float32), "class_embeddings": np.eye(8, dtype="f")}
    assert np.isnan(session.run(None, {**inputs, "modulate": np.array(True)})[0]).all()
    assert np.isfinite(session.run(None, {**inputs, "modulate": np.array(False)})[0]).all()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("heads.files.portable.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxscript.*mote-video\[export\]"):
        save_onnx(build_head(HeadConfig(dim=8, layers=1)), tmp_path / "head.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_head_that_looks_at_pixels_is_exported_with_its_tower(
    golden: Path, tmp_path: Path
) -> None:
    """One graph from frames to cosines: DiST's own, CLIP's, and any mixture."""
    data = stored(golden.with_name("golden_dist") / "dist_model_0.npz")
    model, _, _ = model_of(data)
    head = DistHead(model.config, 3)
    head.branch.load_state_dict(model.branch.state_dict())
    head.logit_scale.copy_(model.logit_scale.detach())
    file = tmp_path / "dist.onnx"
    save_onnx(head, file, model.image_tower)
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("frames", ["batch", 8, 3, 32, 32]),
        ("class_embeddings", ["classes", 32]),
        ("ensemble", []),
    ]
    frames = clips_of(data["video"], torch.float32)
    text = torch.from_numpy(data["text_features_f32"])
    scale = model.logit_scale.detach().exp()
    for batch, classes in ((1, 1), (2, len(text)), (2, 2), (5, 3)):
        pixels = frames.repeat(3, 1, 1, 1, 1)[:batch]
        with torch.no_grad():
            own = model(pixels, text[:classes]) / scale
            mixed = model.zero_shot_logits(pixels, text[:classes]) / scale
        for share, expected in ((0, own), (0.5, mixed), (1, 2 * mixed - own)):
            inputs = {
                "frames": pixels.numpy(),
                "class_embeddings": text[:classes].numpy(),
                "ensemble": np.array(share, np.float32),
            }
            (got,) = session.run(None, inputs)
            assert np.abs(got - expected.numpy()).max() <= 2e-6
    with pytest.raises(UserError, match="a graph of DiST holds the image tower, too"):
        save_onnx(head, file)
    with pytest.raises(UserError, match="was made for embedding width 32"):
        save_onnx(head, file, tiny_tower())


def test_weights_beyond_one_file_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("heads.files.portable.ONNX_LIMIT", 100)
    with pytest.raises(UserError, match="more than the 2 GiB that one ONNX file holds"):
        save_onnx(build_head(HeadConfig(dim=8, layers=1)), tmp_path / "head.onnx")
    assert not [*tmp_path.iterdir()]
