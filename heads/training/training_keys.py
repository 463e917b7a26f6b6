"""Which videos a run was trained on, as its folder keeps it: keys by data set, a hash of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from featstore.errors import WorkError
from featstore.files.durable import write_json
from featstore.format.schema import RowArray
from heads.files.run_files import KEYS_FILE


def rows_hash(rows: RowArray) -> str:
    """Hash of array rows as config.json of a run has it, 16 hex digits."""
    return hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:16]


def write_training_keys(
    run_dir: Path, dataset: str, keys: Iterable[str], began_with: Path | None = None
) -> None:
    """Record in a run folder that it trains on these videos of a data set.

    What was recorded before stays, and what the run it `began_with` records joins it: a head that
    goes on from another one has seen both.
    """
    seen = {dataset: set(keys)}
    for folder in (run_dir, began_with):
        for name, earlier in ((folder and read_training_keys(folder)) or {}).items():
            seen.setdefault(name, set()).update(earlier)
    write_json(run_dir / KEYS_FILE, {name: sorted(seen[name]) for name in seen}, indent=0)


def read_training_keys(run_dir: Path) -> dict[str, frozenset[str]] | None:
    """Keys by data set that a run was trained on; None where it does not say.

    WorkError when the file is not what `write_training_keys` wrote.
    """
    file = run_dir / KEYS_FILE
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text())
        return {name: frozenset(map(str, keys)) for name, keys in value.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise WorkError(f"{file} is damaged: copy the run again or train again") from error
