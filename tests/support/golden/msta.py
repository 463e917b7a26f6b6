"""Golden files of MSTA's adapters recomputed (tests/data/golden_msta/README.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from heads.methods.msta.adapter import Adapters
from heads.methods.msta.config import MstaConfig
from heads.methods.msta.towers import AdaptedTowers
from heads.methods.text_classifier import class_cosines
from tests.support.golden.checks import DTYPES, Check, Kinds, tensor, worst
from tests.support.golden.dist.model import below, encoder_of

LIMITS = {"f32": 2e-5, "f64": 1e-10}


def config_of(c: Mapping[str, Any], **more: Any) -> MstaConfig:
    return MstaConfig(
        dim=c["E"],
        first=c["start"],
        last=c["end"],
        width=c["r"],
        scale=c["scale"],
        **{"form": "none", "frames": 1, **more},
    )


def towers_of(data: Mapping[str, Any], **more: Any) -> tuple[AdaptedTowers, dict[str, Any]]:
    """The adapted towers of a `mma_adapter_*` file, and its configuration."""
    found = json.loads(str(data["config_json"]))
    towers = AdaptedTowers(encoder_of(below(data, "clip/")).model, config_of(found, **more))
    towers.adapters.load_state_dict(below(data, "adapter/"), strict=not more)
    return towers.eval(), found


def check_adapter(file: Path) -> Iterator[Check]:
    data = dict(np.load(file))
    tokens, labels = tensor(data["tokens"]).long(), tensor(data["labels"])
    scale = float(tensor(data["clip/logit_scale"], torch.float64).exp())
    for suffix, dtype in DTYPES.items():
        towers, config = towers_of(data)
        towers = towers.to(dtype)
        images = tensor(data["images"], dtype).requires_grad_()
        clip: Any = towers.clip
        with torch.no_grad():
            plain = {"image": clip.visual(images), "text": clip.encode_text(tokens)}
        # The lowest blocks run without gradients, and the golden gradient goes through them.
        blocks = clip.visual.transformer.resblocks
        lower = clip.visual._embeds(images)
        for block in blocks[: config["start"] - 1]:
            lower = block(lower)
        adapted = {
            "image": towers.video_features_from(lower[:, None]),
            "text": towers.text_features(tokens),
        }
        units = {name: functional.normalize(value, dim=-1) for name, value in adapted.items()}
        logits = scale * class_cosines(units["image"], units["text"])
        loss = functional.cross_entropy(logits, labels)
        limit = LIMITS[suffix]
        yield Check(f"logits {suffix}", worst(logits, data[f"logits_{suffix}"]), limit)
        yield Check(f"loss {suffix}", worst(loss, data[f"loss_{suffix}"]), limit)
        if suffix == "f32":
            continue
        for name in ("image", "text"):
            for kind, found in (("plain", plain), ("adapted", adapted)):
                got, wanted = found[name], data[f"{name}_{kind}_f64"]
                ours = functional.normalize(got, dim=-1) if _is_unit(wanted) else got
                yield Check(f"{name} {kind} f64", worst(ours, wanted), limit)
        with torch.no_grad():
            whole = towers.video_features(images[:, None])
        yield Check("frozen blocks apart f64", worst(whole, adapted["image"].detach()), limit)
        loss.backward()
        for name, parameter in towers.adapters.named_parameters():
            wanted = data[f"grad_f64/{name}"]
            error = worst(parameter.grad, wanted) / max(float(np.abs(wanted).max()), 1e-30)
            yield Check(f"gradient of {name}, relative", error, 1e-6)
        wanted = data["grad_images_f64"]
        error = worst(images.grad, wanted) / float(np.abs(wanted).max())
        yield Check("gradient of the images, relative", error, 1e-6)
        yield Check("parameters", abs(towers.config.parameters - config["trainable"]), 0)
        yield from _first_weights(towers.config, config["init_mean_std"])


def _is_unit(rows: Any) -> bool:
    return bool(np.allclose(np.linalg.norm(rows, axis=-1), 1))


def _first_weights(config: MstaConfig, spreads: Mapping[str, Any]) -> Iterator[Check]:
    adapters = Adapters(config)
    adapters.reset_parameters(torch.Generator().manual_seed(0))
    for name, value in adapters.named_parameters():
        mean, spread = spreads[name]
        if name.endswith("bias"):
            yield Check(f"first {name}", float(value.detach().abs().max()) + abs(mean) + spread, 0)
            continue
        # Two draws of n numbers: their spreads differ by 5 of their standard errors at most.
        error = abs(float(value.detach().std()) / spread - 1)
        yield Check(f"first {name}, spread", error, 5 / math.sqrt(value.numel()))


MSTA_KINDS: Kinds = {"mma_adapter_*.npz": check_adapter}
"""Check of every kind of file, by the pattern of its name."""
