"""Does memory grow with the number of videos? Peak memory of `pack` and `extract` at two sizes.

Each command runs in a process of its own, started by a small one: on Linux a process begins with
the peak of the one that started it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import common

LIMIT = 1.05
PER_TAR = 50  # both sizes fill whole tars
LAUNCHER = (
    "import resource, subprocess, sys\n"
    "code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(code)\n"
)


def peak_mb(*arguments: str | Path) -> float:
    """Peak resident memory of `mote-cli` with these arguments, in megabytes of 10^6 bytes."""
    command = [sys.executable, "-m", "cli.main", *map(str, arguments), "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {ran.stderr.strip()}")
    return int(ran.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e6


def small_clips(count: int) -> list[Path]:
    """Clips of 96x64 and 24 frames that cost little, so that thousands are quick."""
    import av
    import numpy as np

    folder = common.WORK / "small"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        rng = np.random.default_rng(number)
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.codec_context.thread_count = 1
            for _ in range(24):
                picture = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return paths


def main() -> None:
    """Measure both commands at both sizes, the median of a few runs each."""
    chosen = common.options(__doc__, small=200, large=2000, repetitions=3)
    if chosen.quick:
        chosen.small, chosen.large, chosen.repetitions = 50, 200, 1
    where = common.machine()
    clips = small_clips(10)
    encoder = common.tiny_clip_folder()
    sizes = (chosen.small, chosen.large)
    peaks: dict[str, dict[int, list[float]]] = {
        command: {size: [] for size in sizes} for command in ("pack", "extract")
    }
    for size in sizes:
        videos = common.class_folders(common.WORK / f"memory-{size}", clips, size, classes=5)
        for _ in range(chosen.repetitions):
            root = common.fresh(common.WORK / "memory-root")
            of_set = ("--dataset", "bench", "--root", root)
            tars = ("--samples-per-shard", str(PER_TAR))
            peaks["pack"][size].append(peak_mb("pack", *of_set, "--videos", videos, *tars))
            peaks["extract"][size].append(peak_mb("extract", *of_set, "--encoder", encoder))
    rows, shown = [], []
    for command, measured in peaks.items():
        small, large = (common.middle(measured[size]) for size in sizes)
        growth = 1000 * (large - small) / (chosen.large - chosen.small)
        shown.append([command, small, large, large / small, growth])
        rows.append(
            common.Row(
                f"peak memory of `{command}`, {chosen.large} against {chosen.small} videos",
                f"{large:.0f} MB",
                f"{small:.0f} MB",
                large / small,
                f"<= {LIMIT}",
            )
        )
    print(where["name"])
    common.table(["peak MB", *(f"{size} videos" for size in sizes), "ratio", "per 1000"], shown)
    common.save("memory", where, rows, {"peaks_mb": json.loads(json.dumps(peaks))})


if __name__ == "__main__":
    main()
