"""Clips for fine-tuning, straight from packed tars: augmented for training, plain for evaluation.

n usable clips of a batch, T frames of a clip, h, w input of the tower.

Training follows the released code of MoTE (Zhu et al., NeurIPS 2024): a random frame of each of T
segments, and one augmentation for all frames of the clip.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from featstore.balance import members_of
from featstore.errors import UserError
from featstore.segments import IntArray
from pipeline.augmentation import resized_for_training, training_pixels
from pipeline.decoding.contract import Frames
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import validation_indices
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.loader import ClipBatch, ClipLoader, clip_labels
from pipeline.video_clips.mirroring import NEVER
from pipeline.video_clips.order import (
    ListedClip,
    augmentation_rng,
    balanced_draws,
    epoch_order,
    list_digest,
    mirror_draw,
    rank_parts,
    steps_per_epoch,
    training_frames,
)


class ClipStream(ClipLoader):
    """The training clips of one rank, epoch by epoch.

    `steps_per_epoch` is the number of global batches of `batch_size * world_size` clips. `digest`
    is equal on ranks and runs whose order is the same for the same seed; `keys` name the clips, and
    `labels` are those of the usable ones (`clip_labels`).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        preprocessing: Preprocessing,
        seed: int,
        augment: bool = True,
        balanced: bool = False,
        mirrored: IntArray | None = None,
        **loading: Any,
    ) -> None:
        """`loading` holds the other arguments of `ClipLoader`, whose errors are raised.

        A `balanced` epoch has as many clips, but all classes equally often (`balanced_draws`).
        `mirrored` int64 [C] says which class a mirrored clip of each class shows
        (`pipeline.video_clips.mirroring`), which it is then labelled with; a clip without such a
        class, or with several of its own, is not mirrored. With None every clip may be, and keeps
        its label. A draw of its own decides, as the clip's label is needed before its pixels.
        Without `augment`, frames are still drawn at random, but cropped as in evaluation. Also
        raises UserError if frames are to be augmented and the tower's input is not square.
        """
        size = preprocessing.size
        if augment and size[0] != size[1]:
            raise UserError(
                f"the encoder takes {size[0]}x{size[1]} pixels: augmentation needs a square input, "
                "so train without augmentation"
            )
        resized = resized_for_training(size[0]) if augment else size
        super().__init__(dataset, preprocessing=preprocessing, resized=resized, **loading)
        self._seed, self._augment, self._mirrored = seed, augment, mirrored
        self._tars = np.array([clip.tar for clip in self._clips], np.int64)
        self.steps_per_epoch = steps_per_epoch(self.n_listed, self._batch_size, self._world_size)
        self.digest = list_digest(self._clips)
        self.keys = [clip.key for clip in self._clips]
        usable = np.array([not clip.reason for clip in self._clips])
        self.labels = clip_labels([c for c in self._clips if not c.reason], self._classes)
        self._members: list[IntArray] = []
        self._unusable = np.flatnonzero(~usable)
        if balanced and usable.any():
            where = np.flatnonzero(usable)
            self._members = [where[members] for members in members_of(self.labels)]

    def epoch(self, epoch: int, start: int = 0) -> Generator[ClipBatch, None, None]:
        """Yield this rank's part of the epoch's global batches from number `start` on.

        They are bit for bit the batches that follow the first `start` in the whole epoch (except,
        with NVDEC, videos of sizes that NVDEC and PyAV divide in the order in which they come).
        `frames` of a batch are float32 [n,T,3,h,w]. Close the iterator to end its threads early
        (`contextlib.closing`); they only finish the clips that they have begun.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"step {start} of an epoch of {self.steps_per_epoch} steps")
        places = np.arange(self.n_listed)
        if self._members:
            places = balanced_draws(self._members, self._unusable, self.n_listed, self._seed, epoch)
        order = epoch_order(self._tars[places % self.n_listed], self._seed, epoch)
        order = places[order]
        return self.decoded(
            rank_parts(order, self._batch_size, self._rank, self._world_size, start),
            partial(self._choose, epoch),
            partial(self._pixels, epoch),
            partial(self._seen, epoch),
        )

    def _seen(self, epoch: int, clip: ListedClip) -> ListedClip:
        if self._mirrored is None or not self._flips(epoch, clip):
            return clip
        return replace(clip, label=int(self._mirrored[clip.label]))

    def _may_mirror(self, clip: ListedClip) -> bool:
        if self._mirrored is None or not self._augment or clip.label < 0:
            return False
        return bool(self._mirrored[clip.label] != NEVER)

    def _flips(self, epoch: int, clip: ListedClip) -> bool | None:
        """Return whether a clip is mirrored; None: its augmentation draws it among the rest."""
        if self._mirrored is None:
            return None
        return self._may_mirror(clip) and mirror_draw(self._seed, epoch, clip.position)

    def _choose(self, epoch: int, clip: ListedClip, num_frames: int) -> IntArray:
        return training_frames(num_frames, self._frames, self._seed, epoch, clip.position)

    def _pixels(self, epoch: int, clip: ListedClip, frames: Frames) -> torch.Tensor:
        if not self._augment:
            return self._preprocessing.crop_pixels(frames)[0]
        rng = augmentation_rng(self._seed, epoch, clip.position)
        flip = self._flips(epoch, clip)
        return training_pixels(frames, self._preprocessing.size[0], rng, flip)


class EvaluationClips(ClipLoader):
    """The clips of a split for validation: one over the whole of every video, in listed order.

    Frames and the centre crop are those of extraction with one clip and one crop. A rank has the
    videos `rank::world_size`; nothing is padded or repeated, so ranks may have different numbers of
    batches.
    """

    def batches(self) -> Generator[ClipBatch, None, None]:
        """Yield this rank's videos in batches; `frames` are float32 [n,T,3,h,w]."""
        return self.decoded(
            rank_parts(np.arange(self._rank, self.n_listed, self._world_size), self._batch_size),
            self._choose,
            self._pixels,
        )

    def _choose(self, clip: ListedClip, num_frames: int) -> IntArray:
        return validation_indices(num_frames, self._frames)

    def _pixels(self, clip: ListedClip, frames: Frames) -> torch.Tensor:
        return self._preprocessing.crop_pixels(frames)[0]
