"""Result files of `mote-cli eval` for tests of what reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# What files had before results had a format; everything else came with format 2.
OLD: dict[str, Any] = {
    "protocol": "zeroshot",
    "dataset": "hmdb51",
    "head": "first",
    "n_listed": 1530,
    "n_evaluated": 1528,
    "n_failed": 2,
    "top1": 50.0,
    "top5": 80.0,
    "views": "3x1",
    "sampling": "clips:8x3",
    "frames": 8,
    "prompt_set": "mote28",
    "encoder": "ViT-B-16/openai",
    "encoder_fingerprint": "e0e0",
    "mean": 50.0,
    "std": 0.0,
    "mean_top5": 80.0,
    "std_top5": 0.0,
    "kind": "mote",
    "modulate": True,
    "fusion": "softmax",
    "n_classes": 51,
    "n_classes_trained": 0,
    "head_fingerprint": "f1f1",
    "list_hash": "aa11",
    "class_names_hash": "bb22",
    "prompts_hash": "cc33",
    "dataset_fingerprint": "dd44",
    "preprocessing": {"size": [224, 224], "interpolation": "bicubic"},
    "encoder_precision": "fp32",
    "decoder": "pyav",
    "device": "cpu",
    "precision": "fp32",
}
NEW: dict[str, Any] = {
    "protocol_name": "hmdb51-zeroshot-3splits",
    "trained_on": "k400",
    "training_videos": "split train",
    "n_trained_on": 0,
    "test_list": "official test lists 1, 2 and 3; all classes",
    "n_found": 1530,
    "class_names_source": "data set hmdb51",
    "class_list_hash": "ee55",
    "label_map": "corrected",
    "prompt_templates": ["a photo of {}."],
    "sampler": "clips",
    "resize": "short side to 224, bicubic",
    "crop": "224x224 centre",
    "blend": None,
    "epoch": 30,
    "epoch_choice": "last",
    "ensemble": None,
    "clip_store": None,
    "modulation_neighbours": 5,
    "modulation_temperature": 0.05,
    "source": "MoTE",
    "store": "s.zarr",
    "quantised": "",
    "published_counts": [],
    "count_notes": [],
    "result_format": 2,
}
SPLIT = {"n_listed": 1530, "n_evaluated": 1528, "n_failed": 2, "top1": 50.0, "top5": 80.0}


def result(
    old: bool = False, splits: tuple[float, ...] = (50.0,), **changes: Any
) -> dict[str, Any]:
    """A result whose test sets test1, test2, ... have these top-1; a blend of 0.99 unless old."""
    known = OLD if old else {**OLD, **NEW, "blend": 0.99}
    mean = sum(splits) / len(splits)
    per_split = [{**SPLIT, "split": f"test{i}", "top1": x} for i, x in enumerate(splits, start=1)]
    return {**known, "top1": mean, "mean": mean, "per_split": per_split, **changes}


def write_result(path: Path, time: int = 0, **changes: Any) -> Path:
    """Write such a result; `time` in seconds orders files without waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result(**changes)))
    os.utime(path, (10**9 + time, 10**9 + time))
    return path
