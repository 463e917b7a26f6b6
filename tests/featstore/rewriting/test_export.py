"""Rows as files of other programs: every number comes back, nothing is left out in silence."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors import safe_open

import featstore.rewriting.export
from featstore import StoreWriter, UserError, WorkError, open_store
from featstore.rewriting.export import EXPORT_FILE, WRITERS, export
from tests.support.stores.sample_stores import CLASS_NAMES, make_store

Columns = dict[str, Any]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Partitions of 8, 3 and 8 rows, row 1 of each failed."""
    path = tmp_path / "s.zarr"
    make_store(path, rows=(8, 3, 8))
    return path


def summary(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / EXPORT_FILE).read_text())
    return value


def data_files(folder: Path, start: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.startswith(start))


def read_safetensors(folder: Path) -> Columns:
    parts: list[Columns] = []
    for path in data_files(folder, "features-"):
        with safe_open(path, "np") as file:
            part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = {name: json.loads(text) for name, text in file.metadata().items()}
        assert texts["class_names"] == list(CLASS_NAMES)
        parts.append(part | {"key": texts["key"], "splits": texts["splits"]})
    return joined(parts)


def read_parquet(folder: Path) -> Columns:
    parts: list[Columns] = []
    for path in data_files(folder, "features-"):
        table = pyarrow.parquet.read_table(path)
        shapes = json.loads(table.schema.metadata[b"mote"])["shapes"]
        assert pyarrow.types.is_fixed_size_list(table.schema.field("features").type)
        part = {name: table[name].to_pylist() for name in ("key", "splits", "class_name")}
        for name in ("label", "num_frames", "fps"):
            part[name] = table[name].to_numpy()
        for name, shape in shapes.items():
            flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            part[name] = flat.reshape(-1, *shape)
        parts.append(part)
    return joined(parts)


def read_npy(folder: Path) -> Columns:
    parts: list[Columns] = []
    for path in data_files(folder, "features-"):
        number = path.name.removeprefix("features-")
        part: Columns = {
            name: np.load(folder / f"{name}-{number}", allow_pickle=False)
            for name in ("features", "frame_index", "pts")
        }
        with open(folder / f"rows-{number}".replace(".npy", ".csv"), newline="") as file:
            lines = list(csv.DictReader(file))
        part["key"] = [line["key"] for line in lines]
        part["splits"] = [line["splits"].split(";") for line in lines]
        for name, kind in (("label", int), ("num_frames", int), ("fps", float)):
            part[name] = np.array([kind(line[name]) for line in lines])
        parts.append(part)
    return joined(parts)


def joined(parts: list[Columns]) -> Columns:
    return {
        name: [x for part in parts for x in part[name]]
        if isinstance(values, list)
        else np.concatenate([part[name] for part in parts])
        for name, values in parts[0].items()
    }


