"""Fine-tuning tower and head from packed videos: from a request to an encoder and a head.

Everything is decided, checked and agreed upon by all processes before the first step; only the
first process writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from typing import Any

import torch

from featstore.errors import UserError, WorkError, counted
from featstore.files.locks import exclusive
from featstore.files.machine import peak_rss_mb, return_large_blocks
from featstore.progress import ProgressSink, no_progress
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.kept_weights import TEACHER, keep_mean
from heads.end_to_end.memory import gpu_mb, memory_left, memory_words, warn_of_memory
from heads.end_to_end.models.end_to_end_model import EndToEndModel, TrainingStep
from heads.end_to_end.plan import Plan, make_plan
from heads.end_to_end.publish import publish
from heads.end_to_end.request import FinetuneRequest
from heads.end_to_end.run_folder import (
    open_run,
    starting_head,
    write_failed_clips,
)
from heads.end_to_end.sharding import spread
from heads.end_to_end.summary import FinetuneSummary, read_summary
from heads.end_to_end.validate import validate
from heads.files.run_files import (
    BEST_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    LOCK_FILE,
    MEAN_FILE,
    write_training_keys,
)
from heads.scoring.scores import can_modulate
from heads.training.ranks import Ranks, agreed, contact
from heads.training.run_settings import setting_differences
from heads.training.state import Position, restore_weights, save_weights
from heads.training.trainer import Trainer, TrainingBatch
from pipeline.video_clips.stream import ClipStream

log = logging.getLogger(__name__)


def finetune(
    request: FinetuneRequest, ranks: Ranks, progress: ProgressSink = no_progress
) -> FinetuneSummary:
    """Train the tower with the head and publish both; every process of `ranks` calls this.

    `progress` counts batches, with `epoch`, `loss`, `clips_per_second`, `waiting` (share of the
    time spent waiting for data) and `memory` as details. With one process the same request gives
    the same bits, also through `resume`. Raises UserError when settings, encoder, head and data do
    not fit or the run exists, WorkError when another process trains the run, the loss stops being a
    number, no video can be decoded, or another process of `ranks` is lost.
    """
    if ranks.device.type == "cpu":
        return_large_blocks()
    try:
        with ExitStack() as held, contact(ranks):
            with ranks.agreeing():
                plan = make_plan(request, ranks)
            _require_same_plan(plan, ranks)
            begun, run_dir = (request.run_dir / CONFIG_FILE).is_file, request.run_dir
            lock = exclusive(run_dir / LOCK_FILE, f"training {run_dir}", keep=begun)
            ranks.only_first(lambda: held.enter_context(lock))
            ranks.only_first(
                lambda: open_run(
                    request.run_dir,
                    request.encoder_dir,
                    plan.settings,
                    resume=request.resume,
                    continues=request.from_head == request.run_dir,
                )
            )
            return _run(request, plan, ranks, progress)
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"rank {ranks.rank} of {ranks.world_size}: the GPU has too little memory: lower "
            "--batch-size (and raise --accumulation), or add --checkpointing or --shard fsdp"
        ) from error


def _run(
    request: FinetuneRequest, plan: Plan, ranks: Ranks, progress: ProgressSink
) -> FinetuneSummary:
    config, run_dir = request.config, request.run_dir
    if ranks.only_first(lambda: (run_dir / HEAD_FILE).is_file()):
        log.info("run %s is finished already: nothing to train", run_dir.name)
        steps = config.epochs * plan.clips.steps_per_epoch
        return ranks.only_first(lambda: read_summary(request, plan, ranks, steps))
    model = plan.model
    _describe(plan, config, ranks)
    ranks.only_first(lambda: _keep_texts(plan))
    trainer = end_to_end_trainer(
        model,
        config,
        plan.clips,
        plan.precision,
        ranks,
        plan.shard,
        run_dir=run_dir,
        checkpoint_every=request.checkpoint_every,
        progress=progress,
    )
    resumed_from = 0
    if trainer.resume():
        resumed_from = trainer.position.epoch * trainer.steps_per_epoch + trainer.position.step
    if plan.taught:
        ranks.only_first(lambda: keep_mean(run_dir, trainer.parameters, 0))
    ranks.only_first(
        lambda: write_training_keys(
            run_dir,
            plan.dataset.name,
            plan.clips.keys,
            request.from_head and starting_head(run_dir, request.from_head),
        )
    )
    trainer.train(lambda epoch: _close_epoch(request, plan, trainer, epoch))
    with ranks.agreeing():
        epoch, choice = _take_published(plan, trainer, config)
    publish(
        model.eval(),
        run_dir,
        request.encoder_dir,
        origin=plan.origin,
        encoders_dir=request.encoders_dir,
        blend=config.blend,
        epoch=epoch,
        epoch_choice=choice,
        ranks=ranks,
    )
    return ranks.only_first(lambda: read_summary(request, plan, ranks, resumed_from))


def _take_published(plan: Plan, trainer: Trainer, config: FinetuneConfig) -> tuple[int, str]:
    """Put the weights to be published into the model; return their epoch and what they are."""
    epochs, best = config.epochs, trainer.position.best
    if config.save == "mean":
        restore_weights(trainer.run_dir / MEAN_FILE, trainer.parameters, epochs)
        return epochs, "mean of the start and all epochs"
    if config.save == "teacher":
        for name, value in trainer.further.items():
            trainer.parameters[name.removeprefix(TEACHER)].data.copy_(value)
        return epochs, "teacher"
    if config.save == "last" or best is None:
        return epochs, "last"
    epoch: int = best["epoch"]
    if epoch != epochs:
        restore_weights(trainer.run_dir / BEST_FILE, trainer.parameters, epoch)
    return epoch, f"best on {plan.eval_split}"


def end_to_end_trainer(
    model: EndToEndModel,
    config: FinetuneConfig,
    clips: ClipStream,
    precision: str,
    ranks: Ranks,
    shard: bool,
    **more: Any,
) -> Trainer:
    """Make a trainer of tower and head on clips, with the model spread over `ranks`.

    `more` are further fields of the trainer. The class texts are the head's training classes.
    """
    module = spread(TrainingStep(model, **model.weights_of(config)), ranks, shard)

    def batches(epoch: int, start: int) -> Generator[TrainingBatch, None, None]:
        with closing(clips.epoch(epoch, start)) as stream:
            for b in stream:
                yield TrainingBatch(b.frames, b.labels, b.positions, b.keys, b.failed, b.waited)

    def details(position: Position) -> dict[str, Any]:
        seconds = max(position.seconds, 1e-9)
        return {
            "clips_per_second": round(position.samples / seconds, 2),
            "waiting": f"{position.waited / seconds:.0%}",
            "memory": memory_words(ranks.device),
            **({"failed": position.failed} if position.failed else {}),
        }

    return Trainer(
        model=model,
        head=model.head,
        logit_scale=model.logit_scale,
        losses=module,
        tower_parameters=model.tower_parameters(),
        config=config,
        steps_per_epoch=clips.steps_per_epoch,
        precision=precision if model.uses_autocast else "fp32",
        ranks=ranks,
        batches=batches,
        n_listed=clips.n_listed,
        further=model.further_state(),
        draw_seed=config.seed + (ranks.rank if config.draws == "per-rank" else 0),
        details=details,
        **more,
    )


def _close_epoch(
    request: FinetuneRequest, plan: Plan, trainer: Trainer, epoch: int
) -> dict[str, Any]:
    """Evaluate if it is due and write the failures; return what to add to the epoch's record."""
    config, ranks, position = request.config, trainer.ranks, trainer.position
    began, evaluation, every = time.perf_counter(), None, config.evaluate_every
    if plan.evaluation is not None and every and (epoch % every == 0 or epoch == config.epochs):
        assert plan.eval_split is not None
        found, failed = validate(
            plan.model,
            plan.evaluation,
            trainer.classes,
            split=plan.eval_split,
            ranks=ranks,
            batch_size=config.batch_size,
            shape=plan.clip_shape,
            modulate=can_modulate(plan.model.head, len(plan.dataset.class_names)),
            in_step=plan.shard,
        )
        trainer.failures += [(*failure, "evaluation") for failure in failed]
        if found is not None:
            evaluation = found.to_json()
            if position.best is None or found.quality > position.best["top1"]:
                position.best = {"epoch": epoch, "top1": found.quality}
                save_weights(request.run_dir / BEST_FILE, trainer.parameters, epoch, ranks)
            measure = "top-1" if found.mean_ap is None else "mAP"
            log.info("epoch %d: %s %.1f %% on %s", epoch, measure, found.quality, found.split)
        else:
            log.warning("none of the videos of %s could be decoded", plan.eval_split)
    if plan.taught:
        ranks.only_first(lambda: keep_mean(trainer.run_dir, trainer.parameters, epoch))
    failures = trainer.merged_failures()
    ranks.only_first(lambda: write_failed_clips(request.run_dir, failures))
    seconds = max(position.seconds, 1e-9)
    whole = position.seconds + time.perf_counter() - began
    on_gpu = ranks.device.type == "cuda"
    return {
        "tower_lr": float(trainer.rates[position.epoch, -1, 0]),
        "failed": position.failed,
        "clips_per_second": position.samples / seconds,
        "waiting": ranks.largest(position.waited / seconds),
        "peak_rss_mb": round(ranks.largest(peak_rss_mb()), 1),
        "peak_gpu_mb": round(ranks.largest(gpu_mb(ranks.device)), 1) if on_gpu else None,
        "seconds_left": round((config.epochs - epoch) * whole, 1),
        "evaluation": evaluation,
    }


