"""Lets a store grow: by new tars of its data set, or by the class texts of a prompt set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from featstore import ClassText, Provenance, Store, open_store
from featstore.commands import command, workspace_of
from featstore.errors import UserError, WorkError
from featstore.files.exchange import recover
from featstore.format.metadata import TarEntry
from featstore.reading.repair import extraction_of
from featstore.rewriting.grow import Grown, add_class_text
from featstore.rewriting.grow import add_tars as grow
from pipeline.extraction.job import class_text
from pipeline.prompts import PROMPT_SETS, PromptSet, as_prompt_set
from pipeline.tars.dataset import Dataset, Tar, load_dataset

if TYPE_CHECKING:  # an encoder imports torch, which adding tars alone does not need
    from pipeline.clip_encoder import Encoder

    StoreEncoder: TypeAlias = Callable[[Provenance, str | None, str, str, Path | None], Encoder]
    """Loads the encoder of a store, as `recorded_encoder` does."""

logger = logging.getLogger(__name__)


def recorded_encoder(
    made: Provenance, spec: str | None, precision: str, device: str, encoders_dir: Path | None
) -> Encoder:
    """Load the encoder that a store records, or the one that `spec` names, as `load_encoder`."""
    from pipeline.clip_encoder import load_encoder

    return load_encoder(spec or made.encoder, precision, device, encoders_dir=encoders_dir)


def add_tars(
    store_path: Path,
    dataset_dir: Path,
    *,
    encoder: str | None = None,
    encoders_dir: Path | None = None,
    device: str = "cpu",
    load: StoreEncoder = recorded_encoder,
) -> Grown:
    """Add to a store the new tars of its data set, which was packed again with more tars.

    The encoder (the store's, unless `encoder` names one) is loaded only if there are new classes,
    which need class texts; it is loaded by `load`. Raises UserError if the data
    set is no extension of the store's or the encoder is not the store's, WorkError as
    `featstore.rewriting.grow.add_tars` does.
    """
    recover(store_path)
    with _undisturbed(store_path):
        dataset = load_dataset(dataset_dir)
        store = open_store(store_path)
        made = store.provenance
        if dataset.name != made.dataset:
            alike = replace(extraction_of(made), dataset=dataset.name, split=None)
            place = workspace_of(store_path)
            raise UserError(
                f"{store_path} was made from data set {made.dataset!r}, not {dataset.name!r}: "
                f"extract that one too (`{alike.command(place)}`) and join both stores with "
                "`mote-cli store merge`"
            )
        # The tars that belong into the store: all, or those of the split it was made from.
        files = {tar.file for tar in store.tars}
        tars = [
            s for s in dataset.tars if not made.split or s.split == made.split or s.file in files
        ]
        _require_same_failures(store, tars)
        texts = None
        if list(dataset.class_names) != store.class_names:
            tower = _encoder(store, encoder, encoders_dir, device, load)
            texts = {name: _longer(store, name, dataset, tower) for name in store.prompt_sets}
        return grow(
            store_path,
            tars=[
                TarEntry(file=tar.file, rows=tar.rows, bytes=tar.bytes, sha256=tar.sha256)
                for tar in tars
            ],
            class_names=dataset.class_names,
            raw_class_names=dataset.raw_class_names,
            split_names=dataset.split_names,
            dataset_fingerprint=dataset.fingerprint,
            class_texts=texts,
        )


def add_texts(
    store_path: Path,
    prompts: str | PromptSet,
    *,
    encoder: str | None = None,
    encoders_dir: Path | None = None,
    device: str = "cpu",
    load: StoreEncoder = recorded_encoder,
) -> bool:
    """Add the class texts of a prompt set to a store. Returns False if it holds them already.

    `prompts` is a set's name, a template file, or a set that was read; `load` loads the encoder.
    Raises UserError if the set is unknown, lacks classes of the store, or has other sentences than
    the store's set of that name, and if the encoder is not the store's; raises WorkError while
    another process writes to the store, and whatever `load` raises.
    """
    wanted = as_prompt_set(prompts)  # a wrong set is refused before the encoder is loaded
    recover(store_path)
    with _undisturbed(store_path):
        store = open_store(store_path)
        if not store.class_names:
            raise UserError(f"{store_path} has no classes, so there are no class texts to make")
        wanted.require_classes(store.class_names)
        if wanted.name in store.prompt_sets:
            wanted.require_held(store)
        tower = _encoder(store, encoder, encoders_dir, device, load)
        names = tuple(store.class_names)
        return add_class_text(store_path, wanted.name, class_text(tower, names, wanted))


@contextmanager
def _undisturbed(path: Path) -> Iterator[None]:
    """If something fails because another process replaced the store at `path`, say so."""

    def folder_number() -> int | None:
        return path.stat().st_ino if path.exists() else None

    before = folder_number()
    try:
        yield
    except (UserError, WorkError) as error:
        if folder_number() == before:
            raise
        raise WorkError(
            f"another process changed {path} in the meantime: run the same command again"
        ) from error


def _require_same_failures(store: Store, tars: list[Tar]) -> None:
    """Raise UserError unless the store has the same failed videos, which no tar's sha256 covers."""
    held = {tar.file: number for number, tar in enumerate(store.tars)}
    done = set(store.partitions())
    for tar in tars:
        number = held.get(tar.file)
        if number is None or number not in done or tar.sha256 != store.tars[number].sha256:
            continue  # new, still to be extracted, or refused later
        if tar.rows != store.tars[number].rows:
            continue  # refused later
        first = number * store.schema.capacity + tar.samples
        at = store.positions(np.arange(first, first + len(tar.failed)))
        spans = store.spans if store.multi_label else [()] * len(store)
        listed = [(store.keys[i], int(store.labels[i]), spans[i]) for i in at]
        if listed != [(failed.key, failed.label, failed.spans) for failed in tar.failed]:
            raise UserError(
                f"the videos of {tar.file} that could not be packed are not the same as in "
                f"{store.path}: extract the data set as a new store"
            )


def _encoder(
    store: Store,
    spec: str | None,
    encoders_dir: Path | None,
    device: str,
    load: StoreEncoder,
) -> Encoder:
    made = store.provenance
    chosen = spec or made.encoder
    try:
        tower = load(made, spec, "fp32", device, encoders_dir)
    except UserError as error:
        if spec is None:
            raise UserError(
                f"the encoder of {store.path} is not where it was ({error}): name it with --encoder"
            ) from error
        raise
    if tower.fingerprint != made.encoder_fingerprint:
        raise UserError(
            f"{chosen} is not the encoder of {store.path}, which is {made.encoder} (weights "
            f"{made.encoder_fingerprint[:16]}, not {tower.fingerprint[:16]}): name that one with "
            "--encoder"
        )
    return tower


def _longer(store: Store, prompt_set: str, dataset: Dataset, tower: Encoder) -> ClassText:
    """Make class texts for all classes of the data set, and keep the rows that the store has."""
    held = store.class_text(prompt_set)
    prompts = PromptSet(prompt_set, held.templates or PROMPT_SETS.get(prompt_set, ()))
    if not prompts.templates:
        place = workspace_of(store.path)
        remake = command("store", "add-texts", store.path, descriptions="FILE.json", root=place)
        raise UserError(
            f"{store.path} does not keep the sentences of its class texts {prompt_set!r}, so the "
            "texts of new classes cannot be made: remove its folder "
            f"class_text/{prompt_set}, add the tars, and make the class texts again with "
            f"`{remake}`"
        )
    made = class_text(tower, dataset.class_names, prompts)
    rows = np.concatenate([held.embeddings, made.embeddings[len(held.names) :]])
    return replace(made, embeddings=rows)
