"""The demo's world is what it says, and its small CLIP can be made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch.nn.functional import normalize

import pipeline.demo
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.demo.small_clip import make_encoder_folder, unpack
from pipeline.demo.world import (
    ALL_CLASSES,
    COLOURS,
    FRAMES,
    MOTIONS,
    NEW_MOTIONS,
    SHAPES,
    SpriteClass,
    draw_world,
    encode_clip,
    render_clip,
    write_world,
)
from tests.support.worlds.demo_clip import train_small_clip
from tests.support.worlds.frames import frames_of

SHIPPED = Path(pipeline.demo.__file__).parent / "data" / "demo_clip.safetensors"
WHOLE = np.linspace(0.0, 1.0, FRAMES)


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("encoder") / "demo-clip"
    make_encoder_folder(folder)
    return load_encoder(folder, "fp32")


@pytest.mark.parametrize("seed", range(5))
def test_no_known_class_has_a_motion_of_the_new_ones(seed: int) -> None:
    world = draw_world(seed)
    assert len(set(world.known)) == len(set(world.new)) == 40
    assert not {c.motion for c in world.known} & set(NEW_MOTIONS)
    assert {c.motion for c in world.new} <= set(NEW_MOTIONS)


def test_a_seed_draws_one_world() -> None:
    assert draw_world(3) == draw_world(3) != draw_world(4)


def centres(motion: str, seed: int) -> np.ndarray:
    """Centre (x, y) of the sprite in every frame, [T, 2]; NaN where nothing is seen."""
    frames = render_clip(SpriteClass("white", "square", motion), np.random.default_rng(seed), WHOLE)
    bright = frames.min(axis=-1) > 120
    axis = np.arange(frames.shape[1])
    with np.errstate(invalid="ignore"):
        count = bright.sum(axis=(1, 2))
        return np.stack(
            [(bright * axis).sum((1, 2)) / count, (bright * axis[:, None]).sum((1, 2)) / count], -1
        )


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 0, -1), ("moving right", 0, 1), ("rising", 1, -1), ("falling", 1, 1)],
)
def test_sprites_move_where_their_name_says(motion: str, axis: int, sign: int) -> None:
    for seed in range(5):
        path = centres(motion, seed)
        assert sign * (path[-1, axis] - path[0, axis]) > 5
        assert abs(path[-1, 1 - axis] - path[0, 1 - axis]) < 3


def test_growing_grows_shrinking_shrinks_blinking_vanishes() -> None:
    def areas(motion: str) -> np.ndarray:
        frames = render_clip(
            SpriteClass("white", "square", motion), np.random.default_rng(1), WHOLE
        )
        return (frames.min(axis=-1) > 120).sum(axis=(1, 2))

    assert areas("growing")[-1] > 1.3 * areas("growing")[0]
    assert areas("shrinking")[-1] < areas("shrinking")[0] / 1.3
    assert areas("blinking").min() == 0 < areas("blinking").max()


def test_the_files_hold_what_was_drawn(tmp_path: Path) -> None:
    sprite_class = SpriteClass("green", "cross", "circling")
    frames = render_clip(sprite_class, np.random.default_rng(0), WHOLE)
    path = tmp_path / "clip.mp4"
    encode_clip(frames, path)
    decoded = frames_of(PyAVDecoder(), path, range(FRAMES))
    assert np.abs(decoded.astype(int) - frames).mean() < 4  # grey levels; H.264 at crf 6


def test_a_world_is_written_once_and_its_files_do_not_change(tmp_path: Path) -> None:
    world = draw_world(0, known_classes=3, new_classes=2)
    folders = write_world(world, tmp_path / "a", train_clips=2, test_clips=1)
    again = write_world(world, tmp_path / "b", train_clips=2, test_clips=1)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.mp4"))
    assert len(files) == folders.clips == 3 * 3 + 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert {p.name for p in (again.known / "train").iterdir()} == {c.folder for c in world.known}

    before = {file: (tmp_path / "a" / file).stat().st_mtime_ns for file in files}
    write_world(world, tmp_path / "a", train_clips=2, test_clips=1)
    assert before == {file: (tmp_path / "a" / file).stat().st_mtime_ns for file in files}
    write_world(world, tmp_path / "a", train_clips=1, test_clips=1)
    assert len(list((tmp_path / "a").rglob("*.mp4"))) == 3 * 2 + 2


def accuracy(encoder: Encoder, names: list[str], describe: str) -> float:
    """Share of single frames whose best sentence names the right word of `describe`."""
    rng = np.random.default_rng(99)
    classes = [ALL_CLASSES[i] for i in rng.integers(len(ALL_CLASSES), size=400)]
    # Blinking sprites are not always there to be seen.
    classes = [c for c in classes if c.motion != "blinking"]
    frames = np.concatenate([render_clip(c, rng, rng.random(1)) for c in classes])
    images = normalize(encoder.encode_frames(frames), dim=-1)
    texts = normalize(encoder.encode_text(names), dim=-1)
    best = (images @ texts.T).argmax(1).tolist()
    wanted = [names.index(describe.format(c=c)) for c in classes]
    return float(np.mean([b == w for b, w in zip(best, wanted, strict=True)]))


def test_the_shipped_clip_knows_colours_and_shapes(small_clip: Encoder) -> None:
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    assert accuracy(small_clip, names, "a {c.colour} {c.shape}") > 0.8  # chance is 1/36


def test_the_shipped_clip_does_not_know_motions_from_one_frame(small_clip: Encoder) -> None:
    known = [f"a photo of a circle {motion}" for motion in MOTIONS]
    shares = accuracy(small_clip, known, "a photo of a circle {c.motion}")
    assert shares < 0.5


def test_the_shipped_file_is_small_and_says_how_it_was_made() -> None:
    packed = SHIPPED.read_bytes()
    assert len(packed) < 1_000_000
    tensors = safetensors.torch.load(packed)
    assert all(t.dtype in (torch.float16, torch.int64) for t in tensors.values())


def test_training_learns_and_gives_the_same_weights_for_the_same_seed() -> None:
    first, losses = train_small_clip(images=1024, epochs=3, batch=128, seed=5)
    second, _ = train_small_clip(images=1024, epochs=3, batch=128, seed=5)
    assert losses[-1] < losses[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    shipped = safetensors.torch.load(SHIPPED.read_bytes())
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in shipped.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_anew_gives_a_clip_as_good_as_the_shipped_one(
    small_clip: Encoder, tmp_path: Path
) -> None:
    with safetensors.safe_open(SHIPPED, "pt") as file:
        recipe = {name: int(value) for name, value in file.metadata().items()}
    state, _ = train_small_clip(**recipe)
    unpack(safetensors.torch.save(state), tmp_path / "anew")
    anew = load_encoder(tmp_path / "anew", "fp32")
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    sentence = "a {c.colour} {c.shape}"
    assert accuracy(anew, names, sentence) == pytest.approx(
        accuracy(small_clip, names, sentence), abs=0.05
    )
