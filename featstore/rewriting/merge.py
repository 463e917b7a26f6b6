"""Merges several stores that were made in the same way into one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featstore.commands import STORE_SUFFIX, command
from featstore.errors import UserError
from featstore.files.exchange import new_folder
from featstore.format.class_texts import ClassText, texts_command
from featstore.format.metadata import StoreMetadata
from featstore.format.provenance import Provenance
from featstore.format.schema import MAX_SPLITS
from featstore.progress import Outcome, ProgressSink, no_progress
from featstore.rewriting.source import SourceStore, claimed_source
from featstore.writing.writer import StoreWriter

log = logging.getLogger(__name__)

# Class texts of one encoder are equal to the bit; batches of another size may round otherwise.
_SAME_TEXT = 0.9999


@dataclass(frozen=True)
class Merged(Outcome):
    """What `merge` made; `tars_linked` counts the tars whose features file was kept as it was."""

    store: str
    stores: tuple[str, ...]
    tars: int
    tars_linked: int
    rows: int
    classes: int
    splits: tuple[str, ...]
    prompt_sets: tuple[str, ...]
    prompt_sets_left_out: tuple[str, ...]


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    prefix_keys: bool = False,
    progress: ProgressSink = no_progress,
) -> Merged:
    """Merge stores that differ only in their data set; the new store appears when complete.

    Classes and splits of the same name become one, and labels are changed to fit. The new store
    has the largest capacity of the stores: features files of stores with this capacity are linked,
    the others are written anew, equal to the bit. Only class texts that every store has are kept.
    `prefix_keys` puts each store's data set before its keys.

    Raises UserError if the stores were not made in the same way, two of them have the same key, or
    `out` exists; WorkError if one is not complete, damaged, or being written to.
    """
    if len({path.resolve() for path in paths}) < len(paths) or len(paths) < 2:
        raise UserError("merge takes two or more different stores: name each once")
    with ExitStack() as stack:
        sources = [stack.enter_context(claimed_source(path)) for path in paths]
        for source in sources[1:]:
            _require_alike(sources[0], source)
        for source in sources:
            source.require_complete("merge")
        classes = _united_classes(sources)
        splits = list(dict.fromkeys(n for source in sources for n in source.metadata.split_names))
        if len(splits) > MAX_SPLITS:
            raise UserError(
                f"the stores have {len(splits)} splits together, at most {MAX_SPLITS} fit"
            )
        prefixes = _prefixes(sources, prefix_keys)
        texts, left_out = _united_texts(sources, tuple(classes), out)
        # All tars get the sizes of the store whose partitions are largest.
        schemas = [source.metadata.schema for source in sources]
        schema = replace(
            max(schemas, key=lambda schema: schema.capacity),
            frame_capacity=max(schema.frame_capacity for schema in schemas),
        )
        tars = [
            replace(tar, file=f"{prefix}{tar.file}")
            for source, prefix in zip(sources, prefixes, strict=True)
            for tar in source.metadata.tars
        ]
        metadata = StoreMetadata(
            replace(schema, tars=len(tars)),
            _united_provenance([source.store.provenance for source in sources]),
            *(tuple(tars), tuple(classes), tuple(classes.values()), tuple(splits)),
        )
        folder = stack.enter_context(new_folder(out))
        writer = StoreWriter.init(folder, metadata, texts)
        linked = number = 0
        label_of = {name: label for label, name in enumerate(classes)}
        for source, prefix in zip(sources, prefixes, strict=True):
            made = source.metadata
            # The last entry is for the -1 of videos without a class.
            labels = np.array([*(label_of[name] for name in made.class_names), -1], np.int32)
            bits = [splits.index(name) for name in made.split_names]
            same = replace(made.schema, tars=len(tars)) == metadata.schema
            same = same and not schema.sequences  # which are written anew
            for tar in range(made.schema.tars):
                partition = source.partition(tar)
                partition = replace(
                    partition,
                    key=[prefix + key for key in partition.key],
                    label=labels[partition.label],
                    spans=None
                    if partition.spans is None
                    else [
                        [span._replace(label=int(labels[span.label])) for span in spans]
                        for spans in partition.spans
                    ],
                    splits=_moved_bits(partition.splits, bits),
                )
                writer.write_partition(number, partition, source.shard(tar) if same else None)
                linked, number = linked + same, number + 1
                progress(number, len(tars))
    return Merged(
        store=str(out),
        stores=tuple(map(str, paths)),
        tars=len(tars),
        tars_linked=linked,
        rows=sum(len(source.store) for source in sources),
        classes=len(classes),
        splits=tuple(splits),
        prompt_sets=tuple(texts),
        prompt_sets_left_out=left_out,
    )


def _moved_bits(splits: npt.NDArray[np.uint32], bits: Sequence[int]) -> npt.NDArray[np.uint32]:
    """Return `splits` [n] with bit i moved to bit `bits[i]`."""
    moved = np.zeros_like(splits)
    for old, new in enumerate(bits):
        moved |= (splits >> np.uint32(old) & np.uint32(1)) << np.uint32(new)
    return moved


def _require_alike(first: SourceStore, other: SourceStore) -> None:
    mine = first.store.provenance
    theirs = replace(
        other.store.provenance,
        dataset=mine.dataset,
        dataset_fingerprint=mine.dataset_fingerprint,
        split=mine.split,
    )
    # Both files usually have the same name, so the message calls them the first and the second.
    differences = [
        phrase.replace("store has", "the first has").replace("asked for", "the second has")
        for phrase in mine.differences(theirs)
        if not phrase.startswith("quantised:")
    ]
    one, two = first.metadata.schema, other.metadata.schema
    # Items of two tiers differ anyway.
    names = ("views", "frames", "dim", "sequences")
    # Blocks of sequences are equally large unless the frames differ.
    names += (*(("item",) if one.tier == two.tier else ()),)
    names += (*(("chunk_rows",) if one.sequences and two.sequences else ()),)
    for name in names:
        if getattr(one, name) != getattr(two, name):
            differences.append(
                f"{name}: the first has {getattr(one, name)}, the second has {getattr(two, name)}"
            )
    remedies = ["extract one of them as the other was"] if differences else []
    if one.codec != two.codec:
        differences.append(f"codec: the first has {one.codec}, the second has {two.codec}")
        small = other.path.with_name(f"{other.path.stem}-{one.codec}{STORE_SUFFIX}")
        words = command("store", "convert", other.path, codec=one.codec, out=small)
        remedies.append(f"convert the second with `{words}`")
    if one.quantised or two.quantised:
        which = {(True, False): "the first is", (False, True): "the second is"}.get(
            (one.quantised, two.quantised), "both are"
        )
        differences.append(f"{which} int8, with a scale of its own")
        remedies.append("merge the stores that were quantised and quantise that")
    if differences:
        raise UserError(
            f"{first.path} and {other.path} cannot become one store ({'; '.join(differences)}): "
            f"{', and '.join(remedies)}"
        )


def _united_classes(sources: Sequence[SourceStore]) -> dict[str, str]:
    """Return the raw names by natural name, in the order of first appearance."""
    classes: dict[str, str] = {}
    bare = [source.path for source in sources if not source.metadata.class_names]
    if bare and len(bare) < len(sources):
        raise UserError(
            f"{bare[0]} was packed without labels and other stores have classes: merge stores of "
            "one kind"
        )
    several = [source.path for source in sources if source.store.multi_label]
    if several and len(several) < len(sources):
        raise UserError(
            f"a video of {several[0]} may show several classes and one of the other stores only "
            "one: merge stores of one kind"
        )
    for source in sources:
        names = source.metadata.class_names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{source.path} has two classes called {twice!r}: it cannot be merged")
        for name, raw in zip(names, source.metadata.raw_class_names, strict=True):
            classes.setdefault(name, raw)
    return classes


def _prefixes(sources: Sequence[SourceStore], prefix_keys: bool) -> list[str]:
    """Return the prefix for the keys of each store; raises UserError if a key occurs twice."""
    names = [source.store.provenance.dataset for source in sources]
    prefixes = [f"{name}/" if prefix_keys else "" for name in names]
    seen: dict[str, Path] = {}
    for source, prefix in zip(sources, prefixes, strict=True):
        for key in source.store.keys:
            before = seen.setdefault(prefix + key, source.path)
            if before is not source.path:
                remedy = (
                    "their data sets have one name, so nothing tells them apart"
                    if prefix_keys
                    else "--prefix-keys puts the data set's name before every key"
                )
                raise UserError(
                    f"key {prefix + key!r} is in {before} and in {source.path}: a store lists "
                    f"every key once; {remedy}"
                )
    return prefixes


def _united_texts(
    sources: Sequence[SourceStore], classes: tuple[str, ...], out: Path
) -> tuple[dict[str, ClassText], tuple[str, ...]]:
    """Return the class texts of the prompt sets that all stores have, and the other sets' names."""
    texts = [source.texts() for source in sources]
    common = [name for name in texts[0] if all(name in held for held in texts)]
    left_out = tuple(sorted({name for held in texts for name in held} - set(common)))
    for name in left_out:
        log.warning(
            "class texts %s are not in every store and are left out: `%s` makes them again",
            *(name, texts_command(out, name)),
        )
    joined = {name: _joined(name, [held[name] for held in texts], classes) for name in common}
    return joined, left_out


