"""Read a store. Opening checks it; features are read when needed, and never give a wrong number.

Dimension letters: V views, F frames, D dim (in other tiers the item), n requested rows. "Row" is
the array row `tar * capacity + position`; per-sample lists are in the order of `Store.rows`.

In a store of sequences a row has frames of its own number: `sequence` reads it or a part of it, and
what reads fixed rows is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Never

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, WorkError, meant, one_of
from featstore.format.array_checks import whole_numbers
from featstore.format.class_texts import ClassText, read_class_text, texts_command
from featstore.format.metadata import StoreMetadata, TarEntry, prompt_set_names, read_metadata
from featstore.format.provenance import Provenance
from featstore.format.schema import (
    STATUS_FAILED,
    STATUS_OK,
    FeatureArray,
    RowArray,
    Shown,
    StoreSchema,
)
from featstore.format.spans import Span, shown_classes
from featstore.progress import ProgressSink, no_progress
from featstore.reading.chunk_files import ChunkFiles, Commit
from featstore.reading.features import FeatureFiles
from featstore.reading.sequences import SequenceRows, Sequences

# The bytes kept per row must fit into memory, whatever a store claims. Kinetics-700: 650,000 rows.
MAX_ROWS: Final = 2**30


def _per_sample(array: str, docstring: str) -> cached_property[npt.NDArray[Any]]:
    """A property of `Store`: the values of `array` for all listed samples, in order, read-only."""
    numbers = cached_property[npt.NDArray[Any]](lambda store: store._numbers(array))
    numbers.__doc__ = docstring
    return numbers


class Store(SequenceRows):
    """A read-only feature store that reads on demand and is safe to share between threads.

    It shows the partitions that were committed when it was opened. Pickling keeps only the path,
    so worker processes open the store themselves. Before a row of features is returned for the
    first time, it is compared with its recorded checksum.
    """

    def __init__(self, path: Path, *, mapped: bool = True) -> None:
        # Absolute, so that the path stays right when this or another process changes its folder.
        self.path = path = path.absolute()
        self._mapped = mapped
        self._metadata = read_metadata(path)
        if self.schema.rows > MAX_ROWS:
            raise UserError(
                f"{path} has {self.schema.rows} rows, and mote reads at most {MAX_ROWS}: do not "
                "open a store from a source you do not trust"
            )
        self._files = ChunkFiles(path, self._metadata)
        found = {tar: self._intact_commit(tar) for tar in range(self.schema.tars)}
        self._commits = {tar: commit for tar, commit in found.items() if commit is not None}
        # The number of listed rows of each partition.
        self._limits = np.array([c.rows if c else 0 for c in found.values()], np.int64)
        self._features = FeatureFiles(self._files, self._commits, self._key_of, mapped)
        if self.schema.sequences:
            self._of_sequences = Sequences(self._files, self._commits, self._features, self._key_of)

    def __reduce__(self) -> tuple[Callable[[Path], Store], tuple[Path]]:
        return partial(Store, mapped=self._mapped), (self.path,)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} samples, {len(self._commits)} partitions)"

    # What the store is

    @property
    def metadata(self) -> StoreMetadata:
        """All that the store's own `zarr.json` holds."""
        return self._metadata

    @property
    def schema(self) -> StoreSchema:
        """The sizes of the store."""
        return self._metadata.schema

    @property
    def tier(self) -> str:
        """The kind of the features: "embeddings", "frames" or "tokens:K" (see `format.tiers`)."""
        return self.schema.tier

    @property
    def mapped(self) -> bool:
        """Whether features are memory-mapped; otherwise they are decoded chunk by chunk."""
        return self._features.mapped

    def require_embeddings(self, *, of_views: bool = False, sequences: bool = False) -> None:
        """Raise UserError unless the features are embeddings of frames, which heads work on.

        With `of_views` the rows that a head made of whole views will do, too, and with `sequences`
        rows of any length.
        """
        if not sequences:
            self.require_fixed_rows()
        if not self.schema.pooled:
            raise UserError(
                f"{self.path.name} holds {self.tier}, not the embeddings that heads work on: "
                "choose or extract a store without --tier"
            )
        if self.provenance.of_views and not of_views:
            raise UserError(
                f"{self.path.name} holds what one head made of every view, not the embeddings of "
                "frames: choose or extract another store"
            )

    @property
    def provenance(self) -> Provenance:
        """How the features were made."""
        return self._metadata.provenance

    @property
    def tars(self) -> tuple[TarEntry, ...]:
        """The packed tars that the store covers, by partition number."""
        return self._metadata.tars

    @property
    def class_names(self) -> list[str]:
        """Class names in natural words, by label."""
        return list(self._metadata.class_names)

    @property
    def raw_class_names(self) -> list[str]:
        """Class names as the data set spells them, by label."""
        return list(self._metadata.raw_class_names)

    @property
    def split_names(self) -> list[str]:
        """Names of the splits that rows may belong to."""
        return list(self._metadata.split_names)

    @property
    def complete(self) -> bool:
        """Whether every tar has a committed partition."""
        return len(self._commits) == self.schema.tars

    def partitions(self) -> Iterator[int]:
        """Numbers of the committed partitions, ascending."""
        return iter(sorted(self._commits))

    def iter_partitions(self) -> Iterator[tuple[int, RowArray, FeatureArray]]:
        """Yield (number, array rows [n], features float16 [n, V, F, D]) by ascending partition.

        Only one partition at a time is in memory. Errors as `features`.
        """
        self.require_fixed_rows()
        for tar in self.partitions():
            first = tar * self.schema.capacity
            rows = np.arange(first, first + self._commits[tar].rows, dtype=np.int64)
            yield tar, rows, self.features(rows)

    # What it lists

    def facts(self) -> dict[str, Any]:
        """Describe the store, JSON-ready: counts, shapes, provenance and why videos failed."""
        failed = np.flatnonzero(self.status == STATUS_FAILED).tolist()
        keys, reasons = self.keys, self.reasons
        return {
            "rows_ok": len(self) - len(failed),
            "rows_failed": len(failed),
            "tars_done": len(list(self.partitions())),
            "tars": self.schema.tars,
            "complete": self.complete,
            "views": self.schema.views,
            "frames": self.schema.frames,
            "dim": self.schema.dim,
            **({"sequences": True, "frames": int(self.lengths.sum())} if self.sequences else {}),
            "tier": self.tier,
            "item": list(self.schema.item),
            "features": self.schema.storage,
            "classes": len(self.class_names),
            **({"multi_label": True} if self.multi_label else {}),
            "splits": {name: len(self.split(name)) for name in self.split_names},
            "prompt_sets": list(self.prompt_sets),
            "provenance": self.provenance.to_json(),
            "failures": [{"key": keys[i], "reason": reasons[i]} for i in failed],
        }

    def __len__(self) -> int:
        """The number of listed samples, ok or failed, in committed partitions."""
        return sum(commit.rows for commit in self._commits.values())

    @cached_property
    def rows(self) -> RowArray:
        """Array rows of the listed samples, int64 [len], ascending, read-only."""
        capacity = self.schema.capacity
        spans = [
            np.arange(tar * capacity, tar * capacity + self._commits[tar].rows, dtype=np.int64)
            for tar in self.partitions()
        ]
        rows: RowArray = np.concatenate([np.zeros(0, np.int64), *spans])
        rows.flags.writeable = False
        return rows

    @cached_property
    def keys(self) -> list[str]:
        """The key of every listed sample, read-only."""
        return self._texts("key")

    @cached_property
    def reasons(self) -> list[str]:
        """Why each listed sample failed, "" if it did not fail; read-only."""
        return self._texts_of(STATUS_FAILED)

    @cached_property
    def remarks(self) -> list[str]:
        """What was noticed of each listed sample that is ok; read-only."""
        return self._texts_of(STATUS_OK)

    def _texts_of(self, status: int) -> list[str]:
        found = zip(self._texts("reason"), (self.status == status).tolist(), strict=True)
        return _ListedTexts(text if meant else "" for text, meant in found)

    labels = _per_sample(
        "label", "The label of every listed sample, int32 [len]; -1 without one label."
    )
    num_frames = _per_sample("num_frames", "Frames counted in every listed video, int32 [len].")
    fps = _per_sample("fps", "Frames per second of every listed video, float32 [len].")
    container_frames = _per_sample(
        "container_frames", "The frame count in a video's container, int32 [len]; 0 if it has none."
    )
    damaged_packets = _per_sample(
        "damaged_packets", "Damaged packets that were skipped in every video, int32 [len]."
    )
    status = _per_sample("status", "1 if the sample is ok, 2 if it failed, uint8 [len].")
    _splits = _per_sample("splits", "Bit i is set for the samples of split i, uint32 [len].")
    _frame_indices = _per_sample("frame_index", "`frame_index` of all listed samples.")
    _frame_times = _per_sample("pts", "`pts` of all listed samples.")

    @property
    def multi_label(self) -> bool:
        """Whether a video may show several classes; then `spans` has them, and no label."""
        return self.schema.multi_label

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """The classes that every listed sample shows, with their times where they are known."""
        if not self.multi_label:
            return tuple((Span(label),) if label >= 0 else () for label in self.labels.tolist())
        found = (self._files.spans(tar, self._commits[tar].rows) for tar in self.partitions())
        return tuple(spans for part in found for spans in part)

    def shown(self, rows: npt.ArrayLike) -> Shown:
        """Return which classes the samples of array rows show at any time, bool [n, classes]."""
        at = self.positions(rows)
        if self.multi_label:
            return shown_classes([self.spans[i] for i in at], len(self.class_names))
        shown: Shown = self.labels[at][:, None] == np.arange(len(self.class_names))
        return shown

    def require_one_label(self, what: str) -> None:
        """Raise UserError if videos may show several classes, for `what` needs one of each."""
        if self.multi_label:
            raise UserError(
                f"the videos of {self.path.name} may show several classes, and {what} needs one "
                "class a video, for a video counts for every class that it shows: train on all of "
                "them (--class-sampling balanced evens classes out) and evaluate with --closeset "
                "or --zeroshot"
            )

    def split(self, name: str) -> RowArray:
        """Return the array rows of one split, with failed samples, int64 [n], ascending.

        Raises UserError, which lists the splits, if no split has this name.
        """
        if name not in self._metadata.split_names:
            choices = one_of(name, self._metadata.split_names)
            raise UserError(f"{self.path} has no split {name!r}: {choices}")
        bit = np.uint32(1 << self._metadata.split_names.index(name))
        rows: RowArray = self.rows[(self._splits & bit) != 0]
        return rows

    def row(self, key: str) -> int:
        """Return the array row of the sample with this key; UserError if the key is not listed."""
        found = self._row_by_key.get(key)
        if found is None:
            raise UserError(f"{self.path} has no sample {key!r}: `keys` of the store lists them")
        return found

    def positions(self, rows: npt.ArrayLike) -> RowArray:
        """Return the positions of array rows in `rows`, `labels` and other lists, int64 [n].

        Raises UserError if a row belongs to no listed sample.
        """
        found: RowArray = np.searchsorted(self.rows, self._listed(rows)).astype(np.int64)
        return found

    # What it holds

    @property
    def prompt_sets(self) -> list[str]:
        """The prompt sets whose class texts the store holds."""
        return prompt_set_names(self.path)

    def class_text(self, prompt_set: str) -> ClassText:
        """Return the class texts of a prompt set; UserError, which lists the sets, if unknown."""
        known = self.prompt_sets
        if prompt_set not in known:
            raise UserError(
                f"{self.path} has no class texts for prompt set {prompt_set!r}: "
                f"{meant(prompt_set, known)}it has {', '.join(known) or 'none'}; add them with "
                f"`{texts_command(self.path, prompt_set)}`"
            )
        return read_class_text(self.path, prompt_set, self.provenance, self._metadata.class_names)

    def frame_index(self, rows: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Return which frames of the videos were encoded, int32 [n, V, F]; -1 for failed videos."""
        self.require_fixed_rows()
        return self._frame_indices[self.positions(rows)]

    def pts(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the presentation times of the encoded frames in seconds, float64 [n, V, F]."""
        self.require_fixed_rows()
        return self._frame_times[self.positions(rows)]

    def features(self, rows: npt.ArrayLike, frames: npt.ArrayLike | None = None) -> FeatureArray:
        """Return raw (not normalised) frame embeddings, float16 [n, V, F', D]; NaN for failed rows.

        A store of another tier returns its items, [n, V, F', *item]: frames are uint8, and zero
        for failed rows.

        `rows` is one array row or [n] of them, in any order; repeats are allowed. `frames` picks
        stored frames by index: one, [F'] for all rows, or [n, F'] per row; None picks all F. The
        caller may change the returned array.
        Raises UserError for a row that holds no sample and for anything but whole numbers (instead
        of a mask give `rows[mask]`), IndexError for a frame that is not stored or a negative
        index, WorkError if a row fails its checksum.
        """
        self.require_fixed_rows()
        wanted = self._listed(rows)
        chosen = None if frames is None else self._frame_choice(frames, len(wanted))
        if self._features.mapped:
            gathered: FeatureArray = self._features.gather(wanted, None, chosen).numpy()
            return gathered
        out: FeatureArray = np.empty((len(wanted), *self.schema.row_shape), self.schema.dtype)
        self._features.read_into(wanted, out)
        if chosen is None:
            return out
        of_rows = np.arange(len(wanted))[:, None, None]
        views = np.arange(self.schema.views)[:, None]
        return out[of_rows, views, chosen[:, None]]

    def clips(
        self, rows: npt.ArrayLike, views: npt.ArrayLike, frames: npt.ArrayLike
    ) -> FeatureArray:
        """Return the chosen frames of one view of each row: float16 [n, F', D].

        `views` is [n] and `frames` is [n, F']. Errors as `features`; also IndexError for a view
        that is not stored.
        """
        self.require_fixed_rows()
        wanted = self._listed(rows)
        chosen = self._frame_choice(frames, len(wanted))
        view = whole_numbers(views, "views")
        if view.shape != wanted.shape:
            raise UserError(f"views are {list(view.shape)}: they must be [{len(wanted)}]")
        if view.size and not 0 <= view.min() <= view.max() < self.schema.views:
            raise IndexError(f"{self.path} stores views 0 to {self.schema.views - 1}")
        if self._features.mapped:
            gathered: FeatureArray = self._features.gather(wanted, view, chosen).numpy()[:, 0]
            return gathered
        picked = self.features(wanted, chosen)
        return picked[np.arange(len(wanted)), view]

    def read_into(
        self,
        rows: npt.ArrayLike,
        out: FeatureArray,
        *,
        check: bool = True,
        progress: ProgressSink = no_progress,
    ) -> None:
        """Read the features of `rows` from their files into `out` [n, V, F, D], of their dtype.

        This is the fast way to read many rows; `progress` counts rows. With `check` False no
        checksums are compared. Errors as `features`; after an error, `out` is undefined.
        """
        self.require_fixed_rows()
        wanted = self._listed(rows)
        shape = (len(wanted), *self.schema.row_shape)
        if (out.shape, out.dtype) != (shape, self.schema.dtype) or not out.flags.carray:
            raise ValueError(
                f"out is {out.dtype} {list(out.shape)}: it must be {self.schema.dtype} "
                f"{list(shape)}, C-contiguous and writeable"
            )
        self._features.read_into(wanted, out, check, progress)

    # How it is read

    def _intact_commit(self, tar: int) -> Commit | None:
        commit = self._files.commit(tar)
        while commit is not None:
            try:
                self._files.check_shard(tar, commit)
                return commit
            except WorkError:
                # A writer that replaces the partition just now has removed the commit entry first.
                found, commit = commit, self._files.commit(tar)
                if commit == found:
                    raise
        return None

    def _listed(self, rows: npt.ArrayLike) -> RowArray:
        """Return `rows` as int64 [n]; UserError if one belongs to no listed sample."""
        wanted = whole_numbers(rows, "rows")
        if wanted.ndim != 1:
            if wanted.ndim > 1:
                raise UserError(f"rows are {list(wanted.shape)}: they must be [n]")
            wanted = wanted[None]
        tars, positions = np.divmod(wanted, self.schema.capacity)
        known = (tars >= 0) & (tars < self.schema.tars)
        known[known] = positions[known] < self._limits[tars[known]]
        if not known.all():
            raise UserError(
                f"row {int(wanted[~known][0])} of {self.path} holds no sample: it lies beyond the "
                "samples of its tar or in a partition that is not extracted yet"
            )
        return wanted

    def _key_of(self, row: int) -> str:
        return self.keys[int(np.searchsorted(self.rows, row))]

    def _frame_choice(self, frames: npt.ArrayLike, n: int) -> RowArray:
        chosen = whole_numbers(frames, "frames")
        if chosen.ndim < 2:
            chosen = np.broadcast_to(chosen, (n, chosen.size))
        if chosen.ndim != 2 or len(chosen) != n:
            raise UserError(f"frames are {list(chosen.shape)}: they must be [F'] or [{n}, F']")
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.schema.frames:
            raise IndexError(
                f"{self.path} stores frames 0 to {self.schema.frames - 1} of each view"
            )
        return chosen

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        parts = [
            self._files.numbers(name, tar)[: self._commits[tar].rows] for tar in self.partitions()
        ]
        spec = self._files.specs[name]
        joined = np.concatenate(parts) if parts else np.zeros((0, *spec.shape[1:]))
        joined = joined.astype(spec.numpy_dtype.newbyteorder("="), copy=False)
        joined.flags.writeable = False
        return joined

    def _texts(self, name: str) -> list[str]:
        return _ListedTexts(
            text
            for tar in self.partitions()
            for text in self._files.texts(name, tar)[: self._commits[tar].rows]
        )

    @cached_property
    def _row_by_key(self) -> dict[str, int]:
        return dict(zip(self.keys, self.rows.tolist(), strict=True))


class _ListedTexts(list[str]):
    """A list that nobody can change, because all callers of a store share it."""

    def _refused(self, *_: Any, **__: Any) -> Never:
        raise TypeError("the lists of a store are read-only: change a copy, list(...)")

    append = extend = insert = remove = pop = clear = sort = reverse = _refused
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refused

    def __reduce__(self) -> tuple[type[list[str]], tuple[tuple[str, ...]]]:
        return list, (tuple(self),)
