"""Turns videos into embeddings with the GPU's decoder; reading, decoding and encoding overlap.

Reader threads read each file, survey its packets and choose frames. A decode thread decodes the
videos that NVDEC gives exactly, in batches of one picture size; PyAV decodes the rest in the reader
threads. An encode thread takes both, and while the GPU encodes one batch, the results of the batch
before are copied back and delivered. Every stage waits while the next one has enough to do.

Letters: C crops, U frames of a video without repeats, h, w input of the tower, N pictures in a
batch, D embedding.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from featstore.errors import WorkError, one_line
from pipeline.clip_encoder import Encoder
from pipeline.decoding.chosen_frames import within_limit
from pipeline.decoding.contract import DecodeError, Decoder, VideoInfo
from pipeline.decoding.nvdec.batcher import BATCH_VIDEOS, NvdecBatcher, NvdecPlan
from pipeline.decoding.nvdec.graphs import Clip, DaliPixels
from pipeline.decoding.nvdec.rule import nvdec_codecs
from pipeline.extraction.cpu_pool import EncodedVideo, VideoPool, decode_sampled, in_views
from pipeline.sampling import Sampling

logger = logging.getLogger(__name__)

# Neither has been tuned on a GPU yet (benchmarks/gpu_extract.py is there for it).
DECODED_AHEAD = 2  # batches that wait for the encoder
WINDOW_BATCHES = 6


@dataclass(eq=False)
class _Video:
    """One video in the pool; `data` holds its file as long as it may have to be decoded."""

    read: Callable[[], bytes | Path]
    future: Future[EncodedVideo | str]
    data: bytes | Path = b""


@dataclass(eq=False)
class _Decoded:
    """A video with its pixels [C,U,3,h,w]: normalised on the GPU, or uint8 in memory.

    `indices` and `seconds` [clips, frames]; `places` [clips * frames] say where each of those
    frames is among the U that were decoded.
    """

    video: _Video
    pixels: torch.Tensor
    info: VideoInfo
    indices: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]
    places: npt.NDArray[np.int64]


@dataclass(eq=False)
class _Launched:
    """A batch whose encoding was started; a GPU may still be working on it."""

    batch: list[_Decoded]
    embeddings: torch.Tensor  # float32 [N,D] in memory, valid after `done`
    done: Any = None  # the CUDA event after which it is complete
    keep: Any = None  # tensors that the GPU still reads: if freed, their memory would be reused


class DaliVideoPool(VideoPool):
    """A `VideoPool` around NVDEC of the encoder's GPU; `decoder` does what NVDEC may not do."""

    def __init__(
        self,
        decoder: Decoder,
        encoder: Encoder,
        sampling: Sampling,
        crops: int,
        workers: int,
        batch_videos: int = BATCH_VIDEOS,
    ) -> None:
        super().__init__(decoder, encoder, sampling, crops, batch_videos * WINDOW_BATCHES)
        self._batch_videos = batch_videos
        self._on_gpu = encoder.device.type == "cuda"
        device = encoder.device.index or 0
        height, width = encoder.preprocessing.size
        self._changed = Condition()  # guards everything below
        self._batcher: NvdecBatcher[_Video, torch.Tensor] = NvdecBatcher(
            DaliPixels(
                encoder.preprocessing,
                crops,
                batch_size=batch_videos,
                threads=min(batch_videos, max(workers, 4)),
                device_id=device,
                half=encoder.precision == "fp16",
            ),
            self._check,
            nvdec_codecs(torch.cuda.get_device_capability(device)),
            pixels_per_frame=crops * 3 * height * width * 4,
            batch_videos=batch_videos,
            changed=self._changed,
        )
        self._unfinished: set[_Video] = set()
        self._reading = 0  # videos with the readers, waiting or at work
        self._by_nvdec: deque[list[_Decoded]] = deque()
        self._by_pyav: deque[_Decoded] = deque()
        self._stopping = False
        self._broken: WorkError | None = None
        self._readers = ThreadPoolExecutor(
            workers, "read", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._threads = [
            Thread(target=self._guarded, args=(loop,), name=name, daemon=True)
            for name, loop in (("decode", self._decode_loop), ("encode", self._encode_loop))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Callable[[], bytes | Path]) -> Future[EncodedVideo | str]:
        """See `VideoPool.submit`; the future raises `WorkError` when the pool is broken."""
        video = _Video(read, Future())
        with self._changed:
            if self._broken is not None:
                video.future.set_exception(self._broken)
                return video.future
            if self._stopping:
                raise RuntimeError("the pool is closed")
            self._unfinished.add(video)
            self._to_readers(video)
        return video.future

    def close(self) -> None:
        """See `VideoPool.close`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._readers.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join()
        with self._changed:
            dropped, self._unfinished = self._unfinished, set()
        for video in dropped:
            video.future.cancel()
        for line in self._batcher.report():
            logger.info("%s", line)

    # Reader threads.

    def _to_readers(self, video: _Video, refusal: str | None = None) -> None:
        """Give a video to the readers; with a `refusal` PyAV decodes it. Needs the lock."""
        self._reading += 1
        self._readers.submit(self._read, video, refusal)

    def _read(self, video: _Video, refusal: str | None) -> None:
        try:
            if self._stopping:
                return
            if refusal is None:
                video.data = video.read()
                if isinstance(video.data, Path):
                    refusal = "read as a stream"  # NVDEC takes whole files from memory
                else:
                    refusal = self._plan(video, video.data)
            if refusal is not None:
                self._decode_by_pyav(video, refusal)
        except DecodeError as error:
            self._deliver(video, error.reason)
        except BaseException as error:
            self._deliver(video, error)
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    def _plan(self, video: _Video, data: bytes) -> str | None:
        """Choose frames; returns why PyAV must decode the video, None when it waits for NVDEC."""
        preprocessing = self._encoder.preprocessing
        choose = within_limit(
            lambda found: self._sampling.indices(found.num_frames),
            preprocessing.size,
            preprocessing.resize_mode,
        )
        try:
            plan = self._batcher.plan(data, choose)
        except DecodeError:
            return "cannot be used"  # PyAV decides, and gives the reason
        if isinstance(plan, str):
            return plan
        self._batcher.add(video, plan)
        return None

    def _decode_by_pyav(self, video: _Video, refusal: str) -> None:
        data, video.data = video.data, b""
        info, frames, indices, seconds = decode_sampled(
            data, self._decoder, self._encoder, self._sampling
        )
        pixels = self._encoder.preprocessing.crop_pixels(frames, self._crops)
        decoded = _Decoded(video, pixels, info, indices, seconds, np.arange(indices.size))
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or len(self._by_pyav) < 2 * self._batch_videos
            )
            self._batcher.count(f"{self._decoder.name} ({refusal})")
            self._by_pyav.append(decoded)
            self._changed.notify_all()

    # The decode thread.

    def _decode_loop(self) -> None:
        """Decode batches until the pool closes.

        The thread waits while the encoder has enough to do, and while readers may still fill a
        batch. When no reader has work, no video will come before results are delivered.
        """
        while not self._stopping:
            with self._changed:
                batch = None
                if len(self._by_nvdec) < DECODED_AHEAD:
                    batch = self._batcher.take(more_coming=self._reading > 0)
                if batch is None and not self._stopping:
                    self._changed.wait()
            if batch is not None:
                self._decode(batch)

    def _decode(self, batch: list[tuple[_Video, NvdecPlan]]) -> None:
        """Decode a batch, and give the videos on which NVDEC fails to PyAV."""
        decoded = [
            _Decoded(video, pixels, plan.info, plan.indices, plan.seconds, plan.places)
            for video, plan, pixels in self._batcher.decode(batch)
        ]
        for done in decoded:
            done.video.data = b""
        given = {done.video for done in decoded}
        with self._changed:
            for video, _ in batch if not self._stopping else []:
                if video not in given:
                    self._to_readers(video, self._batcher.refusal)
            if decoded:
                self._by_nvdec.append(decoded)
            self._changed.notify_all()

    def _check(self, clip: Clip, pixels: torch.Tensor) -> None:
        asked = (self._crops, len(clip.frames), 3, *self._encoder.preprocessing.size)
        if tuple(pixels.shape) != asked:
            raise RuntimeError(f"pixels {list(pixels.shape)} instead of {list(asked)}")

    # The encode thread.

    def _encode_loop(self) -> None:
        launched: _Launched | None = None
        cuda: Any = torch.cuda  # the streams' annotations are incomplete
        stream = cuda.Stream(self._encoder.device) if self._on_gpu else None
        with cuda.stream(stream):  # None: no stream of its own
            while (batch := self._next_decoded(wait=launched is None)) is not None:
                following = self._launch(batch) if batch else None
                if launched is not None:
                    self._finish(launched)
                launched = following
            if launched is not None:
                self._finish(launched)

    def _next_decoded(self, *, wait: bool) -> list[_Decoded] | None:
        """Return the videos to encode now (none only without `wait`); None when the pool closes."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._stopping or self._by_nvdec or self._by_pyav)
            if self._stopping:
                return None
            batch = self._by_nvdec.popleft() if self._by_nvdec else []
            room = max(self._batch_videos - len(batch), 1)
            batch += [self._by_pyav.popleft() for _ in range(min(room, len(self._by_pyav)))]
            self._changed.notify_all()
            return batch

    def _launch(self, batch: list[_Decoded]) -> _Launched | None:
        """Start encoding; on a GPU the work is only queued, and errors may come in `_finish`."""
        try:
            videos = [self._normalised(decoded.pixels) for decoded in batch]
            pixels = torch.cat([rearrange(video, "c u ... -> (c u) ...") for video in videos])
            embeddings = self._encoder.encode_pixels(pixels)
            if not self._on_gpu:
                return _Launched(batch, embeddings)
            cuda: Any = torch.cuda
            # Only a copy to pinned memory lets the GPU go on with the next batch meanwhile.
            host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
            host.copy_(embeddings, non_blocking=True)
            done = cuda.Event()
            done.record()
            return _Launched(batch, host, done, (pixels, embeddings))
        except Exception as error:
            self._fail(batch, error)
            return None

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype != torch.uint8:
            return pixels
        if self._on_gpu:  # as bytes, a quarter of what floats would send over the bus
            pixels = pixels.pin_memory().to(self._encoder.device, non_blocking=True)
        return self._encoder.preprocessing.normalise(pixels)

    def _finish(self, launched: _Launched) -> None:
        """Wait for a batch and deliver its results."""
        batch = launched.batch
        try:
            if launched.done is not None:
                launched.done.synchronize()
            launched.keep = None
            rows = launched.embeddings.float().numpy()
            ends = np.cumsum([self._crops * decoded.pixels.shape[1] for decoded in batch])
            results = []
            for decoded, part in zip(batch, np.split(rows, ends[:-1].tolist()), strict=True):
                features = rearrange(part, "(c u) d -> c u d", c=self._crops)[:, decoded.places]
                results.append(in_views(decoded.info, features, decoded.indices, decoded.seconds))
        except Exception as error:
            self._fail(batch, error)
            return
        for decoded, result in zip(batch, results, strict=True):
            self._deliver(decoded.video, result)

    # Results.

    def _fail(self, batch: list[_Decoded], error: BaseException) -> None:
        for decoded in batch:
            self._deliver(decoded.video, error)

    def _deliver(self, video: _Video, result: EncodedVideo | str | BaseException) -> None:
        with self._changed:
            if video not in self._unfinished:
                return
            self._unfinished.discard(video)
        if not video.future.set_running_or_notify_cancel():
            return  # the caller has cancelled it
        if isinstance(result, BaseException):
            video.future.set_exception(result)
        else:
            video.future.set_result(result)

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop; if it fails, every unfinished future gets the error."""
        try:
            loop()
        except BaseException as error:
            logger.exception("a thread of the GPU pool failed")
            broken = WorkError(
                f"extraction on the GPU failed ({one_line(error, 200)}): what is done is kept; run "
                f"the same command again, perhaps with --decoder {self._decoder.name}"
            )
            with self._changed:
                self._broken, self._stopping = broken, True
                unfinished = list(self._unfinished)
                self._changed.notify_all()
            for video in unfinished:
                self._deliver(video, broken)
