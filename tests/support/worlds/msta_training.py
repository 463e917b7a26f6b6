"""Adapters of a few hundred parameters in one block of a tiny CLIP."""

from __future__ import annotations

from pathlib import Path

SMALL_ADAPTERS = """[head]
kind = "msta"
first = {block}
last = {block}
width = 8
scale = 0.1

[training]
epochs = 2
warmup_epochs = 0.5
schedule = "floored-wave"
lr = 1e-2
weight_decay = 1e-3
frames = 4
seed = 0

[finetune]
train = "head"
"""


def small_recipe(folder: Path, block: int = 1) -> Path:
    """A recipe file of adapters in one block of both towers."""
    file = folder / "small.toml"
    file.write_text(SMALL_ADAPTERS.format(block=block))
    return file
