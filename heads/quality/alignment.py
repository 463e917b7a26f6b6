"""Finds pairs of videos whose frames agree, also where one of them is a part of the other.

n, m = videos, S = frames of a video, d = width of the space, p = pairs.

Frame j of a copy shows what frame `start + step * j` of the original shows, both counted in the
frames that are compared: step 1 and start 0 for a whole copy, a smaller step for a trimmed one.
Between two frames of the original lies, nearly, their weighted mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SCREENED_FRAMES: Final = 8
SCREENED_WIDTH: Final = 64
"""All pairs of videos are screened with so many frames and directions; those that remain are then
compared with all of them."""
NEAREST: Final = 5  # videos that remain of a screening, for each video and each way of trimming
SHARES: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of a video's length that a trimmed copy may keep
STARTS: Final = 6  # places at which a part may begin, for each share
SHIFTS: Final = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of the length by which two parts of one video, of equal length, may lie apart."""
_NEARER: Final = 0.7  # of the distance of the whole videos: only then a copy counts as trimmed
_SCREENED_AT_ONCE: Final = 2**23  # similarities: 32 MB
_COMPARED_AT_ONCE: Final = 2**21  # numbers of sequences: 16 MB for both videos


class Trimming(NamedTuple):
    """Which part of the original a copy shows: from `start`, as a share, with `step`."""

    start: float
    step: float

    @property
    def whole(self) -> bool:
        """Whether the copy shows all of it."""
        return self.step == 1 and self.start == 0


def trimmings() -> list[Trimming]:
    """Return the ways of trimming that are tried in a comparison, the whole video first."""
    found = [Trimming(0.0, 1.0)]
    for share in SHARES[1:]:
        found += [Trimming(float(s), share) for s in torch.linspace(0, 1 - share, STARTS)]
    return found + [Trimming(shift, 1.0) for shift in SHIFTS]


SCREENED: Final = (
    Trimming(0.0, 1.0),
    *(Trimming(start, 0.85) for start in (0.0, 0.075, 0.15)),
    *(Trimming(start, 0.7) for start in (0.0, 0.1, 0.2, 0.3)),
    *(Trimming(start, 0.55) for start in (0.0, 0.225, 0.45)),
)
"""The ways of trimming of the screening: fewer, because all pairs of videos are tried."""


def points_between(sequences: Tensor, positions: Tensor) -> Tensor:
    """Return the points [n,k,d] at positions [k] between the frames of sequences [n,S,d]."""
    last = sequences.shape[1] - 1
    positions = positions.clamp(0, last)
    below = positions.floor().long()
    share = (positions - below)[None, :, None].to(sequences)
    return sequences[:, below] * (1 - share) + sequences[:, (below + 1).clamp(max=last)] * share


def resampled(sequences: Tensor, frames: int) -> Tensor:
    """Return sequences [n,S,d] with `frames` frames over the same time."""
    have = sequences.shape[1]
    if have == frames:
        return sequences
    return points_between(sequences, torch.arange(frames) * (have / frames))


