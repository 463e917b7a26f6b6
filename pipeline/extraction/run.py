"""Tars in, store partitions out: plan, make or continue the store, run an engine, sum up."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from featstore.errors import WorkError
from featstore.opening import AnyWriter, open_rows
from featstore.progress import ProgressSink, no_progress
from pipeline.extraction.plan import (
    ExtractionPlan,
    ExtractionRequest,
    ExtractionSummary,
    summary_of,
)
from pipeline.extraction.pool_choice import decoder_for, open_pool
from pipeline.extraction.store import load_request_encoder, open_or_init

if TYPE_CHECKING:  # an encoder brings torch along, and a finished store needs none
    from pipeline.clip_encoder import Encoder
    from pipeline.decoding.contract import Decoder
    from pipeline.extraction.cluster.connection import Cluster
    from pipeline.extraction.cpu_pool import VideoPool
    from pipeline.extraction.engine import Totals

logger = logging.getLogger(__name__)


def extract(
    request: ExtractionRequest,
    *,
    decoder: Decoder | None = None,
    encoder: Encoder | None = None,
    cluster: Cluster | None = None,
    progress: ProgressSink = no_progress,
) -> ExtractionSummary:
    """Fill the store that `request` names; partitions that are done are not done again.

    An interruption at any moment loses at most the tars in flight. Videos that cannot be decoded
    keep their row, with status failed and the reason. `decoder` and `encoder` stand in for those
    that the request names. With `cluster` its workers do the work, on a device of its choice.

    Raises `UserError` when the store was made in another way, `WorkError` when tars are missing or
    damaged (after the others are done), the disk is too small, the encoder fails, or another
    process writes the same partitions.
    """
    if cluster is not None:
        # Here the encoder is only needed for names and texts.
        request = replace(request, device="cpu" if cluster.device == "cpu" else "auto")
    plan = ExtractionPlan(request)
    if request.share is not None:
        logger.info(
            "partition %s%s: %d of %d tars",
            request.share.text,
            f" ({request.share.origin})" if request.share.origin else "",
            len(plan.mine),
            len(plan.shards),
        )
    if decoder is None and encoder is None and plan.known_complete():
        logger.info("%s is complete already: nothing to do", request.store_path)
        return summary_of(plan, open_rows(request.store_path))
    if cluster is not None and plan.writer is None:
        from pipeline.extraction.cluster.connection import require_precision

        require_precision(cluster, request)
    begun_with = plan.writer.provenance.decoder if plan.writer is not None else None
    name = decoder.name if decoder is not None else decoder_for(request, begun_with)
    encoder = encoder or load_request_encoder(plan)
    encoder.preprocessing.require_crops(request.crops)
    from pipeline.extraction.tiers import frame_output

    output = frame_output(request.tier, encoder)
    schema = plan.schema(encoder.dim, output.item)
    writer = open_or_init(plan, encoder, name, schema)
    pending = plan.pending()
    if pending:
        logger.info("to write: %s", plan.room(pending, schema))
    plan.require_room(pending, schema)
    started = time.perf_counter()
    if cluster is not None:
        from pipeline.extraction.cluster.driver import run_on_ray

        del encoder, decoder, output  # every worker has its own
        request = replace(request, precision=writer.provenance.precision)
        totals = run_on_ray(plan, request, pending, cluster, progress)
    else:
        with writer.claim(pending):
            # Another process may have done some of them before they were claimed.
            pool = open_pool(request, name, encoder, decoder, output)
            totals = _run(plan, writer, plan.pending(), pool, progress)
    return _concluded(plan, totals, time.perf_counter() - started)


def _run(
    plan: ExtractionPlan,
    writer: AnyWriter,
    pending: list[int],
    pool: VideoPool,
    progress: ProgressSink,
) -> Totals:
    """Do the pending partitions in this process; closes the pool."""
    from pipeline.extraction.engine import run_partitions

    source = plan.tar_source()
    source.open_order([plan.shards[tar] for tar in pending])
    try:
        return run_partitions(
            plan.dataset,
            plan.shards,
            pending,
            writer,
            pool,
            source,
            progress,
            sum(plan.shards[tar].samples for tar in pending),
        )
    finally:
        pool.close()
        source.close()


def _concluded(plan: ExtractionPlan, totals: Totals, seconds: float) -> ExtractionSummary:
    """The summary, or the error when tars could not be used."""
    request = plan.request
    if totals.damaged:
        raise WorkError(
            f"{len(totals.damaged)} of {len(plan.mine)} tars cannot be used, the others are done: "
            f"{totals.damaged[0]}"
        )
    if not totals.done:
        logger.info("%s is complete already: nothing to do", request.store_path)
    if totals.videos_short:
        logger.info(
            "%d videos have fewer than %d frames: frames repeat in their rows",
            totals.videos_short,
            request.sampling.frames,
        )
    return summary_of(
        plan,
        open_rows(request.store_path),
        done=len(totals.done),
        videos=totals.videos,
        frames=totals.frames,
        videos_short=totals.videos_short,
        seconds=seconds,
    )
