"""What an extraction will take: videos, bytes and hours, from a short sample of the real work."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from typing import Any, Final

from featstore.errors import WorkError
from featstore.progress import ProgressSink, no_progress
from pipeline.decoding import decoder_named
from pipeline.extraction import load_request_encoder, provenance_of, require_same
from pipeline.extraction_plan import SPARE_BYTES, ExtractionPlan, ExtractionRequest, free_bytes
from pipeline.machine import usable_cores
from pipeline.tar_source import TarSource
from pipeline.tars import DamagedTar, open_tar
from pipeline.video_pool import ThreadVideoPool, VideoPool

SAMPLE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Estimate:
    """What `extract` would do; sizes in bytes, of what is still to be done.

    `hours` is None when no video could be sampled.
    """

    dataset: str
    store: str
    store_exists: bool
    videos: int
    frames: int  # that would be encoded
    tars: int
    tars_done: int
    bytes_needed: int
    bytes_free: int
    fits: bool
    disk: str  # where the bytes are free; a remote store's pass through there one tar at a time
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

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def facts(self) -> dict[str, str]:
        """The same in words."""
        sampled = (
            f"{self.videos_per_second:.2f} videos/s in a sample of {self.videos_sampled} videos "
            f"({self.sample_seconds:.0f} s)"
        )
        if self.sample_failures:
            sampled += f", {self.sample_failures} of them failed"
        return {
            "store": self.store + (" (begun)" if self.store_exists else " (new)"),
            "videos": f"{self.videos} in {self.tars} tars ({self.tars_done} tars done)",
            "frames": f"{self.frames} to encode",
            "disk": f"{self.bytes_needed / 1e9:.3f} GB needed, {self.bytes_free / 1e9:.1f} GB free",
            "speed": sampled if self.videos_sampled else "not sampled",
            "time": "unknown" if self.hours is None else f"about {self.hours:.2f} hours",
            "encoder": f"{self.encoder} ({self.precision}, decoder {self.decoder})",
            "fingerprint": self.encoder_fingerprint,
        }

    def require_room(self) -> None:
        """Raise `WorkError` when the store would not fit on the disk."""
        if not self.fits:
            raise WorkError(
                f"the store will take {self.bytes_needed / 1e9:.2f} GB and "
                f"{self.disk} has {self.bytes_free / 1e9:.2f} GB free: make room, or "
                "put the workspace (--root) on a larger disk"
            )


def estimate(
    request: ExtractionRequest,
    *,
    seconds: float = SAMPLE_SECONDS,
    progress: ProgressSink = no_progress,
) -> Estimate:
    """Encode videos of the first pending tar for `seconds`, keep nothing, and extrapolate.

    Records are shuffled before packing, so the first videos are like the others. Raises what
    `extract` raises for what it cannot do.
    """
    plan = ExtractionPlan(request)
    decoder = decoder_named(request.decoder, request.strict)
    encoder = load_request_encoder(plan)
    encoder.preprocessing.require_crops(request.crops)
    provenance = provenance_of(plan, encoder, decoder.name)
    if plan.writer is not None:
        require_same(plan, plan.writer, provenance)
    pending = plan.pending()
    pool = ThreadVideoPool(
        decoder, encoder, request.sampling, request.crops, request.workers or usable_cores()
    )
    source = plan.tar_source()
    try:
        done, failed, took = _sample(plan, pending, pool, source, seconds, progress)
    finally:
        pool.close()
        source.close()
    videos = sum(plan.shards[tar].samples for tar in pending)
    needed, free = plan.bytes_needed(pending, encoder.dim), free_bytes(plan.disk)
    rate = done / took if took > 0 else 0.0
    return Estimate(
        dataset=plan.dataset.name,
        store=str(request.store_path),
        store_exists=plan.writer is not None,
        videos=videos,
        frames=videos * request.sampling.clips * request.sampling.frames * request.crops,
        tars=len(pending),
        tars_done=len(plan.mine) - len(pending),
        bytes_needed=needed,
        bytes_free=free,
        fits=plan.disk_needed(pending, encoder.dim) + SPARE_BYTES <= free,
        disk=str(plan.disk),
        videos_sampled=done,
        sample_failures=failed,
        sample_seconds=took,
        videos_per_second=rate,
        hours=videos / rate / 3600 if rate > 0 else (0.0 if not videos else None),
        encoder=provenance.encoder,
        encoder_fingerprint=provenance.encoder_fingerprint,
        precision=provenance.precision,
        decoder=provenance.decoder,
        dataset_fingerprint=provenance.dataset_fingerprint,
    )


def _sample(
    plan: ExtractionPlan,
    pending: list[int],
    pool: VideoPool,
    source: TarSource,
    seconds: float,
    progress: ProgressSink,
) -> tuple[int, int, float]:
    """(videos done, how many of them failed, seconds) of the first tar that can be read."""
    for tar in pending:
        shard = plan.shards[tar]
        try:
            with open_tar(source.path(shard), shard.bytes) as archive:
                if not archive.samples:
                    continue
                done = failed = 0
                started = time.perf_counter()
                running: set[Future[Any]] = set()
                for sample in archive.samples:
                    if time.perf_counter() - started >= seconds:
                        break
                    running.add(pool.submit(lambda sample=sample: archive.read(sample)))  # type: ignore[misc]
                    while len(running) >= pool.window:
                        finished, running = wait(running, return_when=FIRST_COMPLETED)
                        done += len(finished)
                        failed += sum(isinstance(f.result(), str) for f in finished)
                        progress(done, shard.samples)
                finished, _ = wait(running)
                done += len(finished)
                failed += sum(isinstance(f.result(), str) for f in finished)
                return done, failed, time.perf_counter() - started
        except DamagedTar:
            continue  # the extraction itself tells about it
        finally:
            source.release(shard)
    return 0, 0, 0.0
