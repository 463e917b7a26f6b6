"""The head computes what the authors' code computes (numbers in tests/data/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from heads.methods.mote.config import TEMPERATURES, HeadConfig
from heads.methods.mote.experts import ExpertFeedForward, temperature_weights
from heads.methods.mote.modulation import modulation
from heads.methods.mote.routing import expert_probabilities
from heads.methods.text_classifier import class_cosines, video_embeddings
from tests.support.golden.checks import worst
from tests.support.golden.head import golden_head

FFN = ["ffn_0_d16_e1", "ffn_1_d16_e2", "ffn_2_d32_e4", "ffn_3_d32_e6"]
HEADS = ["head_0", "head_1", "head_2", "head_3"]
DTYPES = [("f32", torch.float32), ("f64", torch.float64)]


@pytest.mark.parametrize("name", FFN)
@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
def test_expert_layer(golden: Path, name: str, suffix: str, dtype: torch.dtype) -> None:
    data = np.load(golden / f"{name}.npz")
    dim, experts = int(data["d_model"]), int(data["num_experts"])
    layer = ExpertFeedForward(HeadConfig(dim=dim, experts=experts))
    with torch.no_grad():
        for ours, theirs in (("up_", "up_"), ("down_", "dn_")):
            getattr(layer, f"{ours}weight").copy_(torch.from_numpy(data[f"{theirs}w"]))
            getattr(layer, f"{ours}bias").copy_(torch.from_numpy(data[f"{theirs}b"]))
    layer = layer.to(dtype).eval()
    x = torch.from_numpy(data["x"]).to(dtype)
    tokens = x.reshape(1, -1, dim)
    tolerance = 2e-6 if suffix == "f32" else 1e-12

    def run(coefficients: Tensor | None) -> Tensor:
        return layer(tokens, coefficients).reshape(-1, *x.shape)

    assert worst(run(torch.eye(experts)), data[f"y_expert_{suffix}"]) <= tolerance
    weights = torch.stack([temperature_weights(t, experts) for t in TEMPERATURES])
    assert worst(weights, data["fusion_w_train"]) <= 1e-7
    assert worst(run(weights), data[f"y_merged_{suffix}"]) <= tolerance
    assert worst(run(None)[0], data[f"y_eval_{suffix}"]) <= tolerance
    with torch.no_grad():
        layer.fusion_logits.copy_(torch.from_numpy(data["custom_fusion_logits"]))
    assert worst(run(None)[0], data[f"y_eval_custom_{suffix}"]) <= tolerance
    assert (
        worst(expert_probabilities(HeadConfig(dim=64, experts=experts)), data["route_prob"]) <= 1e-7
    )
    merged = layer.combine(weights[data["merged_tau_idx"]])
    for got, key in zip(merged, ("up_w", "up_b", "dn_w", "dn_b"), strict=True):
        assert worst(got, data[f"merged_{key}"]) <= 2e-6


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
def test_head_in_evaluation(golden: Path, name: str, suffix: str, dtype: torch.dtype) -> None:
    data = np.load(golden / f"{name}.npz")
    head = golden_head(data, dtype)
    x = torch.from_numpy(data["x"]).to(dtype)
    tested = torch.from_numpy(data["gen_cls"]).to(dtype)
    aggregate, cosine = (1e-5, 1e-6) if suffix == "f32" else (1e-10, 1e-10)
    with torch.no_grad():
        assert worst(head.aggregate(x), data[f"agg_plain_{suffix}"]) <= aggregate
        assert worst(head.aggregate(x, tested), data[f"agg_tfm_{suffix}"]) <= aggregate
        same = head.aggregate(x, head.training_class_embeddings)
        assert worst(same, data[f"agg_tfm_same_{suffix}"]) <= aggregate
        assert worst(head(x, tested, modulate=True), data[f"logits_eval_{suffix}"]) <= cosine
        assert worst(head(x, tested, modulate=False), data[f"logits_plain_{suffix}"]) <= cosine
        parts = modulation(x, tested, head.training_class_embeddings)
    assert np.array_equal(parts.tested_neighbours.numpy(), data["tfm_gen_top5_idx"])
    assert np.array_equal(parts.training_neighbours.numpy(), data["tfm_spe_top5_idx"])
    assert worst(parts.pair_similarities, data[f"tfm_pair_sim_{suffix}"]) <= cosine
    assert worst(parts.similarity, data[f"tfm_mean_max_sim_{suffix}"]) <= cosine
    assert worst(parts.scale, data[f"tfm_scale_{suffix}"]) <= aggregate


@pytest.mark.parametrize(
    ("suffix", "dtype", "tolerance"), [(*DTYPES[0], 1e-6), (*DTYPES[1], 1e-12)]
)
@pytest.mark.parametrize("case", range(3))
def test_cosines(
    golden: Path, case: int, suffix: str, dtype: torch.dtype, tolerance: float
) -> None:
    data = np.load(golden / "get_logits.npz")
    frames = torch.from_numpy(data[f"vid_{case}"]).to(dtype)
    classes = torch.from_numpy(data[f"cls_{case}"]).to(dtype)
    got = class_cosines(video_embeddings(frames), classes)
    assert worst(got, data[f"logits_{case}_{suffix}"]) <= tolerance
