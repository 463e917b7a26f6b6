"""Does memory grow with the number of videos or tars? Peak memory of `pack` and `extract`.

Three sets: few videos in four tars, ten times as many videos in tars of the same size, and the
few videos in a tar each.

Each command runs in a process of its own, started by a small one: on Linux a process begins with
the peak of the one that started it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import common

LIMIT = 1.05
TARS_OF_SMALL = 4
LAUNCHER = (
    "import resource, subprocess, sys\n"
    "code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(code)\n"
)


class Set(NamedTuple):
    """How many videos a set has and how many of them lie in one tar."""

    videos: int
    per_tar: int


def peak_mb(*arguments: str | Path) -> float:
    """Peak resident memory of `mote-cli` with these arguments, in megabytes of 10^6 bytes."""
    command = [sys.executable, "-m", "cli.main", *map(str, arguments), "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {ran.stderr.strip()}")
    return int(ran.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    """Measure both commands on every set, the median of a few runs each."""
    chosen = common.options(__doc__, small=200, large=2000, repetitions=3)
    if chosen.quick:
        chosen.small, chosen.large, chosen.repetitions = 50, 200, 1
    where = common.machine()
    clips = common.small_clips(10)
    encoder = common.tiny_clip_folder()
    few = Set(chosen.small, -(-chosen.small // TARS_OF_SMALL))
    sets = {
        f"{few.videos} videos": few,
        f"{chosen.large} videos": Set(chosen.large, few.per_tar),
        f"{few.videos} tars": Set(few.videos, 1),
    }
    base, *others = sets
    peaks: dict[str, dict[str, list[float]]] = {
        command: {name: [] for name in sets} for command in ("pack", "extract")
    }
    for _ in range(chosen.repetitions):
        for name, (count, per_tar) in sets.items():
            videos = common.class_folders(common.WORK / "memory-videos", clips, count, classes=5)
            root = common.fresh(common.WORK / "memory-root")
            of_set = ("--dataset", "bench", "--root", root)
            tars = ("--samples-per-shard", str(per_tar))
            peaks["pack"][name].append(peak_mb("pack", *of_set, "--videos", videos, *tars))
            peaks["extract"][name].append(peak_mb("extract", *of_set, "--encoder", encoder))
    rows, shown = [], []
    for command, measured in peaks.items():
        median = {name: common.middle(runs) for name, runs in measured.items()}
        for name in others:
            ratio = median[name] / median[base]
            # Per 1000 of what there is more of: videos, or tars of the same videos.
            more = sets[name].videos - few.videos or few.videos - TARS_OF_SMALL
            growth = 1000 * (median[name] - median[base]) / more
            verdict = "holds" if ratio <= LIMIT else "BROKEN"
            shown.append(
                [command, name, median[name], median[base], ratio, growth, f"{LIMIT} {verdict}"]
            )
            rows.append(
                common.Row(
                    f"peak memory of `{command}`, {name} against {few.videos} videos in "
                    f"{TARS_OF_SMALL} tars",
                    f"{median[name]:.0f} MB",
                    f"{median[base]:.0f} MB",
                    ratio,
                    f"<= {LIMIT}",
                )
            )
    print(where["name"])
    baseline = f"{base}, {TARS_OF_SMALL} tars"
    common.table(["peak MB", "of", "peak", baseline, "ratio", "per 1000", "limit"], shown)
    common.save("memory", where, rows, {"peaks_mb": peaks})


if __name__ == "__main__":
    main()
