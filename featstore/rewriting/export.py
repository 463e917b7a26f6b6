"""Writes rows of a store as files for other programs: safetensors, Parquet, npy.

An export is a folder that appears when it is complete. Every format has the same columns, written
file by file, so that memory holds the rows of one file:

    key, label, class_name, splits, num_frames, fps, frame_index, pts, features

A store of sequences gives, for every row or piece of a long row, `first` and `length` besides: the
piece's frames come one after the other in `frame_index`, `pts` and `features`, piece after piece
(in Parquet as a list for each piece).

Beside these files lie `export.json` (provenance, names, rows left out, the files with their sha256)
and, for each prompt set, `class_text-SET.npy`, float32 [classes, D].

Dimension letters: n rows of a file, V views, F frames, D dim.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from featstore.commands import command
from featstore.errors import UserError, counted, meant, one_of
from featstore.files.durable import make_folder, write_bytes, write_json
from featstore.files.exchange import new_folder
from featstore.files.tables import csv_bytes
from featstore.format.schema import STATUS_OK, RowArray
from featstore.format.spans import spans_text
from featstore.progress import Outcome, ProgressSink, no_progress
from featstore.reading.store import Store
from featstore.rewriting.source import claimed_source

EXPORT_FILE: Final = "export.json"
# Size of a file that other tools can load at once, and the most that an export holds in memory.
TARGET_FILE_BYTES: Final = 256 * 2**20

CLASS_SEPARATOR: Final = "; "
"""Between the names of the classes of a video that shows several."""

Columns: TypeAlias = dict[str, Any]
Files: TypeAlias = Mapping[str, bytes | memoryview]


@dataclass(frozen=True)
class Exported(Outcome):
    """What `export` wrote, and how many chosen rows it left out because they failed."""

    folder: str
    format: str
    rows: int
    failed_left_out: int
    files: int
    bytes: int


def export(
    path: Path,
    out: Path,
    format: str,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    rows_per_file: int | None = None,
    progress: ProgressSink = no_progress,
) -> Exported:
    """Write rows of a store into the new folder `out` as "safetensors", "parquet" or "npy".

    `split` and `classes` (natural or raw names) restrict the rows; the default is all rows. Rows
    that failed have no features: they are left out, counted and named in `export.json`.
    Raises UserError if no row is left, a name is unknown, `out` exists or pyarrow is not
    installed; WorkError if the store is not complete or a row fails its checksum.
    """
    if format not in WRITERS:
        raise UserError(f"format {format!r} is unknown: {one_of(format, WRITERS)}")
    if rows_per_file is not None and rows_per_file < 1:
        raise UserError(f"{rows_per_file} rows per file are too few: at least 1")
    with claimed_source(path) as source:
        store = source.store
        source.require_complete("export")
        chosen = _chosen(store, split, classes)
        at = store.positions(chosen)
        ok = store.status[at] == STATUS_OK
        rows, failed = chosen[ok], at[~ok]
        if not len(rows):
            raise UserError(
                f"{path} has no row to export: {counted(len(failed), 'was', 'were')} asked for and "
                f"failed; `{command('inspect', path)}` lists the reasons"
            )
        parts = list(_parts(store, rows, rows_per_file))
        reasons = store.reasons if len(failed) else []
        with new_folder(out, store=False) as folder:
            make_folder(folder)
            files = []
            for number, part in enumerate(parts):
                digests = {}
                for name, data in WRITERS[format](_columns(store, part), store).items():
                    stem, ending = name.split(".")
                    name = f"{stem}-{number:05d}-of-{len(parts):05d}.{ending}"
                    write_bytes(folder / name, data)
                    digests[name] = hashlib.sha256(data).hexdigest()
                    del data  # memory holds the rows of one file
                files.append({"rows": len(part), "sha256": digests})
                progress(number + 1, len(parts))
            for prompt_set in store.prompt_sets:
                text = _npy_bytes(store.class_text(prompt_set).embeddings)
                write_bytes(folder / f"class_text-{prompt_set}.npy", text)
            summary = {
                "format": f"mote-export-{format}",
                "format_version": 1,
                "split": split,
                "classes": None if classes is None else list(classes),
                "rows": len(rows),
                "row_shape": list(store.schema.row_shape),
                "failed_left_out": [{"key": store.keys[i], "reason": reasons[i]} for i in failed],
                "files": files,
                "class_names": store.class_names,
                "raw_class_names": store.raw_class_names,
                "split_names": store.split_names,
                "prompt_sets": store.prompt_sets,
                "provenance": store.provenance.to_json(),
            }
            write_json(folder / EXPORT_FILE, summary)
            size = sum(file.stat().st_size for file in folder.iterdir())
    return Exported(str(out), format, len(rows), len(failed), len(files), size)


class _Piece(NamedTuple):
    """A row, or the frames `first` to before `after` of a sequence."""

    row: int
    first: int
    after: int


def _parts(store: Store, rows: RowArray, rows_per_file: int | None) -> Iterator[list[_Piece]]:
    """Yield what goes into each file: rows, or pieces of sequences that fit into memory."""
    room = max(1, TARGET_FILE_BYTES // store.schema.row_bytes)
    if not store.sequences:
        step = rows_per_file or room
        for at in range(0, len(rows), step):
            yield [_Piece(row, 0, 0) for row in rows[at : at + step].tolist()]
        return
    part: list[_Piece] = []
    left = room
    lengths = store.lengths[store.positions(rows)].tolist()
    for row, length in zip(rows.tolist(), lengths, strict=True):
        first = 0
        while first < length:
            if not left or len(part) == rows_per_file:
                yield part
                part, left = [], room
            part.append(_Piece(row, first, min(length, first + left)))
            left -= part[-1].after - first
            first = part[-1].after
    yield part


def _columns(store: Store, part: list[_Piece]) -> Columns:
    """Return all columns of array rows [n], which must be ok, by name.

    `label` int32 [n]; in a multi-label store, `spans` texts as the store holds them, and the names
    of the classes shown in `class_name`, between semicolons; `num_frames` int32 [n]; `fps` float32
    [n]; `frame_index` int32 [n, V, F]; `pts` float64 [n, V, F] in seconds; `features` float16 [n,
    V, F, D], or the items of another tier in its type; `key`, `class_name` and `splits` are lists
    of length n.
    """
    rows = np.array([piece.row for piece in part], np.int64)
    at, names = store.positions(rows), store.class_names
    shown = [store.spans[i] for i in at]
    members = {name: np.isin(rows, store.split(name)) for name in store.split_names}
    return {
        "key": [store.keys[i] for i in at],
        "class_name": [
            CLASS_SEPARATOR.join(names[label] for label in dict.fromkeys(s.label for s in spans))
            for spans in shown
        ],
        "splits": [[name for name, of in members.items() if of[i]] for i in range(len(rows))],
        "label": store.labels[at],
        **({"spans": [spans_text(spans) for spans in shown]} if store.multi_label else {}),
        "num_frames": store.num_frames[at],
        "fps": store.fps[at],
        **(_of_sequences(store, part) if store.sequences else _of_rows(store, rows)),
    }


def _of_rows(store: Store, rows: RowArray) -> Columns:
    return {
        "frame_index": store.frame_index(rows),
        "pts": store.pts(rows),
        "features": store.features(rows),
    }


def _of_sequences(store: Store, part: list[_Piece]) -> Columns:
    """Return `first`, `length` int64 [n] and the frames of all pieces, [sum of lengths, ...]."""
    return {
        "first": np.array([piece.first for piece in part], np.int64),
        "length": np.array([piece.after - piece.first for piece in part], np.int64),
        **{
            name: np.concatenate([store.frames_of(name, *piece) for piece in part])
            for name in ("frame_index", "pts", "features")
        },
    }


def _chosen(store: Store, split: str | None, classes: Sequence[str] | None) -> RowArray:
    rows = store.rows if split is None else store.split(split)
    if classes is None:
        return rows
    labels = set()
    names = list(zip(store.class_names, store.raw_class_names, strict=True))
    for name in classes:
        found = {label for label, known in enumerate(names) if name in known}
        if not found:
            raise UserError(f"{store.path} has no class {name!r}: {_nearest(name, store)}")
        labels |= found
    chosen: RowArray = rows[store.shown(rows)[:, sorted(labels)].any(1)]
    return chosen


def _nearest(name: str, store: Store) -> str:
    """Return a hint at which class may have been meant."""
    names = [*store.raw_class_names, *store.class_names]
    if not names:
        return "it was packed without labels"
    near = meant(name, names)
    more = len(store.class_names) - 10
    return near.strip() or (
        f"it has {', '.join(map(repr, store.class_names[:10]))}"
        + (f" and {more} more" if more > 0 else "")
    )


def _safetensors(columns: Columns, store: Store) -> Files:
    from safetensors.numpy import save

    names: tuple[str, ...] = ("features", "label", "num_frames", "fps", "frame_index", "pts")
    names += ("first", "length") if store.sequences else ()
    # The format's metadata holds texts only.
    texts = {
        **({"spans": columns["spans"]} if store.multi_label else {}),
        "key": columns["key"],
        "splits": columns["splits"],
        "class_names": store.class_names,
        "provenance": store.provenance.to_json(),
    }
    metadata = {name: json.dumps(value) for name, value in texts.items()}
    file = save({name: columns[name] for name in names}, metadata)
    return {"features.safetensors": _in_order(file)}


def _in_order(file: bytes) -> bytes:
    """A safetensors file with the texts in its header sorted.

    The library writes them in another order every time, but a repeated export must have the same
    sha256.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # what follows stays aligned
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(file)[end:]])


