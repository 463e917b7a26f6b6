"""Rewrites a store with int8 features and measures the loss on the store's own rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from featstore.commands import command
from featstore.errors import UserError
from featstore.files.exchange import new_folder
from featstore.format.int8 import scale_of
from featstore.format.schema import STATUS_OK, FloatArray, HalfArray, RowArray
from featstore.progress import Outcome, ProgressSink, no_progress
from featstore.reading.store import Store
from featstore.rewriting.source import SourceStore, claimed_source

QUANTISED: Final = "int8 per dimension"


@dataclass(frozen=True)
class Agreement:
    """Top-1 results of CLIP's mean of frames with one prompt set's class texts, in percent.

    `agreement` is how often the float16 and the int8 answers are the same; the others are the
    accuracies of each.
    """

    prompt_set: str
    agreement: float
    top1_float16: float
    top1_int8: float


@dataclass(frozen=True)
class Quantised(Outcome):
    """What `quantize` made, and the loss.

    `cosine_error` is 1 minus the cosine between a frame's embedding before and after, over all
    frames of ok rows; `agreement` has one entry per prompt set.
    """

    store: str
    tars: int
    rows: int
    bytes_before: int
    bytes_after: int
    cosine_error_mean: float
    cosine_error_max: float
    agreement: tuple[Agreement, ...]


def quantize(path: Path, out: Path, *, progress: ProgressSink = no_progress) -> Quantised:
    """Make a store whose features are int8 with one scale per dimension, half as large.

    `open_store` returns the features as float16, as for any store; `provenance.quantised` records
    that they are rounded. The new store appears at `out` when it is complete. The old one is read
    three times: for the scale, to write, and to measure. Raises UserError if the old one is
    quantised already or has no ok row, or `out` exists; WorkError if the old one is not complete,
    damaged, or being written to.
    """
    with claimed_source(path) as source, new_folder(out) as folder:
        made = source.metadata
        if made.schema.quantised:
            raise UserError(f"{path} is quantised already: doing it twice gains nothing")
        if not made.schema.pooled:
            raise UserError(
                f"{path} holds {made.schema.tier}, but only embeddings can be quantised: "
                f"`{command('store', 'convert', path, codec='zstd', out=out)}` makes it smaller "
                "without loss"
            )
        source.store.require_embeddings(sequences=True)
        source.require_complete("quantise")
        tars = made.schema.tars
        steps = 3 * tars
        before, after = source.rewrite(
            folder,
            replace(made.schema, feature_type="int8"),
            replace(made.provenance, quantised=QUANTISED),
            _scale(source, progress, steps),
            lambda done, total, **details: progress(tars + done, steps),
        )
        errors, agreement = _cost(source, folder, progress, steps)
        return Quantised(
            store=str(out),
            tars=tars,
            rows=len(source.store),
            bytes_before=before,
            bytes_after=after,
            cosine_error_mean=errors[0],
            cosine_error_max=errors[1],
            agreement=agreement,
        )


def _scale(source: SourceStore, progress: ProgressSink, steps: int) -> FloatArray:
    """Return the scale that the largest value of each dimension needs, float32 [D]."""
    largest = np.zeros(source.metadata.schema.dim)
    found = False
    for tar, _, features, _ in _ok_features(source.store):
        found = found or len(features) > 0
        axes = tuple(range(features.ndim - 1))
        largest = np.maximum(largest, np.abs(features).max(axes, initial=0).astype(np.float64))
        progress(tar + 1, steps)
    if not found:
        raise UserError(f"{source.path} has no row that is ok: there is nothing to quantise")
    return scale_of(largest)


def _cost(
    source: SourceStore, folder: Path, progress: ProgressSink, steps: int
) -> tuple[tuple[float, float], tuple[Agreement, ...]]:
    """Return the mean and largest cosine error over frames, and the agreement per prompt set."""
    rounded = Store(folder)
    texts = source.texts()
    total, largest, frames, rows = 0.0, 0.0, 0, 0
    counts = {name: np.zeros(3) for name in texts}  # agree, right in float16, right in int8
    sums: list[npt.NDArray[np.float64]] = [np.zeros(0), np.zeros(0)]
    both = zip(_ok_features(source.store), _ok_features(rounded), strict=True)
    for (tar, ok, before, ends), (_, _, after, _) in both:
        one, two = _unit(before), _unit(after)
        # An embedding that is zero, before and after, has not turned.
        error = np.where((one == two).all(-1), 0, 1 - (one * two).sum(-1))
        total, frames = total + float(error.sum()), frames + error.size
        largest = max(largest, float(error.max(initial=0)))
        # The direction of the mean over views and frames; a sequence comes in several pieces.
        axes = tuple(range(0 if source.store.sequences else 1, one.ndim - 1))
        parts = [np.atleast_2d(unit.sum(axes)) for unit in (one, two)]
        sums = [a + b if a.size else b for a, b in zip(sums, parts, strict=True)]
        if not ends:
            continue
        means, sums = sums, [np.zeros(0), np.zeros(0)]
        shown, each, rows = source.store.shown(ok), np.arange(len(ok)), rows + len(ok)
        for name, text in texts.items():
            answers = [(mean @ text.embeddings.T).argmax(-1) for mean in means]  # int64 [n]
            counts[name] += [
                np.count_nonzero(answers[0] == answers[1]),
                *(np.count_nonzero(shown[each, answer]) for answer in answers),
            ]
        progress(2 * source.metadata.schema.tars + tar + 1, steps)
    agreement = tuple(
        Agreement(name, *(float(100 * n / rows) for n in counts[name])) for name in texts
    )
    return (total / frames, largest), agreement


def _ok_features(store: Store) -> Iterator[tuple[int, RowArray, HalfArray, bool]]:
    """Yield the features of ok rows, a chunk at a time: partition, array rows, features, whether
    the rows end with them. Of sequences, features [n, ...] are a piece of one row."""
    schema = store.schema
    rows = store.rows[store.status == STATUS_OK]
    if schema.sequences:
        lengths = store.lengths[store.status == STATUS_OK].tolist()
        for row, length in zip(rows, lengths, strict=True):
            for first, piece in store.blocks(int(row)):
                ends = first + len(piece) == length
                yield int(row) // schema.capacity, np.array([row]), piece, ends
        return
    edges = np.flatnonzero(np.diff(rows // schema.chunk_rows)) + 1
    for block in np.split(rows, edges) if len(rows) else ():
        yield int(block[0]) // schema.capacity, block, store.features(block), True


def _unit(features: HalfArray) -> npt.NDArray[np.float64]:
    """Scale embeddings [..., D] to length 1; zero embeddings stay zero."""
    wide = features.astype(np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    unit: npt.NDArray[np.float64] = wide / np.where(length > 0, length, 1)
    return unit
