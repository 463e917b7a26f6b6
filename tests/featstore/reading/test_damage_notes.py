"""The note of damage beside a store, as those who fill the store read it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from featstore import StoreWriter
from featstore.format.metadata import read_metadata
from featstore.reading import damage_notes
from featstore.reading.chunk_files import ChunkFiles
from featstore.reading.damage_notes import note_damage, note_path
from tests.support.stores.sample_stores import make_partition, make_store


def test_the_note_is_read_once_per_opening(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    make_store(path, rows=(4,) * 6)
    note_damage(ChunkFiles(path, read_metadata(path)), {2: "a flipped bit", 4: "another"})
    writer = StoreWriter.open(path)
    with mock.patch.object(damage_notes, "read_bounded", wraps=damage_notes.read_bounded) as read:
        assert writer.pending() == [2, 4]
        with writer.claim():
            writer.write_partition(2, make_partition(writer.schema, 2, 4))
        # The finding is of the entry that was there: what was written since is sound.
        assert writer.done(2)
        assert writer.pending() == [4]
    assert [c.args[0] for c in read.call_args_list].count(note_path(path)) == 1
    assert StoreWriter.open(path).pending() == [4]
