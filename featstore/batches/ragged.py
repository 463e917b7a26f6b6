"""Batches of sequences: rows, or windows of them, of different lengths.

Dimension letters: B rows or windows of a batch, n their frames together, L the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from featstore.format.schema import RowArray
from featstore.reading.sequences import Window
from featstore.reading.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class RaggedBatch:
    """`features` [n, ...] of one row after the other, as stored, and `lengths` int64 [B].

    `rows` int64 [B] are their array rows.
    """

    features: Tensor
    lengths: Tensor
    rows: RowArray

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return features [B, L, ...], zero behind a row's end, and bool [B, L]: the frames."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        held = torch.arange(longest) < self.lengths[:, None]
        padded = self.features.new_zeros((*held.shape, *self.features.shape[1:]))
        padded[held] = self.features
        return padded, held


def ragged_batches(
    store: Store, size: int, parts: Iterable[int | Window] | None = None
) -> Iterator[RaggedBatch]:
    """Yield batches of `size` rows or windows, in the order given; the last one may be smaller.

    `parts` are array rows, or windows as `Store.windows` yields them; None means all rows that are
    ok. Only one batch is in memory. Raises UserError and WorkError as `Store.sequence`, ValueError
    for a size below one.
    """
    if size < 1:
        raise ValueError(f"batches of {size} rows: there must be at least one")
    chosen = iter(store.rows[store.lengths > 0].tolist() if parts is None else parts)
    while some := list(islice(chosen, size)):
        arrays = [
            store.window_features(part) if isinstance(part, Window) else store.sequence(part)
            for part in some
        ]
        yield RaggedBatch(
            torch.from_numpy(np.concatenate(arrays)),
            torch.tensor([len(array) for array in arrays]),
            np.array([part.row if isinstance(part, Window) else part for part in some], np.int64),
        )
