"""The generated world of the demo: tiny clips whose classes need motion to be told apart.

A clip shows one sprite on a dim, noisy gradient. Its class is (colour, shape, motion), written as
words a person would use: "red circle moving left". Many motions cannot be told from one frame (left
or right, growing or shrinking), which is what a temporal head is for. Three motions are never shown
to a head, so that it can be tested on new classes.

Letters: T frames, S side of the square picture in pixels.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from featstore.files.documents import found_object
from featstore.files.durable import write_json
from featstore.progress import ProgressSink, no_progress

SIDE = 32
FRAMES = 16
FPS = 8
COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 195, 60),
    "blue": (60, 95, 235),
    "yellow": (235, 220, 60),
    "purple": (165, 70, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
MOTIONS = (
    "moving left",
    "moving right",
    "rising",
    "falling",
    "growing",
    "shrinking",
    "spinning clockwise",
    "spinning counterclockwise",
    "bouncing",
    "circling",
    "shaking",
    "blinking",
)
# A turned circle looks the same, so nobody could tell the classes of these pairs apart.
_TURNS_UNSEEN = {(shape, m) for shape in ("circle", "ring") for m in MOTIONS if "spinning" in m}

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, order=True)
class SpriteClass:
    """One class of the world."""

    colour: str
    shape: str
    motion: str

    @property
    def name(self) -> str:
        """The class in words, as a person would write it."""
        return f"{self.colour} {self.shape} {self.motion}"

    @property
    def pair(self) -> tuple[str, str]:
        """The parts that do not change during a clip: colour and shape."""
        return self.colour, self.shape

    @property
    def folder(self) -> str:
        """The class as a folder name, in the way data sets spell their classes."""
        return self.name.replace(" ", "_")


ALL_CLASSES = tuple(
    SpriteClass(colour, shape, motion)
    for colour in COLOURS
    for shape in SHAPES
    for motion in MOTIONS
    if (shape, motion) not in _TURNS_UNSEEN
)


# Motions that no head is trained on. The small CLIP knows the words for them, as CLIP knows words
# for actions that are in no data set.
NEW_MOTIONS = ("circling", "shaking", "blinking")
# The known classes share this many (colour, shape) pairs, so that most of them can be told from
# their neighbours by motion only.
KNOWN_PAIRS = 16


@dataclass(frozen=True)
class World:
    """The classes that a head trains on and those that are new to it, drawn from one seed."""

    seed: int
    known: tuple[SpriteClass, ...]
    new: tuple[SpriteClass, ...]


def draw_world(seed: int, known_classes: int = 40, new_classes: int = 40) -> World:
    """Draw the classes of a world: known ones from a few pairs, new ones from all pairs.

    No known class has a motion of `NEW_MOTIONS`, every new class has one.
    """
    rng = np.random.default_rng([seed, 0])
    pairs = sorted({sprite_class.pair for sprite_class in ALL_CLASSES})
    few = {pairs[i] for i in rng.choice(len(pairs), KNOWN_PAIRS, replace=False)}
    seen = [c for c in ALL_CLASSES if c.motion not in NEW_MOTIONS and c.pair in few]
    unseen = [c for c in ALL_CLASSES if c.motion in NEW_MOTIONS]
    known = rng.choice(len(seen), known_classes, replace=False)
    new = rng.choice(len(unseen), new_classes, replace=False)
    return World(seed, tuple(sorted(seen[i] for i in known)), tuple(sorted(unseen[i] for i in new)))


def render_clip(sprite_class: SpriteClass, rng: np.random.Generator, moments: Floats) -> Frames:
    """Draw one clip at the given `moments` in [0, 1] of its duration; uint8 [T, S, S, 3].

    Start, size, speed, phase and angle are random per clip.
    """
    t = moments
    still = np.zeros_like(t)
    size = rng.uniform(4.5, 7.0) + still
    angle = rng.uniform(0, 2 * np.pi) + still
    margin = 8.0
    x = rng.uniform(margin, SIDE - margin) + still
    y = rng.uniform(margin, SIDE - margin) + still
    visible = 1.0 + still
    phase = rng.uniform(0, 2 * np.pi)
    # A sprite starts anywhere near the middle and travels: where it is betrays a little of where it
    # is going, never all of it. The same holds for size.
    travel = rng.uniform(9.0, 14.0) * t
    grown = rng.uniform(3.0, 5.0) * t
    match sprite_class.motion:
        case "moving left":
            x = np.maximum(rng.uniform(12.0, 26.0) - travel, 5.0)
        case "moving right":
            x = np.minimum(rng.uniform(6.0, 20.0) + travel, SIDE - 5.0)
        case "rising":
            y = np.maximum(rng.uniform(12.0, 26.0) - travel, 5.0)
        case "falling":
            y = np.minimum(rng.uniform(6.0, 20.0) + travel, SIDE - 5.0)
        case "growing":
            size = rng.uniform(3.5, 6.5) + grown
        case "shrinking":
            size = rng.uniform(6.0, 9.0) - grown
        case "spinning clockwise":
            angle = angle + rng.uniform(0.8, 1.2) * np.pi * t
        case "spinning counterclockwise":
            angle = angle - rng.uniform(0.8, 1.2) * np.pi * t
        case "bouncing":
            y = SIDE - margin - rng.uniform(10, 14) * np.abs(np.sin(2 * np.pi * t + phase))
        case "circling":
            turn = 2 * np.pi * rng.uniform(0.9, 1.3) * t + phase
            radius = rng.uniform(6.0, 8.0)
            x, y = SIDE / 2 + radius * np.cos(turn), SIDE / 2 + radius * np.sin(turn)
        case "shaking":
            x = x + rng.uniform(2.0, 3.5) * np.sign(np.sin(12 * np.pi * t + phase))
        case "blinking":
            visible = (np.sin(rng.uniform(5, 7) * np.pi * t + phase) > -0.2).astype(np.float64)
    return _draw(sprite_class, rng, x, y, size, angle, visible)


def _draw(
    sprite_class: SpriteClass,
    rng: np.random.Generator,
    x: Floats,
    y: Floats,
    size: Floats,
    angle: Floats,
    visible: Floats,
) -> Frames:
    frames = len(x)
    axis = np.arange(SIDE, dtype=np.float32) + 0.5
    dx = axis[None, None, :] - x.astype(np.float32)[:, None, None]
    dy = axis[None, :, None] - y.astype(np.float32)[:, None, None]
    cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    scale = size.astype(np.float32)[:, None, None]
    # u, v: coordinates in the sprite's own turned frame, in units of its size.
    u: Floats = (cos * dx + sin * dy) / scale
    v: Floats = (cos * dy - sin * dx) / scale
    edge = _signed_distance(sprite_class.shape, u, v) * scale
    cover = np.clip(0.5 - edge, 0.0, 1.0) * visible.astype(np.float32)[:, None, None]

    low, high = rng.uniform(10, 40, size=(2, 3)).astype(np.float32)
    direction = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(direction) * axis[None, :] + np.sin(direction) * axis[:, None]) / SIDE
    background = low + (high - low) * ramp.astype(np.float32)[..., None]
    tint = np.asarray(COLOURS[sprite_class.colour], np.float32) * rng.uniform(0.85, 1.0)
    picture: Floats = background + cover[..., None] * (tint - background)
    picture += rng.normal(0.0, 5.0, size=(frames, SIDE, SIDE, 1)).astype(np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _signed_distance(shape: str, u: Floats, v: Floats) -> Floats:
    """Distance to the outline in units of the sprite's size, negative inside."""
    match shape:
        case "circle":
            distance = np.hypot(u, v) - 1.0
        case "square":
            distance = np.maximum(np.abs(u), np.abs(v)) - 0.85
        case "triangle":
            distance = np.maximum(v, np.abs(u) * 0.866 - v * 0.5) - 0.6
        case "cross":
            arm = np.minimum(
                np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.3),
                np.maximum(np.abs(v) - 1.0, np.abs(u) - 0.3),
            )
            distance = arm
        case "ring":
            distance = np.abs(np.hypot(u, v) - 0.8) - 0.22
        case "bar":
            distance = np.maximum(np.abs(u) - 1.15, np.abs(v) - 0.32)
        case _:
            raise ValueError(f"no shape named {shape!r}: there are {', '.join(SHAPES)}")
    return distance


