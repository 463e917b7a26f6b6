"""The miniature official trees are read as they are meant, through `mote-cli pack`."""

from __future__ import annotations

import posixpath
from pathlib import Path

import pytest
from command_line import done
from official_trees import TREES, one_hot_store

from featstore.workspace import Workspace
from pipeline.annotations import name_from_key
from pipeline.packed import load_dataset


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
    failed = {sample.key for shard in dataset.shards for sample in shard.failed}
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
