"""Batches of clips for training and its evaluation, decoded ahead by threads, in order.

n usable clips of a batch, T frames of a clip, h, w input of the tower.

One thread reads a clip, decodes it and writes it into the batch. What is prepared ahead of the
consumer is bounded: whole batches by number and bytes, files and decoded frames by bytes. No thread
depends on another, so the batches are the same for any number of threads.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featstore.errors import one_line
from featstore.format.spans import shown_classes
from featstore.segments import IntArray
from pipeline.decoding import decoder_named
from pipeline.decoding.chosen_frames import decode_chosen
from pipeline.decoding.contract import DecodeError, Decoder, Frames, VideoInfo
from pipeline.decoding.nvdec.decoder import NvdecDecoder
from pipeline.decoding.nvdec.graphs import wants_dali
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.preprocessing import Preprocessing
from pipeline.tars.dataset import Dataset
from pipeline.tars.reading import DamagedTar, damage_of, read_video
from pipeline.video_clips.order import ListedClip, listed_clips, of_classes

BATCHES_AHEAD = 2
AHEAD_BYTES = 2 << 30  # of those batches; at least one is always prepared ahead
FILE_BYTES = 1 << 30  # of the files being decoded; a larger file is decoded alone
FRAME_BYTES = 2 << 30  # of the decoded frames that are not yet pixels; larger ones are held alone


@dataclass(frozen=True)
class ClipBatch:
    """One rank's part of a global batch.

    `frames` float32 [n,T,3,h,w], normalised, in pinned memory where the device is a GPU; `labels`
    and `positions` int64 [n] (labels uint8 [n, classes] where a video may show several classes);
    `keys` of the same clips; n may be 0. `failed` holds key and reason of the clips that could not
    be used. `waited` is how many seconds the consumer waited for the batch.
    """

    frames: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    keys: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    waited: float = 0.0


class ClipLoader:
    """Decodes the clips of a split into batches; holds no threads between uses.

    `n_listed` is the number of clips, `decoder_name` the name of the decoder in use.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        split: str | None,
        frames: int,
        preprocessing: Preprocessing,
        batch_size: int,
        workers: int,
        resized: tuple[int, int] | None = None,
        decoder: str | Decoder = "auto",
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        excluded: Collection[str] = (),
        classes: Sequence[int] | None = None,
    ) -> None:
        """T = `frames`; `batch_size` is this rank's part of a global batch.

        The videos whose keys are `excluded` do not belong to the split here, nor do those of
        other classes than `classes`, whose labels are then numbers in this list.

        Frames are resized to the short side of `resized`, by default that of the tower's input.
        `workers` threads decode: ranks on one machine must divide its cores among them. Raises
        UserError for a split that is unknown or empty and for a decoder that cannot be used here.
        """
        self._dataset = dataset
        self._clips = listed_clips(dataset, split, excluded)
        if classes is not None:
            self._clips = of_classes(self._clips, classes)
        self.n_listed = len(self._clips)
        self._classes = len(dataset.class_names) if dataset.multi_label else 0
        self._frames, self._preprocessing = frames, preprocessing
        self._resized = resized or preprocessing.size
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        device = torch.device(device)
        self._pinned = device.type == "cuda"
        if isinstance(decoder, str):
            if wants_dali(decoder, str(device)):
                decoder = NvdecDecoder(PyAVDecoder(), device, threads=max(workers, 4))
            else:
                decoder = decoder_named(decoder)
        if isinstance(decoder, NvdecDecoder):
            # Most threads wait: one batch is being decoded, the next one collected.
            workers = max(workers, 2 * decoder.batch_videos)
        self._decoder, self._workers = decoder, workers
        self.decoder_name = decoder.name
        self._shape: tuple[int, ...] = (frames, 3, *preprocessing.size)
        bytes_of_batch = batch_size * 4 * math.prod(self._shape)
        self._ahead = min(BATCHES_AHEAD, max(1, AHEAD_BYTES // bytes_of_batch))

    def decoded(
        self,
        parts: Iterable[IntArray],
        choose: Callable[[ListedClip, int], IntArray],
        pixels: Callable[[ListedClip, Frames], torch.Tensor],
        seen: Callable[[ListedClip], ListedClip] = lambda clip: clip,
    ) -> Generator[ClipBatch, None, None]:
        """Yield a batch for each of `parts` (positions, int64), in their order.

        `choose` gives the frame indices of a clip with so many frames, `pixels` makes uint8
        [T,3,h,w] of the decoded frames, or float32 that is normalised already; several threads call
        both. `seen` gives the clip that training sees, which may have another label. When the
        iterator is closed or its user fails, the threads finish their clips and end. Raises what
        `pixels` raises.
        """
        budgets = _ByteBudget(FILE_BYTES), _ByteBudget(FRAME_BYTES)
        load = partial(self._load, choose, pixels, *budgets)
        begun: deque[_Begun] = deque()
        remaining = iter(parts)
        threads = worker_threads(self._workers)
        try:
            while True:
                began = perf_counter()
                while len(begun) <= self._ahead and (part := next(remaining, None)) is not None:
                    clips = [seen(self._clip(place)) for place in part.tolist()]
                    begun.append(self._begin(clips, threads, load))
                if not begun:
                    return
                # No variable holds the batch: it must not live on during the wait for the next one.
                yield _finished(began, *begun.popleft(), self._classes, self.n_listed)
        finally:
            for budget in budgets:
                budget.stop()
            threads.shutdown(wait=True, cancel_futures=True)

    def _clip(self, place: int) -> ListedClip:
        """Return the clip at a place of an epoch, which is its position but for repeated clips."""
        times, position = divmod(place, self.n_listed)
        clip = self._clips[position]
        return replace(clip, position=place) if times else clip

    def _begin(
        self,
        clips: list[ListedClip],
        threads: ThreadPoolExecutor,
        load: Callable[[ListedClip, torch.Tensor], str],
    ) -> _Begun:
        usable = sum(not clip.reason for clip in clips)
        frames = torch.empty((usable, *self._shape), pin_memory=self._pinned and usable > 0)
        slots = iter(frames)
        return (
            clips,
            [clip.reason or threads.submit(load, clip, next(slots)) for clip in clips],
            frames,
        )

    def _load(
        self,
        choose: Callable[[ListedClip, int], IntArray],
        pixels: Callable[[ListedClip, Frames], torch.Tensor],
        file_budget: _ByteBudget,
        frame_budget: _ByteBudget,
        clip: ListedClip,
        slot: torch.Tensor,
    ) -> str:
        """Fill float32 `slot` [T,3,h,w]; returns why it stays empty, "" when it does not."""
        tar = self._dataset.tars[clip.tar]
        try:
            with file_budget.holding(clip.size), ExitStack() as held:
                data = read_video(self._dataset, tar, clip.key, clip.offset, clip.size)
                # This takes 0.1 ms where decoding takes 20 ms, and is the only way to notice much
                # of the damage.
                if clip.sha256 and hashlib.sha256(data).hexdigest() != clip.sha256:
                    what = f"is damaged: the sha256 of {clip.key!r} differs"
                    raise damage_of(self._dataset, tar)(what)

                def chosen(found: VideoInfo) -> IntArray:
                    indices = choose(clip, found.num_frames)
                    held.close()  # decoders may call this twice
                    needed = 3 * found.width * found.height * len(indices)
                    held.enter_context(frame_budget.holding(needed))
                    return indices

                info, frames, _ = decode_chosen(data, self._decoder, chosen, self._resized)
                del data
                if info.num_frames != clip.num_frames:
                    raise DecodeError(
                        f"{info.num_frames} frames are found, {clip.num_frames} were packed"
                    )
                made = pixels(clip, frames)
                if made.is_floating_point():
                    slot.copy_(made)
                else:
                    self._preprocessing.normalise(made, out=slot)
        except (DecodeError, DamagedTar) as error:
            return one_line(error)
        return ""


def clip_labels(clips: Sequence[ListedClip], classes: int) -> npt.NDArray[Any]:
    """Return the labels of clips, int64 [n], or with `classes` uint8 [n, classes] of 0 and 1."""
    if not classes:
        return np.array([clip.label for clip in clips], np.int64)
    return shown_classes([clip.spans for clip in clips], classes).astype(np.uint8)


# A batch in work: its clips, for each the reason why it is unusable ("" if it is not), and frames.
_Begun = tuple[list[ListedClip], list[Future[str] | str], torch.Tensor]


def _finished(
    began: float,
    clips: list[ListedClip],
    results: list[Future[str] | str],
    frames: torch.Tensor,
    classes: int,
    listed: int,
) -> ClipBatch:
    """Wait for the clips of a batch; `began` is when the consumer began to wait.

    `classes` is their number where a clip may show several of them, else 0.
    """
    reasons = [x if isinstance(x, str) else x.result() for x in results]
    good = [clip for clip, reason in zip(clips, reasons, strict=True) if not reason]
    if len(good) < len(frames):
        pinned = frames.is_pinned() and len(good) > 0
        filled = [not r for clip, r in zip(clips, reasons, strict=True) if not clip.reason]
        frames = frames[torch.tensor(filled)]
        frames = frames.pin_memory() if pinned else frames
    return ClipBatch(
        frames=frames,
        labels=torch.from_numpy(clip_labels(good, classes)),
        positions=torch.tensor([clip.position % listed for clip in good], dtype=torch.int64),
        keys=tuple(clip.key for clip in good),
        failed=tuple((c.key, why) for c, why in zip(clips, reasons, strict=True) if why),
        waited=perf_counter() - began,
    )


class _ByteBudget:
    """Lets threads hold at most `limit` bytes together; a thread that is alone may hold more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._stopped = False
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Wait until `count` more bytes are allowed. Raises `DecodeError` after `stop`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not self._used or self._used + count <= self._limit
            )
            if self._stopped:  # the consumer has gone: nobody will read the reason
                raise DecodeError("not decoded: the work was stopped")
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()

    def stop(self) -> None:
        """Allow no more bytes, and wake the waiting threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def worker_threads(count: int) -> ThreadPoolExecutor:
    """Start `count` threads with one torch thread each; the caller's number stays as it is.

    `torch.set_num_threads` sets a number for the thread in OpenMP, and for the process in MKL and
    in threads that have not used torch yet. So all workers set their number and use torch before
    the caller's number is set again.
    """
    before = torch.get_num_threads()
    threads = ThreadPoolExecutor(count, "clips")
    everybody = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # asking makes it this thread's own
        everybody.wait()

    try:
        for _ in range(count):
            threads.submit(begin)
        everybody.wait()
    except BaseException:
        everybody.abort()
        threads.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(before)
    return threads
