"""Stores that grow in place: more tars, class texts of another prompt set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from featstore.errors import UserError
from featstore.files.durable import link_or_copy, sync_folder
from featstore.files.exchange import replacement, staging
from featstore.format.class_texts import ClassText
from featstore.format.metadata import (
    StoreMetadata,
    TarEntry,
    prompt_set_names,
)
from featstore.format.schema import CLASS_TEXT_GROUP
from featstore.progress import Outcome
from featstore.rewriting.source import claimed_source
from featstore.writing.writer import StoreWriter, require_fitting, write_class_text, write_skeleton


@dataclass(frozen=True)
class Grown(Outcome):
    """What `add_tars` did: how many tars and rows the store has now, and how many are new.

    `pending` counts the partitions still to be extracted: new ones and ones that were not done.
    """

    store: str
    tars: int
    tars_added: int
    rows: int
    rows_added: int
    classes_added: int
    pending: int


def add_tars(
    path: Path,
    *,
    tars: Sequence[TarEntry],
    class_names: Sequence[str],
    raw_class_names: Sequence[str],
    split_names: Sequence[str],
    dataset_fingerprint: str,
    class_texts: Mapping[str, ClassText] | None = None,
) -> Grown:
    """Add tars to a store whose data set was packed again with more tars.

    `tars` are all tars in the data set's order. Earlier tars must be unchanged (file, rows and
    sha256) but may have moved in the order. Names may only be added at the end. `class_texts`
    replaces the class texts of the store, and is needed if there are new classes.

    A new store is built beside the old one, with the partitions that are done linked into their
    places, and exchanged with it; killed at any moment, the old or the new one is there. A `Store`
    that is open meanwhile goes on with what it holds as long as no earlier tar changes its place;
    open it again otherwise. Nothing happens when there is nothing new. Raises UserError when the
    tars or names do not continue the store's, WorkError while a process writes to it.
    """
    _require_folder(path)
    with claimed_source(path) as source:
        old = source.metadata
        if old.provenance.quantised:
            raise UserError(
                f"{path} is quantised ({old.provenance.quantised}), and features are extracted in "
                "float16: add the tars to the store it was made of and quantise that again"
            )
        entries = tuple(tars)
        places = _places(path, old, entries)
        for what, had, has in (
            ("class names", old.class_names, class_names),
            ("raw class names", old.raw_class_names, raw_class_names),
            ("splits", old.split_names, split_names),
        ):
            for number, (before, now) in enumerate(zip_longest(had, has, fillvalue="")):
                if number < len(had) and before != now:
                    raise UserError(
                        f"{what} of the data set do not continue those of {path}: number {number} "
                        f"was {before!r}, is {now!r}, and labels would change; new ones may come "
                        "at the end only, so extract the data set as a new store"
                    )
        metadata = replace(
            old,
            schema=replace(old.schema, tars=len(entries)),
            provenance=replace(old.provenance, dataset_fingerprint=dataset_fingerprint),
            tars=entries,
            class_names=tuple(class_names),
            raw_class_names=tuple(raw_class_names),
            split_names=tuple(split_names),
        )
        texts = dict(source.texts() if class_texts is None else class_texts)
        lost = set(source.store.prompt_sets) - set(texts)
        if lost:
            raise ValueError(f"class texts {', '.join(sorted(lost))} of {path} would be lost")
        if metadata != old:
            with replacement(path) as folder:
                write_skeleton(folder, metadata, texts)
                old_store, new_store = StoreWriter.open(path), StoreWriter.open(folder)
                # No file of a partition says its number, so that it can be linked elsewhere.
                for tar in filter(old_store.done, places):
                    for name in metadata.schema.partition_arrays:
                        target = new_store.file(name, places[tar])
                        link_or_copy(old_store.file(name, tar), target)
    return Grown(
        store=str(path),
        tars=len(entries),
        tars_added=len(entries) - len(places),
        rows=sum(tar.rows for tar in entries),
        rows_added=sum(tar.rows for tar in entries) - sum(tar.rows for tar in old.tars),
        classes_added=len(class_names) - len(old.class_names),
        pending=len(StoreWriter.open(path).pending()),
    )


def add_class_text(path: Path, prompt_set: str, text: ClassText) -> bool:
    """Add the class texts of a prompt set; return False if the store holds the same ones already.

    The texts are written beside the store and moved into it by one rename. Raises UserError if
    they have other classes, another size or another encoder than the store, or if the store has
    other sentences under that name; WorkError while a process writes to the store.
    """
    _require_folder(path)
    with claimed_source(path) as source:
        made = source.metadata.provenance
        if text.encoder_fingerprint not in ("", made.encoder_fingerprint):
            raise UserError(
                f"class texts {prompt_set!r} were made with another encoder (weights "
                f"{text.encoder_fingerprint[:16]}) than {path}, which has {made.encoder} (weights "
                f"{made.encoder_fingerprint[:16]}): compute them with that one"
            )
        require_fitting(prompt_set, text, source.metadata)
        if prompt_set in prompt_set_names(path):
            held = source.store.class_text(prompt_set)
            if held.sentences_hash == text.sentences_hash:
                return False  # reading it has refused texts of another encoder
            raise UserError(
                f"{path} has class texts {prompt_set!r} of other sentences: give the new ones "
                "another name"
            )
        with staging(path) as folder:
            write_class_text(folder, text)
            place = path / CLASS_TEXT_GROUP / prompt_set
            folder.rename(place)
            sync_folder(place.parent)
    return True


def _require_folder(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path} is a symbolic link: commands that change a store need the folder itself, "
            f"{path.resolve()}"
        )


def _places(path: Path, old: StoreMetadata, entries: Sequence[TarEntry]) -> dict[int, int]:
    """Return where each tar of the store is in `entries`; UserError if one is gone or too large."""
    numbers = {entry.file: number for number, entry in enumerate(entries)}
    places = {}
    for number, tar in enumerate(old.tars):
        now = numbers.get(tar.file)
        if now is None or replace(entries[now], bytes=tar.bytes) != tar:
            raise UserError(
                f"{tar.file} of {path} {'is not listed any more' if now is None else 'was changed'}"
                ": a store grows only by new tars, the earlier ones unchanged; extract the data "
                "set as a new store"
            )
        places[number] = now
    for entry in entries:
        if entry.rows > old.schema.capacity:
            raise UserError(
                f"{entry.file} lists {entry.rows} videos, a partition of {path} holds "
                f"{old.schema.capacity}: pack the new videos with --samples-per-shard "
                f"{old.schema.capacity} or less, or extract the data set as a new store"
            )
    return places
