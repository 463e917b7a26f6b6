"""Which videos NVDEC decodes together: batches of one picture size, and when they are complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Buckets(Generic[T]):
    """Collects items by key into batches of at most `items` items and `cost` in all.

    No clock is involved: a batch is complete when it is full, when more than `open_keys` keys wait,
    or when nothing is on its way that could fill it.
    """

    def __init__(self, *, items: int, cost: int, open_keys: int) -> None:
        self._items, self._cost, self._open_keys = items, cost, open_keys
        self._open: dict[Hashable, list[T]] = {}
        self._costs: dict[Hashable, int] = {}
        self._full: deque[list[T]] = deque()

    def __len__(self) -> int:
        """Items that wait."""
        return sum(map(len, (*self._open.values(), *self._full)))

    def add(self, key: Hashable, item: T, cost: int) -> None:
        """Put `item` with those of its key; one that costs more than a batch may gets its own."""
        if key in self._open and self._costs[key] + cost > self._cost:
            self._complete(key)
        self._open.setdefault(key, []).append(item)
        self._costs[key] = self._costs.get(key, 0) + cost
        if len(self._open[key]) == self._items or self._costs[key] >= self._cost:
            self._complete(key)

    def take(self, *, more_coming: bool) -> list[T] | None:
        """The next complete batch, None when none is. `more_coming`: items are on their way."""
        if not self._full and self._open:
            # Of those that are not full the fullest, of several the oldest.
            fullest = max(self._open, key=lambda key: len(self._open[key]))
            if not more_coming or len(self._open) > self._open_keys:
                self._complete(fullest)
        return self._full.popleft() if self._full else None

    def _complete(self, key: Hashable) -> None:
        self._full.append(self._open.pop(key))
        del self._costs[key]
