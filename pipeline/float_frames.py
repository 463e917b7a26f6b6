"""Frames as DiST takes them: floating from the start, resized bilinearly without antialiasing.

T frames, H, W their height and width, s side of the tower's input. All of it is float32 and nothing
is rounded to grey levels in between, where `pipeline.preprocessing` works on bytes as CLIP's own
preprocessing does.

Source: DiST (Qing et al., ICCV 2023), its released code and configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.preprocessing import CLIP_MEAN, CLIP_STD, FrameInput, as_images, is_mixed

Style = Literal["short-side", "center-fraction"]
"""What evaluation cuts out: crops after the short side was resized (Kinetics, Something-Something),
or the central square of a share of the short side (HMDB51 and UCF101 in the released code)."""

AREA: Final = (0.4, 1.0)  # fraction of the picture that training cuts out
ASPECT: Final = (3 / 4, 4 / 3)  # of its width to its height
TRIES: Final = 10
FLIP, GREY = 0.5, 0.2  # probabilities
FRACTION_OF: Final = 256  # "center-fraction" cuts out scale / 256 of the short side
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue


def evaluation_floats(
    frames: FrameInput,
    size: int,
    crops: int = 1,
    *,
    scale: int | None = None,
    style: Style = "short-side",
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Turn uint8 frames [T,H,W,3] into normalised float32 [crops,T,3,size,size].

    "short-side" resizes the short side to `scale` (default: `size`), the long one rounded down, and
    cuts out the centre, or 3 crops along the longer side: its start, middle and end.
    "center-fraction" cuts out a central square of scale / 256 of the short side (default scale:
    `size`) and resizes it; it has 1 crop. Raises ValueError for another number of crops.
    Frames of several sizes (`pipeline.preprocessing.is_mixed`) are taken one by one.
    """
    if is_mixed(frames):
        given: dict[str, Any] = {"scale": scale, "style": style, "mean": mean, "std": std}
        return torch.cat([evaluation_floats(f[None], size, crops, **given) for f in frames], 1)
    if crops not in (1, 3) or (style == "center-fraction" and crops != 1):
        raise ValueError(f"{crops} crops in style {style}: only 1, or 3 of short-side")
    values, scale = _floats(frames), scale or size
    height, width = values.shape[-2:]
    if style == "center-fraction":
        side = int(min(height, width) * scale / FRACTION_OF)
        top, left = height // 2 - side // 2, width // 2 - side // 2
        parts = [_resized(values[..., top : top + side, left : left + side], size, size)]
    else:
        long = int(max(height, width) / min(height, width) * scale)
        high, wide = (scale, long) if height < width else (long, scale)
        resized = _resized(values, high, wide)
        y, x = (high - size) // 2, (wide - size) // 2
        corners = [(y, x)]
        if crops == 3:
            ends = (0, (wide - size) // 2, wide - size), (0, (high - size) // 2, high - size)
            corners = [(y, at) for at in ends[0]] if wide > high else [(at, x) for at in ends[1]]
        parts = [resized[..., top : top + size, left : left + size] for top, left in corners]
    return _normalised(torch.stack(parts), mean, std)


@dataclass(frozen=True)
class FloatDraw:
    """The random choices of training for one clip: the part cut out, mirrored or not, grey or not.

    `flip_first` mirrors the whole frames (Kinetics), `flip_last` the finished clip
    (Something-Something, whose labels then change with it).
    """

    top: int
    left: int
    height: int
    width: int
    flip_first: bool = False
    flip_last: bool = False
    grey: bool = False

    @classmethod
    def sample(
        cls, height: int, width: int, rng: np.random.Generator, *, flip_last: bool = False
    ) -> FloatDraw:
        """Draw the choices for frames of that size; `flip_last` says which of the flips is drawn.

        The part is drawn as torchvision's RandomResizedCrop does it: up to ten tries, the logarithm
        of the aspect even, else the middle of the picture.
        """
        flip = draws_flip(rng)
        part = random_part(height, width, rng)
        grey = bool(rng.random() < GREY)
        return cls(*part, flip and not flip_last, flip and flip_last, grey)


def draws_flip(rng: np.random.Generator) -> bool:
    """Draw whether a clip is mirrored: the first draw of its augmentation."""
    return bool(rng.random() < FLIP)


def random_part(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the part of a picture that training cuts out: top, left, height, width."""
    for _ in range(TRIES):
        area = height * width * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        high, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < high <= height and 0 < wide <= width:
            top = int(rng.integers(0, height - high, endpoint=True))
            return top, int(rng.integers(0, width - wide, endpoint=True)), high, wide
    high, wide = height, width
    if width / height < ASPECT[0]:
        high = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        wide = round(height * ASPECT[1])
    return (height - high) // 2, (width - wide) // 2, high, wide


def training_floats(
    frames: FrameInput,
    size: int,
    draw: FloatDraw,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Turn uint8 frames [T,H,W,3] into normalised float32 [T,3,size,size] as `draw` says."""
    values = _floats(frames)
    if draw.flip_first:
        values = values.flip(-1)
    bottom, right = draw.top + draw.height, draw.left + draw.width
    part = _resized(values[..., draw.top : bottom, draw.left : right], size, size)
    if draw.grey:
        shares = torch.tensor(_LUMA).view(3, 1, 1)
        part = (part * shares).sum(-3, keepdim=True).expand_as(part)
    finished = _normalised(part, mean, std)
    return finished.flip(-1) if draw.flip_last else finished


def augmented_floats(
    frames: FrameInput,
    size: int,
    rng: np.random.Generator,
    *,
    mirror: bool,
    flip_last: bool,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Augment uint8 frames [T,H,W,3] of a clip at random to normalised float32 [T,3,size,size].

    Without `mirror` the clip is never mirrored; `flip_last` as `FloatDraw.sample` takes it. Frames
    of several sizes are augmented one by one, with the same draws.
    """
    if is_mixed(frames):
        given: dict[str, Any] = {"mirror": mirror, "flip_last": flip_last, "mean": mean, "std": std}
        state, pictures = rng.bit_generator.state, []
        for frame in frames:
            rng.bit_generator.state = state
            pictures.append(augmented_floats(frame[None], size, rng, **given))
        return torch.cat(pictures)
    height, width = frames.shape[1:3]
    draw = FloatDraw.sample(height, width, rng, flip_last=flip_last)
    if not mirror:
        draw = replace(draw, flip_first=False, flip_last=False)
    return training_floats(frames, size, draw, mean, std)


def _floats(frames: FrameInput) -> Tensor:
    return as_images(frames).float().div_(255)


def _resized(values: Tensor, height: int, width: int) -> Tensor:
    # As the released code does, [3,T,H,W] in one piece: torch resizes other layouts by another
    # arithmetic, up to 5e-6 away.
    clip = values.transpose(0, 1).contiguous()
    found = functional.interpolate(clip, (height, width), mode="bilinear", align_corners=False)
    return found.transpose(0, 1)


def _normalised(values: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shape = (3, 1, 1)
    return (values - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
