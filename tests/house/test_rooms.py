"""The direction in which rooms may import each other: docs/rooms.md against the code."""

from __future__ import annotations

import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.house import rooms as house

ALLOWED = house.table(house.PAGE.read_text())
ROOMS = set(ALLOWED)
FOUND = house.arrows(ROOMS)
# Three packages do not know each other's insides; the fourth sits on top (docs/decisions/0001).
NEIGHBOURS = {
    "featstore": set(),
    "pipeline": {"featstore"},
    "heads": {"featstore"},
    "cli": {"featstore", "pipeline", "heads"},
}
# The demo runs every stage, the inventory lists what each has made, imported checkpoints become
# encoders, training from pixels and prediction decode videos themselves, and so does the search
# for copies; protocols read lists of classes (pure text).
MORE = {
    "heads.demo": {"pipeline"},
    "heads.inventory": {"pipeline.tars", "pipeline.encoders"},
    "heads.end_to_end": {"pipeline"},
    "heads.checkpoints": {"pipeline.annotations", "pipeline.clip_encoder", "pipeline.encoders"},
    "heads.prediction": {"pipeline"},
    "heads.evaluation": {"pipeline.annotations"},
    "heads.quality": {"pipeline.decoding", "pipeline.tars"},
}


@pytest.mark.parametrize("room", sorted(FOUND))
def test_a_room_imports_what_the_table_allows(room: str) -> None:
    assert room in ALLOWED, f"{room} is missing from docs/rooms.md"
    more = FOUND[room] - ALLOWED[room]
    assert not more, f"docs/rooms.md does not let {room} import {', '.join(sorted(more))}"
    unused = ALLOWED[room] - FOUND[room]
    assert not unused, f"{room} no longer imports {', '.join(sorted(unused))}: take it off the page"


def test_no_room_needs_itself_by_any_path() -> None:
    TopologicalSorter(ALLOWED).prepare()  # CycleError names the rooms of a circle


def test_the_table_keeps_the_packages_apart() -> None:
    for room, allowed in ALLOWED.items():
        package = room.partition(".")[0]
        outside = {name for name in allowed if name.partition(".")[0] != package}
        outside -= {name for name in outside if name.partition(".")[0] in NEIGHBOURS[package]}
        for inner, names in MORE.items():
            if f"{room}.".startswith(f"{inner}."):
                outside -= {n for n in outside if any(f"{n}.".startswith(f"{m}.") for m in names)}
        assert not outside, f"{room} must not import {', '.join(sorted(outside))}"


def test_evaluation_is_imported_by_nobody_below_it() -> None:
    above = {"heads", "heads.demo", "heads.inventory", "cli.commands"}
    for room, allowed in ALLOWED.items():
        if not room.startswith("heads.evaluation") and room not in above:
            assert not {name for name in allowed if name.startswith("heads.evaluation")}, room


def test_no_folder_holds_more_than_one_look_takes_in() -> None:
    folders = {path.parent for path in house.MODULES}
    large = {}
    for folder in folders:
        entries = [e for e in folder.iterdir() if e.name not in ("__init__.py", "__pycache__")]
        if len(entries) > 20:
            large[str(folder.relative_to(house.ROOT))] = len(entries)
    assert not large, f"divide these folders: {large}"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from heads.evaluation.results import EvalResult", "heads.evaluation.results"),
        ("from heads.evaluation import results", "heads.evaluation.results"),
        ("import heads.evaluation.results", "heads.evaluation.results"),
        ("from heads import EvalResult", "heads"),
    ],
)
def test_an_import_inside_a_function_is_seen(tmp_path: Path, line: str, name: str) -> None:
    module = tmp_path / "module.py"
    module.write_text(f"def late():\n    {line}\n")
    assert house.imported_modules(module) == {name}


def test_every_module_has_a_room() -> None:
    assert set(FOUND) == ROOMS
    assert {room.partition(".")[0] for room in ROOMS} == set(house.PACKAGES)


def test_every_package_is_installed() -> None:
    project = tomllib.loads((house.ROOT / "pyproject.toml").read_text())
    find = project["tool"]["setuptools"]["packages"]["find"]
    assert find == {"include": [f"{name}*" for name in house.PACKAGES], "namespaces": False}
    assert all((path.parent / "__init__.py").exists() for path in house.MODULES)


def test_no_module_takes_the_name_of_a_library() -> None:
    first = {path.relative_to(house.ROOT).parts[1] for path in house.MODULES}
    assert not {name.removesuffix(".py") for name in first} & sys.stdlib_module_names
