"""A random CLIP and a folder data set of numbered clips, small enough for dozens of tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.encoders.sources import build_model, save_open_clip_folder
from pipeline.encoders.viclip import ViClip
from tests.support.processes.command_line import done
from tests.support.worlds.media import make_video

CLASSES = ("Jump", "brush_hair", "climb stairs", "run", "sit", "wave")
WORDS = ("jump", "brush hair", "climb stairs", "run", "sit", "wave")  # as the heads see them
SHORT_TRAINING = ("--epochs", "2", "--batch-size", "4", "--layers", "1", "--experts", "2")
TRAIN, VAL = 2, 1  # clips per class

CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class World:
    """Inputs, the workspace made of them, and the JSON that each command printed."""

    videos: Path
    encoder: Path
    root: Path
    printed: dict[str, Any]

    @property
    def store(self) -> Path:
        """The one store."""
        return Path(self.printed["extract"]["store"])


def make_encoder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A CLIP of random weights in open_clip's folder format; returns the folder."""
    config = {**CLIP, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config, "test")
        # As drawn, image embeddings hardly depend on the image.
        for parameter in model.visual.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, std=0.3)
    save_open_clip_folder(model, config, {}, folder)
    return folder


VICLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "frames": 4},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 64,
        "heads": 1,
        "layers": 1,
    },
}


def make_viclip(file: Path, seed: int = 0) -> Path:
    """A ViCLIP of random weights, for clips of 4 frames, in a `.pth` or `.safetensors`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViClip(VICLIP)
        for parameter in model.vision_encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    state = model.state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".pth":
        torch.save({"model": state, "epoch": 1}, file)
    else:
        save_file(state, file)
    return file


def make_clip(path: Path, number: int, frames: int | None = None) -> bytes:
    """Clip `number`: its length and its pictures are its own."""
    return make_video(
        path, frames=frames or 10 + number % 5, first=97 * number, width=72, height=48, gop=5
    )


def make_clips(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """A folder data set: train/ and val/, in them a folder per class; returns `folder`."""
    number = 0
    for name in classes:
        for split, count in (("train", TRAIN), ("val", VAL)):
            for i in range(count):
                make_clip(folder / split / name / f"{split}{i} {name}.mp4", number)
                number += 1
    return folder


def packed_workspace(folder: Path, tars: int, per_tar: int) -> Path:
    """A workspace with the data set "clips" of that many tars, and the encoder "tiny" in it."""
    root = folder / "root"
    for number in range(tars * per_tar):
        make_clip(folder / f"videos/{'ab'[number % 2]}/{number}.mp4", number)
    done(
        *("pack", "--dataset", "clips", "--videos", folder / "videos"),
        *("--samples-per-shard", str(per_tar), "--root", root),
    )
    make_encoder(root / "encoders/tiny")
    return root


def rewrite_origin(file: Path, **changes: str) -> None:
    """Change the origin in a head's file."""
    from heads import load_head, save_head

    head = load_head(file)
    assert head.origin is not None
    head.origin = type(head.origin).from_json(head.origin.to_json() | changes)
    save_head(head, file)
