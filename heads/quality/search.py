"""Finds copies of videos among the videos of stores.

n = videos of the first part, m = videos of the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from featstore.errors import UserError
from featstore.files.key_lists import superfluous
from featstore.progress import ProgressSink, no_progress
from heads.quality.alignment import Trimming, compare, resampled, screen, trimmings
from heads.quality.copies import (
    ALIKE,
    IDENTICAL,
    REENCODED,
    SAME,
    TRIMMED,
    Copies,
    CopyGroup,
    Pair,
    Video,
)
from heads.quality.null import LARGEST, NEIGHBOURS, largest_ratio, usual_distances
from heads.quality.part import Part
from heads.quality.pictures import VideoFiles
from heads.quality.pixels import (
    LOOKED_AT,
    PICTURE_DIMENSIONS,
    Way,
    compare_pictures,
    small_pictures,
    ways,
)
from heads.quality.sequences import Space

EXACT: Final = 0.999  # similarity of the same pixels, encoded in other batches or numbers
DIFFERENT: Final = {ALIKE: 0.35, TRIMMED: 0.6}
"""The ratio of the pictures from which on embeddings alone prove nothing, by the kind of copy."""
ALMOST_EQUAL: Final = 1.0  # grey levels between pictures of one file, encoded again


def find_duplicates(part: Part, progress: ProgressSink = no_progress) -> Copies:
    """Find the videos of `part` that are copies of each other.

    Frames are compared in time order, also shifted and trimmed (`heads.quality.alignment`), in a
    space that is learnt on the part, and the similarity from which on a pair counts is found on it,
    too (`heads.quality.null`). Videos of the same bytes count whatever their embeddings.
    `progress` counts videos. Raises WorkError if a row fails its checksum.
    """
    space = Space.of([part], progress)
    sequences = space.sequences(part)
    n = len(sequences)
    pairs = screen(sequences, None, lambda share: progress(share * n, n, stage="screen"))
    return _found((part,), sequences, sequences, pairs, progress)


def find_leaks(train: Part, test: Part, progress: ProgressSink = no_progress) -> Copies:
    """Find the videos of `test` that are copies of videos of `train`; as `find_duplicates`.

    Raises UserError if the two were not encoded by the same encoder, or are the same videos.
    """
    one, other = train.store.provenance, test.store.provenance
    if one.encoder_fingerprint != other.encoder_fingerprint:
        raise UserError(
            f"{train.name} was encoded by {one.encoder} and {test.name} by {other.encoder}: their "
            "embeddings cannot be compared; extract both with one encoder"
        )
    if train.store.path == test.store.path and len(np.intersect1d(train.rows, test.rows)):
        raise UserError(
            f"{train.name} and {test.name} have videos in common: name two splits, "
            "STORE:train STORE:test, or use `mote-cli store duplicates`"
        )
    space = Space.of([train, test], progress)
    first, second = space.sequences(train), space.sequences(test)
    frames = min(first.shape[1], second.shape[1])
    first, second = resampled(first, frames), resampled(second, frames)
    n = len(first) + len(second)
    pairs = screen(first, second, lambda share: progress(share * n, n, stage="screen"))
    return _found((train, test), first, second, pairs, progress)


def _found(
    parts: tuple[Part, ...], first: Tensor, second: Tensor, pairs: Tensor, progress: ProgressSink
) -> Copies:
    """Compare the screened `pairs` [p,2], keep those that are copies, and group them."""
    between, every = len(parts) > 1, sum(len(part.rows) for part in parts)
    similarity, way = compare(first, second, pairs)
    distance = (1 - similarity).clamp_min(0)
    # From here on the videos of all parts are counted together.
    joined = pairs + torch.tensor([0, len(first) * between])
    nearest = _nearest(joined, distance, every)
    usual = usual_distances(nearest)
    ratios = distance / (usual[joined[:, 0]] * usual[joined[:, 1]]).sqrt()
    ratio = largest_ratio(nearest, ratios)
    chosen = (ratios <= ratio) | (similarity >= EXACT)
    kept: dict[tuple[int, int], str] = {}
    by_pair = dict(zip(map(tuple, joined.tolist()), range(len(joined)), strict=True))
    ways = trimmings()
    videos = [video for number, part in enumerate(parts) for video in _videos(number, part)]
    details: dict[tuple[int, int], str] = {}
    for at in torch.nonzero(chosen)[:, 0].tolist():
        a, b = joined[at].tolist()
        number = int(way[at])
        found = ways[number if number >= 0 else -1 - number]
        kept[a, b] = SAME if float(similarity[at]) >= EXACT else ALIKE
        if not found.whole:
            kept[a, b] = TRIMMED
            details[a, b] = _trimmed(videos[a if number >= 0 else b], found)
    unsure = {pair: kind for pair, kind in kept.items() if kind in DIFFERENT}
    pictures = _by_pictures(parts, joined, ratios, unsure, progress)
    for pair in pictures.differ:
        del kept[pair]
    for (a, b), (made, grey) in pictures.pairs.items():
        words = [made.words] if made.words else []
        if not made.trimming.whole:
            words.append(TRIMMED)
        if words or kept.get((a, b)) != SAME:
            kept[a, b] = ", ".join(words) or REENCODED
        details[a, b] = f"pictures {grey:.1f} grey levels apart"
    for a, b in _identical(parts):
        kept[a, b] = IDENTICAL
        details.pop((a, b), None)
    lacking = [pair for pair in kept if pair not in by_pair]
    scores = similarity.tolist()
    if lacking:
        back = torch.tensor(lacking) - torch.tensor([0, len(first) * between])
        for pair, score in zip(lacking, compare(first, second, back)[0].tolist(), strict=True):
            by_pair[pair] = len(scores)
            scores.append(score)
    made_pairs = [
        Pair(videos[a], videos[b], min(scores[by_pair[a, b]], 1.0), kind, details.get((a, b), ""))
        for (a, b), kind in kept.items()
    ]
    made_pairs.sort(key=lambda pair: (pair.kind != IDENTICAL, -pair.similarity, pair.first.key))
    groups = _grouped(made_pairs)
    limits = {"embeddings": ratio, "pictures": pictures.ratio, "looked_at": pictures.looked_at}
    return Copies(parts, groups, limits, _proposed(groups, between))


class _ByPictures(NamedTuple):
    """Pairs whose pictures agree, with the way and the distance, and how that was decided."""

    pairs: dict[tuple[int, int], tuple[Way, float]]
    ratio: float
    looked_at: int
    differ: frozenset[tuple[int, int]] = frozenset()
    """Pairs that were asked for and whose pictures are not near enough."""


def _by_pictures(
    parts: tuple[Part, ...],
    pairs: Tensor,
    ratios: Tensor,
    asked: Mapping[tuple[int, int], str],
    progress: ProgressSink,
) -> _ByPictures:
    """Compare the pictures of the videos at hand; of many, those in the likeliest `pairs`."""
    every = sum(len(part.rows) for part in parts)
    starts = [0, len(parts[0].rows)]
    files = [VideoFiles(part) for part in parts]
    held = [start + at for start, f in zip(starts, files, strict=False) for at in f.at_hand()]
    if len(held) > LOOKED_AT:
        there, likely = set(held), dict[int, None]()
        for a, b in pairs[ratios.argsort()].tolist():
            if a in there and b in there and len(likely) < LOOKED_AT:
                likely |= {a: None, b: None}
        held = sorted(likely)
    seen, found = [], []
    for start, f, part in zip(starts, files, parts, strict=False):
        own = [at for at in held if start <= at < start + len(part.rows)]
        rows = [int(part.rows[at - start]) for at in own]
        for number, pictures in small_pictures(f, rows, progress, every):
            seen.append(own[number])
            found.append(pictures)
    if len(seen) < 2:
        return _ByPictures({}, 0.0, len(seen))
    compared = compare_pictures(torch.stack(found), progress, every)
    nearest = compared.distance.topk(min(NEIGHBOURS, len(seen) - 1), 1, largest=False)[0]
    usual = usual_distances(nearest)
    mutual = torch.minimum(compared.distance, compared.distance.T)
    relative = mutual / (usual[:, None] * usual[None]).sqrt()
    i, j = torch.triu_indices(len(seen), len(seen), 1)
    if len(parts) > 1:
        train = torch.tensor(seen) < starts[1]
        across = train[i] != train[j]
        i, j = i[across], j[across]
    close = relative[i, j] <= LARGEST
    i, j = i[close], j[close]
    ratio = largest_ratio(nearest, relative[i, j], PICTURE_DIMENSIONS)
    good = (relative[i, j] <= ratio) | (mutual[i, j] <= ALMOST_EQUAL)
    tried, made = ways(), dict[tuple[int, int], tuple[Way, float]]()
    for a, b in zip(i[good].tolist(), j[good].tolist(), strict=True):
        copy, original = (a, b) if compared.distance[a, b] <= compared.distance[b, a] else (b, a)
        way = tried[int(compared.way[copy, original])]
        made[seen[a], seen[b]] = (way, float(mutual[a, b]))
    at = {video: number for number, video in enumerate(seen)}
    differ = frozenset(
        (a, b)
        for (a, b), kind in asked.items()
        if a in at and b in at and float(relative[at[a], at[b]]) > DIFFERENT[kind]
    )
    return _ByPictures(made, ratio, len(seen), differ)


def _nearest(pairs: Tensor, distance: Tensor, n: int) -> Tensor:
    """Return the distances [n,k] of each video's nearest screened neighbours, ascending."""
    who = pairs.T.flatten()
    far = distance.repeat(2)
    order = far.argsort()
    order = order[who[order].argsort(stable=True)]
    counts = torch.bincount(who, minlength=n)
    first = counts.cumsum(0) - counts
    k = int(min(NEIGHBOURS, max(int(counts.min()), 1)))
    at = (first[:, None] + torch.arange(k)).clamp(max=max(len(far) - 1, 0))
    return far[order][at] if len(far) else torch.zeros(n, 0)


