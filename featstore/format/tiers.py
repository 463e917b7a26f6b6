"""Tiers: what a store holds for every frame, be it pooled embeddings, pixels or tokens.

Every tier is stored separately, with the same tars, rows and commits. Only the item, which a row
of `features` holds for each frame, differs: [D] for `embeddings`, [h, w, 3] for `frames`, [L, W]
for `tokens:K` (L tokens of width W from the image tower). `motion` is kept as sequences only: the
numbers of a pose, as 263 of a human one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from featstore.errors import UserError, meant

EMBEDDINGS: Final = "embeddings"
FRAMES: Final = "frames"
TOKENS: Final = "tokens"
MOTION: Final = "motion"

_BLOCK = re.compile(r"(0|[1-9]\d{0,3})")
# For each kind: the types that its features may be stored as (the first is the default), and the
# names of the item's dimensions.
_KINDS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    EMBEDDINGS: (("float16", "int8"), ("dim",)),
    FRAMES: (("uint8",), ("height", "width", "channel")),
    TOKENS: (("float16",), ("token", "width")),
    MOTION: (("float32",), ("number",)),
}
# More than any tower or picture has. The limit keeps sizes that a store claims within 64 bits.
_LARGEST: Final = 2**20


@dataclass(frozen=True)
class Tier:
    """A kind of item; for tokens also the number of the image tower's block."""

    kind: str = EMBEDDINGS
    block: int | None = None

    @classmethod
    def parse(cls, text: str) -> Tier:
        """Read a tier as `--tier` and a store's attributes spell it; UserError if it is unknown."""
        kind, colon, number = text.partition(":")
        if kind in (EMBEDDINGS, FRAMES, MOTION) and not colon:
            return cls(kind)
        if kind == TOKENS and _BLOCK.fullmatch(number):
            return cls(kind, int(number))
        raise UserError(
            f"tier {text!r} is unknown: {meant(kind, (EMBEDDINGS, FRAMES, 'tokens:K'))}choose "
            "embeddings, frames, or tokens:K for the output of block K of the image tower, counted "
            "from 0"
        )

    @property
    def text(self) -> str:
        """The tier as text that `parse` reads."""
        return self.kind if self.block is None else f"{self.kind}:{self.block}"

    @property
    def pooled(self) -> bool:
        """Whether these are the embeddings that heads are trained on."""
        return self.kind == EMBEDDINGS

    @property
    def of_sequences(self) -> bool:
        """Whether this is kept as sequences only, and not made by `extract`."""
        return self.kind == MOTION

    @property
    def feature_types(self) -> tuple[str, ...]:
        """The types that its numbers may be stored as, the usual one first."""
        return _KINDS[self.kind][0]

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Names of the item's dimensions."""
        return _KINDS[self.kind][1]

    def check_item(self, item: tuple[int, ...]) -> None:
        """Raise ValueError unless an item can have this shape."""
        names = self.dimension_names
        whole = all(type(size) is int and 0 < size <= _LARGEST for size in item)
        if not whole or len(item) != len(names) or math.prod(item) > 2**40:
            raise ValueError(f"an item of {self.text} is {list(item)}: it must be {list(names)}")
        if self.kind == FRAMES and item[-1] != 3:
            raise ValueError(f"frames have {item[-1]} channels: they must have 3 (RGB)")
