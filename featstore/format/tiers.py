"""What a store holds of every frame: pooled embeddings, pixels, or tokens of the image tower.

A tier beside the pooled embeddings is a store of its own with the same tars, rows and commits; the
rows of its `features` have another item: D for `embeddings`, [h, w, 3] for `frames`, [L, W] for
`tokens:K` (L tokens of width W).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from featstore.errors import UserError

EMBEDDINGS: Final = "embeddings"
FRAMES: Final = "frames"
TOKENS: Final = "tokens"

_BLOCK = re.compile(r"(0|[1-9]\d{0,3})")
# By kind: the types its features may be stored as, the first by default, and the item's dimensions.
_KINDS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    EMBEDDINGS: (("float16", "int8"), ("dim",)),
    FRAMES: (("uint8",), ("height", "width", "channel")),
    TOKENS: (("float16",), ("token", "width")),
}
# More than any tower or picture has; keeps sizes of a store from anybody within 64 bits.
_LARGEST: Final = 2**20


@dataclass(frozen=True)
class Tier:
    """A kind of item, with the number of the tower's block for tokens."""

    kind: str = EMBEDDINGS
    block: int | None = None

    @classmethod
    def parse(cls, text: str) -> Tier:
        """The tier that `--tier` and a store's attributes name; UserError for anything else."""
        kind, colon, number = text.partition(":")
        if kind in (EMBEDDINGS, FRAMES) and not colon:
            return cls(kind)
        if kind == TOKENS and _BLOCK.fullmatch(number):
            return cls(kind, int(number))
        raise UserError(
            f"tier {text!r} is unknown: choose embeddings, frames, or tokens:K for the output of "
            "block K of the image tower, counted from 0"
        )

    @property
    def text(self) -> str:
        """The tier as `parse` takes it."""
        return self.kind if self.block is None else f"{self.kind}:{self.block}"

    @property
    def pooled(self) -> bool:
        """Whether these are the embeddings that heads are trained on."""
        return self.kind == EMBEDDINGS

    @property
    def feature_types(self) -> tuple[str, ...]:
        """What its numbers may be stored as, the usual type first."""
        return _KINDS[self.kind][0]

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Names of the item's dimensions."""
        return _KINDS[self.kind][1]

    def check_item(self, item: tuple[int, ...]) -> None:
        """ValueError unless an item can have this shape."""
        names = self.dimension_names
        whole = all(type(size) is int and 0 < size <= _LARGEST for size in item)
        if not whole or len(item) != len(names) or math.prod(item) > 2**40:
            raise ValueError(f"an item of {self.text} is {list(item)}: it must be {list(names)}")
        if self.kind == FRAMES and item[-1] != 3:
            raise ValueError(f"frames have {item[-1]} channels: they must have 3 (RGB)")
