"""The command that fills or repairs a store, built from what the store records."""

from __future__ import annotations

import shlex
from pathlib import Path

from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.format.metadata import StoreMetadata, prompt_set_names
from featstore.format.tiers import EMBEDDINGS
from featstore.workspace import Workspace


def repair_command(store: Path, metadata: StoreMetadata, root: Path | None = None) -> str:
    """Return the `mote-cli` command that fills this store: only what is damaged or missing.

    If the store was made from other stores, return the command that makes it again, with capitals
    for what the store does not record. `root` is the workspace that holds the videos, for a store
    that lies in no workspace.
    """
    made = metadata.provenance
    if made.quantised:
        return shlex.join(["mote-cli", "store", "quantize", "FLOAT16-STORE", "--out", "NEW-STORE"])
    if "+" in made.dataset and not any(
        tar.file.startswith(f"{made.dataset}-") for tar in metadata.tars
    ):
        return shlex.join(["mote-cli", "store", "merge", "STORE", "STORE", "--out", "NEW-STORE"])
    words = ["mote-cli", "extract", "--dataset", made.dataset or "NAME"]
    words += ["--encoder", made.encoder, "--sampling", made.sampling]
    if made.crops > 1:
        words += ["--crops", str(made.crops)]
    if made.tier != EMBEDDINGS:
        words += ["--tier", made.tier]
    if made.split:
        words += ["--split", made.split]
    prompt_sets = prompt_set_names(store)
    if prompt_sets and DEFAULT_PROMPTS not in prompt_sets:
        words += ["--prompts", prompt_sets[0]]
    if made.strict_decode != "auto":
        words.append("--strict-decode" if made.strict_decode == "always" else "--no-strict-decode")
    place = store.absolute()
    in_workspace = place.parent.name == made.dataset and place.parents[1].name == "features"
    root = place.parents[2] if in_workspace else root
    if root is not None:
        words += ["--root", str(_shown(root))]
    if not in_workspace or place != Workspace(place.parents[2]).store_path(
        made.dataset,
        encoder=made.encoder,
        sampling=made.sampling,
        crops=made.crops,
        split=made.split or None,
        tier=made.tier,
    ):
        words += ["--store", str(_shown(place))]
    return shlex.join(words)


def _shown(path: Path) -> Path:
    """Return `path`, relative to the working folder if it lies inside it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