def screen(
    first: Tensor,
    second: Tensor | None,
    progress: Callable[[float], None] = lambda share: None,
    *,
    ways: Sequence[Trimming] | None = None,
    both: bool = True,
) -> Tensor:
    """Return the pairs [p,2] int64 of videos that may be copies of each other, each once.

    `first` [n,S,d] is compared with `second` [m,S,d], or with itself if that is None; then the
    first of a pair is the smaller number. For each video and each of `ways` (by default `SCREENED`)
    the `NEAREST` of the other set remain, so that p grows with n + m; memory holds a block of
    similarities. Unless `both`, only those of `second` are originals that may have been trimmed.
    """
    ways = ways or SCREENED
    a = _screened(first)
    b = a if second is None else _screened(second)
    asked = [(a, b, False)]
    if second is not None and both:
        asked.append((b, a, True))
    pairs: list[Tensor] = []
    total = len(asked) * len(ways)
    for turn, (copies, originals, swapped) in enumerate(asked):
        flat = functional.normalize(copies.flatten(1), dim=1)
        k = min(NEAREST + (second is None), len(originals))
        at_once = max(1, _SCREENED_AT_ONCE // len(originals))
        for number, way in enumerate(ways):
            places = (way.start + way.step * torch.arange(a.shape[1]) / a.shape[1]) * a.shape[1]
            parts = functional.normalize(points_between(originals, places).flatten(1), dim=1)
            for start in range(0, len(flat), at_once):
                near = (flat[start : start + at_once] @ parts.T).topk(k, 1)[1]
                who = torch.arange(start, start + len(near))[:, None].expand_as(near)
                found = torch.stack([near, who] if swapped else [who, near], -1).flatten(0, 1)
                if second is None:
                    found = found[found[:, 0] != found[:, 1]].sort(1)[0]
                pairs.append(found)
            pairs = [torch.unique(torch.cat(pairs), dim=0)]
            progress((turn * len(ways) + number + 1) / total)
    return pairs[0]


def _screened(sequences: Tensor) -> Tensor:
    """Return sequences as they are screened, float32: the last directions vary most."""
    return resampled(
        sequences[..., -SCREENED_WIDTH:].float(), min(SCREENED_FRAMES, sequences.shape[1])
    )


def compare(first: Tensor, second: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Compare pairs [p,2] of `first` [n,S,d] and `second` [m,S,d].

    Returns the similarity [p] float32, -1 to 1, of the best of `trimmings()`, and the number of
    that trimming [p] int64; negative (-1 - number) if the second video is the original.
    """
    ways = trimmings()
    best = torch.full((len(pairs),), -2.0)
    which = torch.zeros(len(pairs), dtype=torch.int64)
    at_once = max(1, _COMPARED_AT_ONCE // first[0].numel())
    for start in range(0, len(pairs), at_once):
        part = pairs[start : start + at_once]
        x, y = first[part[:, 0]].float(), second[part[:, 1]].float()
        scores, found = _best(x, y, ways)
        best[start : start + at_once], which[start : start + at_once] = scores, found
    return best, which


def _best(x: Tensor, y: Tensor, ways: Sequence[Trimming]) -> tuple[Tensor, Tensor]:
    """Return the best similarity of x [p,S,d] and y [p,S,d], and the number of the trimming."""
    s = x.shape[1]
    products = x @ y.transpose(1, 2)  # [p,S,S]
    best = whole = torch.full((len(x),), -2.0)
    which = torch.zeros(len(x), dtype=torch.int64)
    for original, copy, cross, sign in (
        (x, y, products, 1), (y, x, products.transpose(1, 2), -1)
    ):  # fmt: skip
        of_copy = copy.square().sum(2)
        of_original = original.square().sum(2)
        beside = (original[:, :-1] * original[:, 1:]).sum(2)
        beside = torch.cat([beside, of_original[:, -1:]], 1)
        for number, way in enumerate(ways):
            if way.whole and sign < 0:
                continue
            places = (way.start + way.step * torch.arange(s) / s) * s
            held = places <= s - 0.5
            j = torch.arange(s)[held]
            places = places[held].clamp(max=s - 1)
            below = places.floor().long()
            above = (below + 1).clamp(max=s - 1)
            w = (places - below).to(x)
            both = cross[:, below, j] * (1 - w) + cross[:, above, j] * w
            size = (
                of_original[:, below] * (1 - w).square()
                + of_original[:, above] * w.square()
                + 2 * w * (1 - w) * beside[:, below]
            )
            scale = (size.clamp_min(0).sum(1) * of_copy[:, held].sum(1)).sqrt().clamp_min(1e-6)
            score = both.sum(1) / scale
            if way.whole:
                whole = score
            better = score > best
            best = torch.where(better, score, best)
            which[better] = number if sign > 0 else -1 - number
    which[1 - best > _NEARER * (1 - whole)] = 0
    return best, which
