"""Training batches from a store: features are held in memory, memory-mapped, or streamed, by size.

Dimension letters: N samples, V views, F stored frames, D dim, B batch, T frames of a clip. For a
store of another tier than embeddings read *item for D, and its type for float16.

A whole batch is drawn and gathered at once: one `index_select` over the flattened features reaches
about a million clips a second on one core, while fetching sample by sample, with or without worker
processes, reached a tenth of that (measured at T = 8 of F = 32, D = 512).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.balance import balanced_order, members_of
from featstore.batches.streaming import BatchMemory, StreamedFeatures
from featstore.files.after_fork import settle_torch
from featstore.files.machine import available_memory
from featstore.format.array_checks import whole_numbers
from featstore.format.schema import FeatureArray, RowArray
from featstore.progress import ProgressSink, no_progress
from featstore.reading.store import Store
from featstore.segments import Places, SegmentSampler

log = logging.getLogger(__name__)

Holding = Literal["resident", "mapped", "streamed"]
"""Where a loader keeps its features: in memory, in files that the page cache holds, or in files."""

# Share of free memory for features; the rest is for optimizer, head, page cache, other programs.
RESIDENT_SHARE: Final = 0.6
# Above this share the page cache cannot hold the files, and random reads would wait for the disk.
MAPPED_SHARE: Final = 0.9

# The purposes of an epoch's random streams; the draws have one stream per rank.
_ORDER: Final = 0
_DRAWS: Final = 1
# How many frames are drawn together, for several batches if they are small. Gathering a few batches
# evicts all else from the caches, and then drawing starts four times slower; this is a megabyte.
_TOGETHER: Final = 2**17
# Places below this are int32, half the size, because a megabyte of places leaves the caches.
_INT32_PLACES: Final = 2**31


@dataclass(slots=True, eq=False)
class Batch:
    """One training batch.

    `features` float16 [B, T, D] are raw embeddings as stored, on the loader's features' device
    (convert them to float32 where they are computed with, so that half the bytes travel); `labels`
    int64 [B] (uint8 [B, C] of several classes) are on the same device. `samples` [B] are positions
    among the loader's N samples, whose array rows are `array_rows` [N].
    """

    features: Tensor
    labels: Tensor
    samples: RowArray
    array_rows: RowArray

    @property
    def rows(self) -> Tensor:
        """The array rows if the loader knows them, else positions in its features: int64 [B], CPU.

        They are looked up only on request, because most training never needs them.
        """
        return torch.from_numpy(self.array_rows[self.samples])


# Gathers samples `first`, first + 1, ... of an order in batches of B: takes first, places [n, T] of
# frames and B, and yields float16 [B, T, D]; the last batch has what remains of n. Places count
# from each sample's first frame or, if an epoch has starts, from where the starts are counted.
Clips = Callable[[int, Places, int], Iterator[Tensor]]


@dataclass(frozen=True, eq=False)
class MappedFeatures:
    """Features of `rows` that stay in the store's files; stands in for float16 [N, V, F, D]."""

    store: Store
    rows: RowArray

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, V, F, D)."""
        return (len(self.rows), *self.store.schema.row_shape)


def resident(
    store: Store,
    rows: npt.ArrayLike,
    progress: ProgressSink = no_progress,
    *,
    check: bool = True,
) -> Tensor:
    """Load the features of array rows into memory: float16 [n, V, F, D], checksums compared.

    `check` False trusts the bytes on the disk. Raises UserError if a row holds no sample,
    WorkError if a row fails its checksum.
    """
    wanted = np.atleast_1d(whole_numbers(rows, "rows"))
    # Numpy asks for large pages and torch does not: filling torch's memory took four times as long.
    loaded: FeatureArray = np.empty((len(wanted), *store.schema.row_shape), store.schema.dtype)
    store.read_into(wanted, loaded, check=check, progress=progress)
    return torch.from_numpy(loaded)


def load_features(
    store: Store,
    rows: npt.ArrayLike,
    progress: ProgressSink = no_progress,
    holding: Holding | None = None,
) -> Tensor | MappedFeatures | StreamedFeatures:
    """Return the features of array rows, held as `holding` says; `choose_holding` is the default.

    Errors as `resident`; features that stay in files raise them only when they are read.
    """
    wanted = np.atleast_1d(whole_numbers(rows, "rows"))
    if holding is None:
        holding = choose_holding(len(wanted) * store.schema.row_bytes, mappable=store.mapped)
    if holding == "resident":
        return resident(store, wanted, progress)
    if holding == "mapped":
        return MappedFeatures(store, wanted)
    return StreamedFeatures(store, wanted)


def choose_holding(nbytes: int, available: int | None = None, *, mappable: bool = True) -> Holding:
    """Choose how to hold `nbytes` of features; the choice is logged with its reason.

    `available` is the free memory in bytes, by default the free memory of this process. Features
    that are not `mappable` are read chunk by chunk: a random row would cost a whole chunk, so they
    are streamed where mappable ones are mapped.
    """
    free = available_memory() if available is None else available
    holding: Holding = "streamed"
    share = MAPPED_SHARE if mappable else RESIDENT_SHARE
    if nbytes <= RESIDENT_SHARE * free:
        holding, share = "resident", RESIDENT_SHARE
    elif mappable and nbytes <= MAPPED_SHARE * free:
        holding = "mapped"
    how = {
        "resident": "held in memory",
        "mapped": "read from memory-mapped files",
        "streamed": "streamed from files, shuffled in blocks",
    }[holding]
    within = "exceed" if holding == "streamed" else "are within"
    log.info(
        "features: %s; %.1f MB %s %d %% of the %.0f MB of memory that is free%s",
        *(how, nbytes / 1e6, within, round(100 * share), free / 1e6),
        "" if mappable or holding != "streamed" else ", and this store cannot be memory-mapped",
    )
    return holding


class FeatureLoader:
    """Endless reproducible training batches with random segment sampling.

    Each sample of a batch takes one view at random and, per segment of its F stored frames, one
    frame at random (TSN, Wang et al., ECCV 2016, with the segment edges of `segments`). Order and
    draws depend only on (seed, epoch, step, rank), so any step of any epoch can be computed without
    the earlier ones. Resident and mapped features give the same batches; streamed features come in
    another order, in which each batch is drawn from one pool of blocks.

    With `world_size` W each of W ranks has its own part of every epoch, and together they have
    every sample exactly once. Nothing is padded or repeated, so the parts differ by at most one
    sample, and the ranks' numbers of batches by at most one. Code that synchronises the ranks at
    every step must stop at the smallest number (`len` of each rank) or join uneven inputs (torch's
    `Join`).

    With `repeats` R an epoch has every sample R times, in one shuffled order. A `balanced` epoch
    has as many samples, but every class of `labels` equally often (`featstore.balance`).

    Raises ValueError if a rank has no sample, a size is not positive, or streamed features are to
    be repeated or balanced.
    """

    def __init__(
        self,
        features: Tensor | MappedFeatures | StreamedFeatures,
        labels: Tensor | npt.NDArray[np.integer],
        *,
        batch_size: int,
        frames: int,
        seed: int,
        rows: RowArray | None = None,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        balanced: bool = False,
    ) -> None:
        """`features` float16 [N, V, F, D]; `labels` whole numbers [N]; `rows` array rows [N].

        Labels are [N, C] of zeros and ones where a sample may have several classes.
        """
        if len(features.shape) < 4 or features.shape[0] == 0 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"features {list(features.shape)} in batches of {batch_size}, seed {seed}: there "
                "must be [N, V, F, D] features with N > 0, a positive batch size, a seed >= 0"
            )
        count, self._views, stored, *item = (int(size) for size in features.shape)
        self._item = tuple(item)
        if len(labels) != count or (rows is not None and len(rows) != count):
            raise ValueError(f"{count} samples need as many labels and rows")
        if repeats < 1 or (repeats > 1 and isinstance(features, StreamedFeatures)):
            raise ValueError(f"{repeats} repeats: at least 1, and streamed features have no more")
        if balanced and isinstance(features, StreamedFeatures):
            raise ValueError("streamed features come as they lie: they cannot be balanced")
        if not 0 <= rank < world_size <= count:
            raise ValueError(f"rank {rank} of {world_size} with {count} samples: each needs one")
        self._features = features
        self._count = count
        self._stored = stored
        self._device = features.device if isinstance(features, Tensor) else torch.device("cpu")
        self._labels = torch.tensor(whole_numbers(labels, "labels"), device=self._device)
        if self._labels.ndim == 2:  # many columns: a byte each
            self._labels = self._labels.to(torch.uint8)
        self._members = members_of(self._labels.cpu().numpy()) if balanced else []
        if rows is None:
            rows = (
                np.arange(count, dtype=np.int64) if isinstance(features, Tensor) else features.rows
            )
        self._rows = np.asarray(rows, np.int64)
        self._sampler = SegmentSampler(self._views, stored, frames)
        if isinstance(features, Tensor) and self._device.type == "cpu":
            self._memory = BatchMemory(features.numpy().dtype)
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._repeats = repeats
        self.batch_size = batch_size
        self.frames = frames

    def __len__(self) -> int:
        """The number of batches per epoch of this rank; the last batch may be smaller."""
        mine = len(range(self._rank, self._count * self._repeats, self._world_size))
        return -(-mine // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `start` on, with every sample `repeats` times.

        Raises ValueError, at the first batch, if epoch or step is negative.
        """
        if epoch < 0 or start < 0:
            raise ValueError(f"epoch {epoch}, step {start}: both are counted from 0")
        settle_torch()
        rng = np.random.default_rng((self._seed, epoch, _ORDER))
        with ExitStack() as resources:
            starts: Places | None
            clips: Clips
            if isinstance(self._features, StreamedFeatures):
                blocks = self._features.shuffled(rng, self._rank, self._world_size)
                resources.callback(blocks.close)
                order, starts, clips = blocks.order, blocks.starts, blocks.clips
            else:
                count = self._count * self._repeats
                if self._members:
                    order = balanced_order(self._members, count, rng)
                else:
                    order = rng.permutation(count)
                    if self._repeats > 1:
                        order %= self._count
                order = order[self._rank :: self._world_size]
                if isinstance(self._features, MappedFeatures):
                    starts, clips = None, self._clips_from_files(self._features, order)
                else:
                    per_sample = self._views * self._stored
                    small = self._count * per_sample < _INT32_PLACES
                    starts = order * per_sample
                    starts = starts.astype(np.int32) if small else starts
                    clips = self._clips_from_memory(self._features)
            # The labels are ordered and split once, so that a step only takes its part.
            ordered = torch.from_numpy(order).to(self._device)
            labels = torch.split(self._labels.index_select(0, ordered), self.batch_size)
            stream = (self._seed, epoch, _DRAWS, self._rank)
            together = max(1, _TOGETHER // (self.batch_size * self.frames))
            for step in range(start, len(labels), together):
                first = step * self.batch_size
                end = min(first + together * self.batch_size, len(order))
                begins = None if starts is None else starts[first:end]
                places = self._sampler.draw(stream, first, end - first, begins)
                gathered = clips(first, places, self.batch_size)
                for batch in gathered:
                    samples = order[first : first + self.batch_size]
                    yield Batch(batch, labels[first // self.batch_size], samples, self._rows)
                    first += self.batch_size

    def _clips_from_files(self, features: MappedFeatures, order: RowArray) -> Clips:
        """Return a function that gathers the samples of `order` from mapped files."""
        array_rows = features.rows[order]

        def gather(first: int, places: Places, count: int) -> Iterator[Tensor]:
            rows = array_rows[first : first + len(places)]
            views = places[:, 0] // self._stored
            frames = places - (views * self._stored)[:, None] if self._views > 1 else places
            for at in range(0, len(places), count):
                part = slice(at, at + count)
                yield torch.from_numpy(features.store.clips(rows[part], views[part], frames[part]))

        return gather

    def _clips_from_memory(self, features: Tensor) -> Clips:
        """Return a function that gathers from memory; places count from the first frame of all."""
        item = self._item
        flat = features.reshape(-1, math.prod(item))

        def gather(first: int, places: Places, count: int) -> Iterator[Tensor]:
            indices = torch.from_numpy(places.reshape(-1)).to(self._device)
            for part in torch.split(indices, count * self.frames):
                if self._device.type != "cpu":
                    yield flat.index_select(0, part).view(-1, self.frames, *item)
                else:
                    samples = len(part) // self.frames
                    batch, out = self._memory.take(samples, self.frames, item)
                    torch.index_select(flat, 0, part, out=out)
                    yield batch

        return gather
