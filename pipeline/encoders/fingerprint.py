"""Identifies an encoder by what it computes: its weights and the config of its function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

# Config entries that do not change what a trained model computes.
_TRAINING_ENTRIES = {
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "hf_model_pretrained",
    "output_tokens",
}


def fingerprint(model: torch.nn.Module, model_config: Mapping[str, Any]) -> str:
    """sha256 of every tensor (name, dtype, shape, bytes in fp32) and of the function's config.

    The same model gives the same fingerprint, whatever file or name it was loaded from and
    whatever precision its weights were stored in.
    """
    digest = hashlib.sha256(json.dumps(_function_config(model_config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _function_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Config entries that differ from open_clip's defaults and change what the model computes.

    Because defaults are left out, the fingerprint stays the same when a config spells one out and
    when a later open_clip adds an entry.
    """

    def changed(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in section.items()
            if name not in _TRAINING_ENTRIES and defaults.get(name) != value
        }

    vision = {field.name: field.default for field in fields(CLIPVisionCfg)}
    text = {field.name: field.default for field in fields(CLIPTextCfg)}
    result: dict[str, Any] = {
        "quick_gelu": bool(model_config.get("quick_gelu", False)),
        "vision": changed(model_config["vision_cfg"], vision),
        "text": changed(model_config["text_cfg"], text),
    }
    if "multimodal_cfg" in model_config:
        result["multimodal"] = changed(model_config["multimodal_cfg"], text)
    return result
