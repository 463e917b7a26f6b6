"""Training batches from a store: features held in memory when they fit, mapped when they do not.

Dimension letters: N samples, V views, F stored frames, D dim, B batch, T frames of a clip.

A whole batch is drawn and gathered at once: one `index_select` over the flattened features reaches
about a million clips a second on one core, while a dataset asked sample by sample, with or without
worker processes, reached a tenth of that (measured at T = 8 of F = 32, D = 512).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.progress import ProgressSink, no_progress
from featstore.reader import Store
from featstore.schema import RowArray
from featstore.segments import segment_ranges

log = logging.getLogger(__name__)

# The rest is for the optimizer, the head, the page cache and other programs.
RESIDENT_SHARE: Final = 0.6

_LOAD_BYTES: Final = 64 * 2**20

# First words of the random streams of an epoch; step k of it draws from stream _STEPS + k.
_ORDER: Final = 0
_STEPS: Final = 1


@dataclass(frozen=True, eq=False)
class Batch:
    """One training batch.

    `features` float32 [B, T, D], raw embeddings on the device of the loader's features; `labels`
    int64 [B] beside them; `rows` int64 [B] on the CPU: array rows if the loader knows them, else
    positions in its features.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class MappedFeatures:
    """Features of `rows` that stay in the store's files; stands in for float16 [N, V, F, D]."""

    store: Store
    rows: RowArray

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, V, F, D)."""
        return (len(self.rows), *self.store.schema.row_shape)

    def clips(self, samples: RowArray, views: RowArray, frames: RowArray) -> Tensor:
        """float16 [B, T, D] of samples [B] (positions), views [B], frames [B, T]."""
        return torch.from_numpy(self.store.clips(self.rows[samples], views, frames))


def resident(store: Store, rows: npt.ArrayLike, progress: ProgressSink = no_progress) -> Tensor:
    """Load the features of array rows into memory: float16 [n, V, F, D], checksums compared.

    Raises UserError for a row that holds no sample, WorkError when one fails its checksum.
    """
    wanted = np.atleast_1d(np.asarray(rows, np.int64))
    store.positions(wanted)
    loaded = torch.empty((len(wanted), *store.schema.row_shape), dtype=torch.float16)
    out = loaded.numpy()
    step = max(1, _LOAD_BYTES // store.schema.row_bytes)
    for start in range(0, len(wanted), step):
        stop = min(start + step, len(wanted))
        store.read_into(wanted[start:stop], out[start:stop])
        progress(stop, len(wanted))
    return loaded


def load_features(
    store: Store, rows: npt.ArrayLike, progress: ProgressSink = no_progress
) -> Tensor | MappedFeatures:
    """Features of array rows, resident when they fit into memory, else memory-mapped.

    The choice is logged with its reason. Errors as `resident`.
    """
    wanted = np.atleast_1d(np.asarray(rows, np.int64))
    if features_fit(len(wanted) * store.schema.row_bytes):
        return resident(store, wanted, progress)
    return MappedFeatures(store, wanted)


def features_fit(nbytes: int, available: int | None = None) -> bool:
    """Whether `nbytes` of features should be held in memory; the choice is logged.

    `available` is the free memory in bytes, that of this process by default.
    """
    free = available_memory() if available is None else available
    fits = nbytes <= RESIDENT_SHARE * free
    log.info(
        "features: %s, %.1f MB %s %d %% of the %.0f MB of memory that is free",
        "held in memory" if fits else "read from memory-mapped files",
        nbytes / 1e6,
        "are within" if fits else "exceed",
        round(100 * RESIDENT_SHARE),
        free / 1e6,
    )
    return fits


def available_memory() -> int:
    """Bytes this process may still take: free memory of the machine, less if a cgroup says so."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    # Containers see the machine's memory there and their own limit here (cgroup v2).
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return max(0, min(free, limit - used))


class FeatureLoader:
    """Endless reproducible training batches with random segment sampling.

    Each sample of a batch takes one view at random and, per segment of its F stored frames, one
    frame at random (TSN, Wang et al., ECCV 2016, with the segment edges of `segments`). Order and
    draws depend on (seed, epoch, step) only, so any step of any epoch can be had without the ones
    before it. ValueError when there is no sample or a size is not positive.
    """

    def __init__(
        self,
        features: Tensor | MappedFeatures,
        labels: Tensor | npt.NDArray[np.integer],
        *,
        batch_size: int,
        frames: int,
        seed: int,
        rows: RowArray | None = None,
    ) -> None:
        """`features` float16 [N, V, F, D]; `labels` whole numbers [N]; `rows` array rows [N]."""
        if len(features.shape) != 4 or features.shape[0] == 0 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"features {list(features.shape)} in batches of {batch_size}, seed {seed}: there "
                "must be [N, V, F, D] features with N > 0, a positive batch size, a seed >= 0"
            )
        count, self._views, stored, self._dim = (int(size) for size in features.shape)
        if len(labels) != count or (rows is not None and len(rows) != count):
            raise ValueError(f"{count} samples need as many labels and rows")
        self._features = features
        self._count = count
        self._stored = stored
        self._device = features.device if isinstance(features, Tensor) else torch.device("cpu")
        self._labels = torch.tensor(np.asarray(labels), dtype=torch.int64, device=self._device)
        if rows is None:
            rows = (
                features.rows
                if isinstance(features, MappedFeatures)
                else np.arange(count, dtype=np.int64)
            )
        self._rows = np.asarray(rows, np.int64)
        self._lowest, self._highest = segment_ranges(stored, frames)
        self._seed = seed
        self.batch_size = batch_size
        self.frames = frames

    def __len__(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-self._count // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on; every sample once per epoch."""
        order = np.random.default_rng((self._seed, epoch, _ORDER)).permutation(self._count)
        for step in range(start, len(self)):
            samples = order[step * self.batch_size : (step + 1) * self.batch_size]
            views, frames = self._draw(epoch, step, len(samples))
            chosen = torch.from_numpy(samples)
            yield Batch(
                features=self._gather(samples, views, frames),
                labels=self._labels[chosen.to(self._device)],
                rows=torch.from_numpy(self._rows[samples]),
            )

    def _draw(self, epoch: int, step: int, count: int) -> tuple[RowArray, RowArray]:
        """View [count] and frames [count, T] of each sample of one step."""
        rng = np.random.default_rng((self._seed, epoch, _STEPS + step))
        views = rng.integers(0, self._views, count)
        shape = (count, self.frames)
        frames = rng.integers(self._lowest, self._highest, shape, endpoint=True)
        return views, frames

    def _gather(self, samples: RowArray, views: RowArray, frames: RowArray) -> Tensor:
        """float32 [B, T, D]."""
        if isinstance(self._features, MappedFeatures):
            return self._features.clips(samples, views, frames).float()
        flat = self._features.reshape(-1, self._dim)
        index = ((samples * self._views + views)[:, None] * self._stored + frames).reshape(-1)
        picked = flat.index_select(0, torch.from_numpy(index).to(self._device))
        return picked.view(len(samples), self.frames, self._dim).float()
