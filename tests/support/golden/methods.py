"""Which kinds of golden files a folder holds, by the files that only one method has."""

from __future__ import annotations

from pathlib import Path

from tests.support.golden.checks import KINDS, Kinds
from tests.support.golden.dist.kinds import DIST_KINDS
from tests.support.golden.msta import MSTA_KINDS
from tests.support.golden.taco import TACO_KINDS
from tests.support.golden.viclip import VICLIP_KINDS

OWN: tuple[tuple[str, Kinds], ...] = (
    ("dist_*", DIST_KINDS),
    ("video_*.npz", VICLIP_KINDS),
    ("mma_adapter_*", MSTA_KINDS),
    ("taco_*", TACO_KINDS),
)
"""Files that only one method has, and the kinds of all its files, whose names others have too."""


def kinds_of(folder: Path) -> list[Kinds]:
    """Return the kinds of the methods whose files lie in a folder; MoTE's without any other."""
    return [kinds for pattern, kinds in OWN if any(folder.glob(pattern))] or [KINDS]
