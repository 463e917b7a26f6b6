"""Class names as a published label file has them, over a store that is open already."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from featstore import Store
from heads.evaluation.label_maps import AS_PUBLISHED, with_exchanged_names
from tests.support.stores.action_store import action_store

EXCHANGE = {0: 2, 2: 0}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(action_store(tmp_path / "toy.zarr").path, mapped=False)


def test_a_pickled_store_keeps_its_exchanged_names(store: Store) -> None:
    renamed = with_exchanged_names(store, EXCHANGE)
    names = store.class_names
    names[0], names[2] = names[2], names[0]
    (prompt_set,) = store.prompt_sets
    again = pickle.loads(pickle.dumps(renamed))
    for one in (renamed, again):
        assert one.class_names == names
        assert one.provenance.label_map == AS_PUBLISHED
        assert one.class_text(prompt_set).names == tuple(names)
        own = store.class_text(prompt_set).embeddings
        np.testing.assert_array_equal(one.class_text(prompt_set).embeddings[0], own[2])
        assert one.mapped is False
        np.testing.assert_array_equal(one.features(one.rows[:2]), store.features(store.rows[:2]))


def test_names_exchanged_twice_are_the_names_again(store: Store) -> None:
    twice = with_exchanged_names(with_exchanged_names(store, EXCHANGE), EXCHANGE)
    assert twice.class_names == store.class_names
    assert pickle.loads(pickle.dumps(twice)).class_names == store.class_names


def test_other_names_open_nothing_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("the store is open already")

    monkeypatch.setattr(Store, "__init__", refuse)
    assert with_exchanged_names(store, EXCHANGE).class_names != store.class_names
