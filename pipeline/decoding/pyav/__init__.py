"""Frames decoded on the CPU by PyAV (FFmpeg): the reference for every other decoder."""

from __future__ import annotations

from pipeline.decoding.pyav.decoder import PyAVDecoder

__all__ = ["PyAVDecoder"]
