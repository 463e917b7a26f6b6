"""The code of docs/interop.md runs as it stands and finds what `open_store` finds.

So does that of docs/store-format.md for plain zarr. None of it gives a warning.
"""

from __future__ import annotations

import ast
import importlib
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from featstore import Store, StoreSchema, open_store
from featstore.rewriting.export import WRITERS, export
from featstore.rewriting.quantize import quantize
from tests.support.stores.sample_stores import init_store, make_partition, make_store

DOCUMENTS = Path(__file__).parents[3] / "docs"


def blocks_of(name: str) -> list[str]:
    text = (DOCUMENTS / name).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


pytestmark = pytest.mark.filterwarnings("error")

BLOCKS = blocks_of("interop.md")
# A word of each block that no other has.
WORDS = ("names = [", "xarray", "dask", "Videos", "int8.zarr", "safe_open", "pyarrow", "csv")


def block_with(word: str) -> str:
    (found,) = [block for block in BLOCKS if word in block]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`store.zarr` with a partition that is not done, `int8.zarr`, and an export of each kind."""
    place = tmp_path_factory.mktemp("interop")
    schema = StoreSchema.create(3, 8, 2, 4, 16)
    writer = init_store(place / "store.zarr", schema, (8, 5, 3))
    for tar in (0, 2):
        rows = writer.metadata.tars[tar].rows
        writer.write_partition(tar, make_partition(schema, tar, rows, failed=[1]))
    make_store(place / "whole.zarr", rows=(8, 3))
    quantize(place / "whole.zarr", place / "int8.zarr")
    for format in WRITERS:
        export(place / "whole.zarr", place / f"as-{format}", format)
    return place


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)

    def execute(word: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "block"}
        exec(compile(block_with(word), "interop.md", "exec"), names)
        return names

    return execute


def ok_rows(path: Path) -> tuple[Store, Any]:
    store = open_store(path)
    return store, store.rows[store.status == 1]


def test_every_block_is_tested() -> None:
    assert {block_with(word) for word in WORDS} == set(BLOCKS)


def statements(block: ast.AST) -> int:
    """Lines that do something, without imports and the heads of classes and functions."""
    inner = [node for node in ast.walk(block) if isinstance(node, ast.stmt)]
    heads = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.With)
    return sum(not isinstance(node, heads) for node in inner)


@pytest.mark.parametrize("word", WORDS)
def test_blocks_are_short(word: str) -> None:
    tree = ast.parse(block_with(word))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for part in classes or [tree]:
        assert statements(part) <= 5


def test_zarr(run: Any, folder: Path) -> None:
    found = run("names = [")
    store, rows = ok_rows(folder / "store.zarr")
    assert found["rows"].tolist() == rows.tolist()
    assert found["features"].tobytes() == store.features(rows).tobytes()
    labels = store.labels[store.positions(rows)]
    assert found["names"] == [store.class_names[label] for label in labels]


def test_xarray(run: Any, folder: Path) -> None:
    found = run("xarray")
    store, rows = ok_rows(folder / "store.zarr")
    assert found["features"].dims == ("row", "view", "frame", "dim")
    assert found["features"].values.tobytes() == store.features(rows).tobytes()
    assert found["rows"].key.values.tolist() == [store.keys[i] for i in store.positions(rows)]
    np.testing.assert_array_equal(found["rows"].pts.values, store.pts(rows))
    np.testing.assert_array_equal(found["text"].values, store.class_text("mote28").embeddings)


def test_dask(run: Any, folder: Path) -> None:
    found = run("dask")
    store, rows = ok_rows(folder / "store.zarr")
    assert found["features"].numblocks == (3, 1, 1, 1)
    expected = store.features(rows).astype(np.float32).mean((1, 2))
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-5, atol=1e-6)


def test_torch(run: Any, folder: Path) -> None:
    found = run("Videos")
    store, rows = ok_rows(folder / "store.zarr")
    assert tuple(found["features"].shape) == (4, 2, 4, 16)
    videos = found["Videos"]("store.zarr", "train")
    wanted = np.intersect1d(rows, store.split("train"))
    assert len(videos) == len(wanted)
    for i, row in enumerate(wanted):
        features, label = videos[i]
        assert features.numpy().tobytes() == store.features([row]).tobytes()
        assert label == store.labels[store.positions([row])[0]]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_torch_workers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Workers read what the parent reads, which has touched the maps before; no data travels."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"videos_by_{method}"  # what is pickled needs a module that the workers can import
    (tmp_path / f"{name}.py").write_text(block_with("Videos"))
    videos = importlib.import_module(name).Videos("store.zarr", "train")
    expected = [videos[i] for i in range(len(videos))]
    assert len(pickle.dumps(videos)) < 1000
    workers = 2 if method == "fork" else 1  # starting one takes seconds
    batches = DataLoader(videos, batch_size=3, num_workers=workers, multiprocessing_context=method)
    found = [(one, int(label)) for many in batches for one, label in zip(*many, strict=True)]
    assert len(found) == len(expected)
    for (ours, label), (theirs, other) in zip(found, expected, strict=True):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
        assert label == other


def test_zarr_in_the_format_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks_of("store-format.md")
    monkeypatch.chdir(folder)
    (named,) = map(Path, re.findall(r'open_group\("(.*?)"', block))
    named.parent.mkdir(parents=True)
    shutil.copytree(folder / "store.zarr", named)
    found: dict[str, Any] = {}
    exec(compile(block, "store-format.md", "exec"), found)
    store, rows = ok_rows(folder / "store.zarr")
    assert found["features"].tobytes() == store.features(rows[:8]).tobytes()
    np.testing.assert_array_equal(
        found["in_train"].nonzero()[0], np.intersect1d(rows, store.split("train"))
    )
    np.testing.assert_array_equal(found["text"], store.class_text("mote28").embeddings)


def test_int8(run: Any, folder: Path) -> None:
    store, rows = ok_rows(folder / "int8.zarr")
    assert run("int8.zarr")["features"].tobytes() == store.features(rows).tobytes()


@pytest.mark.parametrize("word", ["safe_open", "pyarrow", "csv"])
def test_exports(run: Any, folder: Path, word: str) -> None:
    found = run(word)
    store, rows = ok_rows(folder / "whole.zarr")
    assert np.asarray(found["features"]).tobytes() == store.features(rows).tobytes()
    if "keys" in found:
        assert found["keys"] == [store.keys[i] for i in store.positions(rows)]
