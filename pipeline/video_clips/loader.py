"""Batches of clips decoded ahead by threads, in order: what training and its evaluation read from.

n clips of a batch that are there, T frames of a clip, h, w input of the tower; a clip's pixels have
whatever shape the loader is told, ending in [3,h,w].

Every clip is read, decoded and put into its place of the batch by one thread. What is ahead of the
consumer is bounded: whole batches by number and bytes, files and decoded frames by bytes. Nothing a
thread does depends on another, so the batches are the same for any number of them.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from featstore.errors import one_line
from featstore.segments import IntArray
from pipeline.decoding.chosen_frames import decode_chosen
from pipeline.decoding.contract import DecodeError, Decoder, Frames, VideoInfo
from pipeline.preprocessing import Preprocessing
from pipeline.tars.dataset import TARS_FOLDER, Dataset
from pipeline.tars.reading import DamagedTar, read_video
from pipeline.video_clips.order import ListedClip

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
AHEAD_BYTES = 2 << 30  # of those batches; one is always prepared ahead
FILE_BYTES = 1 << 30  # of the files being decoded; a larger one is alone
FRAME_BYTES = 2 << 30  # of the decoded frames on their way to pixels; likewise


@dataclass(frozen=True, slots=True)
class ClipFailure:
    """A listed clip that could not be used, and why."""

    key: str
    reason: str
    position: int


@dataclass(frozen=True)
class ClipBatch:
    """One rank's part of a global batch.

    `frames` float32 [n, ..., 3, h, w], normalised, in pinned memory where the device is a GPU;
    `labels` and `positions` int64 [n]; `keys` of the same clips. `failed` are those whose places
    stay empty: n + len(failed) = `listed`, and n may be 0. `waited` is how many seconds the
    consumer waited for the batch.
    """

    frames: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    keys: tuple[str, ...]
    failed: tuple[ClipFailure, ...]
    listed: int
    waited: float = 0.0


class ClipLoader:
    """Decodes listed clips into batches; holds no threads between uses."""

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        clips: Sequence[ListedClip],
        *,
        decoder: Decoder,
        preprocessing: Preprocessing,
        resized: tuple[int, int],
        shape: tuple[int, ...],
        batch_size: int,
        workers: int,
        pinned: bool,
    ) -> None:
        """`clips` by position; `resized` is the size whose short side frames are resized to.

        `shape` is that of one clip's pixels, `batch_size` the most clips of a batch.
        """
        self._paths = [folder / TARS_FOLDER / tar.file for tar in dataset.tars]
        self._clips = clips
        self._decoder = decoder
        self._preprocessing = preprocessing
        self._resized = resized
        self._shape = shape
        self._workers = workers
        self._pinned = pinned
        bytes_of_batch = batch_size * 4 * torch.Size(shape).numel()
        self._ahead = min(BATCHES_AHEAD, max(1, AHEAD_BYTES // bytes_of_batch))

    def batches(
        self,
        parts: Iterable[IntArray],
        choose: Callable[[ListedClip, int], IntArray],
        pixels: Callable[[ListedClip, Frames], torch.Tensor],
    ) -> Generator[ClipBatch, None, None]:
        """A batch for each of `parts` (positions, int64), in their order.

        `choose` gives the frames of a clip by their number, `pixels` uint8 [*shape] of the decoded
        ones; both are called from several threads. Closing the iterator, or an error in whoever
        uses it, ends the threads after the clips that they are at. Raises what `pixels` raises.
        """
        work = _Work(self, choose, pixels)
        begun: deque[_Begun] = deque()
        remaining = iter(parts)
        threads = worker_threads(self._workers)
        try:
            while True:
                began = perf_counter()
                while len(begun) <= self._ahead and (part := next(remaining, None)) is not None:
                    begun.append(self._begin(part, threads, work))
                if not begun:
                    return
                # No name for the batch: it must not live on while the next one is waited for.
                yield begun.popleft().finish(began)
        finally:
            work.stop()
            threads.shutdown(wait=True, cancel_futures=True)

    def _begin(self, part: IntArray, threads: ThreadPoolExecutor, work: _Work) -> _Begun:
        clips = [self._clips[position] for position in part.tolist()]
        usable = sum(not clip.reason for clip in clips)
        frames = torch.empty((usable, *self._shape), pin_memory=self._pinned and usable > 0)
        slots = iter(frames)
        results: list[Future[str] | str] = [
            clip.reason or threads.submit(work.load, clip, next(slots)) for clip in clips
        ]
        return _Begun(clips, results, frames)

    def load(self, clip: ListedClip, slot: torch.Tensor, work: _Work) -> None:
        """Fill float32 `slot` [*shape]. Raises `DecodeError` and `DamagedTar`."""
        with work.files.holding(clip.size), ExitStack() as held:
            data = self._read(clip)

            def choose(found: VideoInfo) -> IntArray:
                chosen = work.choose(clip, found.num_frames)
                held.close()  # decoders may ask twice
                held.enter_context(
                    work.frames.holding(3 * found.width * found.height * len(chosen))
                )
                return chosen

            info, frames, _ = decode_chosen(data, self._decoder, choose, self._resized)
            del data
            if info.num_frames != clip.num_frames:
                raise DecodeError(
                    f"{info.num_frames} frames are found, {clip.num_frames} were packed"
                )
            self._preprocessing.normalise(work.pixels(clip, frames), out=slot)

    def _read(self, clip: ListedClip) -> bytes:
        path = self._paths[clip.tar]
        data = read_video(path, clip.key, clip.offset, clip.size)
        # A tenth of a millisecond where decoding takes twenty, and the only sign of much damage.
        if clip.sha256 and hashlib.sha256(data).hexdigest() != clip.sha256:
            raise DamagedTar.of(path, f"is damaged: the sha256 of {clip.key!r} is another")
        return data


class _Work:
    """What the threads of one iteration share."""

    def __init__(
        self,
        loader: ClipLoader,
        choose: Callable[[ListedClip, int], IntArray],
        pixels: Callable[[ListedClip, Frames], torch.Tensor],
    ) -> None:
        self._loader = loader
        self.choose = choose
        self.pixels = pixels
        self._stopped = threading.Event()
        self.files = _ByteBudget(FILE_BYTES, self._stopped)
        self.frames = _ByteBudget(FRAME_BYTES, self._stopped)

    def load(self, clip: ListedClip, slot: torch.Tensor) -> str:
        """Fill the slot; returns why it stays empty, "" when it does not."""
        try:
            if self._stopped.is_set():
                raise _Stopped
            self._loader.load(clip, slot, self)
        except DecodeError as error:
            return one_line(error.reason)
        except DamagedTar as error:
            return one_line(error)
        return ""

    def stop(self) -> None:
        """Have the threads take nothing up any more."""
        self._stopped.set()
        self.files.wake()
        self.frames.wake()


class _Stopped(DecodeError):
    """The consumer has gone: nobody will read the reason."""

    def __init__(self) -> None:
        super().__init__("not decoded: the work was stopped")


class _ByteBudget:
    """Lets threads hold at most `limit` bytes together, or one of them more."""

    def __init__(self, limit: int, stopped: threading.Event) -> None:
        self._limit = limit
        self._stopped = stopped
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Wait until `count` more bytes are allowed. Raises `_Stopped`."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped.is_set() or not self._used or self._used + count <= self._limit
                )
            )
            if self._stopped.is_set():
                raise _Stopped
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()

    def wake(self) -> None:
        """Let waiting threads see that the work was stopped."""
        with self._changed:
            self._changed.notify_all()


@dataclass
class _Begun:
    """A batch whose clips are with the threads."""

    clips: list[ListedClip]
    results: list[Future[str] | str]  # why a place stays empty
    frames: torch.Tensor  # of the clips that could be begun

    def finish(self, began: float) -> ClipBatch:
        """Wait for the clips; `began` is when the consumer began to wait."""
        reasons = [x if isinstance(x, str) else x.result() for x in self.results]
        good = [clip for clip, reason in zip(self.clips, reasons, strict=True) if not reason]
        frames = self.frames
        if len(good) < len(frames):
            filled = [not x.result() for x in self.results if not isinstance(x, str)]
            frames = frames[torch.tensor(filled)]
            frames = frames.pin_memory() if self.frames.is_pinned() and good else frames
        return ClipBatch(
            frames=frames,
            labels=torch.tensor([clip.label for clip in good], dtype=torch.int64),
            positions=torch.tensor([clip.position for clip in good], dtype=torch.int64),
            keys=tuple(clip.key for clip in good),
            failed=tuple(
                ClipFailure(clip.key, reason, clip.position)
                for clip, reason in zip(self.clips, reasons, strict=True)
                if reason
            ),
            listed=len(self.clips),
            waited=perf_counter() - began,
        )


def worker_threads(count: int) -> ThreadPoolExecutor:
    """`count` running threads with one torch thread each; those of the caller stay as they are.

    `torch.set_num_threads` is a setting of the thread for OpenMP, of the process for MKL and for
    threads that have not used torch yet. So the workers set theirs and use torch, all of them
    before the caller's is set again.
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
