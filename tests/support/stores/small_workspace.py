"""A workspace of small files: two data sets, two stores, two heads with results, an encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featstore import Workspace
from pipeline.tars.dataset import Dataset, FailedVideo, Tar
from tests.support.stores.result_files import write_result
from tests.support.stores.sample_stores import make_provenance, make_store

ENCODER = "tiny"


def make_dataset(folder: Path, videos: int = 5, failed: int = 1) -> Dataset:
    """A packed data set whose tars hold nothing but some bytes."""
    keys = [f"video{number}" for number in range(videos)]
    missing = tuple(
        FailedVideo(key, 0, "run", ("train",), "no video stream") for key in keys[:failed]
    )
    tar = Tar("clips-000000.tar", "train", videos - failed, missing, 1000, "0" * 64)
    dataset = Dataset(
        folder, folder.name, ("run", "sit"), ("run", "sit"), ("train", "val"), True, (tar,),
        {"train": tuple(keys[:-1]), "val": tuple(keys[-1:])},
    )  # fmt: skip
    path = dataset.tar_path(tar)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 1000)
    dataset.write()
    return dataset


def make_run(folder: Path, *, finished: bool = True, **settings: Any) -> Path:
    """A run on the store of `small_workspace`, with the settings given besides."""
    made = make_provenance(encoder=ENCODER, dataset="clips")
    origin = {
        "dataset": "clips",
        "encoder": ENCODER,
        "encoder_fingerprint": made.encoder_fingerprint,
        "sampling": made.sampling,
        "crops": 1,
    }
    value = {"head": {"kind": "mote"}, "training": {"epochs": 30}, "data": origin, **settings}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(value))
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.0}\n')
    if finished:
        (folder / "head.safetensors").write_bytes(b"weights")
    return folder


def small_workspace(root: Path) -> Workspace:
    """Make it at `root`.

    Data set clips has a store, and heads first (evaluated) and second (begun) trained on it; new
    is only packed; other has a store whose second tar is missing.
    """
    workspace = Workspace(root)
    make_dataset(workspace.dataset_dir("clips"))
    make_dataset(workspace.dataset_dir("new"), failed=0)
    make_store(
        workspace.features_dir("clips") / "tiny--uniform-4.zarr", encoder=ENCODER, dataset="clips"
    )
    half = workspace.features_dir("other") / "half.zarr"
    make_store(half, encoder=ENCODER, dataset="other")
    (half / "commit/c/1/0").unlink()
    first = make_run(workspace.run_dir("first"))
    for time, (role, top1) in enumerate([("closeset", 60.0), ("closeset", 71.5), ("zeroshot", 40)]):
        write_result(
            first / f"eval/{time}.json", time, protocol=role, splits=(top1,), dataset="clips",
            store="tiny--uniform-4.zarr",
        )  # fmt: skip
    make_run(workspace.run_dir("second"), finished=False)
    encoder = workspace.encoder_dir(ENCODER)
    encoder.mkdir(parents=True)
    (encoder / "open_clip_config.json").write_text("{}")
    (encoder / "open_clip_model.safetensors").write_bytes(b"x" * 500)
    return workspace
