"""Clips as DiST trains on them: its sampling, floating pixels, and mirrored clips' labels.

C = classes, T = frames of a clip.

Source: DiST (Qing et al., ICCV 2023), its released code and configurations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from featstore.segments import IntArray
from pipeline.decoding.contract import Frames
from pipeline.float_frames import augmented_floats, draws_flip, evaluation_floats
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import dist_test_indices
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.order import ListedClip, augmentation_rng, dist_training_frames
from pipeline.video_clips.stream import ClipStream, EvaluationClips

NEVER: Final = -1
_COUNTER: Final = ("counterclockwise", "anticlockwise", "counter-clockwise", "anti-clockwise")
_MIRRORED: Final = {
    "left": "right",
    "right": "left",
    "clockwise": _COUNTER[0],
    **dict.fromkeys(_COUNTER, "clockwise"),
}
_SIDE: Final = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(_MIRRORED, key=len, reverse=True))})(?![a-z])"
)


def mirrored_classes(class_names: Sequence[str]) -> IntArray:
    """Return which class a mirrored clip of each class shows, int64 [C], by the names.

    A name with left or right in it, or with a sense of rotation, is another class in the mirror:
    the one of the mirrored name, or `NEVER` (such a clip must not be mirrored) if there is none.
    Every other class is its own.
    """
    plain = [name.casefold() for name in class_names]
    place = {name: at for at, name in enumerate(plain)}
    found = [
        next((place[other] for other in _mirror_images(name) if other in place), NEVER)
        for name in plain
    ]
    # Both must agree, or a clip would be mirrored into a class whose clips never are.
    both = [at if at != NEVER and found[at] == own else NEVER for own, at in enumerate(found)]
    return np.array(both, np.int64)


def _mirror_images(name: str) -> Iterator[str]:
    for counter in _COUNTER:
        other = _MIRRORED | {"clockwise": counter}
        parts = _SIDE.split(name)  # sides stand between the other parts
        yield "".join(other.get(part, part) for part in parts)


def mirrored(how: str, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `FloatClipStream` for a way of mirroring.

    It is "" (never), "plain" (every clip, which keeps its label) or "names" (by
    `mirrored_classes`).
    """
    if how == "names":
        return {"mirrored": mirrored_classes(class_names), "flip_last": True}
    return {"mirrored": np.arange(len(class_names)) if how == "plain" else None}


class FloatClipStream(ClipStream):
    """The training clips of one rank, as `ClipStream`, in DiST's way.

    `mirrored` int64 [C] says which class a mirrored clip of each class shows (`mirrored_classes`);
    None: no clip is mirrored. With `flip_last`, a finished clip is mirrored (as published for
    Something-Something), else its whole frames before the crop (Kinetics).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        preprocessing: Preprocessing,
        mirrored: IntArray | None = None,
        flip_last: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(dataset, preprocessing=preprocessing, **loading)
        self._resized = preprocessing.size  # nothing is resized before it is cut
        self._mirrored, self._flip_last = mirrored, flip_last

    def _seen(self, epoch: int, clip: ListedClip) -> ListedClip:
        flips = self._may_mirror(clip) and draws_flip(
            augmentation_rng(self._seed, epoch, clip.position)
        )
        if self._mirrored is None or not flips:
            return clip
        return replace(clip, label=int(self._mirrored[clip.label]))

    def _may_mirror(self, clip: ListedClip) -> bool:
        if self._mirrored is None or not self._augment or clip.label < 0:
            return False
        return bool(self._mirrored[clip.label] != NEVER)

    def _choose(self, epoch: int, clip: ListedClip, num_frames: int) -> IntArray:
        return dist_training_frames(num_frames, self._frames, self._seed, epoch, clip.position)

    def _pixels(self, epoch: int, clip: ListedClip, frames: Frames) -> torch.Tensor:
        made = self._preprocessing
        colours: dict[str, Any] = {"mean": made.mean, "std": made.std}
        if not self._augment:
            return evaluation_floats(frames, made.size[0], **colours)[0]
        rng = augmentation_rng(self._seed, epoch, clip.position)
        return augmented_floats(
            frames,
            made.size[0],
            rng,
            mirror=self._may_mirror(clip),
            flip_last=self._flip_last,
            **colours,
        )


class FloatEvaluationClips(EvaluationClips):
    """The clips of a split for validation, as `EvaluationClips`: middle frames, centre crop."""

    def _choose(self, clip: ListedClip, num_frames: int) -> IntArray:
        indices: IntArray = dist_test_indices(num_frames, self._frames, 1)[0]
        return indices

    def _pixels(self, clip: ListedClip, frames: Frames) -> torch.Tensor:
        made = self._preprocessing
        return evaluation_floats(frames, made.size[0], mean=made.mean, std=made.std)[0]
