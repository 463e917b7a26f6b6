"""Videos in, embeddings (or what else a tier keeps) out: threads that decode and encode.

Each thread works on its own videos with one torch thread. Measured on two cores this reaches 0.95
to 1.0 of what decoding and encoding allow when they share the cores; one multi-threaded encoder
fed by a decoding thread reached half of that.

Letters: V views (one clip in one crop each, crop-major then clip), F frames of a view, D embedding
(in tiers the item).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Protocol

import numpy as np
import torch

from featstore.errors import one_line
from featstore.segments import IntArray
from pipeline.clip_encoder import Encoder
from pipeline.decoding.contract import DecodeError, Decoder, Source, VideoInfo
from pipeline.frame_outputs import FrameOutput, PooledEmbeddings
from pipeline.preprocessing import resized_size
from pipeline.sampling import Sampling
from pipeline.tar_rows import EncodedVideo

logger = logging.getLogger(__name__)

# Larger batches are not faster on a core (measured 8 to 64 frames), only larger in memory.
ENCODE_BATCH = 16
# Videos handed out per worker: keeps workers busy while a partition is written, and bounds memory
# by workers instead of by data.
LOOKAHEAD = 3
# Of one frame after its short side has the encoder's size: a strip of 8192x2 pixels would become a
# picture of 600 MB.
MAX_RESIZED_PIXELS = 1 << 22


class VideoPool(Protocol):
    """Encodes videos at the same time; results come in any order.

    `window` is how many videos may be submitted and not yet taken: it bounds memory.
    """

    window: int

    def submit(self, read: Callable[[], bytes]) -> Future[EncodedVideo | str]:
        """Encode the video file that `read` gives; the result is a reason when it cannot be.

        The future raises what `read` raises, and RuntimeError or `WorkError` when the encoder
        itself fails.
        """
        ...

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        ...


class ThreadVideoPool:
    """A `VideoPool` of `workers` threads around one decoder and one encoder."""

    def __init__(
        self,
        decoder: Decoder,
        encoder: Encoder,
        sampling: Sampling,
        crops: int,
        workers: int,
        output: FrameOutput | None = None,
    ) -> None:
        """`output` makes what is kept of every frame, by default its embedding."""
        self.window = workers * LOOKAHEAD
        self._decoder = decoder
        self._encoder = encoder
        self._sampling = sampling
        self._crops = crops
        self._output = output or PooledEmbeddings(encoder)
        self._stop = Event()
        self._threads = ThreadPoolExecutor(
            workers, "encode", initializer=torch.set_num_threads, initargs=(1,)
        )

    def submit(self, read: Callable[[], bytes]) -> Future[EncodedVideo | str]:
        """See `VideoPool.submit`."""
        return self._threads.submit(self._encode, read)

    def close(self) -> None:
        """See `VideoPool.close`."""
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _encode(self, read: Callable[[], bytes]) -> EncodedVideo | str:
        if self._stop.is_set():
            return "not decoded: the work was stopped"  # and will not be written
        try:
            return encode_video(
                read(), self._decoder, self._encoder, self._sampling, self._crops, self._output
            )
        except DecodeError as error:
            return error.reason


def encode_video(
    source: Source,
    decoder: Decoder,
    encoder: Encoder,
    sampling: Sampling,
    crops: int = 1,
    output: FrameOutput | None = None,
) -> EncodedVideo:
    """Decode the frames that `sampling` chooses, crop, and encode them.

    The one path from video to embeddings: extraction and prediction both use it. Views are ordered
    crop-major, then clip. `output` makes something else than embeddings of the frames. Raises
    `DecodeError`.
    """
    output = output or PooledEmbeddings(encoder)

    def choose(found: VideoInfo) -> IntArray:
        height, width = resized_size(
            found.height, found.width, encoder.preprocessing.size, encoder.preprocessing.resize_mode
        )
        if height * width > MAX_RESIZED_PIXELS:
            raise DecodeError(
                f"frames of {found.width}x{found.height} pixels would be resized to "
                f"{width}x{height}, more than the limit of {MAX_RESIZED_PIXELS} pixels"
            )
        return sampling.indices(found.num_frames).reshape(-1)

    try:
        info, frames, seconds = decoder.decode_with_info(source, choose)
    except DecodeError:
        raise
    except Exception as error:
        # One file must not stop hundreds of thousands; it is recorded, not passed over.
        logger.exception("unexpected error of the decoder: %s", one_line(error))
        raise DecodeError(one_line(f"{type(error).__name__}: {error}")) from error
    indices = sampling.indices(info.num_frames)
    clips, per_clip = indices.shape
    batches = [
        output(part, crops)
        for part in np.split(frames, range(ENCODE_BATCH, len(frames), ENCODE_BATCH))
    ]
    joined = torch.cat(batches, dim=1)
    features = joined.reshape(crops * clips, per_clip, *joined.shape[2:])
    return EncodedVideo(
        info,
        features.cpu().numpy(),
        np.tile(indices, (crops, 1)),
        np.tile(seconds.reshape(clips, per_clip), (crops, 1)),
    )