def _require_same_plan(plan: Plan, ranks: Ranks) -> None:
    """Raise UserError unless all processes have the same options, data and encoder.

    Only the path to the encoder may differ.
    """
    unlike = sorted(
        {
            phrase.split()[0]
            for other in ranks.gathered(plan.settings)
            for phrase in setting_differences(
                other, plan.settings, ("data.encoder", "data.adapted_encoder")
            )
        }
    )
    if unlike:
        raise agreed(
            UserError(
                f"the processes differ in {', '.join(unlike)}: start all of them with the same "
                "options and workspace"
            ),
            ranks.first,
        )


def _describe(plan: Plan, config: FinetuneConfig, ranks: Ranks) -> None:
    """Log once what will be trained."""
    clips, model = plan.clips, plan.model
    if config.batch_size * ranks.world_size > clips.n_listed:
        log.warning(
            "a batch of %d is more than the %s: every epoch is one smaller batch",
            config.batch_size * ranks.world_size,
            counted(clips.n_listed, "training video"),
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(TEACHER))
    log.info(
        "training %s: %.1f of %.1f million parameters, %s in %s of %d (%d x %d)%s, %s on %s",
        *(plan.trained, trained / 1e6),
        *(whole / 1e6,),
        *(counted(clips.n_listed, "video"), counted(clips.steps_per_epoch, "step")),
        *(config.batch_size * ranks.world_size,),
        *(ranks.world_size, config.batch_size, ", sharded (FSDP2)" if plan.shard else ""),
        *(plan.precision, ranks.device.type),
    )
    if plan.tokens is not None:
        log.info("clips are read from %s: no video is decoded", plan.tokens.path.name)
    if model.texts is not None:
        if not config.checkpointing:
            model.texts.keep_within(memory_left(plan.model, ranks.device))
        log.info("class texts: %s", model.texts.words)
    if ranks.device.type == "cpu" and ranks.first:
        warn_of_memory(model, plan.clips.n_listed, config)


def _keep_texts(plan: Plan) -> None:
    """Keep the texts that training begins with, for a run that continues."""
    for place, embeddings in plan.new_texts:
        place.write(embeddings)
