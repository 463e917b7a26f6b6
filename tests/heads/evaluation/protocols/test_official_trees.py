"""The miniature official trees are read as they are meant, through `mote-cli pack`."""

from __future__ import annotations

import posixpath
from pathlib import Path

import pytest

from featstore.workspace import Workspace
from pipeline.annotations.listing import name_from_key
from pipeline.tars.dataset import load_dataset
from tests.support.processes.command_line import done, refused
from tests.support.stores.one_hot_stores import one_hot_store
from tests.support.worlds.official_trees import TREES, UCF101_RAW, ucf101


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_packed_as_it_is_meant(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tree = TREES[name](tmp_path / name)
    summary = done(*tree.pack, "--root", root)
    dataset = load_dataset(Workspace(root).dataset_dir(name))
    assert dataset.class_names == tuple(tree.classes)
    assert summary["videos_packed"] == len(tree.truth)
    assert summary["videos_failed"] == len(tree.missing)
    assert set(dataset.split_names) == set(tree.splits)
    failed = {sample.key for tar in dataset.tars for sample in tar.failed}
    for split in dataset.split_names:
        stems = {posixpath.basename(name_from_key(k)) for k in dataset.keys_by_split[split]}
        assert stems - tree.missing == tree.splits[split]
    store = one_hot_store(root, tree)
    classes = {
        posixpath.basename(name_from_key(key)): dataset.class_names[label]
        for key, label in zip(store.keys, store.labels, strict=True)
        if key not in failed
    }
    assert classes == tree.truth


def test_class_names_as_the_data_set_spells_them(tmp_path: Path) -> None:
    root = tmp_path / "root"
    tree = ucf101(tmp_path / "ucf101")
    done(*tree.pack, "--class-names-as", "raw", "--root", root)
    dataset = load_dataset(Workspace(root).dataset_dir("ucf101"))
    assert dataset.class_names == dataset.raw_class_names == UCF101_RAW
    again = done(*tree.pack, "--class-names-as", "raw", "--root", root)
    assert again["shards_written"] == 0
    assert "names_as was raw, is words" in refused(2, *tree.pack, "--root", root)
    assert "choose one of words, raw" in refused(
        2, *tree.pack, "--class-names-as", "nice", "--root", root
    )
    assert "choose one of corrected, as-published" in refused(
        2, *tree.pack, "--label-map", "wrong", "--root", root
    )
