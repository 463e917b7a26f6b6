"""Decoding video files into frames: what a decoder must do, and the decoders."""

from __future__ import annotations

from featstore.errors import UserError, one_of
from pipeline.decoding.contract import Decoder, Strictness
from pipeline.decoding.pyav import PyAVDecoder


def decoder_named(name: str, strict: Strictness = "auto") -> Decoder:
    """Return the CPU decoder that `--decoder` names; "auto" gives PyAV.

    `strict` says how damage inside a file is treated (docs/decoding.md). Raises UserError for an
    unknown name.
    """
    if name in ("auto", PyAVDecoder.name):
        return PyAVDecoder(strict)
    choices = one_of(name, ("auto", PyAVDecoder.name, "dali"))
    raise UserError(f"decoder {name!r} is unknown: {choices}")
