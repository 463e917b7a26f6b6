"""Batches of pixels through the tower, with the copy back to memory beside the next batch.

Letters: C crops, U frames of a video, h, w input of the tower, N pictures in a batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.clip_encoder import Encoder


@dataclass
class RunningBatch:
    """A batch that was started; on a GPU it may still be at work."""

    shapes: list[tuple[int, int]]  # C and U of every video
    embeddings: torch.Tensor  # float32 [N,D] in memory, once `done` says so
    done: Any = None  # the CUDA event after which it is complete
    keep: Any = None  # what the GPU still reads: freeing it would let its memory be used again

    def features(self) -> list[npt.NDArray[np.float32]]:
        """Wait; then float32 [C,U,D] of every video."""
        if self.done is not None:
            self.done.synchronize()
        self.keep = None
        rows = self.embeddings.float().numpy()
        ends = np.cumsum([crops * frames for crops, frames in self.shapes])
        return [
            part.reshape(crops, frames, -1)
            for part, (crops, frames) in zip(
                np.split(rows, ends[:-1].tolist()), self.shapes, strict=True
            )
        ]


class BatchEncoder:
    """Starts batches on the encoder's device; one thread at a time may use it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._on_gpu = encoder.device.type == "cuda"

    def stream(self) -> AbstractContextManager[Any]:
        """A CUDA stream of its own for the thread that encodes."""
        if not self._on_gpu:
            return nullcontext()
        cuda: Any = torch.cuda  # the streams' annotations are incomplete
        return torch.cuda.stream(cuda.Stream(self._encoder.device))

    def launch(self, videos: Sequence[torch.Tensor]) -> RunningBatch:
        """Encode [C,U,3,h,w] of each video: normalised pixels, or uint8 in memory.

        On a GPU this returns when the work is queued, and errors may come from `features` instead.
        """
        shapes = [(video.shape[0], video.shape[1]) for video in videos]
        pixels = torch.cat([self._normalised(video).flatten(0, 1) for video in videos])
        embeddings = self._encoder.encode_pixels(pixels)
        if not self._on_gpu:
            return RunningBatch(shapes, embeddings)
        cuda: Any = torch.cuda
        # Only pinned memory is copied to while the GPU goes on with the next batch.
        host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
        host.copy_(embeddings, non_blocking=True)
        done = cuda.Event()
        done.record()
        return RunningBatch(shapes, host, done, (videos, pixels, embeddings))

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype != torch.uint8:
            return pixels
        if self._on_gpu:  # as bytes: a quarter of what has to cross the bus
            pixels = pixels.pin_memory().to(self._encoder.device, non_blocking=True)
        return self._encoder.preprocessing.normalise(pixels)
