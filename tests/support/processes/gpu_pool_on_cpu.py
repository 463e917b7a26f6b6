"""The GPU pool on a machine without a GPU: decoding is replaced, all else is the pool's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from pipeline.decoding.nvdec.batcher import BATCH_VIDEOS
from pipeline.decoding.nvdec.graphs import Clip
from pipeline.extraction import gpu_pool
from pipeline.extraction.gpu_pool import DaliVideoPool


def gpu_pool_on_cpu(
    decode: Callable[[Sequence[Clip]], list[torch.Tensor]],
    *arguments: Any,
    batch_videos: int = BATCH_VIDEOS,
) -> DaliVideoPool:
    """`DaliVideoPool(*arguments)` for a made-up Hopper; `decode` stands in for `DaliPixels`."""
    with (
        mock.patch.object(gpu_pool, "DaliPixels", return_value=decode),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        return DaliVideoPool(*arguments, batch_videos)
