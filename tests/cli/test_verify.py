"""`mote-cli verify`: damage is found, named, and repaired by the command that it prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from featstore import Store, StoreWriter, open_store
from featstore.format.checksums import crc32c
from featstore.format.metadata import attributes_checksum
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import World, make_encoder


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def note_of(store: Path) -> Path:
    return store.with_name(f"{store.name}.damaged.json")


def provenance(store: Path, **changes: str) -> None:
    """Change what the store says of itself, as one that was made so would say it."""
    node = json.loads((store / "zarr.json").read_text())
    node["attributes"]["provenance"] |= changes
    node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    (store / "zarr.json").write_text(json.dumps(node))


def everything(store: Store) -> tuple[list[str], np.ndarray, np.ndarray]:
    return store.keys, store.labels, store.features(store.rows)


def test_a_sound_store(world: World) -> None:
    for options in ((), ("--deep",)):
        report = done("verify", world.store, *options)
        assert report["ok"] is True
        assert (report["partitions"], report["rows_ok"], report["rows_failed"]) == (5, 18, 0)
        assert (report["damaged"], report["pending"], report["note"]) == ([], [], None)
    named = mote("verify", world.store.stem, "--root", world.root)
    assert named.code == 0
    assert "no damage found" in named.out
    line = refused(2, "verify", "other", "--root", world.root)
    assert f"under {world.root / 'features'} are: {world.store.name}" in line


def test_a_flipped_bit_is_found_and_the_printed_command_repairs_it(own: World) -> None:
    before = everything(open_store(own.store))
    flip(own.store / "features/c/2/0/0/0", 100)
    contents = {p: p.read_bytes() for p in own.store.rglob("*") if p.is_file()}
    assert done("verify", own.store)["ok"] is True, "a quick check reads no features"
    report = done("verify", own.store, "--deep", code=1)
    assert report["ok"] is False
    assert report["damaged"] == [
        {"partition": 2, "reason": "features chunk 0 fails its checksum"},
    ]
    assert {p: p.read_bytes() for p in own.store.rglob("*") if p.is_file()} == contents
    assert report["note"] == str(note_of(own.store))

    # Until it is repaired a quick check knows it, too, and so does the table.
    table = mote("verify", own.store)
    assert table.code == 1
    assert "found by an earlier deep check" in table.out
    assert done("verify", own.store, code=1)["damaged"][0]["partition"] == 2

    program, *command = shlex.split(report["repair"])
    assert program == "mote-cli"
    assert "to repair:" in table.out
    assert report["repair"] in table.out
    result = done(*command)
    assert (result["partitions_done"], result["partitions_skipped"]) == (1, 4)
    assert done("verify", own.store)["ok"] is True
    assert done("verify", own.store, "--deep")["ok"] is True
    assert not note_of(own.store).exists()
    after = everything(open_store(own.store))
    assert after[0] == before[0]
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_array_equal(after[2], before[2])
    changed = {p for p, raw in contents.items() if p.read_bytes() != raw}
    names = {str(p.relative_to(own.store)) for p in changed}
    assert names == {"features/c/2/0/0/0", "commit/c/2/0"}


def test_damaged_metadata_is_damage(own: World) -> None:
    """Exit code 1 and one JSON object, as for partitions; what never was a store is code 2."""
    for name in ("zarr.json", "label/zarr.json"):
        raw = (own.store / name).read_bytes()
        (own.store / name).write_bytes(raw[: len(raw) // 2])
        report = done("verify", own.store, "--reencode", "1", code=1)
        assert (report["ok"], report["repair"], report["note"]) == (False, None, None)
        (found,) = report["damaged"]
        assert found["partition"] == "metadata"
        assert f"{own.store / name} is not valid JSON" in found["reason"]
        assert "is not valid JSON" in mote("verify", own.store).out
        (own.store / name).write_bytes(raw)
    assert done("verify", own.store)["ok"] is True
    (own.store / "zarr.json").unlink()
    assert "has no zarr.json" in refused(2, "verify", own.store)


def test_several_damages_are_all_named(own: World) -> None:
    (own.store / "label/c/0").unlink()
    (own.store / "features/c/1/0/0/0").write_bytes(b"")
    flip(own.store / "commit/c/3/0", 2)
    report = done("verify", own.store, code=1)
    assert [d["partition"] for d in report["damaged"]] == [0, 1, 3]
    assert report["damaged"][0]["reason"] == "label chunk is missing"
    result = done(*shlex.split(report["repair"])[1:])
    assert (result["partitions_done"], result["partitions_skipped"]) == (3, 2)
    assert done("verify", own.store, "--deep")["ok"] is True


def test_the_printed_command_repairs_a_store_that_lies_elsewhere(
    own: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(open_store(own.store))
    for place in (tmp_path / "my store.zarr", own.store.with_name("mine.zarr")):
        own.store.rename(place)
        flip(place / "features/c/2/0/0/0", 100)
        monkeypatch.chdir(tmp_path)
        report = done("verify", place, "--deep", "--root", own.root, code=1)
        result = done(*shlex.split(report["repair"])[1:])
        assert (result["partitions_done"], result["partitions_skipped"]) == (1, 4)
        assert not own.store.exists(), "another store was filled"
        assert done("verify", place, "--deep")["ok"] is True
        for was, is_now in zip(before, everything(open_store(place)), strict=True):
            np.testing.assert_array_equal(was, is_now)
        place.rename(own.store)


def test_a_merged_store_is_made_again_from_its_parts(own: World) -> None:
    provenance(own.store, dataset="clips+others")
    flip(own.store / "features/c/2/0/0/0", 100)
    report = done("verify", own.store, "--deep", code=1)
    assert report["repair"] == "mote-cli store merge STORE STORE --out NEW-STORE"


def test_a_note_that_cannot_be_written_is_said(own: World) -> None:
    flip(own.store / "features/c/2/0/0/0", 100)
    with mock.patch(
        "featstore.reading.damage_notes.write_json", side_effect=PermissionError(13, "no")
    ):
        result = mote("verify", own.store, "--deep", "--json")
    assert result.code == 1
    assert result.json["note"] is None
    assert "cannot be written" in result.err
    assert f"delete {own.store / 'commit/c/2'} before you run extract" in result.err


def test_a_note_of_somebody_else_is_refused(own: World) -> None:
    note_of(own.store).write_text("[]")
    assert "is not a note of `mote-cli verify`" in refused(2, "verify", own.store)
    # A finding about a partition that was written anew since says nothing.
    note_of(own.store).write_text(
        json.dumps({"partitions": {"1": {"reason": "old", "commit": "00"}}})
    )
    assert done("verify", own.store)["ok"] is True
    assert StoreWriter.open(own.store).pending() == []


def test_videos_encoded_again_are_equal(world: World) -> None:
    report = done("verify", world.store, "--reencode", "7", "--device", "cpu")
    again = report["reencoded"]
    assert (report["ok"], again["ok"], again["equal"], len(again["rows"])) == (True, True, 7, 7)
    assert all(row["max_abs"] == 0 and row["cosine"] > 0.999999 for row in again["rows"])
    same = done("verify", world.store, "--reencode", "7", "--device", "cpu")
    assert same == report
    other = done("verify", world.store, "--reencode", "7", "--seed", "1", "--device", "cpu")
    assert [r["key"] for r in other["reencoded"]["rows"]] != [r["key"] for r in again["rows"]]
    table = mote("verify", world.store, "--reencode", "2", "--device", "cpu")
    assert "2 videos, 2 equal bit for bit" in table.out


def test_features_that_are_not_of_their_videos_are_found(own: World) -> None:
    """Checksums all agree: somebody wrote another's features with the store's own writer."""
    store = open_store(own.store)
    writer = StoreWriter.open(own.store)
    forged = store.features(store.rows[store.rows // store.schema.capacity == 1])
    forged[0] = forged[1]
    rewrite(own.store, writer, store, 1, forged)
    assert done("verify", own.store, "--deep")["ok"] is True
    report = done("verify", own.store, "--reencode", "18", "--device", "cpu", code=1)
    assert [d["partition"] for d in report["damaged"]] == [1]
    assert "encoded again has cosine" in report["damaged"][0]["reason"]
    assert report["reencoded"]["equal"] == 17
    assert done(*shlex.split(report["repair"])[1:])["partitions_done"] == 1
    assert done("verify", own.store, "--reencode", "18", "--device", "cpu")["ok"] is True


def rewrite(path: Path, writer: StoreWriter, store: Store, tar: int, features: np.ndarray) -> None:
    from featstore import Partition

    at = store.rows // store.schema.capacity == tar
    where = np.flatnonzero(at)
    rows = store.rows[at]
    with writer.claim([tar]):
        writer.write_partition(
            tar,
            Partition(
                key=[store.keys[i] for i in where],
                label=store.labels[at].copy(),
                num_frames=store.num_frames[at].copy(),
                fps=store.fps[at].copy(),
                status=store.status[at].copy(),
                splits=np.ones(len(rows), np.uint32),
                container_frames=store.container_frames[at].copy(),
                damaged_packets=store.damaged_packets[at].copy(),
                reason=[""] * len(rows),
                frame_index=store.frame_index(rows),
                pts=store.pts(rows),
                features=features,
            ),
        )
    assert crc32c(features[0]) == crc32c(features[1])


def test_what_is_needed_to_encode_again_is_gone(own: World, tmp_path: Path) -> None:
    arguments = ("verify", own.store, "--reencode", "18", "--device", "cpu")
    tar = sorted((own.root / "datasets/clips/shards").iterdir())[1]
    aside = tmp_path / "aside"
    tar.rename(aside)
    line = refused(2, *arguments)
    assert tar.name in line
    assert "put it back" in line
    aside.rename(tar)
    encoder = own.root / "encoders" / "tiny"
    provenance(own.store, encoder=str(tmp_path / "gone"))
    assert "cannot be loaded, so that nothing can be encoded again" in refused(2, *arguments)
    provenance(own.store, encoder="tiny")
    make_encoder(encoder, seed=1)
    assert "put back the encoder that made it" in refused(2, *arguments)
    (own.root / "datasets/clips/dataset.json").unlink()
    assert "mote-cli pack" in refused(2, *arguments)


def test_damage_keeps_videos_from_being_encoded_again(own: World) -> None:
    (own.store / "features/c/1/0/0/0").write_bytes(b"")
    result = mote("verify", own.store, "--reencode", "3")
    assert result.code == 1
    assert "nothing was encoded again" in result.err
