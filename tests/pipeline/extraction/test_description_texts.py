"""Embeddings of class descriptions: their formula, and that a store keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from featstore import StoreSchema, open_store, verify
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.descriptions.wording import template_descriptions
from pipeline.extraction.description_texts import descriptions_embeddings
from tests.support.stores.sample_stores import CLASS_NAMES, init_store, make_partition
from tests.support.worlds.tiny_world import make_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(str(make_encoder(tmp_path_factory.mktemp("clip") / "tiny")), "fp32")


@pytest.fixture
def store(tmp_path: Path, encoder: Encoder) -> Path:
    path, schema = tmp_path / "s.zarr", StoreSchema.create(1, 4, 1, 2, encoder.dim)
    writer = init_store(path, schema, [4], encoder_fingerprint=encoder.fingerprint)
    with writer.claim():
        writer.write_partition(0, make_partition(schema, 0, 4))
    return path


def by_hand(encoder: Encoder, lines: tuple[str, ...], normalise_first: bool) -> torch.Tensor:
    found = encoder.encode_text(lines).double()
    if normalise_first:
        found = found / found.norm(dim=1, keepdim=True)
    mean = found.mean(0)
    return mean / mean.norm()


@pytest.mark.parametrize("normalise_first", [True, False])
def test_the_mean_of_a_class_by_hand(encoder: Encoder, normalise_first: bool) -> None:
    made = template_descriptions(CLASS_NAMES, 3)
    names = ["throw", "brush_hair"]  # a choice, in another order and spelling
    found = descriptions_embeddings(encoder, made, names, normalise_first=normalise_first)
    for embeddings, lines in zip(found, (made.spatial, made.temporal), strict=True):
        assert embeddings.dtype == torch.float32
        assert embeddings.shape == (2, encoder.dim)
        for row, number in zip(embeddings, (2, 0), strict=True):
            expected = by_hand(encoder, lines[number], normalise_first)
            torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=0)


def test_classes_that_look_alike_are_no_reason_to_warn(
    encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is scored by descriptions: only class texts that coincide are a warning."""
    same = replace(template_descriptions(CLASS_NAMES), spatial=(("a field",),) * len(CLASS_NAMES))
    spatial, _ = descriptions_embeddings(encoder, same, CLASS_NAMES)
    assert torch.equal(spatial[0], spatial[1])
    assert not caplog.messages
    encoder.class_embeddings(CLASS_NAMES, same.prompt_set("spatial", "fields"))
    assert "no score can tell these classes apart" in caplog.text


@pytest.mark.parametrize("normalise_first", [True, False])
def test_a_second_run_encodes_nothing(encoder: Encoder, store: Path, normalise_first: bool) -> None:
    made = template_descriptions(CLASS_NAMES)
    options: dict[str, Any] = {"store": store, "normalise_first": normalise_first}
    first = descriptions_embeddings(encoder, made, CLASS_NAMES, **options)
    with mock.patch.object(Encoder, "encode_tokens", side_effect=AssertionError):
        again = descriptions_embeddings(encoder, made, CLASS_NAMES, **options)
        half = descriptions_embeddings(encoder, made, CLASS_NAMES[1:], **options)
        with pytest.raises(AssertionError):  # other sentences are not those that are kept
            descriptions_embeddings(
                encoder, template_descriptions(CLASS_NAMES, 3), CLASS_NAMES, **options
            )
        options["normalise_first"] = not normalise_first
        with pytest.raises(AssertionError):
            descriptions_embeddings(encoder, made, CLASS_NAMES, **options)
    for one, other, some in zip(first, again, half, strict=True):
        assert np.array_equal(one.numpy(), other.numpy())
        assert np.array_equal(one[1:].numpy(), some.numpy())


def test_what_is_kept_is_no_prompt_set_and_no_damage(encoder: Encoder, store: Path) -> None:
    before = open_store(store).prompt_sets
    descriptions_embeddings(encoder, template_descriptions(CLASS_NAMES), CLASS_NAMES, store=store)
    kept = sorted(p.name for p in (store / "class_text").iterdir() if p.is_dir())
    assert len(kept) == len(before) + 2
    assert open_store(store).prompt_sets == before
    assert verify(store, deep=True).ok


def test_damage_is_told_and_encoded_again(
    encoder: Encoder, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = template_descriptions(CLASS_NAMES)
    first = descriptions_embeddings(encoder, made, CLASS_NAMES, store=store)
    (chunk,) = (store / "class_text").glob("_spatial-*/c/0/0")
    chunk.write_bytes(chunk.read_bytes()[::-1])
    again = descriptions_embeddings(encoder, made, CLASS_NAMES, store=store)
    assert "encoded again" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_store_of_another_encoder_keeps_nothing(
    tmp_path: Path, encoder: Encoder, store: Path
) -> None:
    other = load_encoder(str(make_encoder(tmp_path / "other", seed=1)), "fp32")
    made = template_descriptions(CLASS_NAMES)
    descriptions_embeddings(other, made, CLASS_NAMES, store=store)
    few = template_descriptions(CLASS_NAMES[:2])  # not all classes of the store
    descriptions_embeddings(encoder, few, CLASS_NAMES[:2], store=store)
    assert not list((store / "class_text").glob("_*"))
