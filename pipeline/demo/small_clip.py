"""Makes an encoder folder from the shipped weights of the demo's small CLIP.

No pretrained CLIP can be assumed on a machine without a network, so one was trained on single
frames of the generated world (`tests/support/worlds/demo_clip.py`). Its weights are shipped here
(`data/demo_clip.safetensors`, float16, under 1 MB).

It is an ordinary CLIP of open_clip's own class with CLIP's own tokeniser. Only tokens that occur in
the world's captions have a trained embedding; `unpack` restores the full vocabulary with zeros, so
that the encoder folder loads like any other.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch

from pipeline.demo.world import SIDE
from pipeline.encoders.sources import save_open_clip_folder
from pipeline.encoders.specs import CONFIG_FILE

ENCODER_NAME = "demo-clip"
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": SIDE,
        "layers": 3,
        "width": 96,
        "patch_size": 8,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
PREPROCESSING: dict[str, Any] = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
TOKEN_IDS = "token_ids"
_TOKEN_EMBEDDING = "token_embedding.weight"


def make_encoder_folder(folder: Path) -> None:
    """Put the shipped small CLIP into `folder` as an encoder, unless it is there already."""
    if not (folder / CONFIG_FILE).is_file():
        shipped = resources.files("pipeline.demo").joinpath("data/demo_clip.safetensors")
        unpack(shipped.read_bytes(), folder)


def unpack(packed: bytes, folder: Path) -> None:
    """Write packed weights as an encoder folder in open_clip's own format."""
    state = safetensors.torch.load(packed)
    token_ids, rows = state.pop(TOKEN_IDS), state.pop(_TOKEN_EMBEDDING)
    full = torch.zeros(MODEL_CONFIG["text_cfg"]["vocab_size"], rows.shape[1])
    full[token_ids] = rows.float()
    model = open_clip.CLIP(**MODEL_CONFIG, quick_gelu=False)
    model.load_state_dict(
        {**{name: value.float() for name, value in state.items()}, _TOKEN_EMBEDDING: full}
    )
    save_open_clip_folder(model, MODEL_CONFIG, PREPROCESSING, folder)
