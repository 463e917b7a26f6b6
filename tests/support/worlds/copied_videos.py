"""Videos of the generated world with copies of all kinds among them, as real files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from pipeline.demo.world import (
    ALL_CLASSES,
    FRAMES,
    SIDE,
    Frames,
    SpriteClass,
    draw_world,
    encode_clip,
    render_clip,
)


def world_frames(sprite: SpriteClass, number: int) -> Frames:
    """Video `number` of a class, uint8 [T,S,S,3]."""
    rng = np.random.default_rng([9, ALL_CLASSES.index(sprite), number])
    return render_clip(sprite, rng, np.linspace(0.0, 1.0, FRAMES))


def decoded(path: Path) -> Frames:
    """All frames of a file."""
    with av.open(str(path)) as media:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)])


def encoded(frames: Frames, path: Path, quality: int = 23) -> None:
    """Write frames as H.264 with half the colour resolution, as copies on the web are."""
    with av.open(str(path), "w") as media:
        stream = media.add_stream("libx264", rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality)}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            media.mux(stream.encode(picture))
        media.mux(stream.encode(None))


def remuxed(source: Path, target: Path) -> None:
    """Write the packets of a file into another container."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = read.streams.video[0]
        copy = write.add_stream_from_template(stream)
        for packet in read.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                write.mux(packet)


def cropped(frames: Frames, share: float = 0.1, corner: tuple[float, float] = (0.5, 0.5)) -> Frames:
    """Cut `share` off both sides together, at a corner, and scale what is left to the old size."""
    side = round(SIDE * (1 - share))
    top, left = (round((SIDE - side) * at) for at in corner)
    part = frames[:, top : top + side, left : left + side]
    size = (SIDE, SIDE)
    how = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, how)) for frame in part])


KINDS = ("identical", "re-encoded", "re-muxed", "cropped", "trimmed", "mirrored")


def make_copy(kind: str, source: Path, target: Path) -> Path:
    """Write a copy of `source` beside `target` (without its suffix); return the file."""
    if kind == "identical":
        made = target.with_suffix(".mp4")
        made.write_bytes(source.read_bytes())
        return made
    if kind == "re-muxed":
        made = target.with_suffix(".mkv")
        remuxed(source, made)
        return made
    frames, made = decoded(source), target.with_suffix(".mp4")
    changed = {
        "re-encoded": frames,
        "cropped": cropped(frames),
        "trimmed": frames[2:-2],
        "mirrored": frames[:, :, ::-1],
    }[kind]
    encoded(changed, made, 26 if kind == "re-encoded" else 20)
    return made


def write_videos(
    folder: Path, classes: int, of_class: int, kinds: Sequence[str] = KINDS, seed: int = 4
) -> dict[str, tuple[str, str]]:
    """Write train/CLASS/N.mp4 with one copy of each kind; return kind -> names of both files.

    Names are relative to `folder`, without suffix. Copies lie in val/, in the original class.
    """
    sprites = draw_world(seed).known[:classes]
    for sprite in sprites:
        for number in range(of_class):
            encode_clip(
                world_frames(sprite, number), folder / f"train/{sprite.folder}/{number:03d}.mp4"
            )
    made = {}
    for at, kind in enumerate(kinds):
        sprite, number = sprites[at % classes], at // classes
        source = folder / f"train/{sprite.folder}/{number:03d}.mp4"
        target = folder / f"val/{sprite.folder}/{kind}"
        target.parent.mkdir(parents=True, exist_ok=True)
        make_copy(kind, source, target)
        made[kind] = (f"train/{sprite.folder}/{number:03d}", f"val/{sprite.folder}/{kind}")
    return made


def black_video(path: Path) -> None:
    """A video that shows nothing."""
    encoded(np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8), path)
