"""Stores of videos that may show several classes: format, damage, growth, merging, export."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from featstore import ClassText, StoreWriter, UserError, WorkError, open_store, verify
from featstore.format.metadata import TarEntry
from featstore.format.spans import Span, spans_of_text, spans_text
from featstore.rewriting.export import export
from featstore.rewriting.grow import add_tars
from featstore.rewriting.merge import merge
from featstore.rewriting.quantize import quantize
from tests.featstore.format.test_format_document import compare
from tests.support.stores.action_store import ACTIONS, action_store
from tests.support.stores.sample_stores import make_partition

SHOWN = np.random.default_rng(2).random((12, 4)) < 0.4
SHOWN[5] = False


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return several(tmp_path / "several.zarr")


def several(path: Path, shown: np.ndarray[tuple[int, int], np.dtype[np.bool_]] = SHOWN) -> Path:
    action_store(path, samples=len(shown), classes=4, several=shown, dataset=path.stem)
    return path


@pytest.mark.parametrize(
    "spans",
    [(), (Span(3, 1.5, 2.25), Span(0), Span(3, 0.0, 9.0)), tuple(map(Span, range(40)))],
)
def test_spans_are_read_as_they_were_written(spans: tuple[Span, ...]) -> None:
    assert spans_of_text(spans_text(spans), 40) == spans


@pytest.mark.parametrize(
    "text",
    ["{}", "[3]", "[[4]]", "[[-1]]", "[[true]]", "[[0,1]]", '[["0"]]', "[[0,1,NaN]]",
     "[[0,1,null]]", "[[0,1,1e999]]", "[[0.0]]", "x", "[" * 100_000],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"span|Expecting|seconds|label|JSON|nested"):
        spans_of_text(text, 4)


def test_a_store_says_what_its_videos_show(path: Path) -> None:
    store = open_store(path)
    assert store.multi_label
    assert store.facts()["multi_label"] is True
    assert (store.labels == -1).all()
    assert (store.shown(store.rows) == SHOWN).all()
    assert (store.shown([7, 2]) == SHOWN[[7, 2]]).all()
    assert [tuple(s.label for s in spans) for spans in store.spans] == [
        tuple(np.flatnonzero(row)) for row in SHOWN
    ]
    assert verify(path, deep=True).ok
    assert StoreWriter.open(path).pending() == []
    compare(path)
    texts = zarr.open_group(path, mode="r")["spans"][:]
    assert [json.loads(text) if text else [] for text in texts] == [
        [[int(c)] for c in np.flatnonzero(row)] for row in SHOWN
    ]


def test_a_store_of_one_class_a_video_has_no_spans_and_shows_its_labels(tmp_path: Path) -> None:
    store = action_store(tmp_path / "one.zarr", samples=9, classes=4)
    assert not (store.path / "spans").exists()
    assert "multi_label" not in store.schema.to_json()
    assert (store.shown(store.rows).argmax(1) == store.labels).all()
    assert store.spans == tuple((Span(label),) for label in store.labels.tolist())


def test_damaged_spans_are_found_and_never_read(path: Path) -> None:
    file = next((path / "spans/c").iterdir())
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert not verify(path, deep=True).ok
    with pytest.raises(WorkError, match="spans chunk"):
        _ = open_store(path).spans
    file.unlink()
    assert not verify(path).ok
    assert StoreWriter.open(path).pending() == [0]


def test_partition_and_store_must_be_of_one_kind(tmp_path: Path, path: Path) -> None:
    writer = StoreWriter.open(path)
    plain = make_partition(writer.schema, 0, 12)
    with writer.claim():
        with pytest.raises(ValueError, match="label outside"):
            writer.write_partition(0, plain)
        bare = replace(plain, label=np.full(12, -1, np.int32))
        with pytest.raises(ValueError, match="differ in having spans"):
            writer.write_partition(0, bare)
        with pytest.raises(ValueError, match=r"a span outside 0\.\.3"):
            writer.write_partition(0, replace(bare, spans=[[Span(4)]] * 12))
        long = [Span(1, float(at), at + 0.123456) for at in range(20_000)]
        with pytest.raises(UserError, match="list fewer, or cut the video"):
            writer.write_partition(0, replace(bare, spans=[long] * 12))


def test_a_store_grows_with_its_spans(path: Path) -> None:
    store = open_store(path)
    names = (*store.class_names, "swim")
    text = ClassText(names, np.eye(5, 16, dtype=np.float32), "more")
    grown = add_tars(
        path,
        tars=[*store.tars, TarEntry("toy-000001.tar", 3, 1, "1" * 64)],
        class_names=names,
        raw_class_names=names,
        split_names=store.split_names,
        dataset_fingerprint="new",
        class_texts={"mote28": text},
    )
    assert (grown.tars_added, grown.pending) == (1, 1)
    now = open_store(path)
    assert now.spans == store.spans
    assert now.shown(now.rows).shape == (12, 5)


def test_stores_are_merged_by_the_names_of_their_classes(tmp_path: Path, path: Path) -> None:
    other = np.array([[True, False], [True, True]])
    action_store(
        tmp_path / "other.zarr", samples=2, classes=2, several=other, failed=(),
        class_names=("swim", ACTIONS[1]), dataset="other",
    )  # fmt: skip
    merge([path, tmp_path / "other.zarr"], tmp_path / "named.zarr", prefix_keys=True)
    named = open_store(tmp_path / "named.zarr")
    assert named.class_names == [*ACTIONS[:4], "swim"]
    assert named.shown(named.rows)[-2:].tolist() == [
        [False, False, False, False, True], [False, True, False, False, True],
    ]  # fmt: skip
    several(tmp_path / "more.zarr", SHOWN[:5])
    merge([path, tmp_path / "more.zarr"], tmp_path / "merged.zarr", prefix_keys=True)
    merged = open_store(tmp_path / "merged.zarr")
    assert merged.multi_label
    assert (merged.shown(merged.rows) == np.concatenate([SHOWN, SHOWN[:5]])).all()
    assert verify(merged.path, deep=True).ok
    action_store(tmp_path / "one.zarr", samples=9, classes=4, dataset="one")
    with pytest.raises(UserError, match="merge stores of one kind"):
        merge([path, tmp_path / "one.zarr"], tmp_path / "n.zarr", prefix_keys=True)


def test_quantising_and_exporting_keep_the_classes(tmp_path: Path, path: Path) -> None:
    found = quantize(path, tmp_path / "q.zarr")
    assert 0 <= found.agreement[0].top1_int8 <= 100
    small = open_store(tmp_path / "q.zarr")
    assert (small.shown(small.rows) == SHOWN).all()
    export(path, tmp_path / "npy", "npy")
    rows = list(csv.DictReader((tmp_path / "npy/rows-00000-of-00001.csv").open()))
    assert [row["label"] for row in rows] == ["-1"] * 11  # one failed
    kept = np.delete(SHOWN, 3, axis=0)
    assert [row["class_name"] for row in rows] == [
        "; ".join(ACTIONS[c] for c in np.flatnonzero(row)) for row in kept
    ]
    assert [spans_of_text(row["spans"], 4) for row in rows] == [
        tuple(Span(int(c)) for c in np.flatnonzero(row)) for row in kept
    ]
    export(path, tmp_path / "jump", "npy", classes=[ACTIONS[0]])
    chosen = list(csv.DictReader((tmp_path / "jump/rows-00000-of-00001.csv").open()))
    assert len(chosen) == kept[:, 0].sum()
    for kind in ("safetensors", "parquet"):
        export(path, tmp_path / kind, kind)
