"""NVDEC as a `Decoder` for many threads, whose clips are decoded together in batches.

It starts no threads. A thread that wants a clip surveys it, adds it to others of its picture size
and waits. The first thread that finds a complete batch while the GPU's decoder is idle decodes that
batch for all threads.

U frames of a video without repeats, H, W height and width of its picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from featstore.segments import IntArray
from pipeline.decoding.contract import ChooseFrames, Decoder, Frames, Source, VideoInfo
from pipeline.decoding.nvdec.batcher import BATCH_VIDEOS, NvdecBatcher, NvdecPlan
from pipeline.decoding.nvdec.graphs import DECODER_NAME, Clip, DaliFrames
from pipeline.decoding.nvdec.rule import nvdec_codecs

# RGB uint8 [U,H,W,3] of a clip that waits for its batch, None where NVDEC failed.
_Waiting = Future[Frames | None]


class NvdecDecoder:
    """A `Decoder` around NVDEC, with `fallback` for videos that NVDEC may not decode exactly.

    `device` is a GPU; `source` replaces `DaliFrames`, `codecs` the codecs that the GPU decodes.
    At least `batch_videos` threads should use it at the same time.
    """

    name = DECODER_NAME

    def __init__(
        self,
        fallback: Decoder,
        device: torch.device,
        *,
        threads: int = 4,
        source: Callable[[Sequence[Clip]], list[Frames]] | None = None,
        codecs: frozenset[str] | None = None,
        batch_videos: int = BATCH_VIDEOS,
    ) -> None:
        self.batch_videos = batch_videos
        self._fallback = fallback
        if source is None or codecs is None:
            index = device.index if device.index is not None else torch.cuda.current_device()
            codecs = codecs or nvdec_codecs(torch.cuda.get_device_capability(index))
            source = source or DaliFrames(batch_size=batch_videos, threads=threads, device_id=index)
        self._batcher: NvdecBatcher[_Waiting, Frames] = NvdecBatcher(
            source, _check, codecs, batch_videos=batch_videos
        )
        self._changed = self._batcher.changed  # guards everything below
        self._planning = 0  # threads that may soon have a clip
        self._decoding = False

    def decode_with_info(
        self, source: Source, choose: ChooseFrames
    ) -> tuple[VideoInfo, Frames, npt.NDArray[np.float64]]:
        """See `Decoder.decode_with_info`."""
        data = _contents(source)
        plan = self._planned(data, choose)
        if isinstance(plan, str):
            refusal = plan
        else:
            frames = self._decoded(plan)
            if frames is not None:
                return plan.info, frames[plan.places], plan.seconds
            refusal = self._batcher.refusal
        self._batcher.count(f"{self._fallback.name} ({refusal})")
        return self._fallback.decode_with_info(data, choose)

    def _planned(self, data: bytes, choose: ChooseFrames) -> NvdecPlan | str:
        def waiting_for_nothing(found: VideoInfo) -> IntArray:
            # The caller may wait here for memory, which clips that wait for a batch hold.
            self._expect(-1)
            try:
                return np.asarray(choose(found), np.int64).reshape(-1)
            finally:
                self._expect(+1)

        self._expect(+1)
        try:
            return self._batcher.plan(data, waiting_for_nothing)
        finally:
            self._expect(-1)

    def _expect(self, change: int) -> None:
        with self._changed:
            self._planning += change
            self._changed.notify_all()

    def _decoded(self, plan: NvdecPlan) -> Frames | None:
        """Wait for the clip's batch, decoding batches meanwhile; None if NVDEC failed."""
        clip: _Waiting = Future()
        with self._changed:
            self._batcher.add(clip, plan)
            while not clip.done():
                batch = None
                if not self._decoding:
                    batch = self._batcher.take(more_coming=self._planning > 0)
                if batch is None:
                    self._changed.wait()
                    continue
                self._decoding = True
                self._changed.release()
                try:
                    for waiting, _, frames in self._batcher.decode(batch):
                        waiting.set_result(frames)
                finally:
                    self._changed.acquire()
                    self._decoding = False
                    for waiting, _ in batch:
                        if not waiting.done():
                            waiting.set_result(None)
                    self._changed.notify_all()
            return clip.result()


def _check(clip: Clip, frames: Frames) -> None:
    asked = (len(clip.frames), clip.height, clip.width, 3)
    if frames.shape != asked or frames.dtype != np.uint8:
        raise RuntimeError(f"frames {frames.dtype} {list(frames.shape)} instead of {list(asked)}")


def _contents(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    return source.read_bytes() if isinstance(source, Path) else source.read()
