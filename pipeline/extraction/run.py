"""Runs an extraction: plans it, makes or continues the store, does the work and sums it up."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from featstore.errors import UserError, WorkError, counted
from featstore.format.schema import STATUS_FAILED
from featstore.opening import open_rows
from featstore.progress import ProgressSink, no_progress
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, ExtractionSummary, Totals

if TYPE_CHECKING:  # an encoder imports torch, which a finished store does not need
    from pipeline.clip_encoder import Encoder
    from pipeline.decoding.contract import Decoder
    from pipeline.extraction.cluster.connection import Cluster

logger = logging.getLogger(__name__)

FAILURES_SHOWN: Final = 10


def extract(
    request: ExtractionRequest,
    *,
    decoder: Decoder | None = None,
    encoder: Encoder | None = None,
    cluster: Cluster | None = None,
    progress: ProgressSink = no_progress,
) -> ExtractionSummary:
    """Fill the store that `request` names; partitions that are complete are not done again.

    An interruption at any moment loses at most the tars in flight. Videos that cannot be decoded
    keep their row, with status failed and the reason. `decoder` and `encoder` replace the ones that
    the request names. With `cluster`, the cluster's workers do the work, on the cluster's device.

    Raises `UserError` if the store was made in another way, `WorkError` if tars are missing or
    damaged (after the other tars are done), the disk is too small, the encoder fails, or another
    process writes the same partitions.
    """
    if cluster is not None:
        # This process needs the encoder only for the store's provenance and class texts.
        request = replace(request, device="cpu" if cluster.device == "cpu" else "auto")
    plan = ExtractionPlan(request)
    if request.share is not None:
        logger.info(
            "partition %s%s: %d of %d tars",
            request.share.text,
            f" ({request.share.origin})" if request.share.origin else "",
            len(plan.mine),
            len(plan.tars),
        )
    if decoder is None and encoder is None and plan.known_complete():
        return _concluded(plan, Totals(), 0.0)
    if cluster is not None and cluster.device == "cuda" and request.precision == "auto":
        import torch

        if plan.writer is None and not torch.cuda.is_available():
            raise UserError(
                "--precision auto times the encoder on the machine of the command, which has no "
                "GPU as the workers have: give --precision fp16, bf16 or fp32"
            )
    from pipeline.extraction.job import ExtractionJob

    job = ExtractionJob(plan, encoder, decoder)
    writer = job.begin()
    if plan.pending:
        logger.info("to write: %s", plan.room(plan.pending, job.schema))
    plan.require_room(plan.pending, job.schema)
    started = time.perf_counter()
    if cluster is not None:
        from pipeline.extraction.cluster.driver import run_on_ray

        del job, encoder, decoder  # every worker has its own
        totals = run_on_ray(plan, writer, cluster, progress)
    else:
        with writer.claim(plan.pending), closing(job):
            totals = job.run(writer, plan.pending, progress)
    return _concluded(plan, totals, time.perf_counter() - started)


def _concluded(plan: ExtractionPlan, totals: Totals, seconds: float) -> ExtractionSummary:
    """Return the summary of the store as it is now; raise WorkError if tars were unusable."""
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
            "%s fewer than %d frames: frames repeat in their rows",
            counted(totals.videos_short, "video has", "videos have"),
            request.sampling.frames,
        )
    store = open_rows(request.store_path)
    made = store.provenance
    failed = np.flatnonzero(store.status == STATUS_FAILED)
    missing = store.schema.tars - len(list(store.partitions()))
    rate = 1 / seconds if seconds > 0 else 0.0
    keys, reasons = (store.keys, store.reasons) if len(failed) else ([], [])
    known = store.container_frames > 0
    return ExtractionSummary(
        dataset=plan.dataset.name,
        store=str(request.store_path),
        encoder_fingerprint=made.encoder_fingerprint,
        precision=made.precision,
        decoder=made.decoder,
        rows_ok=len(store) - len(failed),
        rows_failed=len(failed),
        partitions_done=len(totals.done),
        partitions_skipped=len(plan.mine) - len(totals.done),
        partitions_missing=missing,
        partition=request.share.text if request.share else "",
        videos_short=totals.videos_short,
        videos_cut=totals.videos_cut,
        videos_resized=totals.videos_resized,
        rows_damaged=int((store.damaged_packets > 0).sum()),
        rows_miscounted=int((store.container_frames[known] != store.num_frames[known]).sum()),
        videos_per_second=totals.videos * rate,
        frames_per_second=totals.frames * rate,
        seconds=seconds,
        classes=len(store.class_names),
        too_many_failures=len(failed) > request.max_failures * len(store),
        failures=[{"key": keys[i], "reason": reasons[i]} for i in failed[:FAILURES_SHOWN]],
    )
