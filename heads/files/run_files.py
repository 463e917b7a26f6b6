"""The files of a run folder `heads/RUN`: their names, and functions for the plain text ones.

| file | |
|---|---|
| `config.json` | the settings that the run began with; written first |
| `training-keys.json` | the videos that the head was trained on |
| `metrics.jsonl` | one record per epoch |
| `failures.csv` | videos that could not be decoded, end to end only |
| `state/` | the state that training continues from, the best weights, the lock |
| `validation.json` | what training gained on its validation videos, if it had any |
| `last/` | the head of the last epoch, where `head.safetensors` has other weights |
| `best/`, `mean/`, `teacher/` | heads with other weights of a run with a teacher, once made |
| `tower.safetensors` | the tower as trained, for imported and fine-tuned heads |
| `head.safetensors` | the head; written last: a run with it is finished |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from featstore.errors import UserError, WorkError, one_line
from featstore.files.documents import (
    LISTS_LIMIT,
    found_object,
    parse_json,
    read_document,
    read_object,
)
from featstore.files.durable import write_bytes, write_json
from featstore.files.tables import csv_rows
from featstore.format.schema import RowArray
from featstore.workspace import CONFIG_FILE as CONFIG_FILE
from featstore.workspace import FIRST_STAGE, Workspace
from featstore.workspace import HEAD_FILE as HEAD_FILE
from heads.methods.registry import MEAN_OF_FRAMES, untrained

KEYS_FILE: Final = "training-keys.json"
"""In a run folder: {data set: [keys]}, with every video that its parameters were trained on."""
METRICS_FILE: Final = "metrics.jsonl"
FAILURES_FILE: Final = "failures.csv"
STATE_FILE: Final = "state/last.safetensors"
BEST_FILE: Final = "state/best.safetensors"
MEAN_FILE: Final = "state/mean.safetensors"
PART_FILE: Final = "state/part-{}.safetensors"
"""How each epoch did on one part of a cross-validation."""
VALIDATION_FILE: Final = "validation.json"
NOT_FINITE_FILE: Final = "state/not-finite.json"
LOCK_FILE: Final = "state/lock"
TOWER_FILE: Final = "tower.safetensors"
"""Beside an imported or fine-tuned head: the tower as it was trained, before blending."""


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """Read config.json of a run; None if there is none, WorkError if it is no JSON object."""
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        return None
    return read_object(file, "delete the run and train again", error=WorkError)


def keeps_best(run_dir: Path) -> bool:
    """Whether the run that was begun in this folder, if any, keeps its best epoch."""
    settings = read_config(run_dir)
    training = {} if settings is None else settings.get("training")
    return settings is None or (isinstance(training, dict) and bool(training.get("keep_best")))


def rows_hash(rows: RowArray) -> str:
    """Return the hash of array rows, 16 hex digits, as stored in config.json of a run."""
    return hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:16]


def tuned_runs(workspace: Workspace, names: str | None) -> list[str]:
    """Return the runs in "RUN,RUN" if `finetune` trained them on shots or half of the classes.

    Empty for one head that was trained in another way, for the mean of frames and for None. Raises
    UserError for a run that does not exist, and for several if one is not of this kind.
    """
    asked = [] if names in (None, MEAN_OF_FRAMES) else str(names).split(",")
    found = [name for name in asked if _on_choice(workspace.choose_run(name))]
    if len(asked) > 1 and len(found) < len(asked):
        other = next(name for name in asked if name not in found)
        raise UserError(
            f"several runs in --head must be of `finetune --shots`, and {other} is not: name one "
            "head, or only such runs"
        )
    return found


def _on_choice(run_dir: Path) -> bool:
    settings = read_config(run_dir) or {}
    return settings.get("mode") == "finetune" and "half" in settings.get("data", {})


def write_training_keys(
    run_dir: Path, dataset: str, keys: Iterable[str], began_with: Path | None = None
) -> None:
    """Record in a run folder that it trains on these videos of a data set.

    Videos recorded before are kept, and those of the run `began_with` are added, because a head
    that continues another one has seen the videos of both.
    """
    seen = {dataset: set(keys)}
    for folder in (run_dir, began_with):
        for name, earlier in ((folder and read_training_keys(folder)) or {}).items():
            seen.setdefault(name, set()).update(earlier)
    write_json(run_dir / KEYS_FILE, {name: sorted(seen[name]) for name in seen}, indent=0)


def read_training_keys(run_dir: Path) -> dict[str, frozenset[str]] | None:
    """Return the keys by data set that a run was trained on; None if they were not recorded.

    Raises WorkError if `write_training_keys` cannot have written the file.
    """
    file = run_dir / KEYS_FILE
    if not file.is_file():
        return None
    remedy = "copy the run again or train again"
    value = read_object(file, remedy, limit=LISTS_LIMIT, error=WorkError)
    if not all(isinstance(keys, list) for keys in value.values()):
        raise WorkError(f"{file} is damaged (it has no lists of keys); {remedy}")
    return {name: frozenset(map(str, keys)) for name, keys in value.items()}


def write_metrics(run_dir: Path, metrics: list[dict[str, Any]]) -> None:
    """Write the records of a run's epochs, one per line."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in metrics)
    write_bytes(run_dir / METRICS_FILE, lines.encode())