def encode_clip(frames: Frames, path: Path) -> None:
    """Write frames uint8 [T, S, S, 3] as an H.264 MP4 file, 4:4:4 to keep small colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1
        # x264's macroblock tree does not always decide alike on pictures this small (3 files in 800
        # differed), but the same world must give the same files.
        stream.options = {"crf": "6", "preset": "veryfast", "x264-params": "mbtree=0"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@dataclass(frozen=True)
class WorldFolders:
    """The folders into which `write_world` put the videos; both hold class folders."""

    known: Path  # train/<class>/*.mp4 and val/<class>/*.mp4
    new: Path  # <class>/*.mp4, motions that no head trains on
    clips: int


def write_world(
    world: World,
    folder: Path,
    *,
    train_clips: int = 48,
    test_clips: int = 24,
    workers: int = 2,
    progress: ProgressSink = no_progress,
) -> WorldFolders:
    """Write the world's clips as video files under `folder`, which holds nothing else.

    An earlier complete set of the same recipe is kept; anything else in the folder is deleted.
    `train_clips` and `test_clips` are per class. The same world gives the same files.
    """
    jobs: list[tuple[SpriteClass, int, Path]] = []
    for part, classes, count, offset in (
        ("known/train", world.known, train_clips, 0),
        ("known/val", world.known, test_clips, 100_000),
        ("new", world.new, test_clips, 200_000),
    ):
        for sprite_class in classes:
            place = folder / part / sprite_class.folder
            jobs += [(sprite_class, offset + i, place / f"{i:03d}.mp4") for i in range(count)]
    folders = WorldFolders(folder / "known", folder / "new", len(jobs))
    recipe = {
        "known": [sprite_class.name for sprite_class in world.known],
        "new": [sprite_class.name for sprite_class in world.new],
        "seed": world.seed,
        "train_clips": train_clips,
        "test_clips": test_clips,
    }
    marker = folder / "world.json"  # written last: its presence says that all clips are there
    if found_object(marker) == recipe:
        return folders
    if folder.exists():
        shutil.rmtree(folder)

    moments = np.linspace(0.0, 1.0, FRAMES)
    order = {sprite_class: i for i, sprite_class in enumerate(ALL_CLASSES)}

    def make(job: tuple[SpriteClass, int, Path]) -> None:
        sprite_class, number, path = job
        rng = np.random.default_rng([world.seed, 1, order[sprite_class], number])
        encode_clip(render_clip(sprite_class, rng, moments), path)

    with ThreadPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(make, jobs), start=1):
            progress(done, len(jobs))
    write_json(marker, recipe)
    return folders
