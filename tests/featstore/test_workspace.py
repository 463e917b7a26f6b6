from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from featstore import StoreSchema, UserError, WorkError, Workspace
from tests.support.stores.sample_stores import init_store, make_store


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "root with spaces")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "-x", "a\nb", "/etc", "a" * 129])
def test_names_stay_inside(workspace: Workspace, name: str) -> None:
    for folder in (
        workspace.dataset_dir,
        workspace.features_dir,
        workspace.run_dir,
        workspace.encoder_dir,
    ):
        with pytest.raises(UserError, match="is no name for a"):
            folder(name)


def test_layout(workspace: Workspace) -> None:
    assert workspace.dataset_dir("k400") == workspace.root / "datasets/k400"
    assert workspace.encoder_dir("tuned.v2") == workspace.root / "encoders/tuned.v2"
    plain = workspace.store_path("k400", encoder="ViT-B-16/openai", sampling="uniform:16")
    assert plain == workspace.root / "features/k400/ViT-B-16-openai--uniform-16.zarr"
    full = workspace.store_path(
        "k400", encoder="ViT-B-16", sampling="clips:8x4", crops=3, split="val"
    )
    assert full.name == "ViT-B-16--clips-8x4--crops3--val.zarr"


def test_no_store_names_the_command(workspace: Workspace) -> None:
    with pytest.raises(UserError) as info:
        workspace.opened("k400").choose()
    root = f"--root '{workspace.root}'`"
    assert f"pack it with `mote-cli pack --dataset k400 --videos DIR {root}" in str(info.value)
    assert f"run `mote-cli extract --dataset k400 {root}" in str(info.value)


def test_the_one_that_fits(workspace: Workspace) -> None:
    folder = workspace.features_dir("toy")
    make_store(folder / "train.zarr", row_shape=(1, 4, 16), sampling="uniform:4")
    make_store(folder / "val.zarr", row_shape=(3, 4, 16), sampling="clips:4x3")
    assert workspace.opened("toy").choose(views=3).path.name == "val.zarr"
    assert workspace.opened("toy").choose(sampling="uniform:4").path.name == "train.zarr"
    with pytest.raises(UserError, match=r"2 stores .* fit: train.zarr \(.*\), val.zarr \(") as info:
        workspace.opened("toy").choose()
    assert "\n" not in str(info.value)
    with pytest.raises(UserError, match=r"train.zarr has 1 view, not 9; val.zarr has 3 views"):
        workspace.opened("toy").choose(views=9)
    with pytest.raises(UserError, match=r"no rows of split 'test'.*extract .* --split"):
        workspace.opened("toy").choose(split="test")
    with pytest.raises(UserError, match="another encoder"):
        workspace.opened("toy").choose(encoder_fingerprint="ffff")


@pytest.mark.parametrize("own_tars", [True, False])
def test_a_split_that_the_data_set_lacks(workspace: Workspace, own_tars: bool) -> None:
    make_store(workspace.features_dir("toy") / "s.zarr")
    packed = workspace.dataset_dir("toy") / "dataset.json"
    packed.parent.mkdir(parents=True)
    names = ["train", "val", "test"]
    packed.write_text(json.dumps({"split_names": names, "splits_disjoint": own_tars}))
    with pytest.raises(UserError) as none:
        workspace.opened("toy").choose(split="nope")
    assert str(none.value) == "data set 'toy' has no split 'nope': choose one of train, val, test"
    # A split that it has is to be extracted: by itself where it has tars of its own.
    with pytest.raises(UserError, match="no rows of split 'test'") as known:
        workspace.opened("toy").choose(split="test")
    assert ("--split test" in str(known.value)) is own_tars


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"split_names": 3}', '{"split_names": [], "splits_disjoint": 0}']
)
def test_a_data_set_that_does_not_say_its_splits(workspace: Workspace, content: str) -> None:
    make_store(workspace.features_dir("toy") / "s.zarr")
    packed = workspace.dataset_dir("toy") / "dataset.json"
    packed.parent.mkdir(parents=True)
    packed.write_text(content)
    with pytest.raises(UserError, match=r"of split 'nope'|split 'nope': it has none"):
        workspace.opened("toy").choose(split="nope")


def test_an_unfinished_store_is_not_used(workspace: Workspace) -> None:
    path = workspace.features_dir("toy") / "s.zarr"
    init_store(path, StoreSchema.create(2, 4, 1, 2, 8), [4, 4])
    with pytest.raises(WorkError, match="holds 0 of 2 partitions: finish it with"):
        workspace.opened("toy").choose()


def test_a_damaged_store_is_reported_when_nothing_else_fits(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    folder = workspace.features_dir("toy")
    make_store(folder / "a.zarr")
    (folder / "a.zarr/features/c/0/0/0/0").unlink()
    with pytest.raises(WorkError, match="partition 0"):
        workspace.opened("toy").choose()
    make_store(folder / "b.zarr")
    assert workspace.opened("toy").choose().path.name == "b.zarr"
    assert "left out: partition 0" in caplog.text


def test_runs(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="run `mote-cli pack --dataset NAME --videos DIR --root"):
        workspace.choose_run(None)
    for age, name in enumerate(["new", "middle", "old", "interrupted"]):
        run = workspace.run_dir(name)
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        os.utime(run / "config.json", (1_000_000 - age, 1_000_000 - age))
        if name != "interrupted":
            (run / "head.safetensors").write_bytes(b"")
    assert [run.name for run in workspace.trained_runs()] == ["new", "middle", "old"]
    assert workspace.choose_run(None).name == "new"
    assert workspace.choose_run("old") == workspace.run_dir("old")
    for name in ("new", "middle"):  # trained by an evaluation as a part of itself
        config = workspace.run_dir(name) / "config.json"
        times = config.stat()
        config.write_text('{"protocol": "hmdb51-fewshot"}')
        os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert workspace.choose_run(None).name == "old"
    assert workspace.choose_run("new").name == "new"
    for missing in ("interrupted", "none"):
        with pytest.raises(UserError, match=f"head '{missing}' .* choose one of new, middle, old"):
            workspace.choose_run(missing)
