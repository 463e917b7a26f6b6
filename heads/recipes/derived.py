"""The settings that a recipe leaves to the data: "auto" in its table [training].

n = training videos, D = width of the features. The rules were chosen on validation videos of the
generated world; docs/recipes.md has their reasons and what they reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

AUTO: Final = "auto"
"""The value of a setting that is derived from the data."""
DERIVED: Final = (
    *("batch_size", "epochs", "warmup_epochs", "lr", "weight_decay", "patience", "shrinkage"),
)
"""The settings of [training] that may be "auto"."""

_EPOCHS: Final = 24  # looks at the validation videos; more cost time and find luck
_LEAST_PASSES: Final = 10
_FEW_OF_CLASS, _FEW = 4, 100  # videos of a class and in all, below which the rate is doubled
_SHRUNK: Final = 6  # videos' worth
_LEAST_SHRINKAGE: Final = 0.1


def derived(
    given: Mapping[str, Any], *, videos: int, classes: int, dim: int, repeats: int | None = None
) -> tuple[dict[str, Any], int]:
    """Return the settings `given` with numbers for "auto", and how often an epoch has each video.

    `videos` n and `classes` are those trained on, `dim` is D. `repeats` is what the user wants;
    without it, a small set is repeated within an epoch where the epochs are derived too, so that a
    run has about two dozen epochs, each judged on validation videos.
    """
    found, videos = dict(given), max(videos, 1)  # training refuses an empty set itself

    def settle(name: str, rule: Callable[[], Any]) -> Any:
        if found.get(name) == AUTO:
            found[name] = rule()
        return found.get(name)

    # A step sees a small part of the set, and a product of fewer than 16 videos saves no time.
    wanted = 2 ** round(math.log2(videos / 16))
    batch = settle("batch_size", lambda: min(max(wanted, 16), 128, videos)) or 192
    # The wider the features, the more each step of a given rate changes the output. Where classes
    # have one to three videos, longer steps gained; with five they did not.
    longer = 2 if videos < min(_FEW_OF_CLASS * classes, _FEW) else 1
    settle("lr", lambda: round(longer * 2e-3 * (64 / dim) ** 0.75, 6))
    settle("weight_decay", lambda: 0.2)
    passes = max(1200 * (videos / 1000) ** 0.4 * batch / videos, _LEAST_PASSES)
    if found.get("epochs") != AUTO:
        repeats = repeats or 1
    repeats = repeats or max(1, int(passes / _EPOCHS))
    epochs = settle("epochs", lambda: max(1, round(passes / repeats)))
    settle("warmup_epochs", lambda: round(epochs / 10, 2))
    settle("patience", lambda: max(5, math.ceil(epochs / 3)))
    # What few videos teach is half chance; what one video of a class teaches made heads worse.
    taken = 1.0 if videos < 2 * classes else min(round(_SHRUNK / videos, 2), 0.5)
    settle("shrinkage", lambda: taken if taken >= _LEAST_SHRINKAGE else 0.0)
    return found, repeats


def derived_beside_tower(given: Mapping[str, Any], videos: int) -> dict[str, Any]:
    """Return the settings `given` of a head beside a frozen tower, with numbers for "auto".

    The rules lead from the published setting (DiST, Qing et al., ICCV 2023: 240,436 videos, batches
    of 256, 36 epochs of which 6 warm up, rate 3.2e-4) to small sets: batches become smaller, so
    that an epoch still has some steps, and the rate falls with the square root of the batch, as the
    noise of its gradient grows.
    """
    found, videos = dict(given), max(videos, 1)

    def settle(name: str, rule: Callable[[], Any]) -> Any:
        if found.get(name) == AUTO:
            found[name] = rule()
        return found.get(name)

    wanted = min(max(2 ** round(math.log2(videos / 16)), 4), 32)
    batch = settle("batch_size", lambda: min(wanted, videos))
    settle("lr", lambda: round(3.2e-4 * math.sqrt((batch or 32) / 256), 7))
    epochs = settle("epochs", lambda: 36)
    settle("warmup_epochs", lambda: round(epochs / 6, 2))
    settle("weight_decay", lambda: 1e-4)
    return found
