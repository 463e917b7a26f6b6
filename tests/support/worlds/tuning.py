"""A workspace to fine-tune in: a dozen tiny clips, a random CLIP, and what a run leaves."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.processes.command_line import done
from tests.support.processes.processes import Commands, Running
from tests.support.worlds.tiny_world import make_clips, make_encoder

TIMES = {"seconds", "clips_per_second", "waiting", "peak_rss_mb", "peak_gpu_mb", "seconds_left"}
KEY_BIASES = ("attn.in_proj_bias", "attention.qkv_bias")


def tuning_workspace(folder: Path) -> Path:
    """12 clips to train on and 6 to evaluate on, in tars of four, and the encoder "tiny"."""
    root = folder / "root"
    make_clips(folder / "videos")
    done(
        *("pack", "--dataset", "clips", "--videos", folder / "videos"),
        *("--samples-per-shard", "4", "--root", root),
    )
    make_encoder(root / "encoders/tiny")
    return root


def finetune(root: Path, name: str, *more: str | Path, batch_size: int = 4) -> tuple[str, ...]:
    """The command; `more` comes last and wins."""
    command = ("finetune", "--dataset", "clips", "--encoder", "tiny", "--name", name)
    command += ("--prompts", "name")
    shape = ("--epochs", "2", "--frames", "2", "--layers", "1", "--experts", "2", "--lr", "1e-3")
    size = ("--batch-size", str(batch_size), "--root", str(root), "--json")
    return (*command, *shape, *size, *map(str, more))


def start_ranks(commands: Commands, count: int, *arguments: str | Path) -> list[Running]:
    """The command as `count` processes of one training, as a launcher would start them."""
    return start_lines(commands, [arguments] * count)


def start_lines(commands: Commands, lines: Sequence[Sequence[str | Path]]) -> list[Running]:
    """Processes of one training, each with its own command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        commands.start(
            *arguments,
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(len(lines)),
                "LOCAL_WORLD_SIZE": str(len(lines)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank, arguments in enumerate(lines)
    ]


def files_of(root: Path, name: str) -> dict[str, Any]:
    """What a finished run leaves, times left out: tensors, records, failures.

    Methods that leave the towers alone have no file of a tuned tower or no encoder of their own.
    """
    run, encoder = root / "heads" / name, root / "encoders" / name
    own = {
        "tower": run / "tower.safetensors",
        "encoder": encoder / "open_clip_model.safetensors",
    }
    return {
        "head": load_file(run / "head.safetensors"),
        "state": load_file(run / "state/last.safetensors"),
        "best": load_file(run / "state/best.safetensors"),
        **{part: load_file(file) for part, file in own.items() if file.exists()},
        "metrics": [
            {key: value for key, value in json.loads(line).items() if key not in TIMES}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ],
        "failures": (run / "failures.csv").read_text(),
    }


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs left the same, bit for bit."""
    return a.keys() == b.keys() and all(
        a[part] == b[part]
        if part in ("metrics", "failures")
        else a[part].keys() == b[part].keys()
        and all(torch.equal(value, b[part][name]) for name, value in a[part].items())
        for part in a
    )


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights.

    The key third of attention biases is left out: its gradient is zero but for rounding, which
    Adam turns into whole steps.
    """
    worst = 0.0
    for name, value in a.items():
        apart = (value.double() - b[name].double()).abs()
        if name.endswith(KEY_BIASES):
            third = len(apart) // 3
            apart = torch.cat([apart[:third], apart[2 * third :]])
        worst = max(worst, float(apart.max()) if apart.numel() else 0.0)
    return worst
