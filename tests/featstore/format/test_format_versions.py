"""Stores of every format version stay readable; newer ones are refused with the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from featstore import StoreWriter, UserError, open_store, verify
from featstore.format.schema import FORMAT_VERSION
from tests.support.stores.sample_stores import make_store
from tests.support.stores.tiny_stores import content

STORES = Path(__file__).parents[2] / "data" / "stores"
EVERY = sorted(path.name for path in STORES.glob("v*.zarr"))


def test_there_is_a_store_of_every_version() -> None:
    assert {f"v{n}.zarr" for n in range(1, FORMAT_VERSION + 1)} <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_a_store_of_an_earlier_release_holds_what_it_held(name: str, tmp_path: Path) -> None:
    expected = json.loads((STORES / f"{name[:2]}.json").read_text())[name]
    path = tmp_path / name
    shutil.copytree(STORES / name, path)
    found = content(path)
    assert found.keys() == expected.keys()
    # Attributes may gain entries, with a meaning for stores that lack them.
    for key, value in expected.pop("attributes").items():
        if key == "checksum":  # of all attributes, those that came later too
            continue
        now = found["attributes"][key]
        assert now | value == now if isinstance(value, dict) else now == value, key
    for key, value in expected.items():
        if isinstance(value, list) and value and isinstance(value[0], float):
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value, key
    report = verify(path, deep=True)
    assert (report.ok, report.partitions) == (True, 2)
    assert StoreWriter.open(path).pending() == []


def test_a_new_store_of_embeddings_has_the_metadata_of_the_oldest(tmp_path: Path) -> None:
    """What came later is only said where it is not the usual."""
    make_store(tmp_path / "v1.zarr", rows=(3, 2), capacity=3, row_shape=(1, 2, 4))

    def nodes(store: Path) -> dict[str, dict[str, Any]]:
        return {
            str(p.relative_to(store)): json.loads(p.read_bytes()) for p in store.rglob("zarr.json")
        }

    found = nodes(tmp_path / "v1.zarr")
    later = found["class_text/mote28/zarr.json"]["attributes"]
    assert {type(later.pop(name)) for name in ("checksum", "embeddings_checksum")} == {int}
    assert found == nodes(STORES / "v1.zarr")


def test_plain_zarr_reads_the_oldest_store() -> None:
    group = zarr.open_group(STORES / "v1.zarr", mode="r")
    store = open_store(STORES / "v1.zarr")
    assert group["features"][:][store.rows].tobytes() == store.features(store.rows).tobytes()
    assert group["key"][:][store.rows].tolist() == store.keys


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT_VERSION + 1, f"has format version {FORMAT_VERSION + 1}, this mote reads up to "
                             f"{FORMAT_VERSION}: install a newer mote-video"),
        (0, "format version 0: it must be a whole number"),
        ("1", "format version '1': it must be a whole number"),
        (True, "format version True: it must be a whole number"),
    ],
)  # fmt: skip
def test_another_version_is_refused_with_the_remedy(
    tmp_path: Path, version: Any, message: str
) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(STORES / "v1.zarr", path)
    node = json.loads((path / "zarr.json").read_text())
    node["attributes"]["format_version"] = version
    # What a newer version says besides is not looked at first.
    node["attributes"]["schema"]["unheard_of"] = 1
    (path / "zarr.json").write_text(json.dumps(node))
    for work in (open_store, verify, StoreWriter.open):
        with pytest.raises(UserError, match=message):
            work(path)
