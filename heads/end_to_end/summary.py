"""The summary of a finished fine-tuning, read from its files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from featstore.files.key_lists import Excluded
from featstore.progress import Outcome
from heads.end_to_end.config import AVERAGES
from heads.end_to_end.plan import Plan
from heads.end_to_end.request import FinetuneRequest
from heads.files.head_file import load_head
from heads.files.run_files import best_epoch, measure_of, read_failed_clips, read_metrics
from heads.training.ranks import Ranks

LISTED_FAILURES: Final = 5


@dataclass(frozen=True)
class FinetuneSummary(Outcome):
    """The summary of a finished run; counts and times include all its processes and calls."""

    run: str
    dataset: str
    head: str
    encoder: str
    """The CLIP that the run began with."""
    trained: str
    epochs: int
    frames: int
    """Frames per clip, in training and evaluation."""
    eval_split: str | None
    """None without an evaluation."""
    n_listed: int
    n_failed: int
    """Training videos that could not be decoded."""
    n_evaluated: int
    """Videos listed for evaluation; 0 without one."""
    n_evaluated_failed: int
    loss: float
    """Mean training loss of the last epoch."""
    published_epoch: int
    """Epoch whose weights were published, from 1."""
    top1: float | None
    """Accuracy of the published weights, before blending; None without an evaluation of them."""
    best_epoch: int | None
    best_top1: float | None
    batch_size: int
    """Videos per step of one process."""
    videos_per_step: int
    processes: int
    sharded: bool
    precision: str
    device: str
    seconds: float
    clips_per_second: float
    waiting: float
    """Share of the training time spent waiting for data."""
    peak_rss_mb: float
    peak_gpu_mb: float | None
    resumed_from: int
    """Steps already done before this call."""
    blend: float
    encoder_fingerprint: str
    """Fingerprint of the published encoder."""
    path: str
    encoder_path: str
    failures: list[dict[str, Any]]
    """The first few failed videos, with reasons; failures.csv lists all."""
    class_balance: dict[str, Any]
    """The numbers of training videos of the classes (`Balance.to_json`)."""
    measure: str
    """What `top1` and `best_top1` are: "top1", or "mAP" where a video may show several classes."""
    excluded: Excluded | None
    """The videos that a list left out."""
    tokens: str
    """Name of the store of tokens that stood for the training videos, "" for the videos."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        excluded = None if self.excluded is None else self.excluded.to_json()
        return {**super().to_json(), "excluded": excluded}


def read_summary(
    request: FinetuneRequest, plan: Plan, ranks: Ranks, resumed_from: int
) -> FinetuneSummary:
    """Read the summary of a finished run from its files."""
    run_dir, config = request.run_dir, request.config
    metrics = read_metrics(run_dir)
    failures = read_failed_clips(run_dir)
    failed = Counter(failure["split"] for failure in failures)
    origin = load_head(run_dir).origin
    assert origin is not None
    measured = {r["epoch"]: measure_of(r["evaluation"]) for r in metrics if r["evaluation"]}
    best = best_epoch(metrics)
    published = best if config.save == "best" and best is not None else len(metrics)
    seconds = sum(record["seconds"] for record in metrics)
    waited = sum(record["seconds"] * record["waiting"] for record in metrics)
    gpu = [record["peak_gpu_mb"] for record in metrics if record["peak_gpu_mb"] is not None]
    return FinetuneSummary(
        run=run_dir.name,
        dataset=plan.dataset.name,
        head=plan.model.head.config.kind,
        encoder=plan.origin.encoder,
        trained=config.train,
        epochs=len(metrics),
        frames=config.frames,
        eval_split=None if plan.evaluation is None else plan.eval_split,
        n_listed=plan.clips.n_listed,
        n_failed=failed["train"],
        n_evaluated=0 if plan.evaluation is None else plan.evaluation.n_listed,
        n_evaluated_failed=failed["evaluation"],
        loss=metrics[-1]["loss"],
        published_epoch=published,
        excluded=plan.excluded,
        tokens="" if plan.tokens is None else plan.tokens.path.name,
        measure="mAP" if plan.dataset.multi_label else "top1",
        top1=None if config.save in AVERAGES else measured.get(published),
        best_epoch=best,
        best_top1=None if best is None else measured[best],
        batch_size=config.batch_size,
        videos_per_step=config.batch_size * ranks.world_size,
        processes=ranks.world_size,
        sharded=plan.shard,
        precision=plan.precision,
        device=ranks.device.type,
        seconds=seconds,
        clips_per_second=sum(record["samples"] for record in metrics) / max(seconds, 1e-9),
        waiting=waited / max(seconds, 1e-9),
        peak_rss_mb=max(record["peak_rss_mb"] for record in metrics),
        peak_gpu_mb=max(gpu, default=None),
        resumed_from=resumed_from,
        blend=config.blend,
        encoder_fingerprint=origin.encoder_fingerprint,
        path=str(run_dir),
        encoder_path="" if plan.origin.adapted_encoder else str(request.encoder_dir),
        failures=failures[:LISTED_FAILURES],
        class_balance={} if plan.balance is None else plan.balance.to_json(),
    )
