"""Turns frames into CLIP's input: resizes, crops and normalises them.

T frames, H, W height and width of the frames, h, w of the input of the tower.

Mean, std and sizes are defined only here. The geometry is that of the MoTE reference (Zhu et al.,
NeurIPS 2024): the short side is resized to the crop size (bicubic with antialiasing, long side
rounded down), so nothing is cut from that side.
Pillow resizes, as in the reference, so that the pixels are the same to the last bit. Torchvision's
uint8 resize differs by a grey level here and there; it would save 0.5 ms a frame of Kinetics size
and 10 ms of a 1080p frame, where encoding a frame takes a core 25 ms (ViT-B/32) to 100 ms (B/16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image

from featstore.errors import UserError

# Mean and standard deviation of CLIP's training images (Radford et al., 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

CROP_COUNTS = (1, 3, 5, 10)
MAX_SIZE = 4096  # pixels; far above any tower, far below what a damaged config could ask for
_INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

ResizeMode = Literal["shortest", "squash", "longest"]
_CHOICES = {
    "interpolation": tuple(_INTERPOLATIONS),
    "resize_mode": get_args(ResizeMode),
    "mode": ("RGB",),
}

FrameInput = npt.NDArray[np.uint8] | torch.Tensor


@dataclass(frozen=True)
class Preprocessing:
    """How frames become the input of one tower.

    `size` is (height, width) of the input. `resize_mode`: `shortest` fits the short side and
    crops, `squash` ignores the aspect ratio, `longest` fits the long side and pads with
    `fill_color` (a grey level 0 to 255).
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill_color: int = 0

    @classmethod
    def from_open_clip(
        cls, config: Mapping[str, Any], size: int | tuple[int, int] | None = None
    ) -> Preprocessing:
        """Read the `preprocess_cfg` of an open_clip folder; CLIP's values stand for missing ones.

        `size`, the input size of the tower itself, replaces the one in the config, as in
        open_clip. Raises UserError for a value that is not supported.
        """
        given = {name: value for name, value in config.items() if value is not None}
        for name, allowed in _CHOICES.items():
            if name in given and given[name] not in allowed:
                raise UserError(
                    f"preprocessing {name} {given[name]!r} is not supported: use "
                    f"{' or '.join(allowed)}"
                )
        given["size"] = _size(size if size is not None else given.get("size", 224))
        for name in given.keys() & {"mean", "std"}:
            given[name] = _three_numbers(name, given[name])
        grey = given.get("fill_color", 0)
        if not isinstance(grey, int) or not 0 <= grey <= 255:
            raise UserError(f"preprocessing fill_color {grey!r} is not a grey level from 0 to 255")
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in known})

    def to_json(self) -> dict[str, Any]:
        """Return plain values for provenance: two stores can be mixed only if all values agree."""
        plain = asdict(self)
        plain.update(size=list(self.size), mean=list(self.mean), std=list(self.std))
        return plain

    def resize(self, frames: torch.Tensor) -> torch.Tensor:
        """Resize uint8 [T,3,H,W] as `resize_mode` says, before any crop."""
        height, width = frames.shape[-2:]
        target = resized_size(height, width, self.size, self.resize_mode)
        if (height, width) == target:
            return frames
        mode = _INTERPOLATIONS[self.interpolation]
        pictures = rearrange(frames, "t c h w -> t h w c").contiguous().cpu().numpy()
        resized = [Image.fromarray(p).resize(target[::-1], mode) for p in pictures]
        stacked = np.stack([np.asarray(picture) for picture in resized])
        return rearrange(torch.from_numpy(stacked), "t h w c -> t c h w")

    def crop_pixels(self, frames: FrameInput, crops: int = 1) -> torch.Tensor:
        """Crop uint8 frames [T,H,W,3] (array or tensor) to uint8 [crops,T,3,h,w], not normalised.

        Crop order: 1: centre; 3: left, right, centre; 5: the corners and the centre; 10: each of
        the five followed by its mirror image. Raises UserError for another number of crops.
        Frames of several sizes (`Decoder.decode_with_info`) are cropped one by one.
        """
        if is_mixed(frames):
            return torch.cat([self.crop_pixels(frame[None], crops) for frame in frames], 1)
        images = as_images(frames)
        self.require_crops(crops)
        resized = self.resize(images)
        height, width = resized.shape[-2:]
        if self.resize_mode == "longest":
            x, y = self.size[1] - width, self.size[0] - height
            sides = x // 2, x - x // 2, y // 2, y - y // 2
            return torch.nn.functional.pad(resized, sides, value=self.fill_color)[None]
        views = [
            resized[..., y : y + self.size[0], x : x + self.size[1]]
            for x, y in crop_corners(height, width, self.size, crops)
        ]
        if crops == 10:
            views = [view for crop in views for view in (crop, crop.flip(-1))]
        return torch.stack(views)

    def require_crops(self, crops: int) -> None:
        """Raise UserError for a number of crops that is not possible."""
        if crops not in CROP_COUNTS:
            raise UserError(f"{crops} crops are not supported: use 1, 3, 5 or 10")
        if crops > 1 and self.resize_mode != "shortest":
            raise UserError(
                f"{crops} crops make no sense with resize mode {self.resize_mode!r}, which keeps "
                "the whole picture: use 1 crop"
            )

    def normalise(self, pixels: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Turn uint8 [...,3,h,w] into float32 (pixels / 255 - mean) / std, in `out` if given."""
        mean = rearrange(torch.tensor(self.mean, device=pixels.device), "c -> c 1 1")
        std = rearrange(torch.tensor(self.std, device=pixels.device), "c -> c 1 1")
        values = pixels.float() if out is None else out.copy_(pixels)
        return values.div_(255).sub_(mean).div_(std)

    def crops(self, frames: FrameInput, crops: int = 1) -> torch.Tensor:
        """Turn uint8 frames [T,H,W,3] (array or tensor) into normalised float32 [crops,T,3,h,w]."""
        return self.normalise(self.crop_pixels(frames, crops))


def evaluation_crops(
    frames: FrameInput,
    size: int | tuple[int, int],
    crops: int,
    preprocessing: Preprocessing | None = None,
) -> torch.Tensor:
    """Turn uint8 frames [T,H,W,3] into float32 [crops,T,3,size,size] with 1, 3, 5 or 10 crops.

    `preprocessing` gives everything but the size; the default is CLIP's.
    """
    return replace(preprocessing or Preprocessing(), size=_size(size)).crops(frames, crops)


def resized_size(
    height: int, width: int, size: tuple[int, int], resize_mode: ResizeMode = "shortest"
) -> tuple[int, int]:
    """Return (height, width) of a picture resized towards an input of `size` (height, width)."""
    if resize_mode == "squash":
        return size
    if resize_mode == "shortest" and size[0] == size[1]:
        # Short side exact, long side rounded down: what torchvision and the reference do.
        short, long = min(height, width), max(height, width)
        longer = int(size[0] * long / short)
        return (size[0], longer) if height <= width else (longer, size[0])
    ratios = height / size[0], width / size[1]
    ratio = max(ratios) if resize_mode == "longest" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def crop_corners(
    height: int, width: int, size: tuple[int, int], crops: int
) -> list[tuple[int, int]]:
    """Return the upper left corners (x, y) of the crops of a resized picture.

    A single crop is centred with Python's rounding (half to even). Several crops lie on a grid of
    quarters rounded down, so "right" can stop up to 3 pixels short of the edge, and their centre
    crop is not the same as a single crop.
    """
    spare_y, spare_x = height - size[0], width - size[1]
    if crops == 1:
        return [(round(spare_x / 2), round(spare_y / 2))]
    a, b = spare_x // 4, spare_y // 4
    if crops == 3:
        return [(0, 2 * b), (4 * a, 2 * b), (2 * a, 2 * b)]
    return [(0, 0), (4 * a, 0), (0, 4 * b), (4 * a, 4 * b), (2 * a, 2 * b)]


def is_mixed(frames: FrameInput) -> bool:
    """Whether frames differ in size: an array [T] of dtype object with pictures uint8 [H,W,3]."""
    return isinstance(frames, np.ndarray) and frames.dtype == object


def as_images(frames: FrameInput) -> torch.Tensor:
    """View uint8 [T,H,W,3] as a tensor [T,3,H,W] without copying; memory stays channels-last."""
    # torch warns about arrays it may not write to, and refuses negative strides.
    tensor = torch.as_tensor(
        frames if isinstance(frames, torch.Tensor) else np.require(frames, requirements=["C", "W"])
    )
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [T,H,W,3], not {tensor.dtype} {list(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"frames are empty: {list(tensor.shape)}")
    return rearrange(tensor, "t h w c -> t c h w")


def _size(value: object) -> tuple[int, int]:
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or not all(
        isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= MAX_SIZE
        for side in pair
    ):
        raise UserError(
            f"preprocessing size {value!r} is not a size: give one or two whole numbers from 1 "
            f"to {MAX_SIZE}"
        )
    return cast(int, pair[0]), cast(int, pair[1])


def _three_numbers(name: str, value: object) -> tuple[float, ...]:
    numbers = list(value) if isinstance(value, list | tuple) else []
    if (
        len(numbers) != 3
        or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        or (name == "std" and min(numbers) <= 0)
    ):
        raise UserError(f"preprocessing {name} {value!r} is not supported: give three numbers")
    return tuple(float(number) for number in numbers)
