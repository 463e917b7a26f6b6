"""`mote-cli inspect`: what a data set, a store or a run holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.output import print_facts, print_json
from featstore.errors import UserError
from featstore.workspace import FIRST_STAGE

WANTED = (
    "give the folder of one, such as mote-data/datasets/NAME, mote-data/features/NAME/STORE.zarr "
    "or mote-data/heads/RUN"
)


def inspect_path(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder under the workspace.")],
    json: options.Json = False,
) -> None:
    """Say what PATH is (data set, feature store or run) and what is in it.

    Example: `mote-cli inspect mote-data/features/my-clips/ViT-B-16-openai--uniform-16.zarr`
    """
    if (path / "dataset.json").is_file():
        facts = _dataset(path)
    elif (path / "zarr.json").is_file():
        facts = _store(path)
    elif (path / "config.json").is_file():
        facts = _run(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist: {WANTED}")
    else:
        raise UserError(
            f"{path} is neither a data set (dataset.json), a store (zarr.json) nor a run "
            f"(config.json): {WANTED}"
        )
    if json:
        print_json(facts)
    else:
        print_facts({name: _short(value) for name, value in facts.items()})


def _dataset(path: Path) -> dict[str, Any]:
    from pipeline.tars.dataset import load_dataset

    dataset = load_dataset(path)
    return {
        "kind": "dataset",
        "name": dataset.name,
        "videos_listed": dataset.listed,
        "videos_packed": dataset.packed,
        "videos_failed": dataset.listed - dataset.packed,
        "classes": len(dataset.class_names),
        "class_names": list(dataset.class_names),
        "splits": {name: len(dataset.keys_by_split[name]) for name in dataset.split_names},
        "tars": len(dataset.tars),
        "bytes": sum(shard.bytes for shard in dataset.tars),
        "fingerprint": dataset.fingerprint,
        "failures": [
            {"key": failure.key, "reason": failure.reason}
            for shard in dataset.tars
            for failure in shard.failed
        ],
    }


def _store(path: Path) -> dict[str, Any]:
    from featstore import open_store
    from featstore.format.schema import STATUS_FAILED

    store = open_store(path)
    failed = [i for i, status in enumerate(store.status) if status == STATUS_FAILED]
    keys, reasons = store.keys, store.reasons
    return {
        "kind": "store",
        "rows_ok": len(store) - len(failed),
        "rows_failed": len(failed),
        "tars_done": len(list(store.partitions())),
        "tars": store.schema.tars,
        "complete": store.complete,
        "views": store.schema.views,
        "frames": store.schema.frames,
        "dim": store.schema.dim,
        "tier": store.tier,
        "item": list(store.schema.item),
        "features": store.schema.storage,
        "classes": len(store.class_names),
        "splits": {name: len(store.split(name)) for name in store.split_names},
        "prompt_sets": list(store.prompt_sets),
        "provenance": store.provenance.to_json(),
        "failures": [{"key": keys[i], "reason": reasons[i]} for i in failed],
    }


def _run(path: Path) -> dict[str, Any]:
    from heads.files.run_files import describe_run

    facts = {"kind": "run", **describe_run(path)}
    if facts.get("mode") == "finetune":
        from heads.end_to_end.run_folder import read_failed_clips
        from heads.files.run_files import read_metrics

        records = read_metrics(path)
        facts |= {
            "top1_by_epoch": {
                f"epoch {record['epoch']}": round(record["evaluation"]["top1"], 2)
                for record in records
                if record["evaluation"]
            },
            "clips_per_second": round(records[-1]["clips_per_second"], 2) if records else None,
            **({"first_stage": str(path / FIRST_STAGE)} if (path / FIRST_STAGE).is_dir() else {}),
            "failures": [
                {"key": failure["key"], "reason": failure["reason"]}
                for failure in read_failed_clips(path)
            ],
        }
    return facts


def _short(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 10:
        return f"{', '.join(map(str, value[:10]))}, ... ({len(value)})"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items()) or "none"
    return value
