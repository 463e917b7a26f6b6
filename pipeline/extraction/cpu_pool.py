"""Videos in, embeddings (or what else a tier keeps) out: threads that decode and encode.

Each thread works on its own videos with one torch thread. Measured on two cores this reaches 0.95
to 1.0 of what decoding and encoding allow when they share the cores; one multi-threaded encoder
fed by a decoding thread reached half of that.

Letters: V views (one clip in one crop each, crop-major then clip), F frames of a view, D embedding
(in tiers the item).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Protocol

import numpy as np
import torch

from pipeline.clip_encoder import Encoder
from pipeline.decoding.chosen_frames import decode_chosen
from pipeline.decoding.contract import DecodeError, Decoder, Source
from pipeline.extraction.rows import EncodedVideo
from pipeline.extraction.tiers import FrameOutput, PooledEmbeddings
from pipeline.sampling import Sampling

# Larger batches are not faster on a core (measured 8 to 64 frames), only larger in memory.
ENCODE_BATCH = 16
# Videos handed out per worker: keeps workers busy while a partition is written, and bounds memory
# by workers instead of by data.
LOOKAHEAD = 3


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

    preprocessing = encoder.preprocessing
    info, frames, seconds = decode_chosen(
        source,
        decoder,
        lambda found: sampling.indices(found.num_frames).reshape(-1),
        preprocessing.size,
        preprocessing.resize_mode,
    )
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
