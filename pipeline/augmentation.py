"""Training augmentation as the MoTE authors do it: random crop, flip, grey, drawn once per clip.

T frames, H, W their height and width, h, w the same after resizing, s side of the tower's input.

The steps, with draws shared by all frames of a clip: the short side is resized to 256 (bicubic), or
to s if the tower does not take 224; a random part of the picture is resized to s x s (bilinear); it
is mirrored with probability 0.5 and made grey with 0.2; it is scaled and normalised as in
evaluation.

Source: the released code of MoTE (Zhu et al., NeurIPS 2024). The aspect ratio is drawn evenly, not
evenly in its logarithm as in torchvision's RandomResizedCrop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.preprocessing import FrameInput, Preprocessing, as_images, is_mixed, resized_size

AREA = (0.08, 1.0)  # fraction of the resized picture
ASPECT = (3 / 4, 4 / 3)  # width / height, before the two may be exchanged
TRIES = 10
FLIP, GREY, TURN = 0.5, 0.2, 0.5  # probabilities
SHORT_SIDE, SHORT_SIDE_OF = 256, 224  # the resized short side for towers that take 224
_LUMA = (19595, 38470, 7471)  # 65536ths of red, green and blue, as Pillow rounds ITU-R 601


@dataclass(frozen=True)
class AugmentationDraw:
    """The random choices for one clip: part of the resized picture, mirrored or not, grey or not.

    `fitted` means that ten tries found no part: the short side is resized to s, and (x, y) is the
    corner of an s x s square of the result.
    """

    x: int
    y: int
    width: int
    height: int
    flip: bool
    grey: bool
    fitted: bool = False

    @classmethod
    def sample(
        cls, width: int, height: int, size: int, rng: np.random.Generator
    ) -> AugmentationDraw:
        """Draw choices for pictures resized to `width` x `height`, for an input of side `size`."""
        for _ in range(TRIES):
            part = crop_size(
                width, height, rng.uniform(*AREA), rng.uniform(*ASPECT), rng.random() < TURN
            )
            if part[0] <= width and part[1] <= height:
                fitted = False
                break
        else:
            fitted, part = True, (size, size)
            height, width = resized_size(height, width, (size, size))
        x = int(rng.integers(0, width - part[0], endpoint=True))
        y = int(rng.integers(0, height - part[1], endpoint=True))
        return cls(x, y, *part, bool(rng.random() < FLIP), bool(rng.random() < GREY), fitted)


def crop_size(
    width: int, height: int, area_fraction: float, aspect: float, turned: bool
) -> tuple[int, int]:
    """Return (width, height) of a part of a picture, which may be larger than the picture.

    The part has `area_fraction` of the picture's pixels and `aspect` = width / height; `turned`
    exchanges width and height.
    """
    area = area_fraction * width * height
    part = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return part[::-1] if turned else part


def resized_for_training(size: int) -> tuple[int, int]:
    """Return the square size that the short side is resized to, for a tower of input `size`."""
    short = SHORT_SIDE if size == SHORT_SIDE_OF else size
    return short, short


def resized_clip(frames: FrameInput, size: int) -> torch.Tensor:
    """Resize uint8 [T,H,W,3] to uint8 [T,3,h,w], the short side for a tower of input `size`."""
    return Preprocessing(size=resized_for_training(size)).resize(as_images(frames))


def augmented_pixels(resized: torch.Tensor, size: int, draw: AugmentationDraw) -> torch.Tensor:
    """Turn uint8 [T,3,h,w] of `resized_clip` into uint8 [T,3,size,size] as `draw` says.

    The result is not normalised.

    Raises ValueError when the drawn part lies outside the picture.
    """
    if draw.fitted:
        resized = Preprocessing(size=(size, size), interpolation="bilinear").resize(resized)
    bottom, right = draw.y + draw.height, draw.x + draw.width
    height, width = resized.shape[-2:]
    if draw.x < 0 or draw.y < 0 or bottom > height or right > width:
        raise ValueError(f"{draw} lies outside a picture of {width} x {height}")
    part = resized[..., draw.y : bottom, draw.x : right]
    squash = Preprocessing(size=(size, size), interpolation="bilinear", resize_mode="squash")
    part = squash.resize(part)
    if draw.flip:
        part = part.flip(-1)
    return _grey(part) if draw.grey else part


def training_pixels(
    frames: FrameInput, size: int, rng: np.random.Generator, flip: bool | None = None
) -> torch.Tensor:
    """Augment uint8 frames [T,H,W,3] of a clip to uint8 [T,3,size,size], not normalised.

    `flip` says whether they are mirrored; None: it is drawn. Other draws are the same in any case.
    Frames of several sizes are augmented one by one, with the same draws.
    """
    if is_mixed(frames):
        state, pixels = rng.bit_generator.state, []
        for frame in frames:
            rng.bit_generator.state = state
            pixels.append(training_pixels(frame[None], size, rng, flip))
        return torch.cat(pixels)
    resized = resized_clip(frames, size)
    height, width = resized.shape[-2:]
    draw = AugmentationDraw.sample(width, height, size, rng)
    if flip is not None:
        draw = replace(draw, flip=flip)
    return augmented_pixels(resized, size, draw)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """Set every channel of uint8 [T,3,h,w] to the brightness that Pillow computes."""
    shares = torch.tensor(_LUMA, dtype=torch.int32).view(3, 1, 1)
    brightness = (pixels.int() * shares).sum(-3, keepdim=True).add_(1 << 15) >> 16
    return brightness.to(torch.uint8).expand_as(pixels)
