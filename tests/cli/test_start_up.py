"""What the command line loads before there is any work: help, the version and wrong options."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from cli.main import COMMANDS, load_command

HEAVY = ("torch", "zarr", "open_clip", "numpy", "av", "scipy")
# Leaves with the exit code and writes the heavy modules that were loaded as its last line.
CHILD = f"""
import sys
from cli.main import main
try:
    main()
finally:
    print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def loaded_by(*arguments: str) -> tuple[int, str, list[str]]:
    """(exit code, standard output, heavy modules) of the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code, shown, heavy = loaded_by(*arguments)
    assert (code, heavy) == (0, [])
    assert all(name in shown for name in COMMANDS)


def test_the_version_is_the_installed_one_and_loads_nothing_heavy() -> None:
    assert loaded_by("--version") == (0, f"mote-cli {version('mote-video')}\n", [])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    code, _, heavy = loaded_by(command, "--help")
    assert (code, heavy) == (0, [])


@pytest.mark.parametrize(
    "arguments",
    [["--wrong"], ["wrong"], *([name, "--wrong"] for name in COMMANDS), ["eval", "--closeset"]],
)
def test_what_is_typed_wrong_loads_nothing_heavy(arguments: list[str]) -> None:
    code, _, heavy = loaded_by(*arguments)
    assert (code, heavy) == (2, [])


@pytest.mark.parametrize(
    "arguments",
    [
        "pack --dataset a --videos nothere",
        "extract --dataset nothere",
        "train-head --dataset nothere",
        "train-head --recipe nothere",
        "train-head --from-head nothere",
        "finetune --dataset nothere",
        "eval --closeset nothere --head mean",
        "eval --closeset nothere --head nothere",
        "eval --protocol nothere",
        "eval --closeset a --zeroshot b",
        "eval --closeset a --sweep what=1",
        "eval --closeset a --device what --head mean",
        "compare a b",
        "tradeoff nothere",
        "predict nothere.mp4",
        "export nothere --format onnx --out head.onnx",
        "inspect nothere",
        "protocols show nothere",
        "rm head nothere",
        "import-checkpoint nothere.pt",
        "verify nothere",
        "store duplicates nothere",
        "store leaks nothere:train nothere:val",
        "store suspects nothere",
        "store add-texts nothere",
        "store add-tars nothere --dataset a",
        "store convert nothere --codec zstd --out new",
        "store quantize nothere --out new",
        "store merge nothere other --out new",
        "store export nothere --to parquet --out new",
    ],
)
def test_what_is_named_wrong_is_said_before_torch_is_loaded(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTE_ROOT", str(tmp_path))
    code, _, heavy = loaded_by(*arguments.split())
    assert code == 2
    assert not set(heavy) & {"torch", "open_clip", "scipy"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_line_in_the_list_of_commands_begins_the_commands_own_help(command: str) -> None:
    text = load_command(command).help
    assert " ".join(str(text).split("\n\n")[0].split()) == COMMANDS[command][1]


@pytest.mark.parametrize(("set_before", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_leave_the_cores_to_others(
    set_before: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if set_before is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", set_before)
    child = CHILD.replace(
        "print(*", "import os; print(os.environ['OMP_WAIT_POLICY'], file=sys.stdout)\n    print(*"
    )
    done = subprocess.run(
        [sys.executable, "-c", child, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == expected
