"""Is prediction as fast as extraction? Videos/s of `predict` against those of `extract`.

Both see the same 200 short files with the same encoder, sampling and threads: `extract` from tars
into a store, `predict` from the files through a MoTE head into a CSV file. With the tiny CLIP
encoding costs nearly nothing, so that all else that a video costs is seen; `--encoder vit-b32`
shows what is left of it with a real tower. They take turns (extract, predict, predict, extract),
each from its first report to its end, so that loading and the choice of precision do not count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import timed_command
from core_time import Took, Watch

from featstore import Workspace
from heads.prediction.predict import Predictor
from heads.prediction.request import PredictionRequest
from heads.prediction.videos import find_videos
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.run import extract
from pipeline.sampling import parse_sampling
from pipeline.tars.packing import pack

LIMIT = 0.9
FRAMES = 8


class Progress:
    """Starts a watch at the first report."""

    def __init__(self) -> None:
        self.watch: Watch | None = None

    def __call__(self, done: float, total: float, **_: object) -> None:
        self.watch = self.watch or Watch()

    def took(self) -> Took:
        assert self.watch is not None
        return self.watch.read()


def extraction(workspace: Workspace, encoder: Path, videos: int) -> Took:
    """One extraction into a new store."""
    store = common.fresh(common.WORK / "predict-store") / "bench.zarr"
    progress = Progress()
    summary = extract(
        ExtractionRequest(
            *(workspace.dataset_dir("bench"), store, str(encoder)),
            parse_sampling(f"uniform:{FRAMES}"),
            precision="fp32",
        ),
        progress=progress,
    )
    assert summary.rows_ok == videos, summary
    return progress.took()


def prediction(workspace: Workspace, folder: Path, videos: int) -> Took:
    """One prediction of the folder into a new file."""
    out = common.fresh(common.WORK / "predict-out") / "bench.csv"
    progress = Progress()
    request = PredictionRequest(
        *(find_videos([folder]), None, "bench"), frames=FRAMES, precision="fp32", out=out
    )
    predictor = Predictor(workspace, request)
    answers = list(predictor.answers(progress))
    took = progress.took()
    assert (len(answers), predictor.failed) == (videos, 0)
    return took


def main() -> None:
    chosen = common.options(__doc__, videos=200, repetitions=5, encoder="tiny")
    if chosen.quick:
        chosen.videos, chosen.repetitions = 40, 1
    where = common.machine()
    folders = {"tiny": common.tiny_clip_folder, "vit-b32": common.vit_b32_folder}
    encoder = folders[chosen.encoder]()
    clips = common.small_clips(chosen.videos)
    folder = common.class_folders(common.WORK / "predict-videos", clips, chosen.videos, classes=10)
    workspace = Workspace(common.fresh(common.WORK / "predict-root"))
    pack(folder, "bench", workspace.dataset_dir("bench"))
    place = ["--root", workspace.root]
    timed_command.mote_cli(
        *("extract", "--dataset", "bench", "--encoder", encoder, "--precision", "fp32"),
        *("--sampling", f"uniform:{FRAMES}", *place),
    )
    timed_command.mote_cli(
        *("train-head", "--dataset", "bench", "--name", "bench", "--head", "mote"),
        *("--epochs", "1", "--warmup-epochs", "0", "--frames", str(FRAMES), "--layers", "4"),
        *("--experts", "4", *place),
    )

    runs: list[dict[str, Any]] = []
    for number in range(-1, chosen.repetitions):
        wall = {"extract": 0.0, "predict": 0.0}
        core = dict(wall)
        for turn in ("extract", "predict", "predict", "extract"):
            if turn == "extract":
                took = extraction(workspace, encoder, chosen.videos)
            else:
                took = prediction(workspace, folder, chosen.videos)
            wall[turn] += took.wall
            core[turn] += took.core
        if number >= 0:  # the first round only warms the page cache and the libraries
            rates = {turn: 2 * chosen.videos / seconds for turn, seconds in wall.items()}
            ratio = core["extract"] / core["predict"]
            runs.append({**rates, "wall": rates["predict"] / rates["extract"], "core": ratio})
    median = {name: common.middle([run[name] for run in runs]) for name in runs[0]}
    print(f"\n{where['name']}; {chosen.encoder}, {chosen.videos} videos of 24 frames")
    common.table(
        ["repetition", *median],
        [*([n, *run.values()] for n, run in enumerate(runs, 1)), ["median", *median.values()]],
    )
    row = common.Row(
        f"`predict`, {chosen.videos} short files, {chosen.encoder} CLIP, uniform:{FRAMES}, core "
        f"seconds a video (wall {median['wall']:.3f})",
        f"{median['predict']:.1f} videos/s",
        f"{median['extract']:.1f} videos/s (`extract`)",
        median["core"],
        f">= {LIMIT}",
    )
    common.save(f"predict-{chosen.encoder}", where, [row], {"repetitions": runs})


if __name__ == "__main__":
    main()
