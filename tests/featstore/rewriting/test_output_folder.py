"""Where new stores and exports may be made, and what a full disk leaves."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest import mock

import pytest

from featstore import UserError, WorkError, verify
from featstore.rewriting.convert import convert
from featstore.rewriting.export import export
from featstore.rewriting.merge import merge
from featstore.rewriting.quantize import quantize
from tests.support.stores.growing_stores import make_small_store


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


def test_what_is_refused_leaves_no_lock(store: Path, tmp_path: Path) -> None:
    half, out = tmp_path / "half.zarr", tmp_path / "out.zarr"
    quantize(store, half)
    before = sorted(tmp_path.rglob("*"))
    for make, message in (
        (lambda: quantize(half, out), "is quantised already"),
        (lambda: export(store, out, "npy", split="none"), "'none'"),
        (lambda: merge([store, half], out), "."),
        (lambda: convert(store, out, "gzip"), "'gzip' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            make()
        assert sorted(tmp_path.rglob("*")) == before


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