READERS: dict[str, Callable[[Path], Columns]] = {
    "safetensors": read_safetensors,
    "parquet": read_parquet,
    "npy": read_npy,
}


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("rows_per_file", [None, 5])
def test_round_trip(store: Path, tmp_path: Path, format: str, rows_per_file: int | None) -> None:
    out = tmp_path / "rows"
    exported = export(store, out, format, rows_per_file=rows_per_file)
    files = 1 if rows_per_file is None else 4
    assert (exported.rows, exported.failed_left_out, exported.files) == (16, 3, files)
    opened = open_store(store)
    rows = opened.rows[opened.status == 1]
    at = opened.positions(rows)
    read = READERS[format](out)
    assert read["features"].dtype == np.float16
    assert read["features"].tobytes() == opened.features(rows).tobytes()
    assert read["key"] == [opened.keys[i] for i in at]
    np.testing.assert_array_equal(read["label"], opened.labels[at])
    np.testing.assert_array_equal(read["num_frames"], opened.num_frames[at])
    np.testing.assert_array_equal(read["fps"].astype(np.float32), opened.fps[at])
    np.testing.assert_array_equal(read["frame_index"], opened.frame_index(rows))
    np.testing.assert_array_equal(read["pts"], opened.pts(rows))
    train = [row in opened.split("train") for row in rows]
    assert ["train" in splits for splits in read["splits"]] == train
    text = np.load(out / "class_text-mote28.npy", allow_pickle=False)
    np.testing.assert_array_equal(text, opened.class_text("mote28").embeddings)
    told = summary(out)
    assert told["provenance"] == opened.provenance.to_json()
    assert told["rows"] == 16
    assert [f["key"] for f in told["failed_left_out"]] == [f"tar{i}/clip 1 é" for i in range(3)]
    for entry in told["files"]:
        for name, digest in entry["sha256"].items():
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_rows_of_a_split_and_of_classes(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    ok = opened.status == 1
    export(store, tmp_path / "val", "npy", split="val")
    of_val = np.isin(opened.rows, opened.split("val")) & ok
    keys = np.array(opened.keys)
    assert read_npy(tmp_path / "val")["key"] == keys[of_val].tolist()
    # A raw name and a natural one.
    export(store, tmp_path / "two", "npy", classes=["brush_hair", "throw"])
    of_two = np.isin(opened.labels, [0, 2]) & ok
    assert read_npy(tmp_path / "two")["key"] == keys[of_two].tolist()
    exported = export(store, tmp_path / "both", "npy", split="val", classes=["throw"])
    assert exported.rows == int((of_val & (opened.labels == 2)).sum())
    told = summary(tmp_path / "both")
    assert (told["split"], told["classes"]) == ("val", ["throw"])


def test_what_is_refused_leaves_nothing(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    for arguments, message in (
        (("csv",), "format 'csv' is unknown: choose one of safetensors, parquet, npy"),
        (("npy", "test"), "has no split 'test': choose one of train, val"),
        (("npy", None, ["fly"]), "has no class 'fly'"),
    ):
        format, *rest = arguments
        chosen = dict(zip(("split", "classes"), rest, strict=False))
        with pytest.raises(UserError, match=message):
            export(store, out, format, **chosen)  # type: ignore[arg-type]
    make_store(tmp_path / "n.zarr", rows=(2,), failed=(0, 1))
    with pytest.raises(UserError, match="no row to export: 2 were asked for and failed"):
        export(tmp_path / "n.zarr", out, "npy")
    with (
        StoreWriter.open(store).claim([2]),
        pytest.raises(WorkError, match="is writing partition 2"),
    ):
        export(store, out, "npy")
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(store, out, "npy")
    assert not list(tmp_path.glob("*.partial"))


def test_an_unfinished_store_is_refused(store: Path, tmp_path: Path) -> None:
    (store / "commit" / "c" / "1" / "0").unlink()
    with pytest.raises(WorkError, match="lacks 1 of 3 partitions: finish it with `mote-cli extr"):
        export(store, tmp_path / "rows", "npy")


def test_a_damaged_row_ends_the_export_and_leaves_nothing(store: Path, tmp_path: Path) -> None:
    shard = store / "features" / "c" / "2" / "0" / "0" / "0"
    raw = bytearray(shard.read_bytes())
    raw[0] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(WorkError, match="partition 2"):
        export(store, tmp_path / "rows", "safetensors", rows_per_file=4)
    assert not (tmp_path / "rows").exists()
    assert not list(tmp_path.glob("rows*.partial"))


def test_an_export_leaves_nothing_beside_it(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "rows", "npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows", "s.zarr", "s.zarr.lock"]
    with pytest.raises(UserError, match="0 rows per file are too few"):
        export(store, tmp_path / "more", "npy", rows_per_file=0)
    with pytest.raises(UserError, match="has no class 'fly'"):
        export(store, tmp_path / "more", "npy", classes=["fly"])
    assert not list(tmp_path.glob("more*"))


def test_without_pyarrow_the_remedy_is_named(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "featstore.rewriting.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'mote-video\[share\]'"):
        export(store, tmp_path / "rows", "parquet")
    monkeypatch.delitem(sys.modules, "featstore.rewriting.parquet", raising=False)


def test_hugging_face_finds_its_features(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "rows", "parquet")
    (path,) = data_files(tmp_path / "rows", "features-")
    schema = pyarrow.parquet.read_schema(path)
    told = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(told) == schema.names
    assert told["label"] == {"names": list(CLASS_NAMES), "_type": "ClassLabel"}
    assert told["features"]["length"] == schema.field("features").type.list_size == 2 * 4 * 16


def test_memory_holds_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.zarr"
    make_store(path, rows=(16,) * 8, capacity=16, row_shape=(1, 16, 256), failed=())
    monkeypatch.setattr(featstore.rewriting.export, "TARGET_FILE_BYTES", 2**17)
    peaks: list[int] = []

    def measure(done: float, total: float, **details: object) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    tracemalloc.start()
    exported = export(path, tmp_path / "rows", "safetensors", progress=measure)
    tracemalloc.stop()
    assert exported.files == 8
    assert max(peaks[1:]) - min(peaks[1:]) < 2**16, "memory grows with the files"
    assert max(peaks[1:]) < 6 * 2**17  # the first holds what is imported and opened


def test_an_export_made_again_has_the_same_bytes(store: Path, tmp_path: Path) -> None:
    for format in ("safetensors", "parquet", "npy"):
        digests = set()
        for number in range(5):
            out = tmp_path / f"{format}{number}"
            export(store, out, format, rows_per_file=4)
            content = [path.read_bytes() for path in sorted(out.iterdir())]
            digests.add(hashlib.sha256(b"".join(content)).hexdigest())
        assert len(digests) == 1, format


def test_a_class_that_is_unknown_is_answered_with_those_that_are_near(
    store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"did you mean 'brush hair'"):
        export(store, tmp_path / "x", "npy", classes=["Brush Hairs"])
    with pytest.raises(UserError, match=r"it has 'brush hair', 'climb stairs', 'throw'"):
        export(store, tmp_path / "x", "npy", classes=["qqq"])
