"""Where new stores and exports may be made, and what the errors of making them say."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from featstore import StoreSchema, UserError, WorkError, verify
from featstore.rewriting.convert import convert
from featstore.rewriting.export import export
from featstore.rewriting.merge import merge
from featstore.rewriting.quantize import quantize
from tests.support.stores.growing_stores import make_other_store, make_small_store
from tests.support.stores.sample_stores import init_store, make_partition


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_small_store(tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "not the name of a new folder"),
        (".", "not the name of a new folder"),
        ("..", "not the name of a new folder"),
        ("/", "not the name of a new folder"),
        ("s3://bucket/rows", "looks like a URL"),
        ("s.zarr/rows", "would lie inside the store"),
        ("s.zarr/features/rows", "would lie inside the store"),
        ("file/rows", "is a file"),
        ("link", "exists already"),
        ("file", "exists already"),
    ],
)
def test_places_where_nothing_new_can_be(
    store: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    monkeypatch.chdir(store.parent)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    before = sorted(Path().rglob("*"))
    for make in (
        lambda: export(store, Path(out), "npy"),
        lambda: convert(store, Path(out), "zstd"),
        lambda: quantize(store, Path(out)),
    ):
        with pytest.raises(UserError, match=message):
            make()
    assert sorted(Path().rglob("*")) == before
    assert verify(store, deep=True).ok


def test_a_full_disk_is_named(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    full = OSError(errno.ENOSPC, "No space left on device")  # of a write: it names no file
    with (
        mock.patch("featstore.rewriting.export.write_bytes", side_effect=full),
        pytest.raises(WorkError, match=f"no room is left on the disk of {out}"),
    ):
        export(store, out, "npy")
    assert [path.name for path in tmp_path.iterdir() if "rows" in path.name] == []
    export(store, out, "npy")


def test_an_export_made_again_has_the_same_bytes(store: Path, tmp_path: Path) -> None:
    for format in ("safetensors", "parquet", "npy"):
        digests = set()
        for number in range(5):
            out = tmp_path / f"{format}{number}"
            export(store, out, format, rows_per_file=4)
            content = [path.read_bytes() for path in sorted(out.iterdir())]
            digests.add(hashlib.sha256(b"".join(content)).hexdigest())
        assert len(digests) == 1, format


def test_what_differs_is_told_by_order(tmp_path: Path) -> None:
    """The stores of two data sets have one file name as a rule."""
    one, two = tmp_path / "one/vit--uniform-4.zarr", tmp_path / "two/vit--uniform-4.zarr"
    make_small_store(one)
    make_other_store(two, sampling="uniform:8")
    with pytest.raises(UserError) as error:
        merge([one, two], tmp_path / "m.zarr")
    assert re.search(r"sampling: the first has \S+, the second has uniform:8", str(error.value))
    assert "extract one of them" in str(error.value)
    assert "convert" not in str(error.value)


def test_another_codec_or_int8_has_its_own_remedy(tmp_path: Path) -> None:
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    make_small_store(one)
    make_other_store(two)
    convert(two, tmp_path / "z.zarr", "zstd")
    with pytest.raises(UserError, match=r"codec: the first has none, the second has zstd") as error:
        merge([one, tmp_path / "z.zarr"], tmp_path / "m.zarr")
    assert str(error.value).endswith(
        "convert the second with `mote-cli store convert --codec none`"
    )
    quantize(one, tmp_path / "q1.zarr")
    quantize(two, tmp_path / "q2.zarr")
    with pytest.raises(UserError, match="both are int8, with a scale of its own") as error:
        merge([tmp_path / "q1.zarr", tmp_path / "q2.zarr"], tmp_path / "m.zarr")
    assert "q1.zarr and " in str(error.value)
    assert "q2.zarr cannot" in str(error.value)
    with pytest.raises(UserError, match="the second is int8"):
        merge([one, tmp_path / "q2.zarr"], tmp_path / "m.zarr")
    # What the message says to do works.
    convert(tmp_path / "z.zarr", tmp_path / "back.zarr", "none")
    merge([one, tmp_path / "back.zarr"], tmp_path / "m.zarr")
    quantize(tmp_path / "m.zarr", tmp_path / "mq.zarr")
    assert verify(tmp_path / "mq.zarr", deep=True).ok


def test_a_class_that_is_unknown_is_answered_with_those_that_are_near(
    store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"did you mean 'brush hair'"):
        export(store, tmp_path / "x", "npy", classes=["Brush Hairs"])
    with pytest.raises(UserError, match=r"it has 'brush hair', 'climb stairs', 'throw'"):
        export(store, tmp_path / "x", "npy", classes=["qqq"])


def test_an_embedding_of_zeros_turns_by_nothing(tmp_path: Path) -> None:
    """And dimensions that are always zero, or always the same, cost nothing."""
    schema = StoreSchema.create(1, 4, 1, 2, 16)
    writer = init_store(tmp_path / "s.zarr", schema, (4,))
    partition = make_partition(schema, 0, 4, seed=3, failed=[1])
    assert isinstance(partition.features, np.ndarray)
    partition.features[0] = 0
    partition.features[2:, ..., 5] = 0
    partition.features[2:, ..., 6] = 3
    with writer.claim():
        writer.write_partition(0, partition)
    made = quantize(tmp_path / "s.zarr", tmp_path / "q.zarr")
    assert made.cosine_error_max < 1e-3
    assert made.agreement[0].agreement == 100
