"""Lists the clips of a split and orders them for each epoch.

N listed clips of a split. The order depends only on seed, epoch and the list; ranks, workers, batch
sizes and machines only divide it (docs/decisions/0018).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

import numpy as np

from featstore.balance import balanced_order
from featstore.errors import UserError, one_line
from featstore.format.spans import Span
from featstore.segments import IntArray, segment_ranges
from pipeline.sampling import dist_train_indices
from pipeline.tars.dataset import Dataset
from pipeline.tars.reading import DamagedTar, open_packed

# How many tars have their clips mixed. Packing has mixed the classes of every tar already. A small
# number keeps reads close together, which matters on disks with heads and network file systems.
TARS_TOGETHER = 8

# The first word of a seed says what its random numbers are for. Numpy pads seeds with zeros, so two
# seeds must not differ only in words that may be zero.
_ORDER, _FRAMES, _AUGMENTATION, _BALANCE, _MIRROR = 1, 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class ListedClip:
    """One listed video: its tar's number in `dataset.json`, and where its bytes lie in that tar.

    `position` counts the listed clips in the order of their keys. `reason` is set if there is
    nothing to decode: packing failed, or the tar is damaged (then `label` is -1). `sha256` is the
    hash of the video's bytes, "" if the sidecar has none. `spans` are the classes of a video that
    may show several.
    """

    tar: int
    key: str
    label: int
    position: int = -1
    num_frames: int = 0
    offset: int = 0
    size: int = 0
    sha256: str = ""
    reason: str = ""
    spans: tuple[Span, ...] = ()


def listed_clips(
    dataset: Dataset, split: str | None, excluded: Collection[str] = ()
) -> list[ListedClip]:
    """List all videos of `split` (of all splits if it is None), in the order of their keys.

    Nothing but the keys `excluded` is left out: a video that cannot be read has a reason. Videos
    that are in no intact tar are assigned to the damaged tars; if several are damaged, which one is
    a guess.

    Raises UserError for a split that does not exist or is empty, `DamagedTar` if a damaged tar
    holds videos whose names are unknown because they belong to no split.
    """
    if split is not None and split not in dataset.split_names:
        raise UserError(
            f"split {split!r} does not exist in data set {dataset.name!r}: it has "
            f"{', '.join(map(repr, dataset.split_names)) or 'no splits'}"
        )
    found: dict[str, ListedClip] = {}
    damaged: list[tuple[int, str]] = []  # tar and reason, once for each video of the tar
    for number, tar in enumerate(dataset.tars):
        if dataset.splits_disjoint and split is not None and tar.split != split:
            continue
        for failed in tar.failed:
            if split is None or split in failed.splits:
                found[failed.key] = ListedClip(
                    *(number, failed.key, failed.label),
                    reason=failed.reason,
                    spans=failed.spans,
                )
        try:
            with open_packed(dataset, tar) as archive:
                samples = archive.samples
        except DamagedTar as error:
            damaged += [(number, one_line(error))] * tar.samples
            continue
        for sample in samples:
            sidecar = sample.sidecar
            if split is None or split in sidecar["splits"]:
                found[sample.key] = ListedClip(
                    number,
                    sample.key,
                    sidecar["label"],
                    num_frames=sidecar["num_frames"],
                    offset=sample.offset,
                    size=sample.size,
                    sha256=str(sidecar.get("sha256") or ""),
                    spans=sample.spans(len(dataset.class_names)),
                )
    splits = dataset.split_names if split is None else (split,)
    lost = {key for name in splits for key in dataset.keys_by_split[name]} - found.keys()
    reasons = chain(damaged, repeat((0, "it is in none of the tars")))
    for key, (number, reason) in zip(sorted(lost), reasons, strict=False):
        found[key] = ListedClip(number, key, -1, reason=reason)
    unknown = sum(tar.rows for tar in dataset.tars) - len(found) if split is None else 0
    if unknown:
        raise DamagedTar(
            f"{damaged[0][1]} ({unknown} videos without a split cannot be named without this tar)"
        )
    if not found:
        raise UserError(
            f"split {split!r} of data set {dataset.name!r} has no videos: choose another"
        )
    left = [clip for key, clip in sorted(found.items()) if key not in excluded]
    return [replace(clip, position=position) for position, clip in enumerate(left)]


def of_classes(clips: Sequence[ListedClip], classes: Sequence[int]) -> list[ListedClip]:
    """Return the clips of some classes, whose new labels are their numbers in `classes`.

    Clips of unknown class, in a damaged tar, stay: they are counted as failed.
    """
    number = {label: new for new, label in enumerate(classes)} | {-1: -1}
    kept = [replace(c, label=number[c.label]) for c in clips if c.label in number]
    return [replace(clip, position=position) for position, clip in enumerate(kept)]


def list_digest(clips: Sequence[ListedClip]) -> str:
    """Return a hash of what the order depends on; it must be equal on all ranks."""
    text = "\n".join(f"{clip.key} {clip.tar}" for clip in clips)
    return hashlib.sha256(text.encode()).hexdigest()


def balanced_draws(
    members: Sequence[IntArray], unusable: IntArray, listed: int, seed: int, epoch: int
) -> IntArray:
    """Return the places of an epoch in which all classes come equally often, int64 [N].

    `members` are the positions of usable clips by class, `unusable` all others, which come once
    each, so that they are counted. A place is `position + N * times`, with the number of times that
    the clip has come in this epoch before: it is drawn and augmented anew each time.
    """
    rng = np.random.default_rng([_BALANCE, seed, epoch])
    drawn = balanced_order(members, listed - len(unusable), rng)
    order = np.argsort(drawn, kind="stable")
    ranked = drawn[order]
    first = np.searchsorted(ranked, ranked)
    times = np.empty_like(drawn)
    times[order] = np.arange(len(drawn)) - first
    return np.concatenate([drawn + listed * times, unusable])


def epoch_order(tars_of: IntArray, seed: int, epoch: int, window: int = TARS_TOGETHER) -> IntArray:
    """Return the order of an epoch: a permutation of the places, int64 [N].

    `tars_of` int64 [N] is the tar of every place. The tars are permuted, then the clips within
    every `window` consecutive tars. `seed` and `epoch` are not negative.
    """
    rng = np.random.default_rng([_ORDER, seed, epoch])
    tars, which = np.unique(tars_of, return_inverse=True)
    group = rng.permutation(len(tars))[which.reshape(-1)] // window
    return np.lexsort((rng.permutation(len(tars_of)), group)).astype(np.int64)


def steps_per_epoch(listed: int, batch_size: int, world_size: int = 1) -> int:
    """Count the global batches of an epoch: every rank is part of each, the last may be smaller."""
    return -(-listed // (batch_size * world_size))


def rank_parts(
    order: IntArray, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0
) -> Iterator[IntArray]:
    """Yield the rank's part of every global batch from number `start` on; the last may be empty.

    Global batch k is order[k*G:(k+1)*G] with G = batch_size * world_size. A rank's part is every
    `world_size`-th position in it, from `rank` on.
    """
    size = batch_size * world_size
    for first in range(start * size, len(order), size):
        yield order[first : first + size][rank::world_size]


def training_frames(
    num_frames: int, segments: int, seed: int, epoch: int, position: int
) -> IntArray:
    """Draw a frame from each segment of a clip for this epoch, int64 [segments]."""
    lowest, highest = segment_ranges(num_frames, segments)
    rng = np.random.default_rng([_FRAMES, seed, epoch, position])
    return rng.integers(lowest, highest, endpoint=True)


def dist_training_frames(
    num_frames: int, segments: int, seed: int, epoch: int, position: int
) -> IntArray:
    """Draw a frame from each segment of a clip as DiST does, int64 [segments]."""
    rng = np.random.default_rng([_FRAMES, seed, epoch, position])
    return dist_train_indices(num_frames, segments, rng.random(segments, np.float32))


def mirror_draw(seed: int, epoch: int, position: int) -> bool:
    """Draw whether a clip is mirrored in this epoch, where that is known before its pixels."""
    from pipeline.augmentation import FLIP  # it loads torch, which the order does without

    return bool(np.random.default_rng([_MIRROR, seed, epoch, position]).random() < FLIP)


def augmentation_rng(seed: int, epoch: int, position: int) -> np.random.Generator:
    """Return the random generator of a clip's augmentation in this epoch."""
    return np.random.default_rng([_AUGMENTATION, seed, epoch, position])
