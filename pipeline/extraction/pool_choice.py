"""Which decoder does a request's work, and the pool around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featstore.errors import UserError
from featstore.files.machine import usable_cores
from pipeline.decoding import decoder_named
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction.plan import ExtractionRequest

if TYPE_CHECKING:
    from pipeline.clip_encoder import Encoder
    from pipeline.decoding.contract import Decoder
    from pipeline.extraction.cpu_pool import VideoPool
    from pipeline.extraction.tiers import FrameOutput


def decoder_for(request: ExtractionRequest, begun_with: str | None = None) -> str:
    """The name of the decoder, as the store will record it.

    `begun_with` is the decoder of a store that exists: "auto" stays with it. Raises UserError for a
    decoder that is unknown or cannot be used here.
    """
    from pipeline.decoding.nvdec.graphs import DECODER_NAME, wants_dali

    if not request.tier.pooled:
        if request.decoder == DECODER_NAME:
            raise UserError(
                f"--tier {request.tier.text} with decoder {DECODER_NAME!r}: frames that are "
                "decoded on the GPU become embeddings there and nothing else; use --decoder pyav"
            )
        return decoder_named(request.decoder, request.strict).name
    asked = begun_with if begun_with is not None and request.decoder == "auto" else request.decoder
    if wants_dali(asked, request.device, request.strict):
        return DECODER_NAME
    return decoder_named(asked, request.strict).name


def open_pool(
    request: ExtractionRequest,
    name: str,
    encoder: Encoder,
    decoder: Decoder | None = None,
    output: FrameOutput | None = None,
) -> VideoPool:
    """The pool for a request and one of the names `decoder_for` gives; close it after use.

    `decoder` stands in for the one that is named, `output` for that of the request's tier.
    """
    from pipeline.decoding.nvdec.graphs import DECODER_NAME

    workers = request.workers or usable_cores()
    if name == DECODER_NAME and decoder is None:
        from pipeline.extraction.gpu_pool import DaliVideoPool

        fallback = PyAVDecoder(request.strict)
        return DaliVideoPool(fallback, encoder, request.sampling, request.crops, workers)
    from pipeline.extraction.cpu_pool import ThreadVideoPool
    from pipeline.extraction.tiers import frame_output

    decoder = decoder or decoder_named(name, request.strict)
    output = output or frame_output(request.tier, encoder)
    return ThreadVideoPool(decoder, encoder, request.sampling, request.crops, workers, output)