def _trimmed(original: Video, way: Trimming) -> str:
    end = min(1.0, way.start + way.step)
    seconds = f"{way.start * original.seconds:.1f} to {end * original.seconds:.1f} s"
    return f"about {seconds} of {original.key}"


def _videos(number: int, part: Part) -> list[Video]:
    facts = zip(
        part.rows.tolist(), part.keys, part.class_names, part.splits, part.seconds, strict=True
    )
    return [Video(number, *fact) for fact in facts]


def _identical(parts: tuple[Part, ...]) -> Iterator[tuple[int, int]]:
    """Yield pairs of videos of the same bytes: each with the first of its hash."""
    first: dict[str, int] = {}
    for at, key in enumerate(parts[0].keys):
        digest = parts[0].hashes.get(key)
        if digest is None:
            continue
        if first.setdefault(digest, at) != at and len(parts) == 1:
            yield first[digest], at
    for at, key in enumerate(parts[1].keys if len(parts) > 1 else ()):
        if (there := first.get(parts[1].hashes.get(key, ""))) is not None:
            yield there, len(parts[0].rows) + at


def _grouped(pairs: Sequence[Pair]) -> tuple[CopyGroup, ...]:
    """Join pairs that have a video in common; pairs come with the most alike first."""
    above: dict[tuple[int, int], tuple[int, int]] = {}

    def top(one: tuple[int, int]) -> tuple[int, int]:
        while above.setdefault(one, one) != one:
            above[one] = above[above[one]]
            one = above[one]
        return one

    ids = [((p.first.part, p.first.row), (p.second.part, p.second.row)) for p in pairs]
    for one, other in ids:
        above[top(one)] = top(other)
    held: dict[tuple[int, int], list[Pair]] = {}
    for pair, (one, _) in zip(pairs, ids, strict=True):
        held.setdefault(top(one), []).append(pair)
    groups = []
    for found in held.values():
        members = {(v.part, v.row): v for p in found for v in (p.first, p.second)}
        groups.append(CopyGroup(tuple(members[at] for at in sorted(members)), tuple(found)))
    groups.sort(key=lambda g: (not g.across_classes, not g.across_splits, -g.pairs[0].similarity))
    return tuple(groups)


def _proposed(groups: Sequence[CopyGroup], between: bool) -> frozenset[tuple[int, str]]:
    """Return part and key of the videos to leave out: of training and test the training ones."""
    if between:
        return frozenset((0, v.key) for group in groups for v in group.videos if v.part == 0)
    found = (superfluous((v.key, v.splits, v.class_name) for v in g.videos) for g in groups)
    return frozenset((0, key) for keys in found for key in keys)
