"""How commands walk through the code: from `extract` to the store, to a head, to a result.

    python benchmarks/journeys.py [--root WORKSPACE] [--route] [--json FILE]

Runs `extract`, `train-head` and `eval --closeset` on a small generated data set (or on the packed
data set "clips" and the encoder "tiny" of WORKSPACE) and records the calls from one file of the
project into another. A pair of functions counts once, however often one calls the other, so loops
over videos do not weigh more than steps. Printed for every command:

- hops: calls from one file into another;
- files: how many files are entered;
- returns: hops into a file that had been entered before and left.

The fewer returns, the more a reader can follow the command forward. `--route` prints every hop.
The same script runs over an older checkout that PYTHONPATH names.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import common

PACKAGES = ("pipeline", "featstore", "heads", "cli")
COMMANDS = {
    "extract": ("extract", "--dataset", "clips", "--encoder", "tiny", "--sampling", "uniform:4"),
    "train-head": (
        *("train-head", "--dataset", "clips", "--name", "walked", "--epochs", "1"),
        *("--batch-size", "4", "--layers", "1", "--experts", "2"),
    ),
    "eval": ("eval", "--closeset", "clips", "--head", "walked", "--no-modulate"),
}


class Journey:
    """The hops of one command, in the order in which they were first made."""

    def __init__(self, checkout: Path) -> None:
        self.route: list[str] = []
        self.files: set[str] = set()
        self.returns = 0
        self._last = ""
        self._folders = tuple(f"{checkout / package}/" for package in PACKAGES)
        self._root = len(str(checkout)) + 1
        self._known: set[tuple[CodeType, CodeType]] = set()
        self._lock = threading.Lock()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.setprofile` calls."""
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<") or not self._ours(code):
            return
        caller = frame.f_back
        while caller is not None and not self._ours(caller.f_code):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename == code.co_filename:
            return
        with self._lock:
            pair = (caller.f_code, code)
            if pair in self._known:
                return
            self._known.add(pair)
            here, there = (c.co_filename[self._root :] for c in pair)
            self.route.append(f"{here} -> {there}:{code.co_name}")
            self.returns += there in self.files and there != self._last
            self.files |= {here, there}
            self._last = there

    def counts(self) -> dict[str, int]:
        """How many hops, files and returns there were."""
        return {"hops": len(self.route), "files": len(self.files), "returns": self.returns}

    def _ours(self, code: CodeType) -> bool:
        return code.co_filename.startswith(self._folders)


def walk(name: str, root: Path, checkout: Path) -> Journey:
    """Run one command in this process and record its calls."""
    from cli.main import main

    journey, command = Journey(checkout), COMMANDS[name]
    arguments, sys.argv = sys.argv, ["mote-cli", *command, "--root", str(root), "--json"]
    threading.setprofile(journey)
    sys.setprofile(journey)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main()
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"{' '.join(command)} failed: {out.getvalue()}") from None
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.argv = arguments
    return journey


def make_world(folder: Path) -> Path:
    """A workspace with the packed data set "clips" and the encoder "tiny"."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.support.processes.command_line import done
    from tests.support.worlds.tiny_world import make_clips, make_encoder

    root = folder / "root"
    done("pack", "--dataset", "clips", "--videos", make_clips(folder / "clips"), "--root", root)
    make_encoder(root / "encoders/tiny")
    return root


def main() -> None:
    """Walk the three commands and print what was counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="workspace; a small one is generated otherwise")
    parser.add_argument("--route", action="store_true", help="print every hop")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    chosen = parser.parse_args()
    import cli.main

    checkout = Path(cli.main.__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        root = chosen.root or make_world(Path(folder))
        journeys = {name: walk(name, root, checkout) for name in COMMANDS}
    if chosen.route:
        for name, journey in journeys.items():
            print("\n".join([f"\n{name}", *journey.route]))
    counts = {name: journey.counts() for name, journey in journeys.items()}
    common.table(
        ["command", *counts["extract"]],
        [[name, *map(str, values.values())] for name, values in counts.items()],
    )
    if chosen.json:
        chosen.json.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
