"""Clips for fine-tuning, straight from packed tars: augmented for training, plain for evaluation.

n clips of a batch that are there, T frames of a clip, s side of the tower's input, V views of a
video (crop by crop, then clip by clip), h, w input of the tower.

Training follows the released code of MoTE (Zhu et al., NeurIPS 2024): a random frame of each of T
segments, and one augmentation for all frames of the clip.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from featstore.errors import UserError
from featstore.files.machine import usable_cores
from featstore.segments import IntArray
from pipeline.augmentation import resized_for_training, training_pixels
from pipeline.decoding import decoder_named
from pipeline.decoding.contract import Decoder, Frames
from pipeline.decoding.nvdec.decoder import NvdecDecoder
from pipeline.decoding.nvdec.graphs import wants_dali
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import Sampling
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.loader import ClipBatch, ClipFailure, ClipLoader
from pipeline.video_clips.order import (
    TARS_TOGETHER,
    ListedClip,
    augmentation_rng,
    epoch_order,
    list_digest,
    listed_clips,
    rank_parts,
    steps_per_epoch,
    training_frames,
)

__all__ = ["ClipBatch", "ClipFailure", "ClipStream", "EvaluationClips"]


class ClipStream:
    """The training clips of one rank, epoch by epoch.

    `n_listed` clips, `steps_per_epoch` global batches of `batch_size * world_size` clips. `digest`
    is equal on ranks and runs whose order is the same for the same seed. `decoder_name` is that of
    the decoder in use.
    """

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        *,
        split: str | None,
        frames: int,
        preprocessing: Preprocessing,
        batch_size: int,
        seed: int,
        decoder: str | Decoder = "auto",
        device: str | torch.device = "cpu",
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        augment: bool = True,
        tars_together: int = TARS_TOGETHER,
    ) -> None:
        """`folder` is the packed data set's, `batch_size` this rank's part of a global batch.

        `workers` threads decode, by default as many as there are cores: ranks that share a machine
        must share these out. Without `augment` frames are drawn all the same, and cropped as in
        evaluation. Raises UserError for a split that is unknown or empty, for a decoder that cannot
        be used here, and for augmentation towards an input that is not square.
        """
        size = preprocessing.size
        if augment and size[0] != size[1]:
            raise UserError(
                f"the encoder takes {size[0]}x{size[1]} pixels: augmentation needs a square input, "
                "train without it"
            )
        _require_rank(batch_size, rank, world_size)
        self._clips = listed_clips(dataset, folder, split)
        self._frames, self._seed = frames, seed
        self._preprocessing, self._augment = preprocessing, augment
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._tars = np.array([clip.tar for clip in self._clips], np.int64)
        self._tars_together = tars_together
        device = torch.device(device)
        decoder, workers = _decoder(decoder, device, workers or usable_cores())
        self.decoder_name = decoder.name
        self.n_listed = len(self._clips)
        self.steps_per_epoch = steps_per_epoch(self.n_listed, batch_size, world_size)
        self.digest = list_digest(self._clips)
        self._loader = ClipLoader(
            dataset,
            folder,
            self._clips,
            decoder=decoder,
            preprocessing=preprocessing,
            resized=resized_for_training(size[0]) if augment else size,
            shape=(frames, 3, *size),
            batch_size=batch_size,
            workers=workers,
            pinned=device.type == "cuda",
        )

    @property
    def keys(self) -> list[str]:
        """Keys of the listed clips."""
        return [clip.key for clip in self._clips]

    def epoch(self, epoch: int, start: int = 0) -> Generator[ClipBatch, None, None]:
        """This rank's part of the epoch's global batches from number `start` on.

        The batches are those that come after `start` of the epoch from its beginning, bit for bit
        (with NVDEC but for videos of sizes that it and PyAV share out as they come).
        `frames` of a batch are float32 [n,T,3,s,s]. Close the iterator to end its threads early
        (`contextlib.closing`); they decode nothing more than the clips that they are at.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"step {start} of an epoch of {self.steps_per_epoch} steps")
        order = epoch_order(self._tars, self._seed, epoch, self._tars_together)
        return self._loader.batches(
            rank_parts(order, self._batch_size, self._rank, self._world_size, start),
            partial(self._choose, epoch),
            partial(self._pixels, epoch),
        )

    def _choose(self, epoch: int, clip: ListedClip, num_frames: int) -> IntArray:
        return training_frames(num_frames, self._frames, self._seed, epoch, clip.position)

    def _pixels(self, epoch: int, clip: ListedClip, frames: Frames) -> torch.Tensor:
        if not self._augment:
            return self._preprocessing.crop_pixels(frames)[0]
        rng = augmentation_rng(self._seed, epoch, clip.position)
        return training_pixels(frames, self._preprocessing.size[0], rng)


class EvaluationClips:
    """The clips of a split for the close-set protocol: every listed video once, in listed order.

    V = `crops` x `clips` views of `frames` frames, placed as extraction places them: one clip over
    the whole video, or several. A rank has the videos `rank::world_size`; nothing is padded or
    repeated, so ranks may have different numbers of batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        *,
        split: str | None,
        frames: int,
        preprocessing: Preprocessing,
        batch_size: int,
        clips: int = 1,
        crops: int = 1,
        decoder: str | Decoder = "auto",
        device: str | torch.device = "cpu",
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """As in `ClipStream`; `batch_size` counts videos. Raises UserError for other crops too."""
        preprocessing.require_crops(crops)
        _require_rank(batch_size, rank, world_size)
        self._clips = listed_clips(dataset, folder, split)
        self._sampling = Sampling("uniform" if clips == 1 else "clips", frames, clips)
        self._preprocessing, self._crops = preprocessing, crops
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        device = torch.device(device)
        decoder, workers = _decoder(decoder, device, workers or usable_cores())
        self.decoder_name = decoder.name
        self.n_listed = len(self._clips)
        self._shape = (crops * clips, frames, 3, *preprocessing.size)
        self._loader = ClipLoader(
            dataset,
            folder,
            self._clips,
            decoder=decoder,
            preprocessing=preprocessing,
            resized=preprocessing.size,
            shape=self._shape,
            batch_size=batch_size,
            workers=workers,
            pinned=device.type == "cuda",
        )

    def batches(self) -> Generator[ClipBatch, None, None]:
        """This rank's videos in batches; `frames` are float32 [n,V,T,3,h,w]."""
        own = np.arange(self._rank, self.n_listed, self._world_size)
        return self._loader.batches(rank_parts(own, self._batch_size), self._choose, self._pixels)

    def _choose(self, clip: ListedClip, num_frames: int) -> IntArray:
        return self._sampling.indices(num_frames).reshape(-1)

    def _pixels(self, clip: ListedClip, frames: Frames) -> torch.Tensor:
        pixels = self._preprocessing.crop_pixels(frames, self._crops)
        return rearrange(pixels, "c (v t) ... -> (c v) t ...", v=self._sampling.clips)


def _decoder(decoder: str | Decoder, device: torch.device, workers: int) -> tuple[Decoder, int]:
    """The decoder, and how many threads are to use it."""
    if isinstance(decoder, str):
        if wants_dali(decoder, str(device)):
            decoder = NvdecDecoder(PyAVDecoder(), device, threads=max(workers, 4))
        else:
            decoder = decoder_named(decoder)
    if isinstance(decoder, NvdecDecoder):
        # Most of them wait: one batch is being decoded, the next one collected.
        workers = max(workers, 2 * decoder.batch_videos)
    return decoder, workers


def _require_rank(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
