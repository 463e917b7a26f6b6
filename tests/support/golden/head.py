"""Golden head files in our names: the authors' state-dict entries -> `TemporalHead` tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from heads.methods.mote.config import HeadConfig
from heads.methods.mote.model import TemporalHead

RENAMED = {
    "ln_1.weight": "attention_norm.weight",
    "ln_1.bias": "attention_norm.bias",
    "attn.in_proj_weight": "attention.qkv_weight",
    "attn.in_proj_bias": "attention.qkv_bias",
    "attn.out_proj.weight": "attention.out_weight",
    "attn.out_proj.bias": "attention.out_bias",
    "ln_2.weight": "feed_forward_norm.weight",
    "ln_2.bias": "feed_forward_norm.bias",
    "mlp.mote_fusion_weight": "feed_forward.fusion_logits",
}
TOP = {
    "spe_cls_feature": "training_class_embeddings",
    "frame_position_embeddings.weight": "transformer.positions",
}
EXPERT = re.compile(r"mlp\.fc_(up|dn)\.(\d+)\.(weight|bias)")


def our_name(name: str) -> tuple[str, int | None]:
    """The authors' name -> our name, and the expert's index inside our stacked tensor."""
    if name in TOP:
        return TOP[name], None
    layer, rest = name.removeprefix("transformer.resblocks.").split(".", 1)
    prefix = f"transformer.blocks.{layer}."
    if match := EXPERT.fullmatch(rest):
        side = {"up": "up", "dn": "down"}[match[1]]
        return f"{prefix}feed_forward.{side}_{match[3]}", int(match[2])
    return prefix + RENAMED[rest], None


def golden_entries(data: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """Entries `prefix`NAME of a golden file by the authors' NAME."""
    return {
        name.removeprefix(prefix): torch.from_numpy(np.asarray(data[name]))
        for name in data
        if name.startswith(prefix)
    }


def golden_head(data: Mapping[str, np.ndarray], dtype: torch.dtype) -> TemporalHead:
    """The head stored under `param/`, in `dtype`."""
    entries = golden_entries(data, "param/")
    classes, dim = entries["spe_cls_feature"].shape
    config = HeadConfig(
        dim=dim,
        layers=int(data["layers"]),
        experts=int(data["num_experts"]),
        attention_heads=int(data["n_heads"]),
    )
    head = TemporalHead(config, classes).eval()
    state = head.state_dict()
    for name, value in entries.items():
        ours, expert = our_name(name)
        (state[ours] if expert is None else state[ours][expert]).copy_(value)
    return head.to(dtype)
