"""How near two videos must be to be copies, found on the videos themselves.

n = videos, k = neighbours of a video, p = pairs.

A pair is judged by its distance, divided by the usual one near its two videos: that to the k-th
neighbour. Videos that are no copies lie, seen closely, as if scattered over a few dimensions m.
Then a ratio below r happens by chance to k * r^m of the videos. m follows from the ratios of the
neighbours themselves (Levina and Bickel, NeurIPS 2004), of all videos together, so that a few
copies do not change it. Taken is the largest r with few enough chance pairs among those found.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

NEIGHBOURS: Final = 8
FALSE_SHARE: Final = 0.02  # of the pairs found may be expected to be there by chance,
FALSE_PAIRS: Final = 0.25  # or so many pairs, if few are found
LARGEST: Final = 0.5  # no ratio above this is a copy, however many dimensions there are
FLOOR: Final = 0.1  # a video's usual distance is at least that of this share of the videos, so
# that many copies of one video do not take each other for its usual neighbours


def usual_distances(nearest: Tensor) -> Tensor:
    """Return the usual distance [n] near each video, from its sorted neighbours' [n,k]."""
    last = nearest[:, -1]
    return torch.maximum(last, last.quantile(FLOOR)).clamp_min(1e-12)


def largest_ratio(nearest: Tensor, ratios: Tensor, least_dimensions: float = 1.0) -> float:
    """Return the ratio up to which pairs with `ratios` [p] are copies; `nearest` [n,k] is sorted.

    Videos are taken to be scattered over `least_dimensions` at least: in small sets, where some of
    the neighbours are of other classes, fewer are found than there are. 0.0 if there are too few
    neighbours to say what is usual: then only equal videos are copies.
    """
    n, k = nearest.shape
    if k < 3 or n < 4:
        return 0.0
    dimensions = max(least_dimensions, _dimensions(nearest))
    found = ratios.sort()[0].double()
    expected = n * k * found.pow(dimensions)
    allowed = (FALSE_SHARE * torch.arange(1, len(found) + 1)).clamp_min(FALSE_PAIRS)
    good = torch.nonzero((expected <= allowed) & (found <= LARGEST))
    least = math.exp(math.log(FALSE_PAIRS / (n * k)) / dimensions)
    return min(LARGEST, max(least, float(found[good[-1]]) if len(good) else 0.0))


def _dimensions(nearest: Tensor) -> float:
    """Return the number of dimensions that videos are scattered over, from neighbours [n,k]."""
    k = nearest.shape[1]
    near = nearest.clamp_min(1e-12).double()
    mean = (near[:, -1:] / near[:, :-1]).log().mean(1)  # 1/m times a mean of k - 1 exponentials
    usual = float(mean.median()) / (1 - 1 / (3 * (k - 1)))
    return min(64.0, 1 / max(usual, 1 / 64)) if math.isfinite(usual) else 64.0
