"""Turns videos into embeddings (or what else a tier keeps) in threads that decode and encode.

Each thread works on its own videos with one torch thread. Measured on two cores this reaches 0.95
to 1.0 of what decoding and encoding allow when they share the cores; one multi-threaded encoder
fed by a decoding thread reached half of that.

Letters: V views (one clip in one crop each, crop-major then clip), F frames of a view, D embedding
(in other tiers the item).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange, repeat

from featstore.errors import UserError
from featstore.files.machine import usable_cores
from pipeline.clip_encoder import Encoder
from pipeline.decoding import decoder_named
from pipeline.decoding.chosen_frames import decode_chosen
from pipeline.decoding.contract import (
    DecodeError,
    Decoder,
    Frames,
    Source,
    Strictness,
    VideoInfo,
)
from pipeline.decoding.nvdec.graphs import DECODER_NAME, wants_dali
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.encoders.specs import VICLIP
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.tiers import FrameOutput, PooledEmbeddings
from pipeline.sampling import Sampling, Windows

# Larger batches are not faster on a core (measured 8 to 64 frames), only larger in memory.
ENCODE_BATCH = 16
# Videos handed out per worker: keeps workers busy while a partition is written, and bounds memory
# by workers instead of by data.
LOOKAHEAD = 3


@dataclass(frozen=True)
class EncodedVideo:
    """The features of one video.

    `features` float32 [V, F, D], raw projected embeddings, or [V, F, *item] in another tier's type;
    `frame_index` int64 [V, F] counted from zero; `pts` float64 [V, F] seconds.
    """

    info: VideoInfo
    features: npt.NDArray[Any]
    frame_index: npt.NDArray[np.int64]
    pts: npt.NDArray[np.float64]


class VideoPool(ABC):
    """Encodes several videos at the same time; results come in any order.

    `window` is how many videos may be submitted before their results are taken: it bounds memory.
    """

    def __init__(
        self, decoder: Decoder, encoder: Encoder, sampling: Sampling, crops: int, window: int
    ) -> None:
        self.window = window
        self._decoder = decoder
        self._encoder = encoder
        self._sampling = sampling
        self._crops = crops

    @abstractmethod
    def submit(self, read: Callable[[], bytes | Path]) -> Future[EncodedVideo | str]:
        """Encode the video file that `read` returns, as its bytes or as a path to read it from.

        The result is the reason if that fails. The future raises what `read` raises, and
        RuntimeError or `WorkError` when the encoder itself fails. It is cancelled when the pool
        closes before the video's turn.
        """

    @abstractmethod
    def close(self) -> None:
        """Cancel the videos that have not begun, and wait for those that have."""


class ThreadVideoPool(VideoPool):
    """A `VideoPool` of `workers` threads around one decoder and one encoder."""

    def __init__(
        self,
        decoder: Decoder,
        encoder: Encoder,
        sampling: Sampling,
        crops: int,
        workers: int,
        output: FrameOutput,
    ) -> None:
        """`output` makes what is kept of every frame."""
        super().__init__(decoder, encoder, sampling, crops, workers * LOOKAHEAD)
        self._output = output
        self._stop = Event()
        self._threads = ThreadPoolExecutor(
            workers, "encode", initializer=torch.set_num_threads, initargs=(1,)
        )

    def submit(
        self, read: Callable[[], bytes | Path], windows: Windows | None = None
    ) -> Future[EncodedVideo | str]:
        """See `VideoPool.submit`; `windows` are taken in place of the pool's sampling."""
        return self._threads.submit(self._encode, read, windows or self._sampling)

    def close(self) -> None:
        """See `VideoPool.close`."""
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _encode(
        self, read: Callable[[], bytes | Path], sampling: Sampling | Windows
    ) -> EncodedVideo | str:
        if self._stop.is_set():
            return "not decoded: the work was stopped"  # and will not be written
        try:
            return encode_video(
                read(), self._decoder, self._encoder, sampling, self._crops, self._output
            )
        except DecodeError as error:
            return error.reason


