"""What the commands call can be called from Python, and says the same."""

from __future__ import annotations

from pathlib import Path

from featstore import open_store
from featstore.checking.verify import note_partitions
from featstore.workspace import Workspace
from heads.demo import demo_rows
from heads.end_to_end.predict import predict
from heads.methods.registry import names
from pipeline.extraction.reencode import reencode_store
from pipeline.tars.dataset import load_dataset
from tests.support.processes.command_line import done
from tests.support.worlds.tiny_world import World


def test_predict(world: World) -> None:
    video = sorted(world.videos.rglob("*.mp4"))[0]
    found = predict(Workspace(world.root), [video], head="clips-mote", top=1)
    assert found == done("predict", video, "--head", "clips-mote", "--top", 1, "--root", world.root)


def test_facts_of_a_data_set_and_a_store(world: World) -> None:
    dataset = load_dataset(world.root / "datasets" / "clips")
    assert done("inspect", dataset.folder).items() >= {"kind": "dataset", **dataset.facts()}.items()
    store = open_store(world.store)
    assert done("inspect", store.path).items() >= {"kind": "store", **store.facts()}.items()


def test_noted_damage_and_rows_encoded_again(own: World, tmp_path: Path) -> None:
    note = note_partitions(own.store, True, {0: "a reason"})
    assert note is not None
    assert "a reason" in note.read_text()
    again = reencode_store(own.store, Workspace(tmp_path), 2)
    assert again.ok
    assert len(again.rows) == 2


def test_the_demo_names_methods_of_the_registry() -> None:
    assert {row.head for row in demo_rows(finetuned=False)} <= set(names())
