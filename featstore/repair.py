"""What was found damaged, noted beside the store, and the command that makes it good.

The note is `STORE.damaged.json`: by partition the reason and the commit entry as it was found. A
finding holds as long as the partition has that entry: once it is written anew the entry differs.
`StoreWriter.done` looks here, so that `mote-cli extract` does the damaged partitions once more.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from featstore.bounded import read_bounded
from featstore.chunks import ChunkFiles
from featstore.durable import sync_folder, write_json
from featstore.errors import UserError
from featstore.metadata import StoreMetadata, prompt_set_names
from featstore.tiers import EMBEDDINGS

NOTE_LIMIT: Final = 16 * 2**20
_ENTRY_LIMIT: Final = 256
_UNSAFE = re.compile(r"[^A-Za-z0-9._+]+")  # as store names are made


def note_path(store: Path) -> Path:
    """Where damage of a store is noted."""
    return store.with_name(f"{store.name}.damaged.json")


def noted_damage(files: ChunkFiles) -> dict[int, str]:
    """Reason by partition of the findings that still hold.

    UserError when the note is not one of ours.
    """
    note = note_path(files.store)
    try:
        raw = read_bounded(note, NOTE_LIMIT)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{note} cannot be read ({why}): delete it and verify again with --deep"
        ) from error
    try:
        found: dict[str, dict[str, Any]] = json.loads(raw)["partitions"]
        return {
            int(tar): str(finding["reason"])
            for tar, finding in found.items()
            if 0 <= int(tar) < files.schema.tars and finding["commit"] == _entry(files, int(tar))
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{note} is not a note of `mote-cli verify` ({error}): delete it and verify again"
        ) from error


def note_damage(files: ChunkFiles, reasons: Mapping[int, str]) -> Path | None:
    """Note the findings in place of earlier ones; no note is left when there are none.

    Returns the note's path, None without findings. OSError where it cannot be written.
    """
    note = note_path(files.store)
    if not reasons:
        if note.exists():
            note.unlink()
            sync_folder(note.parent)
        return None
    partitions = {
        str(tar): {"reason": reason, "commit": _entry(files, tar)}
        for tar, reason in sorted(reasons.items())
    }
    write_json(note, {"partitions": partitions})
    return note


def repair_command(store: Path, metadata: StoreMetadata) -> str:
    """The `mote-cli extract` command that fills this store, from what it records of itself."""
    made = metadata.provenance
    if made.quantised:  # rounded from another store, which extract makes
        return shlex.join(["mote-cli", "store", "quantize", "FLOAT16-STORE", "--out", str(store)])
    words = ["mote-cli", "extract", "--dataset", made.dataset or "NAME"]
    words += ["--encoder", made.encoder, "--sampling", made.sampling]
    if made.crops > 1:
        words += ["--crops", str(made.crops)]
    # A store of one split says so in its name:
    # <encoder>--<sampling>[--crops3][--<tier>][--<split>].
    endings = store.name.removesuffix(".zarr").split("--")[2:]
    if made.tier != EMBEDDINGS:
        words += ["--tier", made.tier]
        tier = _UNSAFE.sub("-", made.tier)
        endings = endings[endings.index(tier) + 1 :] if tier in endings else endings
    for split in metadata.split_names:
        if _UNSAFE.sub("-", split).strip("-.") in endings:
            words += ["--split", split]
            break
    prompt_sets = prompt_set_names(store)
    if prompt_sets and "mote28" not in prompt_sets:
        words += ["--prompts", prompt_sets[0]]
    if made.strict_decode != "auto":
        words.append("--strict-decode" if made.strict_decode == "always" else "--no-strict-decode")
    folder = store.absolute().parent
    if folder.name == made.dataset and folder.parent.name == "features":
        words += ["--root", str(_shown(folder.parents[1]))]
    return shlex.join(words)


def _shown(root: Path) -> Path:
    """`root` relative to the working folder where it lies inside."""
    here = Path.cwd()
    return root.relative_to(here) if root.is_relative_to(here) else root


def _entry(files: ChunkFiles, tar: int) -> str:
    """The commit entry's bytes as they lie on the disk, in hexadecimal; "" when there is none."""
    try:
        return read_bounded(files.path("commit", tar), _ENTRY_LIMIT).hex()
    except (OSError, ValueError):  # UserError for a link, too
        return ""
