"""Finds the CLIP that an image tower was tuned from, and joins the tuned tower with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from featstore.errors import UserError
from pipeline.encoders.fingerprint import fingerprint
from pipeline.encoders.sources import LoadedClip, clip_of_state, load_clip

logger = logging.getLogger(__name__)

# (width, patch, positions, layers) of OpenAI's vision transformers (Radford et al., 2021).
_PUBLISHED: Final = {
    (768, 32, 50, 12): "ViT-B-32/openai",
    (768, 16, 197, 12): "ViT-B-16/openai",
    (1024, 14, 257, 24): "ViT-L-14/openai",
    (1024, 14, 577, 24): "ViT-L-14-336/openai",
}
# Entries of a preprocessing config that concern pixels; the others say where weights come from.
_PIXELS: Final = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")


def published_clip(tower_state: Mapping[str, torch.Tensor]) -> str:
    """Return the spec of the OpenAI CLIP whose tower has this shape (tensors `visual.*`).

    Raises UserError when no such CLIP has it.
    """
    patches = tower_state["visual.conv1.weight"]
    positions = tower_state["visual.positional_embedding"].shape[0]
    layers = sum(name.endswith(".attn.in_proj_weight") for name in tower_state)
    shape = (patches.shape[0], patches.shape[-1], positions, layers)
    if shape not in _PUBLISHED:
        raise UserError(
            f"the tower (width {shape[0]}, patch {shape[1]}, {shape[2]} positions, {layers} "
            "layers) is none of OpenAI's CLIPs: name the CLIP it was tuned from with --clip SPEC"
        )
    return _PUBLISHED[shape]


def original_clip(spec: str, encoders_dir: Path | None = None) -> LoadedClip:
    """Load the CLIP that a tower was tuned from (specs and errors of `load_clip`).

    Logs a warning if its activation is not QuickGELU, which OpenAI's CLIPs and the code that tunes
    them use.
    """
    loaded = load_clip(spec, encoders_dir)
    if not loaded.model_config.get("quick_gelu"):
        logger.warning(
            "%s uses GELU, but OpenAI's CLIPs use QuickGELU: make sure that it is the CLIP that "
            "the tower was tuned from",
            spec,
        )
    return loaded


def text_attention_heads(clip: LoadedClip) -> int:
    """The number of attention heads of the text tower by OpenAI's rule (width 64 each)."""
    return max(1, int(clip.model_config["text_cfg"]["width"]) // 64)


def tower_of(clip: LoadedClip) -> dict[str, torch.Tensor]:
    """Return the tensors `visual.*` and `logit_scale` of a CLIP."""
    return {
        name: value
        for name, value in clip.model.state_dict().items()
        if name.startswith("visual.") or name == "logit_scale"
    }


def tuned_clip(
    original: LoadedClip, tower_state: Mapping[str, torch.Tensor], name: str
) -> LoadedClip:
    """Put the tensors of `tower_state` into `original`; return the result as `name`.

    The model of `original` is changed. `tower_state` has names of its tensors, at least those of
    `tower_of(original)`.
    """
    state = original.model.state_dict()
    for key, value in tower_state.items():
        state[key] = value.reshape(state[key].shape)
    original.model.load_state_dict(state)
    return LoadedClip(
        name=name,
        model=original.model,
        model_config=original.model_config,
        preprocess_config={
            key: value for key, value in original.preprocess_config.items() if key in _PIXELS
        },
        tokenizer_source=original.tokenizer_source,
    )


def require_openai_function(
    model: torch.nn.Module, model_config: Mapping[str, Any], name: str
) -> None:
    """Raise UserError unless the tensors of a CLIP alone tell what it computes.

    OpenAI's format has no place for the number of attention heads or the activation: they are
    those of OpenAI's models, so that another CLIP would come back as a different one.
    """
    try:
        plain = clip_of_state(model.state_dict(), name)
        same = fingerprint(plain.model, plain.model_config) == fingerprint(model, model_config)
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"{name} is not built as OpenAI's CLIPs are (attention heads 64 wide, QuickGELU), "
            "which the official format takes for granted: export safetensors or onnx"
        )
