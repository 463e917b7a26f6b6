"""The command that fills or repairs a store, built from what the store records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from featstore.commands import STORE_SUFFIX, Extraction, command, head_in_name, workspace_of
from featstore.errors import UserError, WorkError
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.format.metadata import StoreMetadata, prompt_set_names, read_metadata
from featstore.format.provenance import Provenance
from featstore.format.tiers import EMBEDDINGS


def repair_command(store: Path, metadata: StoreMetadata, root: Path | None = None) -> str:
    """Return the `mote-cli` command that fills this store: only what is damaged or missing.

    If the store was made from other stores, return the command that makes it again beside this
    one, with capitals for a source that does not lie in the same workspace. `root` is the
    workspace that holds the videos, for a store that lies in no workspace.
    """
    made, at = metadata.provenance, store.absolute()
    if made.quantised:
        before = replace(made, quantised="")
        source = _the_one(at.parent, lambda other: not other.differences(before))
        if source is None:
            return command("store", "quantize", "FLOAT16-STORE", out="NEW-STORE")
        return command("store", "quantize", source, out=beside(at))
    if "+" in made.dataset and not any(
        tar.file.startswith(f"{made.dataset}-") for tar in metadata.tars
    ):
        parts = [_part(at.parents[1], name, made) for name in made.dataset.split("+")]
        sources = [part for part in parts if part is not None]
        if len(sources) < len(parts):
            return command("store", "merge", "STORE", "STORE", out="NEW-STORE")
        return command("store", "merge", *sources, out=beside(at))
    extraction = extraction_of(made)
    own = workspace_of(at)
    if made.of_views:  # an imported head has the name of its encoder
        making = replace(extraction, head=head_in_name(at) or made.encoder)
        return making.command(own or root)
    sets = prompt_set_names(store)
    if sets and DEFAULT_PROMPTS not in sets:
        extraction = replace(extraction, prompts=sets[0])
    in_workspace = own is not None and at.parent.name == made.dataset
    return extraction.command(
        own if in_workspace else root,
        strict_decode=made.strict_decode == "always",
        no_strict_decode=made.strict_decode == "never",
        store=None if in_workspace and at.name == extraction.file_name else at,
    )


def extraction_of(made: Provenance) -> Extraction:
    """Return the `extract` options that give features made in this way."""
    return Extraction(
        made.dataset or "NAME",
        made.encoder,
        made.sampling,
        made.crops,
        None if made.tier == EMBEDDINGS else made.tier,
        made.split or None,
        style=made.style,
    )


def _part(features: Path, dataset: str, made: Provenance) -> Path | None:
    """Return the one store of `dataset` that a store made as `made` says can be merged from."""

    def fits(other: Provenance) -> bool:
        own = ("dataset", "dataset_fingerprint", "label_map", "split")
        asked = replace(made, **{name: getattr(other, name) for name in own})
        return other.dataset == dataset and not other.differences(asked)

    return _the_one(features / dataset, fits)


def _the_one(folder: Path, fits: Callable[[Provenance], bool]) -> Path | None:
    """Return the one store in `folder` whose provenance fits, else None."""
    found = []
    for path in sorted(folder.glob(f"*{STORE_SUFFIX}")):
        with contextlib.suppress(UserError, WorkError):
            if fits(read_metadata(path).provenance):
                found.append(path)
    return found[0] if len(found) == 1 else None


def beside(store: Path) -> Path:
    """Return a new path beside a store."""
    number = 2
    while (path := store.with_name(f"{store.stem}-{number}{STORE_SUFFIX}")).exists():
        number += 1
    return path
