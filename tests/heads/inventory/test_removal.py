"""Removing from a workspace: whole or not at all, nothing in use, and nothing outside of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from featstore import UserError, WorkError, Workspace
from featstore.files.locks import claimed
from heads.inventory.contents import workspace_contents
from heads.inventory.removal import Removal, removals_of, remove
from tests.support.stores.sample_stores import make_store
from tests.support.stores.small_workspace import make_run, small_workspace

EVERY = [
    ("dataset", "clips", "datasets/clips"),
    ("store", "clips/tiny--uniform-4", "features/clips/tiny--uniform-4.zarr"),
    ("head", "first", "heads/first"),
    ("encoder", "tiny", "encoders/tiny"),
]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return small_workspace(tmp_path / "work")


def planned(workspace: Workspace, kind: str, name: str) -> Removal:
    (removal,) = removals_of(workspace, kind, [name])
    return removal


def files_of(workspace: Workspace) -> set[str]:
    return {str(p.relative_to(workspace.root)) for p in workspace.root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("kind", "name", "part"), EVERY)
def test_one_thing_goes_and_everything_else_stays(
    workspace: Workspace, kind: str, name: str, part: str
) -> None:
    before = files_of(workspace)
    removal = planned(workspace, kind, name)
    assert (removal.name, removal.path) == (name, workspace.root / part)
    inside = [workspace.root / file for file in before if file.startswith(f"{part}/")]
    assert removal.bytes == sum(file.stat().st_size for file in inside)
    assert files_of(workspace) == before
    remove(workspace, removal)
    left = {file for file in before if not file.startswith(f"{part}/")}
    assert files_of(workspace) - {f"{part}.lock"} == left - {f"{part}.lock"}
    assert not list(workspace.root.rglob(".trash"))
    assert workspace_contents(workspace.root).problems == []


def test_what_depends_on_a_thing_is_told(workspace: Workspace) -> None:
    make_run(workspace.run_dir("tuned"), mode="finetune", from_head={"run": "first"})

    def told(kind: str, name: str) -> list[tuple[str, str]]:
        return [(d.kind, d.name) for d in planned(workspace, kind, name).dependents]

    store = ("store", "clips/tiny--uniform-4")
    heads = [("head", "first"), ("head", "second"), ("head", "tuned")]
    assert told("dataset", "clips") == [store, *heads, ("result", "first")]
    assert told("dataset", "new") == []
    assert told(*store) == [*heads[:2], ("result", "first")]
    assert told("head", "first") == [("head", "tuned")]
    assert told("encoder", "tiny") == [store, ("store", "other/half"), *heads]
    assert planned(workspace, "head", "first").holds == "3 results"
    assert planned(workspace, "head", "second").holds.endswith("training not finished")


@pytest.mark.parametrize(
    ("kind", "name", "lock", "what"),
    [
        ("dataset", "clips", "datasets/clips/.packing/lock", "data set clips"),
        ("dataset", "clips", "features/clips/tiny--uniform-4.zarr.lock", "needs data set clips"),
        ("store", "tiny--uniform-4", "features/clips/tiny--uniform-4.zarr.lock", "store clips/"),
        ("store", "tiny--uniform-4", "heads/second/state/lock", "head second, which needs store"),
        ("head", "second", "heads/second/state/lock", "head second"),
        ("encoder", "tiny", "features/other/half.zarr.lock", "needs encoder tiny"),
        ("encoder", "tiny", "heads/second/state/lock", "needs encoder tiny"),
    ],
)
def test_what_a_running_command_uses_stays(
    workspace: Workspace, kind: str, name: str, lock: str, what: str
) -> None:
    removal = planned(workspace, kind, name)
    before = files_of(workspace)
    with claimed(workspace.root / lock, [3], str):
        for attempt in (lambda: planned(workspace, kind, name), lambda: remove(workspace, removal)):
            with pytest.raises(WorkError, match=rf"pid {os.getpid()} on .* is working on .*{what}"):
                attempt()
    assert files_of(workspace) - {lock} == before - {lock}
    remove(workspace, removal)
    assert not removal.path.exists()


@pytest.mark.parametrize(("kind", "name", "part"), EVERY)
def test_a_link_goes_without_what_it_leads_to(
    workspace: Workspace, tmp_path: Path, kind: str, name: str, part: str
) -> None:
    outside = tmp_path / "outside"
    (workspace.root / part).rename(outside)
    kept = sorted(outside.rglob("*"))
    (workspace.root / part).symlink_to(outside)
    removal = planned(workspace, kind, name)
    assert (removal.link, removal.bytes) == (str(outside), 0)
    remove(workspace, removal)
    assert not os.path.lexists(workspace.root / part)
    assert sorted(outside.rglob("*")) == kept


@pytest.mark.parametrize(("kind", "name", "part"), EVERY)
def test_nothing_behind_a_link_is_removed(
    workspace: Workspace, tmp_path: Path, kind: str, name: str, part: str
) -> None:
    parent = (workspace.root / part).parent
    parent.rename(tmp_path / "elsewhere")
    parent.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"lies behind a link at .*outside of the workspace"):
        removals_of(workspace, kind, [name])
    assert sorted(tmp_path.rglob("*")) == before


def test_files_are_not_deleted_through_a_link_in_the_place_of_the_trash(
    workspace: Workspace, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    (outside / "kept.lock").touch()
    (workspace.root / "heads/.trash").symlink_to(outside)
    with pytest.raises(WorkError, match=r"\.trash is a symbolic link: remove it"):
        removals_of(workspace, "head", ["first"])
    assert (outside / "kept").is_dir()
    assert (workspace.root / "heads/first").is_dir()


@pytest.mark.parametrize("how", ["{outside}", "{root}/features/../../outside/x.zarr", "s3://b/x"])
def test_a_store_outside_is_not_touched(workspace: Workspace, tmp_path: Path, how: str) -> None:
    make_store(tmp_path / "outside/x.zarr")
    text = how.format(outside=tmp_path / "outside/x.zarr", root=workspace.root)
    with pytest.raises(UserError, match=r"does not lie in .*features|no store"):
        removals_of(workspace, "store", [text])
    assert (tmp_path / "outside/x.zarr/zarr.json").is_file()


def test_a_store_is_found_by_each_of_its_names(workspace: Workspace) -> None:
    path = workspace.root / "features/clips/tiny--uniform-4.zarr"
    names = ["tiny--uniform-4", "tiny--uniform-4.zarr", "clips/tiny--uniform-4", str(path)]
    assert [r.path for r in removals_of(workspace, "store", names)] == [path]
    make_store(workspace.features_dir("new") / "tiny--uniform-4.zarr")
    with pytest.raises(UserError, match="2 stores have the name 'tiny--uniform-4': name clips/tin"):
        removals_of(workspace, "store", names[:1])


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("dataset", "clip", "no data set 'clip' in .*: did you mean clips"),
        ("store", "tiny-uniform-4", "did you mean clips/tiny--uniform-4"),
        ("head", "frist", "no head 'frist' in .*: did you mean first"),
        ("encoder", "tony", "did you mean tiny"),
        ("head", "..", "is no name for a run"),
        ("dataset", "../x", "is no name for a data set"),
        ("datasets", "x", "'datasets' cannot be removed: did you mean dataset"),
    ],
)
def test_an_unknown_name_is_answered_with_a_near_one(
    workspace: Workspace, kind: str, name: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        removals_of(workspace, kind, [name])


def test_damaged_things_can_be_removed(workspace: Workspace) -> None:
    for _, _, part in EVERY:
        for file in (workspace.root / part).glob("*.json"):
            file.write_text("[" * 10_000)
    for kind, name, part in EVERY:
        remove(workspace, planned(workspace, kind, name))
        assert not (workspace.root / part).exists()


KILLED = """
import os, shutil, sys
from pathlib import Path
from featstore import Workspace
from heads.inventory.removal import removals_of, remove
shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), 9)
workspace = Workspace(Path(sys.argv[1]))
for removal in removals_of(workspace, sys.argv[2], [sys.argv[3]]):
    remove(workspace, removal)
"""


@pytest.mark.parametrize(("kind", "name", "part"), EVERY)
def test_a_killed_removal_leaves_nothing_half_removed(
    workspace: Workspace, kind: str, name: str, part: str
) -> None:
    before = workspace_contents(workspace.root).to_json()
    words = [sys.executable, "-c", KILLED, str(workspace.root), kind, name]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert not (workspace.root / part).exists()
    found = workspace_contents(workspace.root).to_json()
    for one in ("datasets", "stores", "heads", "encoders"):
        names = [each["name"] for each in found[one]]
        assert names == [e["name"] for e in before[one] if not e["folder"].endswith(part)]
    (problem,) = found["problems"]
    assert problem["path"].endswith("/.trash")
    with pytest.raises(UserError, match=re.escape(repr(name.removesuffix(".zarr")))):
        removals_of(workspace, kind, [name])
    assert workspace_contents(workspace.root).problems == []
    assert not list(workspace.root.rglob(".trash"))
