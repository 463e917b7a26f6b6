"""The branch of golden files of DiST: outputs, gradients and sizes."""

from __future__ import annotations
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
import numpy as np
import torch
from torch import Tensor
from heads.methods.dist.branch import DistBranch
from heads.methods.dist.config import DistConfig
from tests.support.golden.checks import DTYPES, Check, tensor, worst
from tests.support.golden.dist.model import below, model_of, stored

def compact_sums(got: Tensor | None, sums: Any) -> float:
    """The error of a tensor's sum, length and cosine sum, per entry in units of its largest."""
    assert got is not None
    flat = got.detach().double().reshape(-1)
    k = torch.arange(len(flat), dtype=torch.float64)
    found = torch.stack([flat.sum(), flat.norm(), (flat * k.cos()).sum()])
    unit = max(float(flat.abs().max()), 1e-30)
    return worst(found, sums) / unit / math.sqrt(len(flat))


def compact_error(got: Tensor, entries: Any, sums: Any) -> float:
    """The error of a tensor against a compact record, in units of its largest entry."""
    flat = got.detach().double().reshape(-1)
    step = math.ceil(len(flat) / 100)
    unit = max(float(flat.abs().max()), 1e-30)
    return max(worst(flat[::step], entries) / unit, compact_sums(got, sums))


def compact(got: Mapping[str, Tensor], data: Mapping[str, Any], what: str) -> float:
    """The largest error over tensors, each relative to its largest entry."""
    names = [k.removeprefix(f"{what}_sub/") for k in data if k.startswith(f"{what}_sub/")]
    assert names
    return max(
        compact_error(got[name], data[f"{what}_sub/{name}"], data[f"{what}_chk/{name}"])
        for name in names
    )


def check_branch(file: Path) -> Iterator[Check]:
    data = stored(file)
    weights = stored(file.with_name(file.name.replace("branch", "model")))
    model, _, config = model_of(weights)
    for suffix, dtype in DTYPES.items():
        branch = model.to(dtype).branch
        features = {
            number: value.to(dtype).transpose(0, 1).requires_grad_()
            for number, value in below(data, "feat/").items()
        }
        images = tensor(data["images"], dtype).unflatten(0, (-1, config["T"])).requires_grad_()
        v = branch(images, [features[str(number)] for number in config["sel"]])
        exact = suffix == "f64"
        yield Check(f"v {suffix}", worst(v, data[f"v_{suffix}"]), 1e-10 if exact else 2e-5)
        branch.zero_grad()
        (v * tensor(data["cotangent"], dtype)).sum().backward()
        sums = compact_sums(images.grad, data[f"grad_images_chk_{suffix}"])
        yield Check(f"gradient of the images {suffix}", sums, 1e-9 if exact else 2e-5)
        if not exact:
            continue
        gradients = {n: p.grad for n, p in branch.named_parameters() if p.grad is not None}
        without = sorted({n for n, _ in branch.named_parameters()} - set(gradients))
        differ = set(without) ^ set(json.loads(str(data["no_grad_names"])))
        yield Check("parameters without gradient that differ", len(differ), 0)
        yield Check("gradients f64", compact(gradients, data, "grad_f64"), 1e-9)
        error = 0.0
        for number, value in features.items():
            expected = data[f"grad_feat/{number}_f64"]
            assert value.grad is not None
            unit = float(np.abs(expected).max())
            error = max(error, worst(value.grad.transpose(0, 1), expected) / unit)
        yield Check("gradients of the features, rounded to float32", error, 1e-6)


def check_parameters(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())
    towers = {"b16": (768, 16, 12, 512), "l14": (1024, 14, 24, 768)}
    for name, case in cases.items():
        size, frames, pool = name.split("_")[:3]
        width, patch, blocks, dim = towers[size]
        dense = int(frames.rstrip("f").split("+")[1])
        config = DistConfig(dim=dim, dense_frames=dense, pooling_layers=int(pool[-1]))
        with torch.device("meta"):
            branch = DistBranch(config.for_backbone(width, patch, blocks, dim))
        counts: dict[str, int] = {}
        for key, value in branch.named_parameters():
            part = key.partition(".")[0]
            counts[part] = counts.get(part, 0) + value.numel()
        wrong = sum(counts.get(part) != count for part, count in case["parts"].items())
        wrong += sum(counts.values()) != case["total"]
        wrong += len(list(branch.parameters())) != case["tensors"]
        yield Check(f"{name}: counts that differ", wrong, 0)
        if "parameters" not in case:
            continue
        branch = branch.to_empty(device="cpu")
        branch.reset_parameters(torch.Generator().manual_seed(0))
        ours = dict(branch.named_parameters())
        listed = [[n, list(shape)] for n, shape, *_ in case["parameters"]]
        found = [[n, list(value.shape)] for n, value in ours.items()]
        yield Check(f"{name}: names and shapes that differ", int(listed != found), 0)
        error = 0.0
        for key, _, mean, std, _ in case["parameters"]:
            value = ours[key].detach()
            if not std:
                error = max(error, float((value - mean).abs().max()))
            elif value.numel() > 10_000:  # of fewer numbers chance moves it by more
                error = max(error, abs(float(value.std()) / std - 1))
        yield Check(f"{name}: spread of first weights, relative", error, 0.05)
