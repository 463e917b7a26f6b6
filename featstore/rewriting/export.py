"""Rows of a store as files of other programs: safetensors, Parquet, npy.

An export is a folder that appears when it is complete. Every format has the same columns, written
a file at a time, so that memory holds one file's rows:

    key, label, class_name, splits, num_frames, fps, frame_index, pts, features

and beside them `export.json` (provenance, names, what was left out, the files with their sha256)
and `class_text-SET.npy`, float32 [classes, D], of each prompt set.

Dimension letters: n rows of a file, V views, F frames, D dim.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError
from featstore.files.durable import make_folder, write_bytes, write_json
from featstore.files.exchange import new_folder
from featstore.format.schema import STATUS_OK, RowArray
from featstore.progress import Outcome, ProgressSink, no_progress
from featstore.reading.store import Store
from featstore.rewriting.export_rows import Rows, read_rows
from featstore.rewriting.source import claimed_source

EXPORT_FILE: Final = "export.json"
EXPORT_VERSION: Final = 1
# A file that other tools load at once, and the most that an export holds in memory.
TARGET_FILE_BYTES: Final = 256 * 2**20
_NAMED: Final = 10  # classes that an error lists


# A writer gets the folder, the file's number, its rows and the store; it returns its files' names.
Writer = Callable[[Path, str, Rows, Store], Sequence[str]]


@dataclass(frozen=True)
class Exported(Outcome):
    """What `export` wrote, and the rows that were asked for and left out because they failed."""

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
    """Write rows of a store under the new folder `out` as "safetensors", "parquet" or "npy".

    All rows, or those of a split, or of some classes (natural or raw names), or of both. Rows
    that failed have no features: they are left out, counted and named in `export.json`.
    Raises UserError when nothing is left, a name is unknown, `out` exists or pyarrow is not
    installed, WorkError when the store is not complete or a row fails its checksum.
    """
    if format not in WRITERS:
        raise UserError(f"format {format!r} is unknown: choose one of {', '.join(WRITERS)}")
    if rows_per_file is not None and rows_per_file < 1:
        raise UserError(f"{rows_per_file} rows per file are too few: at least 1")
    with claimed_source(path) as source:
        store = source.store
        source.require_complete("export")
        chosen = _chosen(store, split, classes)
        ok = store.status[store.positions(chosen)] == STATUS_OK
        rows, failed = chosen[ok], chosen[~ok]
        if not len(rows):
            raise UserError(
                f"{path} has no row to export: {len(failed)} were asked for and failed; "
                "`mote-cli inspect` lists the reasons"
            )
        write = WRITERS[format]()
        with new_folder(out, store=False) as folder:
            make_folder(folder)
            files = _write_files(store, rows, rows_per_file, folder, write, progress)
            for prompt_set in store.prompt_sets:
                data = io.BytesIO()
                np.save(data, store.class_text(prompt_set).embeddings)
                write_bytes(folder / f"class_text-{prompt_set}.npy", data.getvalue())
            write_json(
                folder / EXPORT_FILE, _summary(store, format, split, classes, rows, failed, files)
            )
            size = sum(file.stat().st_size for file in folder.iterdir())
    return Exported(str(out), format, len(rows), len(failed), len(files), size)


def _write_files(
    store: Store,
    rows: RowArray,
    rows_per_file: int | None,
    folder: Path,
    write: Writer,
    progress: ProgressSink,
) -> list[dict[str, Any]]:
    """Write the rows a file at a time; returns what `export.json` says of each file."""
    step = rows_per_file or max(1, TARGET_FILE_BYTES // store.schema.row_bytes)
    count = -(-len(rows) // step)
    files = []
    for number in range(count):
        part = read_rows(store, rows[number * step : (number + 1) * step])
        names = write(folder, f"{number:05d}-of-{count:05d}", part, store)
        files.append(_listed(folder, names, len(part.key)))
        progress(min((number + 1) * step, len(rows)), len(rows))
    return files


def _chosen(store: Store, split: str | None, classes: Sequence[str] | None) -> RowArray:
    rows = store.rows if split is None else store.split(split)
    if classes is None:
        return rows
    labels = set()
    for name in classes:
        found = {
            label
            for names in (store.class_names, store.raw_class_names)
            for label, known in enumerate(names)
            if known == name
        }
        if not found:
            raise UserError(f"{store.path} has no class {name!r}: {_nearest(name, store)}")
        labels |= found
    wanted = np.isin(store.labels[store.positions(rows)], sorted(labels))
    chosen: RowArray = rows[wanted]
    return chosen


def _nearest(name: str, store: Store) -> str:
    """Which class may have been meant."""
    names = {known.lower(): known for known in [*store.raw_class_names, *store.class_names]}
    meant = difflib.get_close_matches(name.lower(), names, n=3)
    if meant:
        return f"did you mean {' or '.join(repr(names[found]) for found in meant)}?"
    more = len(store.class_names) - _NAMED
    return f"it has {', '.join(map(repr, store.class_names[:_NAMED]))}" + (
        f" and {more} more" if more > 0 else ""
    )


def _summary(
    store: Store,
    format: str,
    split: str | None,
    classes: Sequence[str] | None,
    rows: RowArray,
    failed: RowArray,
    files: list[dict[str, Any]],
) -> dict[str, Any]:
    at = store.positions(failed)
    reasons = store.reasons if len(at) else []
    return {
        "format": f"mote-export-{format}",
        "format_version": EXPORT_VERSION,
        "split": split,
        "classes": None if classes is None else list(classes),
        "rows": len(rows),
        "row_shape": list(store.schema.row_shape),
        "failed_left_out": [{"key": store.keys[i], "reason": reasons[i]} for i in at],
        "files": files,
        "class_names": store.class_names,
        "raw_class_names": store.raw_class_names,
        "split_names": store.split_names,
        "prompt_sets": store.prompt_sets,
        "provenance": store.provenance.to_json(),
    }


def _listed(folder: Path, names: Sequence[str], rows: int) -> dict[str, Any]:
    digests = {}
    for name in names:
        with open(folder / name, "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"rows": rows, "sha256": digests}


def _safetensors() -> Writer:
    from safetensors.numpy import save

    def write(folder: Path, number: str, rows: Rows, store: Store) -> Sequence[str]:
        name = f"features-{number}.safetensors"
        tensors: dict[str, npt.NDArray[Any]] = {
            "features": rows.features,
            "label": rows.label,
            "num_frames": rows.num_frames,
            "fps": rows.fps,
            "frame_index": rows.frame_index,
            "pts": rows.pts,
        }
        # The format's metadata holds texts only.
        texts = {
            "key": rows.key,
            "splits": rows.splits,
            "class_names": store.class_names,
            "provenance": store.provenance.to_json(),
        }
        metadata = {name: json.dumps(value) for name, value in texts.items()}
        write_bytes(folder / name, _in_order(save(tensors, metadata)))
        return [name]

    return write


def _in_order(file: bytes) -> bytes:
    """A safetensors file with the texts in its header sorted.

    The library gives them in another order every time, and an export made again has to have the
    same sha256.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # what follows stays aligned
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(file)[end:]])


def _npy() -> Writer:
    def write(folder: Path, number: str, rows: Rows, store: Store) -> Sequence[str]:
        names = []
        for column in ("features", "frame_index", "pts"):
            data = io.BytesIO()
            np.save(data, getattr(rows, column))
            names.append(f"{column}-{number}.npy")
            write_bytes(folder / names[-1], data.getbuffer())
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["key", "label", "class_name", "splits", "num_frames", "fps"])
        for i, key in enumerate(rows.key):
            facts = (int(rows.label[i]), rows.class_name[i], ";".join(rows.splits[i]))
            table.writerow([key, *facts, int(rows.num_frames[i]), float(rows.fps[i])])
        names.append(f"rows-{number}.csv")
        write_bytes(folder / names[-1], text.getvalue().encode())
        return names

    return write


def _parquet() -> Writer:
    from featstore.rewriting.parquet import table_bytes

    def write(folder: Path, number: str, rows: Rows, store: Store) -> Sequence[str]:
        name = f"features-{number}.parquet"
        write_bytes(folder / name, table_bytes(rows, store))
        return [name]

    return write


WRITERS: Final[dict[str, Callable[[], Writer]]] = {
    "safetensors": _safetensors,
    "parquet": _parquet,
    "npy": _npy,
}
