"""What a workspace holds, read from small files; damage is told and hides nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from featstore.files.locks import claimed
from featstore.writing.writer import lock_file
from heads.inventory.contents import workspace_contents
from tests.support.stores.sample_stores import make_store
from tests.support.stores.small_workspace import small_workspace


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_workspace(tmp_path / "work").root


def test_everything_is_listed_with_its_numbers(root: Path) -> None:
    found = workspace_contents(root)
    assert found.problems == []
    clips, new = found.datasets
    assert (clips.name, clips.videos, clips.failed, clips.classes) == ("clips", 5, 1, 2)
    assert clips.splits == {"train": 4, "val": 1}
    assert clips.bytes == sum(p.stat().st_size for p in clips.folder.rglob("*") if p.is_file())
    assert (new.name, new.failed) == ("new", 0)
    store, half = found.stores
    assert (store.dataset, store.name, store.complete) == ("clips", "tiny--uniform-4", True)
    assert (store.rows_ok, store.rows_failed) == (9, 2)
    assert (half.complete, half.tars_done, half.rows_ok) == (False, 1, 7)
    first, second = found.heads
    assert (first.name, first.finished, len(first.results)) == ("first", True, 3)
    assert (second.finished, second.epochs_done, second.epochs) == (False, 1, 30)
    newest = {role: first.newest(role) for role in ("closeset", "zeroshot", "halfclass")}
    assert {r: n and n.number for r, n in newest.items()} == {
        "closeset": 71.5, "zeroshot": 40.0, "halfclass": None,
    }  # fmt: skip
    (encoder,) = found.encoders
    assert (encoder.name, encoder.bytes) == ("tiny", 502)
    assert found.stores_of("clips") == [store]
    assert found.heads_of("clips") == [first, second]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    found = workspace_contents(tmp_path / "none")
    assert found.to_json() == {
        "root": str(tmp_path / "none"),
        "bytes": 0,
        **{key: [] for key in ("datasets", "stores", "heads", "encoders", "problems")},
    }
    assert not (tmp_path / "none").exists()


def _nested(path: Path) -> None:
    path.write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        ("datasets/clips/dataset.json", lambda p: p.write_text('{"format_version": 1}')),
        ("datasets/clips/dataset.json", Path.unlink),
        ("datasets/clips/dataset.json", _nested),
        ("features/clips/tiny--uniform-4.zarr/zarr.json", lambda p: p.write_bytes(b"\xff")),
        ("features/clips/tiny--uniform-4.zarr/status/c/0", lambda p: p.write_bytes(b"\0" * 12)),
        ("features/clips/tiny--uniform-4.zarr/features/c/0/0/0/0", Path.unlink),
        ("heads/first/config.json", lambda p: p.write_text("[1]")),
        ("heads/first/config.json", _nested),
        ("heads/first/eval/1.json", lambda p: p.write_text("{}")),
        ("encoders/tiny/open_clip_config.json", Path.unlink),
    ],
)
def test_damage_is_a_line_and_the_rest_is_listed(
    root: Path, part: str, harm: Callable[[Path], object]
) -> None:
    whole = workspace_contents(root).to_json()
    harm(root / part)
    found = workspace_contents(root).to_json()
    (problem,) = found["problems"]
    assert problem["path"].startswith(str(root / "/".join(part.split("/")[:2])))
    assert problem["reason"]
    assert "\n" not in problem["reason"]
    kinds = ("datasets", "stores", "heads", "encoders")
    lost = sum(len(whole[kind]) - len(found[kind]) for kind in kinds)
    assert lost == (0 if "eval" in part else 1)


def test_what_another_process_is_writing_is_said(root: Path) -> None:
    store = root / "features/clips/tiny--uniform-4.zarr"
    with claimed(lock_file(store), [2], str), claimed(root / "heads/second/state/lock", [0], str):
        found = workspace_contents(root)
        assert f"pid {os.getpid()} on" in str(found.stores[0].busy)
        assert f"pid {os.getpid()} on" in str(found.heads[1].busy)
    found = workspace_contents(root)
    assert [one.busy for one in [*found.stores, *found.heads]] == [None] * 4


def test_links_and_second_names_do_not_make_a_folder_larger(root: Path, tmp_path: Path) -> None:
    before = workspace_contents(root)
    tar = root / "datasets/clips/shards/clips-000000.tar"
    os.link(tar, tar.with_name("again.tar"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/large").write_bytes(b"x" * 10_000)
    (root / "datasets/clips/shards/link").symlink_to(tmp_path / "outside")
    after = workspace_contents(root)
    assert after.datasets[0].bytes - before.datasets[0].bytes < 1000


def test_a_hundred_stores_are_listed_without_torch_or_zarr(tmp_path: Path) -> None:
    first = tmp_path / "features/clips/0.zarr"
    make_store(first, dataset="clips")
    for number in range(1, 100):
        first.with_name(f"{number}.zarr").symlink_to(first)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from heads.inventory.contents import workspace_contents\n"
        f"print(len(workspace_contents(Path({str(tmp_path)!r})).stores))\n"
        "print(*[name for name in ('torch', 'zarr', 'open_clip', 'av') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["100", "", ""]
