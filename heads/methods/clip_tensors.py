"""The sizes of a CLIP read off its tensors, and the shapes that all of them must then have.

Names are OpenAI's (Radford et al., 2021). W = width of the image tower, D = embedding width.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from featstore.errors import UserError

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

HEAD_WIDTH: Final = 64
VISION_BLOCKS: Final = "visual.transformer.resblocks."
_TEXT_BLOCKS = "transformer.resblocks."
_TEXT: Final = ("token_embedding.", "positional_embedding", "text_projection", "ln_final.")

Shapes = dict[str, tuple[int, ...]]


def usual(sizes: Iterable[int]) -> int:
    """Return the most frequent size, so that errors name the tensor that deviates; 1 if empty."""
    counted = Counter(sizes).most_common(1)
    return counted[0][0] if counted else 1


def usual_count(names: Iterable[str], pattern: str) -> int:
    """Count the numbers at group "n" of `pattern` that names equal elsewhere usually have."""
    found = [match for name in names if (match := re.fullmatch(pattern, name))]
    alike = Counter(
        match.string[: match.start("n")] + match.string[match.end("n") :] for match in found
    )
    return usual(alike.values())


def is_text(name: str) -> bool:
    """Return whether a tensor of that name belongs to the text tower."""
    return name.startswith((*_TEXT, _TEXT_BLOCKS))


def vision_tower(tower: Mapping[str, Tensor], dim: int, where: str) -> VisionTransformer:
    """Return an image tower without weights (on "meta") of the sizes of the tensors `visual.*`.

    `dim` is D; attention heads are W // 64 and the activation is QuickGELU, as in OpenAI's CLIPs.
    Raises UserError if the tensors are not those of a vision transformer; which of them deviate is
    for the caller to find (`vision_shapes`).
    """
    patches = tower.get("visual.conv1.weight")
    places = tower.get("visual.positional_embedding")
    norms = [value for name, value in tower.items() if ".ln_" in name and value.ndim]
    if (
        patches is None
        or patches.ndim != 4
        or places is None
        or places.ndim != 2
        or not any(name.startswith("visual.") and ".ln_" in name for name in tower)
    ):
        raise UserError(
            f"{where} holds no vision transformer of CLIP: it needs visual.conv1.weight and "
            "visual.positional_embedding"
        )
    from open_clip.transformer import QuickGELU, VisionTransformer  # slow, only reading needs it

    patch = max(patches.shape[-1], 1)
    side = math.isqrt(max(places.shape[0] - 1, 1))  # patches of a square picture, and the class
    width = max(usual(value.shape[-1] for value in norms), 1)
    heads = max(1, width // HEAD_WIDTH)
    with torch.device("meta"):
        return VisionTransformer(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            layers=usual_count(tower, re.escape(VISION_BLOCKS) + r"(?P<n>\d+)\..*"),
            heads=heads if width % heads == 0 else 1,
            mlp_ratio=4.0,
            output_dim=dim,
            act_layer=QuickGELU,
        )


def vision_shapes(tower: VisionTransformer) -> Shapes:
    """Return the shape of every tensor of an image tower and of the logit scale."""
    state = tower.state_dict().items()
    return {"logit_scale": (), **{f"visual.{name}": tuple(v.shape) for name, v in state}}


def text_shapes(text: Mapping[str, Tensor], dim: int) -> Shapes:
    """Return the shape that every tensor of a text tower must have; `text` may lack some."""
    from open_clip.transformer import TextTransformer  # slow, and only reading needs it

    def size(name: str, axis: int, default: int) -> int:
        value = text.get(name)
        return default if value is None or value.ndim != 2 else max(value.shape[axis], 1)

    norms = [value for name, value in text.items() if "ln_" in name and value.ndim]
    with torch.device("meta"):
        tower = TextTransformer(
            context_length=size("positional_embedding", 0, 77),
            vocab_size=size("token_embedding.weight", 0, 49408),
            width=max(usual(value.shape[-1] for value in norms), 1),
            heads=1,  # which no shape depends on
            layers=usual_count(text, re.escape(_TEXT_BLOCKS) + r"(?P<n>\d+)\..*"),
            output_dim=dim,
        )
    return {name: tuple(value.shape) for name, value in tower.state_dict().items()}


def clip_shapes(
    clip: Mapping[str, Tensor], dim: int, where: str, *, text: bool | None = None
) -> Shapes:
    """Return the shape that every tensor of a CLIP must have: image tower, scale and text tower.

    `dim` is D. `text` says whether there must be a text tower; None: where any of it is there.
    Raises UserError as `vision_tower`.
    """
    shapes = vision_shapes(vision_tower(clip, dim, where))
    own = {name: value for name, value in clip.items() if is_text(name)}
    return shapes | (text_shapes(own, dim) if own or text else {})


def width_of(clip: Mapping[str, Tensor], default: int) -> int:
    """Return D of a CLIP, the width of its image tower's projection, or `default` without one."""
    projection = clip.get("visual.proj")
    return default if projection is None or projection.ndim != 2 else projection.shape[1]
