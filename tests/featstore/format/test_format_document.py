"""docs/store-format.md says all that a reader needs: this one knows nothing but that page.

It uses numpy, files, and the codecs the page names; no zarr and nothing of featstore.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
from numcodecs import Blosc, Zstd

from featstore import StoreSchema, open_store
from featstore.rewriting.quantize import quantize
from tests.support.stores.sample_stores import init_store, make_partition, make_store

STORES = Path(__file__).parents[2] / "data" / "stores"
PER_ROW = {
    "label": "<i4", "num_frames": "<i4", "fps": "<f4", "status": "u1", "splits": "<u4",
    "container_frames": "<i4", "damaged_packets": "<i4", "checksum": "<u4",
}  # fmt: skip


def unsealed(raw: bytes) -> bytes:
    """What lies before the crc32c that it must agree with."""
    assert google_crc32c.value(raw[:-4]) == int.from_bytes(raw[-4:], "little")
    return raw[:-4]


class DocumentReader:
    """One partition after another, as the page describes the files."""

    def __init__(self, store: Path) -> None:
        self.store = store
        node = json.loads((store / "zarr.json").read_text())
        self.attributes: dict[str, Any] = node["attributes"]
        others = [
            *("format", "format_version", "schema", "provenance", "logit_scale", "tars"),
            *("class_names", "raw_class_names", "split_names"),
        ]
        text = json.dumps(
            {name: self.attributes[name] for name in others}, sort_keys=True, separators=(",", ":")
        )
        assert self.attributes["checksum"] == google_crc32c.value(text.encode())
        self.schema = self.attributes["schema"]
        self.capacity = self.schema["capacity"]
        self.item = self.schema.get("item", [self.schema["dim"]])

    def file(self, array: str, *numbers: int) -> bytes:
        return self.store.joinpath(array, "c", *map(str, numbers)).read_bytes()

    def commit(self, tar: int) -> tuple[int, int, int, int] | None:
        if not (self.store / f"commit/c/{tar}/0").exists():
            return None
        rows, crc, size, time = np.frombuffer(unsealed(self.file("commit", tar, 0)), "<u8").tolist()
        return rows, crc, size, time

    def texts(self, array: str, tar: int) -> list[str]:
        content = bytes(Zstd().decode(unsealed(self.file(array, tar))))
        assert int.from_bytes(content[:4], "little") == self.capacity
        at, found = 4, []
        for _ in range(self.capacity):
            length = int.from_bytes(content[at : at + 4], "little")
            found.append(content[at + 4 : at + 4 + length].decode())
            at += 4 + length
        assert at == len(content)
        return found

    def partition(self, tar: int) -> dict[str, Any]:
        commit = self.commit(tar)
        assert commit is not None
        rows, crc_of_checksums, size, time = commit
        assert rows == self.attributes["tars"][tar]["rows"]
        assert time > 0
        names = ("key", "reason", *(("spans",) if self.schema.get("multi_label") else ()))
        found: dict[str, Any] = {name: self.texts(name, tar) for name in names}
        for name, dtype in PER_ROW.items():
            found[name] = np.frombuffer(unsealed(self.file(name, tar)), dtype)
            assert len(found[name]) == self.capacity
        views, frames = self.schema["views"], self.schema["frames"]
        for name, dtype in (("frame_index", "<i4"), ("pts", "<f8")):
            chunk = np.frombuffer(unsealed(self.file(name, tar, 0, 0)), dtype)
            found[name] = chunk.reshape(self.capacity, views, frames)
        node = json.loads((self.store / "chunk_checksum/zarr.json").read_text())
        recorded = np.frombuffer(unsealed(self.file("chunk_checksum", tar, 0)), "<u4").tolist()
        for name, crc in zip(node["attributes"]["arrays"], recorded, strict=True):
            rest = (0, 0) if name in ("frame_index", "pts") else ()
            assert int.from_bytes(self.file(name, tar, *rest)[-4:], "little") == crc
        assert google_crc32c.value(found["checksum"][:rows].tobytes()) == crc_of_checksums
        found["features"] = self.features(tar, rows, size)
        for row, crc in zip(found["features"], found["checksum"], strict=False):
            assert google_crc32c.value(row.tobytes()) == crc
        # Rows beyond the samples are empty.
        assert not found["status"][rows:].any()
        assert found["key"][rows:] == [""] * (self.capacity - rows)
        assert (found["label"][rows:] == -1).all()
        return {name: value[:rows] for name, value in found.items()}

    def features(self, tar: int, rows: int, size: int) -> npt.NDArray[Any]:
        raw = self.file("features", tar, *[0] * (2 + len(self.item)))
        assert len(raw) == size
        chunk_rows = self.schema["chunk_rows"]
        count = self.capacity // chunk_rows
        index = np.frombuffer(unsealed(raw[-16 * count - 4 :]), "<u8").reshape(count, 2)
        listed = -(-rows // chunk_rows)
        assert (index[listed:] == 2**64 - 1).all()
        dtype = {"float16": "<f2", "int8": "i1", "uint8": "u1"}[
            self.schema.get("feature_type", "float16")
        ]
        parts = []
        for offset, length in index[:listed].tolist():
            body = unsealed(raw[offset : offset + length])
            plain = body if self.schema.get("codec", "none") == "none" else Blosc().decode(body)
            shape = (chunk_rows, self.schema["views"], self.schema["frames"], *self.item)
            parts.append(np.frombuffer(plain, dtype).reshape(shape))
        values = np.concatenate(parts)[:rows]
        if dtype != "i1":
            return values
        scale = np.frombuffer(unsealed(self.file("feature_scale", 0)), "<f4")
        read = (values.astype(np.float32) * scale).astype(np.float16)
        read[values == -128] = np.nan
        return read

    def class_text(self, prompt_set: str) -> npt.NDArray[Any]:
        folder = f"class_text/{prompt_set}"
        raw = self.file(folder, 0, 0)
        said = json.loads((self.store / folder / "zarr.json").read_text())["attributes"]
        assert said["class_names"] == self.attributes["class_names"]
        checksum = said.pop("checksum", None)
        if checksum is not None:  # earlier stores lack the two
            assert int.from_bytes(raw[-4:], "little") == said["embeddings_checksum"]
            text = json.dumps(said, sort_keys=True, separators=(",", ":"))
            assert google_crc32c.value(text.encode()) == checksum
        texts = np.frombuffer(unsealed(raw), "<f4")
        return texts.reshape(len(said["class_names"]), self.schema["dim"])


def compare(path: Path) -> None:
    store, document = open_store(path), DocumentReader(path)
    assert document.attributes["format"] == "mote-features"
    partitions = [
        document.partition(tar)
        for tar in range(document.schema["tars"])
        if document.commit(tar) is not None
    ]
    joined = {name: np.concatenate([part[name] for part in partitions]) for name in partitions[0]}
    assert joined["key"].tolist() == store.keys
    assert joined["reason"].tolist() == store.reasons
    for name, values in (
        ("label", store.labels), ("num_frames", store.num_frames), ("fps", store.fps),
        ("status", store.status), ("container_frames", store.container_frames),
        ("damaged_packets", store.damaged_packets), ("pts", store.pts(store.rows)),
        ("frame_index", store.frame_index(store.rows)), ("features", store.features(store.rows)),
    ):  # fmt: skip
        assert joined[name].tobytes() == values.tobytes(), name
    for bit, name in enumerate(store.split_names):
        assert store.rows[joined["splits"] >> bit & 1 == 1].tolist() == store.split(name).tolist()
    for prompt_set in store.prompt_sets:
        held = store.class_text(prompt_set).embeddings
        assert document.class_text(prompt_set).tobytes() == held.tobytes()


def frames_of(store: Path, array: str, tar: int, shape: list[int], dtype: str) -> Any:
    """A sharded array of a store of sequences, by the page: its blocks, and the crc32c of each."""
    schema = json.loads((store / "zarr.json").read_text())["attributes"]["schema"]
    raw = store.joinpath(array, "c", str(tar), *["0"] * len(shape)).read_bytes()
    count = schema["frame_capacity"] // schema["chunk_rows"]
    index = np.frombuffer(unsealed(raw[-16 * count - 4 :]), "<u8").reshape(count, 2)
    blocks = []
    for offset, length in index[index[:, 0] < 2**64 - 1].tolist():
        body = unsealed(raw[offset : offset + length])
        if array == "features" and schema.get("codec", "none") != "none":
            body = Blosc().decode(body)
        blocks.append(np.frombuffer(body, dtype).reshape(schema["chunk_rows"], *shape))
    return blocks


@pytest.mark.parametrize("name", ["v2.zarr", "v2-int8-zstd.zarr"])
def test_the_page_describes_sequences(name: str) -> None:
    path, store = STORES / name, open_store(STORES / name)
    document = DocumentReader(path)
    shape = [document.schema["views"], *document.item]
    for tar in range(document.schema["tars"]):
        rows, crc, size, time, frames = np.frombuffer(
            unsealed(document.file("commit", tar, 0)), "<u8"
        ).tolist()
        assert time > 0
        assert size == path.joinpath("features", "c", str(tar), "0", "0").stat().st_size
        first, length = (
            np.frombuffer(unsealed(document.file(array, tar)), "<i8")[:rows]
            for array in ("first_frame", "length")
        )
        assert (first == np.cumsum(length) - length).all()
        assert length.sum() == frames
        sums = np.frombuffer(unsealed(document.file("checksum", tar, 0)), "<u4").reshape(-1, 3)
        int8 = "int8" in name
        held = {
            "features": frames_of(path, "features", tar, shape, "i1" if int8 else "<f2"),
            "pts": frames_of(path, "pts", tar, [], "<f8"),
            "frame_index": frames_of(path, "frame_index", tar, [], "<i4"),
        }
        if int8:
            scale = np.frombuffer(unsealed(document.file("feature_scale", 0)), "<f4")
            held["features"] = [
                (block.astype(np.float32) * scale).astype(np.float16) for block in held["features"]
            ]
        block = document.schema["chunk_rows"]
        assert google_crc32c.value(sums[: -(-frames // block)].tobytes()) == crc
        for column, blocks in enumerate(held.values()):
            for number, values in enumerate(blocks):
                listed = values[: frames - number * block]
                assert google_crc32c.value(listed.tobytes()) == sums[number, column]
        joined = {array: np.concatenate(blocks)[:frames] for array, blocks in held.items()}
        for position in range(rows):
            row = tar * document.capacity + position
            part = slice(first[position], first[position] + length[position])
            assert joined["features"][part].tobytes() == store.sequence(row).tobytes()
            assert joined["pts"][part].tobytes() == store.sequence_times(row).tobytes()
            assert joined["frame_index"][part].tobytes() == store.sequence_frames(row).tobytes()
        gaps = [json.loads(text) if text else [] for text in document.texts("gaps", tar)[:rows]]
        at = store.positions(tar * document.capacity + np.arange(rows))
        assert gaps == [[[*gap] for gap in store.gaps[i]] for i in at]


@pytest.mark.parametrize("name", sorted(path.name for path in STORES.glob("v1*.zarr")))
def test_the_page_describes_the_stores_of_every_version(name: str) -> None:
    compare(STORES / name)


@pytest.mark.parametrize("changes", [
    {}, {"codec": "zstd"}, {"codec": "lz4"},
    {"feature_type": "uint8", "tier": "frames", "item": (4, 5, 3)},
    {"tier": "tokens:2", "item": (3, 7)},
], ids=str)  # fmt: skip
def test_the_page_describes_new_stores(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, rows = tmp_path / "s.zarr", (8, 3, 1)
    schema = replace(StoreSchema(3, 8, 2, 4, 16, chunk_rows=2), item=(), codec="none")
    schema = replace(schema, **changes)
    writer = init_store(path, schema, rows)
    for tar in (0, 2):  # partition 1 is not done
        failed = [1] if rows[tar] > 1 else []
        writer.write_partition(tar, make_partition(schema, tar, rows[tar], failed=failed))
    compare(path)


def test_the_page_describes_quantised_stores(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    quantize(tmp_path / "s.zarr", tmp_path / "q.zarr")
    compare(tmp_path / "q.zarr")
