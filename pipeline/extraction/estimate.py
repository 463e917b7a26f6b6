"""Estimates the videos, bytes and hours of an extraction from a short sample of the real work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from featstore.errors import counted
from featstore.files.disk import SPARE_BYTES, free_bytes, in_bytes
from featstore.progress import Outcome, ProgressSink, no_progress
from pipeline.clip_encoder import Encoder
from pipeline.extraction.cpu_pool import VideoPool
from pipeline.extraction.job import ExtractionJob
from pipeline.extraction.plan import ExtractionPlan, no_room
from pipeline.extraction.request import ExtractionRequest
from pipeline.tars.reading import DamagedTar, open_packed
from pipeline.tars.sources import TarSource

SAMPLE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Estimate(Outcome):
    """What `extract` would do. Counts and sizes (in bytes) are of the work still to be done.

    `hours` is None when no video could be sampled.
    """

    dataset: str
    store: str
    store_exists: bool
    videos: int
    frames: int  # how many would be encoded
    tars: int
    tars_done: int
    tier: str
    bytes_per_row: int  # of features
    bytes_needed: int
    bytes_free: int
    fits: bool
    disk: str  # the disk of `bytes_free`; a remote store passes through it one tar at a time
    videos_sampled: int
    sample_failures: int
    sample_seconds: float
    videos_per_second: float
    hours: float | None
    encoder: str
    encoder_fingerprint: str
    precision: str
    decoder: str
    dataset_fingerprint: str

    def facts(self) -> dict[str, str]:
        """The same facts in words, by name."""
        sampled = (
            f"{self.videos_per_second:.2f} videos/s in a sample of "
            f"{counted(self.videos_sampled, 'video')} ({self.sample_seconds:.0f} s)"
        )
        if self.sample_failures:
            sampled += f", {self.sample_failures} of them failed"
        return {
            "store": self.store + (" (begun)" if self.store_exists else " (new)"),
            "videos": f"{self.videos} in {counted(self.tars, 'tar')} ({self.tars_done} done)",
            "frames": f"{self.frames} to encode",
            "disk": f"{in_bytes(self.bytes_needed)} needed ({self.tier}: "
            f"{in_bytes(self.bytes_per_row)} a video), {in_bytes(self.bytes_free)} free",
            "speed": sampled if self.videos_sampled else "not sampled",
            "time": "unknown" if self.hours is None else _duration(self.hours),
            "encoder": f"{self.encoder} ({self.precision}, decoder {self.decoder})",
            "fingerprint": self.encoder_fingerprint,
        }

    def require_room(self) -> None:
        """Raise `WorkError` when the store would not fit on the disk."""
        if not self.fits:
            raise no_room(self.bytes_needed, self.disk, self.bytes_free)


def estimate(
    request: ExtractionRequest,
    *,
    encoder: Encoder | None = None,
    seconds: float = SAMPLE_SECONDS,
    progress: ProgressSink = no_progress,
) -> Estimate:
    """Encode videos of the pending tars for `seconds`, keep nothing, and extrapolate.

    `encoder` replaces the one that the request names. Records are shuffled before packing, so the
    first videos are like the others. Raises what `extract` raises if it cannot do the work.
    """
    plan = ExtractionPlan(request)
    job = ExtractionJob(plan, encoder)
    with closing(job), closing(plan.tar_source()) as source:
        sample = _sample(plan, job.pool, source, seconds, progress)
    pending, schema, provenance = plan.pending, job.schema, job.provenance
    videos = sum(plan.tars[number].samples for number in pending)
    needed, free = plan.bytes_needed(pending, schema), free_bytes(plan.disk)
    rate = sample["videos_per_second"]
    return Estimate(
        dataset=plan.dataset.name,
        store=str(request.store_path),
        store_exists=plan.writer is not None,
        videos=videos,
        frames=videos * request.sampling.clips * request.sampling.frames * request.crops,
        tars=len(pending),
        tars_done=len(plan.mine) - len(pending),
        tier=request.tier.text,
        bytes_per_row=schema.row_bytes,
        bytes_needed=needed,
        bytes_free=free,
        fits=plan.disk_needed(pending, schema) + SPARE_BYTES <= free,
        disk=str(plan.disk),
        hours=videos / rate / 3600 if rate > 0 else (0.0 if not videos else None),
        encoder=provenance.encoder,
        encoder_fingerprint=provenance.encoder_fingerprint,
        precision=provenance.precision,
        decoder=provenance.decoder,
        dataset_fingerprint=provenance.dataset_fingerprint,
        **sample,
    )


def _sample(
    plan: ExtractionPlan,
    pool: VideoPool,
    source: TarSource,
    seconds: float,
    progress: ProgressSink,
) -> dict[str, Any]:
    """Encode videos for `seconds`; return the fields of `Estimate` that say how many, how fast."""
    started = time.perf_counter()

    def results() -> Iterator[set[Future[Any]]]:
        running: set[Future[Any]] = set()
        for data in _videos(plan, source):
            if time.perf_counter() - started >= seconds:
                break
            running.add(pool.submit(partial(bytes, data)))
            if len(running) >= pool.window:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield finished
        for result in as_completed(running):
            yield {result}

    total = sum(plan.tars[number].samples for number in plan.pending)
    videos, failures, elapsed = 0, 0, 0.0
    first: tuple[int, float] | None = None  # videos and time once the pool has warmed up
    for finished in results():
        videos += len(finished)
        failures += sum(isinstance(result.result(), str) for result in finished)
        elapsed = time.perf_counter() - started
        first = first or (videos, elapsed)
        progress(videos, total)
    # The first results do not count, because libraries and caches warm up until then.
    before, since = first if first and videos > first[0] else (0, 0.0)
    return {
        "videos_sampled": videos,
        "sample_failures": failures,
        "sample_seconds": elapsed,
        "videos_per_second": (videos - before) / (elapsed - since) if videos else 0.0,
    }


def _videos(plan: ExtractionPlan, source: TarSource) -> Iterator[bytes]:
    """Yield the video files of the pending tars, without damaged tars: `extract` reports those."""
    for number in plan.pending:
        tar = plan.tars[number]
        try:
            with open_packed(plan.dataset, tar, source.path(tar)) as archive:
                for sample in archive.samples:
                    yield archive.read(sample)
        except DamagedTar:
            continue
        finally:
            source.release(tar)


def _duration(hours: float) -> str:
    return f"about {hours:.1f} hours" if hours >= 1 else f"about {hours * 60:.1f} minutes"
