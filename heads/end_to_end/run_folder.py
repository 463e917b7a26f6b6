"""The folder of a fine-tuning: its settings, and the stage that came before it.

`heads/RUN` holds config.json, metrics.jsonl, failures.csv and state/ during training, afterwards
also tower.safetensors and, written last, head.safetensors. A run that continues a head of the same
name keeps that first stage, with its results, in `heads/RUN/frozen`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from featstore.commands import command
from featstore.errors import UserError
from featstore.files.durable import link_or_copy, sync_folder, write_bytes, write_json
from featstore.files.tables import csv_bytes
from featstore.workspace import FIRST_STAGE, LAST_EPOCH
from heads.end_to_end.config import FinetuneConfig
from heads.files.run_files import (
    CONFIG_FILE,
    FAILURES_FILE,
    HEAD_FILE,
    KEYS_FILE,
    METRICS_FILE,
    STATE_FILE,
    VALIDATION_FILE,
    read_config,
)
from heads.training.run_settings import require_same_run

log = logging.getLogger(__name__)

MODE: Final = "finetune"
RUN_FORMAT: Final = 1
_STAGE_FILES: Final = (METRICS_FILE, STATE_FILE, KEYS_FILE, VALIDATION_FILE)
_STAGE_FOLDERS: Final = ("eval", LAST_EPOCH)

# Names of the same weights may differ between machines; how the batch is spread over processes
# changes sums in their last bits only.
_INFORMATIVE: Final = frozenset(
    {
        *("data.encoder", "data.prompt_templates", "from_head.run", "batch.processes"),
        *("training.batch_size", "training.shard", "data.adapted_encoder"),
    }
)


def is_finetuning(run_dir: Path) -> bool:
    """Return whether this mode began the run in `run_dir`; WorkError for a damaged config.json."""
    settings = read_config(run_dir)
    return settings is not None and settings.get("mode") == MODE


def starting_head(run_dir: Path, from_head: Path) -> Path:
    """Return the folder of the head to begin with: `from_head`, or its copy kept in `run_dir`."""
    if from_head != run_dir or (is_finetuning(run_dir) is False and _has_head(run_dir)):
        return from_head
    kept = run_dir / FIRST_STAGE
    if not _has_head(kept):
        train = command("train-head", name=run_dir.name, root=run_dir.parent.parent)
        raise UserError(
            f"run {run_dir.name} has no head of a first stage: train one with `{train}`, or leave "
            "--from-head out"
        )
    return kept


def open_run(
    run_dir: Path, encoder_dir: Path, settings: Mapping[str, Any], *, resume: bool, continues: bool
) -> None:
    """Begin or continue the run; `continues` means that it begins with the head of this name.

    Raises UserError if the run or an encoder of its name exists, or if the settings differ from
    those that the run began with (the message names them).
    """
    begun = read_config(run_dir)
    if begun is not None and begun.get("mode") == MODE:
        # If every process makes its own draws, the number of processes changes them.
        per_rank = settings["training"]["draws"] == "per-rank"
        may_differ = _INFORMATIVE - ({"batch.processes"} if per_rank else set())
        require_same_run(run_dir, begun, settings, resume, FinetuneConfig, may_differ)
        return
    if encoder_dir.exists():
        raise UserError(
            f"{encoder_dir} exists already, and the tuned tower goes there: choose another --name"
        )
    if continues:
        _keep_first_stage(run_dir)
    elif begun is not None or _has_head(run_dir):
        raise UserError(
            f"run {run_dir.name} in {run_dir.parent} is a head that was trained or imported: begin "
            f"with it by --from-head {run_dir.name}, or choose another --name"
        )
    elif resume:
        log.info("there is no run %s to continue: starting it", run_dir.name)
    write_json(run_dir / CONFIG_FILE, dict(settings))


def write_failed_clips(run_dir: Path, failures: Mapping[str, Mapping[str, Any]]) -> None:
    """Write failures.csv: every failed video with the epoch of its first failure, from 1."""
    rows = [[key, f["split"], f["epoch"], f["reason"]] for key, f in sorted(failures.items())]
    table = csv_bytes(["key", "split", "first_epoch", "reason"], rows)
    write_bytes(run_dir / FAILURES_FILE, table)


def _has_head(run_dir: Path) -> bool:
    return (run_dir / HEAD_FILE).is_file()


def _keep_first_stage(run_dir: Path) -> None:
    """Move a head and its records to `frozen/`; can be repeated if it was stopped at any point.

    The files are complete in one of the two places at every moment, and the folder never looks like
    a finished fine-tuning, because the new config.json is written after the old head is gone.
    """
    kept = run_dir / FIRST_STAGE
    if _has_head(run_dir):
        staging = run_dir / f".{FIRST_STAGE}"
        shutil.rmtree(staging, ignore_errors=True)
        inner = [path for name in _STAGE_FOLDERS for path in sorted((run_dir / name).rglob("*"))]
        others = [run_dir / name for name in (HEAD_FILE, CONFIG_FILE, *_STAGE_FILES)]
        for file in [*others, *inner]:
            if file.is_file():
                link_or_copy(file, staging / file.relative_to(run_dir))
        shutil.rmtree(kept, ignore_errors=True)  # of a move that was stopped
        staging.rename(kept)
        sync_folder(run_dir)
    for name in (HEAD_FILE, *_STAGE_FILES):
        (run_dir / name).unlink(missing_ok=True)
    for name in _STAGE_FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    sync_folder(run_dir)
