"""Clips as DiST trains on them: its sampling and floating pixels.

C = classes, T = frames of a clip.

Source: DiST (Qing et al., ICCV 2023), its released code and configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from featstore.segments import IntArray
from pipeline.decoding.contract import Frames
from pipeline.float_frames import augmented_floats, draws_flip, evaluation_floats
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import dist_test_indices
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.mirroring import mirrored_classes
from pipeline.video_clips.order import ListedClip, augmentation_rng, dist_training_frames
from pipeline.video_clips.stream import ClipStream, EvaluationClips


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
        super().__init__(dataset, preprocessing=preprocessing, mirrored=mirrored, **loading)
        self._resized = preprocessing.size  # nothing is resized before it is cut
        self._flip_last = flip_last

    def _flips(self, epoch: int, clip: ListedClip) -> bool | None:
        return self._may_mirror(clip) and draws_flip(
            augmentation_rng(self._seed, epoch, clip.position)
        )

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