def learned_nothing(settings: Mapping[str, Any]) -> bool:
    """Return whether the run of these settings has a head without parameters and its tower's own.

    Fine-tuning, which they name as their mode, trains the tower of such a head.
    """
    return untrained(settings.get("head", {}).get("kind")) and "mode" not in settings


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the records of a run's epochs; empty if the file is missing or damaged."""
    try:
        raw = read_document(run_dir / METRICS_FILE, "", limit=LISTS_LIMIT)
        return [parse_json(line) for line in raw.splitlines()]
    except ValueError:  # UserError is one
        return []  # they describe a finished run; its head is what counts


def best_epoch(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the epoch, from 1, that was evaluated best, the first of equals; None without one."""
    measured = {r["epoch"]: measure_of(r["evaluation"]) for r in metrics if r.get("evaluation")}
    return max(measured, key=lambda epoch: (measured[epoch], -epoch), default=None)


def measure_of(evaluation: Mapping[str, Any]) -> float:
    """Return what epochs are compared by: the mean average precision if there is one, or top-1."""
    found: float = evaluation.get("mean_ap") or evaluation["top1"]
    return found


def read_validation(run_dir: Path) -> dict[str, Any] | None:
    """Read what a run gained on its validation videos; None without a file that can be read."""
    return found_object(run_dir / VALIDATION_FILE)


def read_failed_clips(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of failures.csv; empty if there is no such file."""
    file = run_dir / FAILURES_FILE
    if not file.is_file():
        return []
    remedy = "delete it"
    try:
        columns, *rows = csv_rows(read_document(file, remedy, limit=LISTS_LIMIT))
        return [dict(zip(columns, row, strict=True)) for row in rows]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} is damaged ({one_line(error, 120)}); {remedy}") from error


def describe_run(run_dir: Path) -> dict[str, Any]:
    """Describe a run and its progress, JSON-ready; UserError if `run_dir` is no run."""
    settings = read_config(run_dir)
    if settings is None:
        raise UserError(f"{run_dir} is no run: it has no {CONFIG_FILE}")
    epochs = read_metrics(run_dir)
    facts = {
        "name": run_dir.name,
        "finished": (run_dir / HEAD_FILE).is_file(),
        "epochs_done": len(epochs),
        "last_loss": epochs[-1]["loss"] if epochs else None,
        **({"mode": settings["mode"]} if "mode" in settings else {}),
        **({} if (found := read_validation(run_dir)) is None else {"validation": found}),
        "head": settings.get("head", {}),
        "training": settings.get("training", {}),
        "data": settings.get("data", {}),
        **({"imported": settings["imported"]} if "imported" in settings else {}),
        "results": sorted(path.name for path in (run_dir / "eval").glob("*.json")),
    }
    if facts.get("mode") == "finetune":
        facts["top1_by_epoch"] = {
            f"epoch {record['epoch']}": round(
                record["evaluation"].get("mean_ap") or record["evaluation"]["top1"], 2
            )
            for record in epochs
            if record["evaluation"]
        }
        facts["clips_per_second"] = round(epochs[-1]["clips_per_second"], 2) if epochs else None
        if (run_dir / FIRST_STAGE).is_dir():
            facts["first_stage"] = str(run_dir / FIRST_STAGE)
        facts["failures"] = [
            {"key": failure["key"], "reason": failure["reason"]}
            for failure in read_failed_clips(run_dir)
        ]
    return facts
