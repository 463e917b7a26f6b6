"""Compares the pictures of videos whose files are at hand: they tell copies that embeddings cannot.

n = videos, T = frames of a video, S = side of a small picture, P = side of the picture compared.

A cropped or mirrored copy may have other embeddings than its original, but its pictures are those
of the original, cropped or mirrored. Every video is compared with every other one in all of these
ways. The distance is the root mean square difference in grey levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featstore.progress import ProgressSink
from heads.quality.alignment import Trimming, points_between, trimmings
from heads.quality.pictures import VideoFiles

LOOKED_AT: Final = 2000  # videos whose files are decoded, at most
FRAMES: Final = 16  # of a video, evenly spaced
COMPARED: Final = 8  # of these, every other one
SIDE: Final = 40
POOLED: Final = 8
PICTURE_DIMENSIONS: Final = 6.0
"""In how many ways pictures of two videos differ at least (`heads.quality.null`); measured on 1175
videos of the generated world: 8."""
_NEARER: Final = 0.64  # of the square of the plain distance: only then another way is named
_WIDTH: Final = 256  # directions that are kept of all numbers of a video, with nearly all variance
_WINDOW: Final = 36  # of a copy that lost a tenth of its sides


class Way(NamedTuple):
    """How a copy was made of an original: mirrored, cropped, trimmed."""

    mirrored: bool
    top: int
    left: int
    side: int
    trimming: Trimming

    @property
    def window(self) -> tuple[int, int, int]:
        """Which part of the picture is shown."""
        return self.top, self.left, self.side

    @property
    def words(self) -> str:
        """The way in words; "" for the pictures as they are."""
        said = ["mirrored"] * self.mirrored + ["cropped"] * (self.side < SIDE)
        return ", ".join(said)


def ways() -> list[Way]:
    """Return all ways that are tried: trims of the whole picture, crops of the whole video."""
    whole = Trimming(0.0, 1.0)
    # A part of the video that is all inside the other one.
    inside = [whole, *(way for way in trimmings() if not way.whole and way.step < 1)]
    found = [Way(mirrored, 0, 0, SIDE, way) for way in inside for mirrored in (False, True)]
    offsets = range(SIDE - _WINDOW + 1)
    return found + [
        Way(mirrored, y, x, _WINDOW, whole)
        for y in offsets
        for x in offsets
        for mirrored in (False, True)
    ]


class Compared(NamedTuple):
    """The distance [n,n] float32 of each two videos in the best way, and that way's number.

    Row is the copy and column the original; the lower of both orders counts for a pair.
    """

    distance: Tensor
    way: Tensor


def compare_pictures(pictures: Tensor, progress: ProgressSink, every: int) -> Compared:
    """Compare pictures uint8 [n,FRAMES,3,SIDE,SIDE] of videos with each other.

    `progress` counts to `every`. Memory holds a few matrices [n,n].
    """
    n, tried = len(pictures), ways()
    pooled = _pooled(pictures, tried[0])
    plain = _described(pooled, tried[0])
    centre = plain.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same pictures give the same directions
        width = min(_WIDTH, *plain.shape)
        _, _, directions = torch.pca_lowrank(plain - centre, width, center=False, niter=3)
    copies = (plain - centre) @ directions
    size = copies.square().sum(1)
    best = usual = torch.full((n, n), torch.inf)
    number = torch.zeros((n, n), dtype=torch.int16)
    window = tried[0].window
    for at, way in enumerate(tried):
        if way.window != window:
            window, pooled = way.window, _pooled(pictures[:, :: FRAMES // COMPARED], way)
        originals = (_described(pooled, way) - centre) @ directions
        squares = size[:, None] + originals.square().sum(1)[None] - 2 * copies @ originals.T
        if at == 0:
            best, usual = squares, squares.clone()
            continue
        better = squares < best
        best[better] = squares[better]
        number[better] = at
        progress(every * (at + 1) / len(tried), every, stage="pictures")
    number[best > _NEARER * usual] = 0
    scale = 3 * POOLED * POOLED * COMPARED
    return Compared((best.clamp_min(0) / scale).sqrt().fill_diagonal_(torch.inf), number)


def _pooled(pictures: Tensor, way: Way) -> Tensor:
    """Return the window of a way in few pixels, float32 [n,T,3,P,P]."""
    part = pictures[..., way.top : way.top + way.side, way.left : way.left + way.side]
    blocks = [
        functional.adaptive_avg_pool2d(block.flatten(0, 1).float(), POOLED)
        for block in torch.split(part, 128)
    ]
    return torch.cat(blocks).reshape(*part.shape[:3], POOLED, POOLED)


def _described(pooled: Tensor, way: Way) -> Tensor:
    """Return the numbers [n,k] that stand for videos, shown in a way."""
    turned = (pooled.flip(-1) if way.mirrored else pooled).flatten(2)
    if turned.shape[1] == COMPARED:
        return turned.flatten(1)
    # The first and the last frame are among those that were decoded.
    step, start = way.trimming.step * FRAMES / COMPARED, way.trimming.start * (FRAMES - 1)
    return points_between(turned, torch.arange(COMPARED) * step + start).flatten(1)


def small_pictures(
    files: VideoFiles, rows: list[int], progress: ProgressSink, every: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number in `rows` and the pictures [FRAMES,3,SIDE,SIDE] of each video at hand."""
    for number, found in enumerate(files.squares(rows, FRAMES, SIDE)):
        progress(every * (number + 1) / len(rows), every, stage="decode")
        if found is not None:
            yield number, torch.from_numpy(np.moveaxis(found, 3, 1).copy())
