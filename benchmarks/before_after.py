"""Two checkouts of this repository measured in turn: has a change made anything slower?

    .venv/bin/python benchmarks/before_after.py ../old-checkout --rounds 3 bench_store bench_eval

Every round runs each script in the other checkout and in this one, so that both have the same
machine and the same moment. A ratio above 1 says that this checkout takes less time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import common

HERE: Final = Path(__file__).parents[1]
LIMIT: Final = 0.97
# Benchmarks that other programs' times or the machine's own bounds are part of.
_BOUNDS: Final = ("reference", "products", "index_select", "np.load", "read", "loop")


def seconds(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """What a benchmark's JSON says of its own time: (what, seconds), where less is better."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("machine", "rows") or any(bound in key for bound in _BOUNDS):
                continue
            if key == "step":
                yield f"{name} seconds a step", float(inner)
            elif key == "extract_frames_per_second":
                yield f"{name} seconds a frame", 1 / float(inner)
            else:
                # Only the median stands for the repetitions of extract.
                yield from () if key == "repetitions" else seconds(inner, f"{name} {key}".strip())
    elif isinstance(value, list) and value:
        if all(isinstance(one, dict) for one in value):
            found = [dict(seconds(one, name)) for one in value]
            for key in found[0]:
                yield key, statistics.median(one[key] for one in found)
        elif all(isinstance(one, list) and len(one) == 2 for one in value):
            yield f"{name} CPU", statistics.median(cpu for cpu, _ in value)
        elif name.endswith("cpu_seconds"):
            yield name, float(value[-1])


def run(checkout: Path, script: str, options: list[str]) -> dict[str, float]:
    """Run a benchmark of a checkout with this Python, and read what it measured."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, f"benchmarks/{script}.py", *options]
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    file = checkout / "benchmarks" / "results" / f"{script.removeprefix('bench_')}.json"
    return dict(seconds(json.loads(file.read_text())))


def main() -> None:
    """Measure the scripts in turn and print the ratio of each of their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="folder of the other checkout")
    parser.add_argument("scripts", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    chosen = parser.parse_intermixed_args()
    scripts = chosen.scripts or [
        *("bench_extract", "bench_head", "bench_store", "bench_eval", "bench_finetune")
    ]
    options = ["--quick"] if chosen.quick else []
    where = common.machine()
    print(where["name"])
    rows, details = [], {}
    for script in scripts:
        rounds = []
        for number in range(chosen.rounds):
            sides = [chosen.old.resolve(), HERE]
            took = {side: run(side, script, options) for side in sides[:: (-1) ** number]}
            rounds.append([took[side] for side in sides])
        for what in rounds[0][1].keys() & rounds[0][0].keys():
            pairs = [(old[what], new[what]) for old, new in rounds]
            old, new = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(before / after for before, after in pairs)
            details[f"{script}: {what}"] = pairs
            claim = f"{script}: {what}, before against after"
            rows.append(common.Row(claim, f"{new:.4g} s", f"{old:.4g} s", ratio, f">= {LIMIT}"))
        rows.sort(key=lambda row: row.claim)
        common.save("before_after", where, rows, {"pairs": details})  # a later one may fail
    common.table(
        ["figure", "before", "after", "ratio"],
        [[row.claim, row.baseline, row.measured, row.ratio] for row in rows],
    )


if __name__ == "__main__":
    main()