def encode_video(
    source: Source,
    decoder: Decoder,
    encoder: Encoder,
    sampling: Sampling | Windows,
    crops: int = 1,
    output: FrameOutput | None = None,
) -> EncodedVideo:
    """Decode the frames that `sampling` chooses, crop them, and encode them.

    This is the only path from video to embeddings: extraction and prediction both use it. `output`
    makes something other than embeddings from the frames. Raises `DecodeError`.
    """
    output = output or PooledEmbeddings(encoder)
    info, frames, indices, seconds = decode_sampled(source, decoder, encoder, sampling)
    together = encoder.frames_together
    step = max(1, ENCODE_BATCH // together) * together
    batches = [output(part, crops) for part in np.split(frames, range(step, len(frames), step))]
    first = slice(None, None, output.clip_frames)  # frame of every clip
    features = torch.cat(batches, 1).cpu().numpy()
    return in_views(info, features, indices[:, first], seconds[:, first])


def decode_sampled(
    source: Source, decoder: Decoder, encoder: Encoder, sampling: Sampling | Windows
) -> tuple[VideoInfo, Frames, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Decode the frames of a video that `sampling` chooses.

    Returns (info, frames uint8 [clips * F,H,W,3], their indices and seconds [clips, F]). Raises
    `DecodeError`, also for frames that would become too large for the encoder's input.
    """
    info, frames, seconds = decode_chosen(
        source,
        decoder,
        lambda found: sampling.indices(found.num_frames).reshape(-1),
        encoder.preprocessing.size,
        encoder.preprocessing.resize_mode,
    )
    indices = sampling.indices(info.num_frames)
    return info, frames, indices, seconds.reshape(indices.shape)


def in_views(
    info: VideoInfo,
    features: npt.NDArray[Any],
    indices: npt.NDArray[np.int64],
    seconds: npt.NDArray[np.float64],
) -> EncodedVideo:
    """Arrange `features` [crops, clips * F, *item] of the frames `indices` [clips, F] by view."""
    return EncodedVideo(
        info,
        rearrange(features, "c (v t) ... -> (c v) t ...", v=len(indices)),
        repeat(indices, "v t -> (c v) t", c=len(features)),
        repeat(seconds, "v t -> (c v) t", c=len(features)),
    )


def decoder_for(request: ExtractionRequest, begun_with: str | None = None) -> str:
    """Return the name of the decoder, as the store will record it.

    `begun_with` is the decoder of a store that exists already: "auto" keeps that one. Raises
    UserError for a decoder that is unknown or cannot be used here.
    """
    asked = request.decoder if request.decoder != "auto" else begun_with or "auto"
    clips = request.encoder.startswith(VICLIP)
    if clips and asked == DECODER_NAME:
        raise UserError(
            f"decoder {DECODER_NAME!r} gives single frames, and {request.encoder} encodes clips: "
            "use --decoder pyav"
        )
    if request.tier.pooled and not clips and wants_dali(asked, request.device, request.strict):
        return DECODER_NAME
    if not request.tier.pooled and request.decoder == DECODER_NAME:
        raise UserError(
            f"--tier {request.tier.text} with decoder {DECODER_NAME!r}: frames that are decoded on "
            "the GPU become embeddings there and nothing else; use --decoder pyav"
        )
    return decoder_named(asked, request.strict).name


def open_pool(
    name: str,
    encoder: Encoder,
    sampling: Sampling,
    output: FrameOutput,
    *,
    crops: int = 1,
    workers: int | None = None,
    strict: Strictness = "auto",
    decoder: Decoder | None = None,
) -> VideoPool:
    """Open the pool of the decoder `name`, as `decoder_for` returns it; close the pool after use.

    `output` makes the items of a tier. `workers` None means one per core that this process may
    use; `decoder` replaces the decoder of that name.
    """
    common = encoder, sampling, crops, workers or usable_cores()
    if name == DECODER_NAME and decoder is None:
        from pipeline.extraction.gpu_pool import DaliVideoPool  # which imports this module

        return DaliVideoPool(PyAVDecoder(strict), *common)
    return ThreadVideoPool(decoder or decoder_named(name, strict), *common, output)
