"""Which videos a run was trained on, so that none of them is tested by mistake."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from featstore.durable import write_json
from featstore.errors import UserError, WorkError
from featstore.reader import Store
from featstore.schema import STATUS_OK, RowArray
from heads.checkpoints import CONFIG_FILE
from heads.protocol_types import TestSet

log = logging.getLogger(__name__)

KEYS_FILE: Final = "training-keys.json"
"""In a run folder: {data set: [keys]}, of every video that moved its parameters."""

NAMED: Final = 3  # how many videos an error names
_KINETICS_CLIP = re.compile(r"([A-Za-z0-9_-]{11}_\d{6})_\d{6}")


def rows_hash(rows: RowArray) -> str:
    """Hash of array rows as config.json of a run has it, 16 hex digits."""
    return hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:16]


def write_training_keys(run_dir: Path, dataset: str, keys: Iterable[str]) -> None:
    """Record in a run folder that it trains on these videos of a data set.

    What was recorded before stays: a head that goes on from another one has seen both.
    """
    known = read_training_keys(run_dir) or {}
    merged = {name: sorted(known[name]) for name in known}
    merged[dataset] = sorted(set(keys) | known.get(dataset, frozenset()))
    write_json(run_dir / KEYS_FILE, merged, indent=0)


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


def trained_videos(store: Store, rows: RowArray, run_dir: Path) -> RowArray | None:
    """Those of `rows` (int64, array rows of `store`) that the run was trained on; None: unknown.

    Videos are told by data set and key, clips of Kinetics by their YouTube id and start in every
    data set. A run that recorded no keys but trained on this store is told by its rows.
    """
    settings = _settings(run_dir)
    if settings.get("head", {}).get("kind") == "mean":
        return np.zeros(0, np.int64)
    known = read_training_keys(run_dir)
    if known is None:
        return _rows_by_hash(store, rows, settings.get("data", {}))
    same = known.get(store.provenance.dataset, frozenset())
    clips = {clip for keys in known.values() for key in keys if (clip := _clip(key)) is not None}
    found = []
    for row, at in zip(rows.tolist(), store.positions(rows).tolist(), strict=True):
        key = store.keys[at]
        if key in same or (clips and _clip(key) in clips):
            found.append(row)
    return np.array(found, np.int64)


def require_no_leak(
    store: Store, tests: Sequence[TestSet], run_dir: Path, *, allow: bool = False
) -> int | None:
    """Number of tested videos that the run in `run_dir` was trained on; None when not known.

    UserError that names some when there are any, unless `allow`, which makes it a warning.
    """
    rows = np.unique(np.concatenate([np.asarray(test.rows, np.int64) for test in tests]))
    found = trained_videos(store, rows, run_dir)
    if found is None:
        log.warning(
            "%s does not say which videos it was trained on: whether tested ones are among them "
            "is not known",
            run_dir.name,
        )
        return None
    if len(found) == 0:
        return 0
    keys = [store.keys[at] for at in store.positions(found[:NAMED]).tolist()]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    what = (
        f"{len(found)} of {len(rows)} tested videos are training videos of {run_dir.name} "
        f"({', '.join(keys)}{more})"
    )
    if not allow:
        raise UserError(
            f"{what}: name a split without them with --split, or pass --allow-overlap to measure "
            "all the same"
        )
    log.warning("%s", what)
    return len(found)


def _rows_by_hash(store: Store, rows: RowArray, data: Mapping[str, Any]) -> RowArray | None:
    """Tested rows of a run without keys that trained on a split of this store, or all of it."""
    if data.get("dataset_fingerprint") != store.provenance.dataset_fingerprint:
        return None
    for listed in (*(store.split(name) for name in store.split_names), store.rows):
        if len(listed) == 0:
            continue
        usable = listed[store.status[store.positions(listed)] == STATUS_OK]
        if rows_hash(usable) == data.get("rows_hash"):
            both: RowArray = np.intersect1d(rows, usable).astype(np.int64)
            return both
    return None


def _settings(run_dir: Path) -> Mapping[str, Any]:
    try:
        value = json.loads((run_dir / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _clip(key: str) -> str | None:
    """YouTube id and start of a clip of Kinetics; None for other names."""
    match = _KINETICS_CLIP.fullmatch(key.rpartition("/")[2])
    return None if match is None else match[1]
