"""How long does nothing take? `mote-cli extract` on a finished store, and its start-up.

A store of 200 tars is finished once with a tiny CLIP and once with a ViT-B/16 (random weights,
600 MB). Then the same command runs again and again, each time as a new process, in turns with
`python -c "import torch"`, which is what any program that might encode pays at least. The second
part extracts a few clips of Kinetics kind with the ViT-B/16 and notes when its work began and when
the first video was done, from the start of the process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import common
import timed_command

from featstore import Workspace
from pipeline.tars.packing import pack

# In units of `import torch` on the same machine, which both commands have to wait for.
RESUME_LIMIT = 1.25
START_LIMIT = 8.0
BASELINE = (sys.executable, "-c", "import torch")


def arguments(root: Path, encoder: Path, sampling: str) -> list[str | Path]:
    """The command line of an extraction."""
    of_set = ["extract", "--dataset", "bench", "--root", root, "--encoder", encoder]
    return [*of_set, "--sampling", sampling, "--json"]


def resume(
    chosen_tars: int, repetitions: int, encoders: dict[str, Path]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every run on a finished store and of the baseline, and of the extractions."""
    clips = common.small_clips(10)
    folders = common.class_folders(common.WORK / "resume-videos", clips, chosen_tars, classes=5)
    root = common.fresh(common.WORK / "resume-root")
    pack(folders, "bench", Workspace(root).dataset_dir("bench"), samples_per_shard=1)
    commands = {name: arguments(root, folder, "uniform:1") for name, folder in encoders.items()}
    finishing = {name: timed_command.mote_cli(*line).seconds for name, line in commands.items()}
    took: dict[str, list[float]] = {name: [] for name in ("import torch", *commands)}
    for _ in range(repetitions):
        took["import torch"].append(timed_command.run(BASELINE).seconds)
        for name, line in commands.items():
            took[name].append(timed_command.mote_cli(*line).seconds)
    return took, finishing


def start_up(repetitions: int, encoder: Path, videos: int) -> dict[str, list[float]]:
    """Seconds to the beginning of the work, to the first video, and to the end."""
    clips = common.kinetics_clips(videos)
    folders = common.class_folders(common.WORK / "start-videos", clips, videos, classes=2)
    root = common.fresh(common.WORK / "start-root")
    pack(folders, "bench", Workspace(root).dataset_dir("bench"))
    took: dict[str, list[float]] = {"work begins": [], "first video": [], "end": []}
    for _ in range(repetitions):
        common.fresh(Workspace(root).features_dir("bench"))
        moments = timed_command.mote_cli_moments(root, *arguments(root, encoder, "uniform:16"))
        assert moments.first is not None
        for name, seconds in zip(took, (moments.began, moments.first, moments.end), strict=True):
            took[name].append(seconds)
    return took


def main() -> None:
    """Measure both."""
    chosen = common.options(__doc__, tars=200, repetitions=7, videos=4)
    if chosen.quick:
        chosen.tars, chosen.repetitions, chosen.videos = 20, 2, 2
    where = common.machine()
    encoders = {"tiny CLIP": common.tiny_clip_folder(), "ViT-B/16": common.vit_b16_folder()}
    print(where["name"])

    resumed, finishing = resume(chosen.tars, chosen.repetitions, encoders)
    print(f"\nseconds of a whole command, store of {chosen.tars} tars finished")
    show(resumed)
    print("to finish them took", {name: round(seconds, 1) for name, seconds in finishing.items()})
    started = start_up(chosen.repetitions, encoders["ViT-B/16"], chosen.videos)
    print(f"\nseconds since the start, ViT-B/16, {chosen.videos} clips, uniform:16")
    show(started)

    # The least of the runs: everything else that happens on a machine can only add to it.
    least = {name: min(times) for name, times in resumed.items()}
    rows = [
        common.Row(
            f"`extract` on a finished store of {chosen.tars} tars, {name}",
            f"{least[name]:.2f} s",
            f"{least['import torch']:.2f} s (`import torch`)",
            least[name] / least["import torch"],
            f"<= {RESUME_LIMIT}",
        )
        for name in encoders
    ]
    first = min(started["first video"])
    rows.append(
        common.Row(
            "start-up of `extract` to the first video, ViT-B/16, uniform:16",
            f"{first:.1f} s (work begins at {min(started['work begins']):.1f} s)",
            f"{least['import torch']:.2f} s (`import torch`)",
            first / least["import torch"],
            f"<= {START_LIMIT}",
        )
    )
    common.save(
        "resume", where, rows, {"resume": resumed, "finishing": finishing, "start_up": started}
    )


def show(took: dict[str, list[float]]) -> None:
    """A line for each command: least, median, most."""
    common.table(
        ["", "least", "median", "most"],
        [[name, min(t), common.middle(t), max(t)] for name, t in took.items()],
    )


if __name__ == "__main__":
    main()
