"""How much faster than the usual way? Videos/s of `mote-cli extract` against a plain script.

The script is `usual_way.py`; both run as commands of their own on the same packed videos with the
same ViT-B/16 of random weights, in turns. Videos/s are counted from the moment the work begins
(imports and loading the model are left out) to the end of the process; a second column has the
whole process. The features of the two are compared frame by frame.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import timed_command

from featstore import Workspace, open_store
from pipeline.tars.packing import pack

LIMIT = 3.0
COSINE = 0.999
TARS = 2


class Measured(NamedTuple):
    """Seconds of the work and of the whole process, and features float32 [F, D] by key."""

    work: float
    process: float
    features: dict[str, np.ndarray]


def usual(tars: Path, encoder: Path, frames: int) -> Measured:
    """Run the script."""
    out = common.fresh(common.WORK / "usual-out") / "features.npz"
    script = Path(__file__).with_name("usual_way.py")
    ran = timed_command.run([sys.executable, script, tars, encoder, out, "--frames", str(frames)])
    began = json.loads(ran.output)["began"] - ran.monotonic
    with np.load(out) as arrays:
        features = {key: arrays[key] for key in arrays.files}
    return Measured(ran.seconds - began, ran.seconds, features)


def ours(root: Path, encoder: Path, frames: int) -> Measured:
    """Run `mote-cli extract` into a new store."""
    stores = common.fresh(Workspace(root).features_dir("bench"))
    moments = timed_command.mote_cli_moments(
        root,
        *("extract", "--dataset", "bench", "--root", root, "--encoder", encoder),
        *("--sampling", f"uniform:{frames}", "--json"),
    )
    (path,) = stores.glob("*.zarr")
    store = open_store(path)
    features = np.asarray(store.features(store.rows), np.float32)[:, 0]
    return Measured(
        moments.end - moments.began, moments.end, dict(zip(store.keys, features, strict=True))
    )


def cosines(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> np.ndarray:
    """Cosine of every frame, float64 [videos * F]; the two must hold the same videos."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    a, b = (np.concatenate([f[key] for key in sorted(one)]).astype(float) for f in (one, other))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main() -> None:
    """Measure 8 and 16 frames."""
    chosen = common.options(__doc__, clips=16, videos=16, repetitions=3)
    if chosen.quick:
        chosen.clips, chosen.videos, chosen.repetitions = 3, 4, 1
    where = common.machine()
    clips = common.kinetics_clips(chosen.clips)
    folders = common.class_folders(common.WORK / "usual-videos", clips, chosen.videos, classes=4)
    root = common.fresh(common.WORK / "usual-root")
    dataset = Workspace(root).dataset_dir("bench")
    pack(folders, "bench", dataset, samples_per_shard=-(-chosen.videos // TARS))
    encoder = common.vit_b16_folder()
    print(where["name"])
    rows, details = [], {}
    for frames in (8, 16):
        runs = []
        for number in range(chosen.repetitions):
            took: dict[str, Measured] = {}
            for name in ("usual", "ours")[:: -1 if number % 2 else 1]:
                took[name] = (
                    usual(dataset / "shards", encoder, frames)
                    if name == "usual"
                    else ours(root, encoder, frames)
                )
            agreement = cosines(took["ours"].features, took["usual"].features)
            runs.append(
                {
                    "ours_videos_per_second": chosen.videos / took["ours"].work,
                    "usual_videos_per_second": chosen.videos / took["usual"].work,
                    "ratio": took["usual"].work / took["ours"].work,
                    "ours_process_seconds": took["ours"].process,
                    "usual_process_seconds": took["usual"].process,
                    "process_ratio": took["usual"].process / took["ours"].process,
                    "cosine_min": float(agreement.min()),
                    "cosine_mean": float(agreement.mean()),
                }
            )
        median = {name: common.middle([run[name] for run in runs]) for name in runs[0]}
        worst = min(run["cosine_min"] for run in runs)
        print(f"\nuniform:{frames}, {chosen.videos} videos")
        common.table(
            ["", *(name.replace("videos_per_second", "videos/s") for name in median)],
            [
                [name, *(f"{run[k]:.6f}" if k.startswith("cosine") else run[k] for k in median)]
                for name, run in [
                    *((f"repetition {n}", r) for n, r in enumerate(runs, 1)),
                    ("median", median),
                ]
            ],
        )
        print(f"smallest cosine {worst:.6f}, limit >= {COSINE}")
        details[f"uniform:{frames}"] = {"repetitions": runs, "median": median}
        rows.append(
            common.Row(
                f"`extract` against the usual way, uniform:{frames}, cosine {worst:.5f} "
                f"(limit {COSINE})",
                f"{median['ours_videos_per_second']:.2f} videos/s",
                f"{median['usual_videos_per_second']:.2f} videos/s",
                median["ratio"],
                f">= {LIMIT}",
            )
        )
    common.save("usual_way", where, rows, {"videos": chosen.videos, "samplings": details})


if __name__ == "__main__":
    main()
