"""Reads a weight file of ViCLIP: the published `.pth`, or safetensors; nothing in it is run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from featstore.errors import UserError, one_line
from pipeline.encoders.sizes import require_sane_sizes
from pipeline.encoders.sources import LoadedClip, safe_name
from pipeline.encoders.specs import viclip_label
from pipeline.encoders.tensors import (
    plain_tensors,
    read_safetensors,
    require_finite,
    require_shapes,
    shapes_in_safetensors,
)
from pipeline.encoders.viclip import VICLIP_PREPROCESSING, ViClip, viclip_config

OWN_SIZES: Final = "the ViCLIP of its own sizes"


def load_viclip(path: Path) -> LoadedClip:
    """Load a ViCLIP, B/16 or L/14 or of any other size; the sizes are read off its tensors.

    Of a `.pth` only the entry `model` is used. Objects of unknown classes beside it are not built.
    Raises UserError for a file that is missing, damaged or of something else, and names tensors
    that are missing, extra or of another shape.
    """
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"{path} does not exist"
        raise UserError(
            f"{what if path.name else 'viclip: names no file'}: viclip:FILE takes a weight file of "
            "ViCLIP, such as ViCLIP-B_InternVid-FLT-10M.pth or a model.safetensors"
        )
    state = None if path.suffix == ".safetensors" else _read_pth(path)
    if state is None:
        shapes = shapes_in_safetensors(path)
    else:
        shapes = {name: tuple(value.shape) for name, value in state.items()}
    try:
        config = viclip_config(shapes)
        require_sane_sizes(config, str(path))
        with torch.device("meta"):  # shapes only: wrong sizes must not cost memory
            expected = ViClip(config).state_dict()
    except UserError:
        raise
    except Exception as error:  # sizes that are none of a ViCLIP fail in any way
        raise UserError(
            f"{path} holds no ViCLIP ({one_line(error, 100)}): it needs the tensors "
            "vision_encoder.* and text_encoder.* of both towers; a CLIP is named without viclip:"
        ) from None
    if state is None:
        state = read_safetensors(path, expected, OWN_SIZES)
    else:
        wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        require_shapes(path, wanted, shapes, OWN_SIZES)
    model = ViClip(config)
    model.load_state_dict(state)
    require_finite(model, str(path))
    return LoadedClip(
        name=safe_name(viclip_label(path)),
        model=model.eval().requires_grad_(False),
        model_config=config,
        preprocess_config=VICLIP_PREPROCESSING,
        tokenizer_source="",
    )


def _read_pth(path: Path) -> dict[str, Tensor]:
    """Read the entry `model` of a training's file; no code in the file is run."""
    try:
        # The settings of the training lie beside the weights, as objects of a class that is not
        # here. A plain dictionary takes the place of whatever torch does not know.
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(OrderedDict, name) for name in unknown]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights: {one_line(error, 120)}; it is cut off, damaged or "
            "of another kind: fetch it again"
        ) from None
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("model"), Mapping):
        raise UserError(f"{path} has no entry 'model': it is no published file of ViCLIP")
    state = {str(name).removeprefix("module."): v for name, v in loaded["model"].items()}
    return plain_tensors(state, path)
