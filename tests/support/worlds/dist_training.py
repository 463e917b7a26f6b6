"""A DiST branch of a few thousand parameters, and the command that trains it."""

from __future__ import annotations

from pathlib import Path

SMALL_BRANCH = """[head]
kind = "dist"
integration_dim = 32
temporal_dim = 8
pooling_layers = 1

[training]
epochs = 2
warmup_epochs = 0.5
warmup_start = 1e-5
schedule = "whole-wave"
lr = 3e-3
weight_decay = 1e-2
frames = 4
seed = 0

[finetune]
train = "head"
batch_size = 4
"""
MIXED = 'mixup = 0.8\ncutmix = 1.0\nsmoothing = 0.1\nmirror = "names"\n'


def small_recipe(folder: Path, mixed: bool = True) -> Path:
    """A recipe file of a small branch, with or without mixing."""
    file = folder / ("mixed.toml" if mixed else "plain.toml")
    file.write_text(SMALL_BRANCH + (MIXED if mixed else ""))
    return file


def train_dist(
    root: Path, recipe: Path | str, name: str, *more: str | Path, batch_size: int = 4
) -> tuple[str, ...]:
    """The command; `more` comes last and wins."""
    command = ("finetune", "--dataset", "clips", "--encoder", "tiny", "--method", "dist")
    shape = ("--recipe", str(recipe), "--name", name, "--batch-size", str(batch_size))
    return (*command, *shape, "--root", str(root), "--json", *map(str, more))