def _npy(columns: Columns, store: Store) -> Files:
    arrays = ("features", "frame_index", "pts")
    files = {f"{name}.npy": _npy_bytes(columns[name]) for name in arrays}
    found = dict(columns)
    numbers = ["label", "num_frames", "fps", *(("first", "length") * store.sequences)]
    found |= {name: columns[name].tolist() for name in numbers}
    found["splits"] = [";".join(of) for of in columns["splits"]]
    names = ["key", "label", "class_name", "splits", "num_frames", "fps"]
    names += ["spans"] * ("spans" in found) + ["first", "length"] * store.sequences
    rows = zip(*(found[name] for name in names), strict=True)
    return {**files, "rows.csv": csv_bytes(names, rows)}


def _npy_bytes(array: npt.NDArray[Any]) -> memoryview:
    data = io.BytesIO()
    np.save(data, array)
    return data.getbuffer()


def _parquet(columns: Columns, store: Store) -> Files:
    from featstore.rewriting.parquet import table_bytes

    return {"features.parquet": table_bytes(columns, store)}


# Each function returns the files for one part of the rows, by file name without the number.
WRITERS: Final[dict[str, Callable[[Columns, Store], Files]]] = {
    "safetensors": _safetensors,
    "parquet": _parquet,
    "npy": _npy,
}
