"""Decoded frames by their numbers."""

from __future__ import annotations

import numpy.typing as npt

from pipeline.decoding.contract import Decoder, Frames, Source


def frames_of(decoder: Decoder, source: Source, indices: npt.ArrayLike) -> Frames:
    """RGB uint8 [n,H,W,3] of the frames `indices` [n]."""
    return decoder.decode_with_info(source, lambda _: indices)[1]
