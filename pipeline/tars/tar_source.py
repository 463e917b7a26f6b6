"""Where tars come from: a folder of this machine, or a place they are fetched from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline.tars.dataset import Dataset, Shard


class TarSource(Protocol):
    """Gives the tars of a data set as local files, a few at a time."""

    def open_order(self, shards: Sequence[Shard]) -> None:
        """Tell the order in which `path` will be asked, so that tars can be fetched ahead."""
        ...

    def path(self, shard: Shard) -> Path:
        """The tar as a local file; raises `DamagedTar` when it cannot be had."""
        ...

    def release(self, shard: Shard) -> None:
        """Say that the tar is not needed any more."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class LocalTars:
    """The tars where packing left them."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def open_order(self, shards: Sequence[Shard]) -> None:
        """Nothing is fetched."""

    def path(self, shard: Shard) -> Path:
        """Where the tar lies, whether it is there or not."""
        return self._dataset.shard_path(shard)

    def release(self, shard: Shard) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""
