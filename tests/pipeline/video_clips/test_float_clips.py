"""DiST's clips: its draws of frames and pixels, and the labels of mirrored clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heads.methods.dist.training import MIRRORED
from pipeline.float_frames import augmented_floats, evaluation_floats
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import dist_edges, dist_test_indices, dist_train_indices
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.float_clips import FloatClipStream, FloatEvaluationClips, mirrored
from pipeline.video_clips.loader import ClipBatch
from pipeline.video_clips.mirroring import NEVER, mirrored_classes
from pipeline.video_clips.order import augmentation_rng, dist_training_frames
from tests.pipeline.video_clips.test_training_clips import Pictures, numbered

SMALL, SEED, FRAMES = Preprocessing(size=(32, 32)), 11, 8
NAMES = ("turn left", "turn right", "jump", "Wave the LEFT hand")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return numbered(tmp_path_factory.mktemp("numbers") / "made")


def loading(**changes: Any) -> dict[str, Any]:
    usual = {"split": "train", "frames": FRAMES, "preprocessing": SMALL, "batch_size": 3}
    return usual | {"decoder": Pictures(), "workers": 2} | changes


def stream(dataset: Dataset, **changes: Any) -> FloatClipStream:
    return FloatClipStream(dataset, **loading(seed=SEED, **changes))


def pictures(number: int, indices: Any) -> Any:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (12, 40, 40, 3), np.uint8)[indices]


def each(batches: Any) -> dict[str, tuple[torch.Tensor, int, int]]:
    """Pixels, label and position of every clip by key."""
    found = {}
    for batch in batches:
        assert isinstance(batch, ClipBatch)
        rows = zip(batch.keys, batch.frames, batch.labels.tolist(), strict=True)
        for (key, pixels, label), at in zip(rows, batch.positions.tolist(), strict=True):
            found[key] = (pixels, label, at)
    return found


def test_names_with_a_side_change_in_the_mirror() -> None:
    sides = ("spin it clockwise", "spin it counterclockwise", "from left to right", "upright")
    assert mirrored_classes((*NAMES, *sides)).tolist() == [1, 0, 2, NEVER, 5, 4, NEVER, 7]
    assert mirrored_classes(("from left to right", "from right to left")).tolist() == [1, 0]
    two = ("turn clockwise", "turn anticlockwise", "turn anti-clockwise")
    assert sorted(mirrored_classes(two).tolist()) == [NEVER, 0, 1]


def test_the_names_of_something_something_give_the_published_swaps() -> None:
    names = [f"doing {number}" for number in range(174)]
    for first, word in ((86, "Pulling"), (93, "Pushing")):
        names[first] = f"{word} something from left to right"
        names[first + 1] = f"{word} something from right to left"
    names[166:168] = [f"Turning the camera {side} while filming something" for side in
                      ("left", "right")]  # fmt: skip
    found = mirrored_classes(names)
    assert {n: int(other) for n, other in enumerate(found) if n != other} == MIRRORED


def test_frames_come_from_segments_and_their_right_ends_too() -> None:
    drawn = np.array([dist_training_frames(12, 4, SEED, 0, at) for at in range(400)])
    edges = np.clip(dist_edges(12, 4), 0, 11)
    assert (drawn.min(0) == edges[:-1]).all()
    assert (drawn.max(0) == edges[1:]).all()
    assert not (dist_training_frames(99, FRAMES, SEED, 0, 3)
                == dist_training_frames(99, FRAMES, SEED, 1, 3)).all()  # fmt: skip
    draws = np.random.default_rng([2, SEED, 4, 7]).random(FRAMES, np.float32)
    wanted = dist_train_indices(50, FRAMES, draws)
    assert dist_training_frames(50, FRAMES, SEED, 4, 7).tolist() == wanted.tolist()


@pytest.mark.parametrize("how", ["", "plain", "names"])
def test_pixels_and_labels_are_those_of_the_draws(numbers: Dataset, how: str) -> None:
    labels = {key: label for key, (_, label, _) in each(stream(numbers).epoch(0)).items()}
    classes = max(labels.values()) + 1
    names = [NAMES[n] if n < len(NAMES) else f"class {n}" for n in range(max(classes, 4))]
    ways = mirrored(how, names)
    flipped = 0
    for epoch in range(3):
        found = each(stream(numbers, **ways).epoch(epoch))
        assert found.keys() == labels.keys()
        for key, (pixels, label, position) in found.items():
            indices = dist_training_frames(12, FRAMES, SEED, epoch, position)
            other = {"": NEVER, "plain": labels[key]}.get(
                how, int(mirrored_classes(names)[labels[key]])
            )
            rng = augmentation_rng(SEED, epoch, position)
            flips = bool(rng.random() < 0.5) and other != NEVER
            flipped += flips
            assert label == (other if flips else labels[key])
            wanted = augmented_floats(
                pictures(int(key[1:]), indices),
                32,
                augmentation_rng(SEED, epoch, position),
                mirror=flips,
                flip_last=how == "names",
            )
            assert torch.equal(pixels, wanted)
    assert (flipped > 0) == (how != "")


def test_a_clip_mirrored_last_is_the_mirror_of_the_other() -> None:
    frames = pictures(5, np.arange(4))
    seed = next(n for n in range(9) if np.random.default_rng(n).random() < 0.5)
    both = [
        augmented_floats(frames, 32, np.random.default_rng(seed), mirror=m, flip_last=True)
        for m in (True, False)
    ]
    assert torch.equal(both[0].flip(-1), both[1])


def test_without_augmentation_only_the_frames_are_drawn(numbers: Dataset) -> None:
    ways = mirrored("plain", ["a"] * 30)
    for key, (pixels, _, position) in each(stream(numbers, augment=False, **ways).epoch(2)).items():
        indices = dist_training_frames(12, FRAMES, SEED, 2, position)
        wanted = evaluation_floats(pictures(int(key[1:]), indices), 32)[0]
        assert torch.equal(pixels, wanted)


def test_validation_takes_the_middles_and_the_centre(numbers: Dataset) -> None:
    found = each(FloatEvaluationClips(numbers, **loading()).batches())
    assert len(found) == 20
    for key, (pixels, _, _) in found.items():
        frames = pictures(int(key[1:]), dist_test_indices(12, FRAMES, 1)[0])
        assert torch.equal(pixels, evaluation_floats(frames, 32)[0])


def test_ranks_share_an_epoch_and_a_part_of_it_is_the_same(numbers: Dataset) -> None:
    ways = mirrored("plain", ["a"] * 30)
    whole = each(stream(numbers, **ways).epoch(1))
    parts: dict[str, tuple[torch.Tensor, int, int]] = {}
    for rank in range(2):
        parts |= each(stream(numbers, rank=rank, world_size=2, **ways).epoch(1))
    rest = each(stream(numbers, **ways).epoch(1, start=4))
    assert parts.keys() == whole.keys()
    assert len(rest) == 20 - 4 * 3
    for made in (parts, rest):
        assert all(torch.equal(pixels, whole[key][0]) for key, (pixels, _, _) in made.items())


def test_frames_of_several_sizes_are_augmented_alike(tmp_path: Path) -> None:
    frame = pictures(3, np.arange(1))[0]
    mixed = np.empty(2, object)
    mixed[0], mixed[1] = frame, frame.repeat(2, 0).repeat(2, 1)
    draws = {"mirror": True, "flip_last": False}
    made = augmented_floats(mixed, 32, np.random.default_rng(4), **draws)  # type: ignore[arg-type]
    alone = [
        augmented_floats(each[None], 32, np.random.default_rng(4), **draws)  # type: ignore[arg-type]
        for each in mixed
    ]
    assert torch.equal(made, torch.cat(alone))
    views = evaluation_floats(mixed, 32, crops=1)
    assert views.shape == (1, 2, 3, 32, 32)
    assert torch.equal(views[:, 1:], evaluation_floats(mixed[1][None], 32))