def _joined(prompt_set: str, texts: Sequence[ClassText], classes: tuple[str, ...]) -> ClassText:
    rows: dict[str, npt.NDArray[np.float32]] = {}
    for text in texts:
        for name, row in zip(text.names, text.embeddings, strict=True):
            if float(rows.setdefault(name, row) @ row) < _SAME_TEXT:
                raise UserError(
                    f"class texts {prompt_set!r} of {name!r} differ between the stores: they were "
                    "made from other sentences; extract one of the stores again"
                )
    hashes = list(dict.fromkeys(text.sentences_hash for text in texts))
    joined = (
        hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    )
    templates = {text.templates for text in texts}
    return ClassText(
        *(classes, np.stack([rows[name] for name in classes]), joined),
        templates=templates.pop() if len(templates) == 1 else (),
        # The stores have the same encoder, and reading refused texts of any other.
        encoder_fingerprint=min(text.encoder_fingerprint for text in texts),
        rephrased=any(text.rephrased for text in texts),
    )


def _united_provenance(made: Sequence[Provenance]) -> Provenance:
    fingerprints = dict.fromkeys(p.dataset_fingerprint for p in made)
    splits = {p.split for p in made}
    return replace(
        made[0],
        dataset="+".join(dict.fromkeys(p.dataset for p in made)),
        dataset_fingerprint=hashlib.sha256("\n".join(fingerprints).encode()).hexdigest(),
        split=splits.pop() if len(splits) == 1 else "",
    )
