"""Training a head from a store: what is read, what is written, and how a run continues.

n = samples trained on, V = views, F = stored frames, T = frames trained on, D = embedding width.

A run folder holds config.json (written first), training-keys.json (`heads.files.run_files`),
state/last.safetensors (after every epoch and every ten minutes), metrics.jsonl (one line per epoch)
and head.safetensors (written last: a run with it is finished). With validation videos there are
also state/best.safetensors, validation.json and, if the best epoch is kept, the last one in last/.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featstore.balance import Balance
from featstore.batches.loader import FeatureLoader, Holding, choose_holding, load_features
from featstore.commands import command, workspace_of
from featstore.errors import UserError, counted, counted_of
from featstore.files.locks import exclusive
from featstore.format.schema import RowArray
from featstore.progress import Outcome, ProgressSink, no_progress
from featstore.reading.store import Store
from featstore.workspace import PROTOCOL_FIELD
from heads.arithmetic import resolve_device, resolve_precision
from heads.compatibility import check_complete
from heads.files.head_file import (
    head_fingerprint,
    save_head,
)
from heads.files.run_files import (
    CONFIG_FILE,
    HEAD_FILE,
    LOCK_FILE,
    read_config,
    read_metrics,
    read_validation,
    rows_hash,
    write_metrics,
    write_training_keys,
)
from heads.methods.head import Head, build_head
from heads.methods.registry import method
from heads.methods.settings import HeadOrigin, MethodConfig
from heads.training.baselines import fit_on_store
from heads.training.class_weights import class_weights, require_possible
from heads.training.config import TrainConfig
from heads.training.logit_bias import first_bias
from heads.training.run_settings import open_run
from heads.training.selection import Beginning, Selection, begin_selection, shrunk
from heads.training.state import Position
from heads.training.trainer import Trainer, batches_of
from heads.training.training_set import (
    renumbered,
    start_from,
    subset_text,
    usable_rows,
    warn_of_classes_without_videos,
)
from heads.training.validation import Validation, check_balance

log = logging.getLogger(__name__)

AfterEpoch = Callable[[Head, int], Mapping[str, float]]
"""A function called after every epoch with the current head and the number of epochs done."""

RUN_FORMAT = 1


@dataclass(frozen=True)
class TrainSummary(Outcome):
    """What a finished run did; `seconds` counts training only, over all its processes."""

    run: str
    head: str
    dataset: str
    epochs: int
    n_listed: int
    n_trained: int
    n_failed: int
    loss: float | None
    """Mean training loss of the last epoch; None for kind "mean"."""
    precision: str
    device: str
    seconds: float
    samples_per_second: float | None
    resumed_from: int
    """Epochs already done before this call; equal to `epochs` if the run had finished before."""
    path: str
    trained_on: str = ""
    """A description of the training videos; empty if the caller gave none."""
    validation: dict[str, Any] | None = None
    """What was gained on the validation videos (`Selection.close`); None without such videos."""
    class_balance: dict[str, Any] = field(default_factory=dict)
    """The numbers of training videos of the classes (`Balance.to_json`)."""


def train_head(
    store: Store,
    run_dir: Path,
    head: MethodConfig,
    training: TrainConfig,
    *,
    rows: npt.ArrayLike,
    prompt_set: str,
    classes: npt.ArrayLike | None = None,
    trained_on: str = "",
    repeats: int = 1,
    initial: Head | None = None,
    initial_run: Path | None = None,
    validation: Validation | None = None,
    after_epoch: AfterEpoch | None = None,
    protocol: str = "",
    resume: bool = False,
    device: str = "auto",
    progress: ProgressSink = no_progress,
) -> TrainSummary:
    """Train a head on array rows `rows` of `store` and leave it in `run_dir`.

    `classes` are the label ids to train on, by default all. They are renumbered in this order, and
    the head learns no other class texts. `trained_on` describes the rows and classes in words.
    An epoch has every row `repeats` times. `initial` is a head of configuration `head`, whose
    weights training starts from; `initial_run` is its folder, and its training videos count as
    this run's. Every epoch is judged on the videos of `validation` (`choose_validation`); with
    `training.keep_best` the best one is kept, or none where none is better than an untrained head
    by more than chance. `after_epoch` is called with the head and the number of epochs done; its
    return value is added to the epoch's record in metrics.jsonl. `protocol` names the evaluation
    that the run belongs to; such a run is never chosen as the newest head.

    Rows whose extraction failed are left out, counted and logged. Features stay in memory when
    they fit. The same seed on the same machine gives the same bits, also after `resume`, which
    continues from the last checkpoint (and starts a run that does not exist yet). If the store has
    fewer frames per view than `training.frames`, all of its frames are used.

    A method that is `fitted` learns in one go what others learn in epochs: its one epoch counts in
    the record, and batch size and rates have no effect.

    `progress` counts batches, with `epoch`, `loss` and `samples_per_second` as details; or videos,
    if the head is fitted.
    Raises UserError when head, rows or classes do not fit the store, when the run exists and
    `resume` is off, or when it was begun with other settings (named in the message); WorkError
    when another process trains the run, the store is not complete, the loss stops being a number
    (the last good state is kept) or a saved state is damaged.
    """
    store.require_embeddings()
    if head.dim != store.provenance.dim:
        raise UserError(
            f"the head is {head.dim} wide and the store's embeddings {store.provenance.dim}: "
            "build the head for this store"
        )
    check_complete(store)
    chosen = method(head.kind)
    named = {"dataset": store.provenance.dataset, "method": chosen.name}
    on_videos = command("finetune", **named, root=workspace_of(store.path))
    chosen.require(
        "trained from a store",
        chosen.from_store,
        f"train another method, or this one on videos with `{on_videos}`",
    )
    where = resolve_device(device)
    if training.frames > store.schema.frames:
        log.warning(
            "asked for %d frames per view, and the store has %d: training on those",
            *(training.frames, store.schema.frames),
        )
        training = replace(training, frames=store.schema.frames)
    if chosen.fitted:
        what = "trained from another head's weights"
        chosen.require(what, initial is None, "begin with a run of another method")
        training = replace(training, epochs=1, warmup_epochs=0.0)
    listed = np.unique(np.asarray(rows, np.int64))
    usable = usable_rows(store, listed)
    if len(usable) == 0:
        raise UserError(
            f"none of {counted(len(listed), 'training sample')} of {store.path} was extracted: "
            f"see the reasons with `{command('inspect', store.path)}`"
        )
    if len(usable) < len(listed):
        log.warning(
            "%s in extraction and left out",
            counted_of(
                len(listed) - len(usable), len(listed), "training sample", "failed", "failed"
            ),
        )
    require_possible(chosen, training, store.multi_label)
    text = subset_text(store.class_text(prompt_set), classes)
    labels = renumbered(store, usable, classes)
    warn_of_classes_without_videos(text.names, labels)
    balance = check_balance(text.names, labels, balanced=bool(training.class_sampling))
    weights = class_weights(training.class_weights, labels, text.names)
    if training.shrinkage == 1 and chosen.in_epochs:
        log.warning(
            "%s of %s are too few to learn from: the head will answer as no head; add a second "
            "video of each class, or keep what was learnt with --shrinkage 0",
            *(counted(len(usable), "video"), counted(len(text.names), "class", "classes")),
        )
    if head.modulates and len(text.names) < head.modulation_neighbours:
        log.warning(
            "modulation will be impossible: it compares the %d nearest classes, and %s has %d; "
            "evaluate with --no-modulate",
            *(head.modulation_neighbours, store.provenance.dataset, len(text.names)),
        )
    provenance = store.provenance
    origin = HeadOrigin(
        dataset=provenance.dataset,
        dataset_fingerprint=provenance.dataset_fingerprint,
        encoder=provenance.encoder,
        encoder_fingerprint=provenance.encoder_fingerprint,
        encoder_precision=provenance.precision,
        sampling=provenance.sampling,
        crops=provenance.crops,
        preprocessing=dict(provenance.preprocessing),
        prompt_set=prompt_set,
        class_names=text.names,
        frames=training.frames,
        label_map=provenance.label_map,
        prompt_templates=text.templates,
        trained_on=trained_on,
        initial_head="" if initial is None else head_fingerprint(initial),
    )
    holding = _holding(run_dir, len(usable) * store.schema.row_bytes, store.mapped)
    if holding == "streamed" and (repeats > 1 or training.class_sampling):
        holding = "mapped"  # single reads; a set that is repeated is a small one
    precision = resolve_precision(training.precision, head.dim, where)
    settings = {
        "format": RUN_FORMAT,
        "head": head.to_json(),
        "training": training.to_json(),
        "data": {
            **origin.to_json(),
            "n_listed": len(listed),
            "n_trained": len(usable),
            "rows_hash": rows_hash(usable),
            "prompts_hash": text.sentences_hash,
            **({"order": BLOCK_ORDER} if holding == "streamed" else {}),
            **({"repeats": repeats} if repeats > 1 else {}),
            **({"multi_label": True} if store.multi_label else {}),
            **({} if weights is None else {"class_weights": list(map(str, weights.tolist()))}),
            **({} if validation is None or not training.keep_best else validation.to_json()),
        },
        "precision": precision,
        "device": where.type,
        **({PROTOCOL_FIELD: protocol} if protocol else {}),
    }
    begun = (run_dir / CONFIG_FILE).is_file
    with exclusive(run_dir / LOCK_FILE, f"training {run_dir}", keep=begun):
        open_run(run_dir, settings, resume)
        if (run_dir / HEAD_FILE).is_file():
            log.info("run %s is finished already: nothing to train", run_dir.name)
            metrics = read_metrics(run_dir)
            return _summary(run_dir, settings, metrics, len(metrics), balance)

        keys = (store.keys[at] for at in store.positions(usable).tolist())
        write_training_keys(run_dir, store.provenance.dataset, keys, initial_run)
        model = build_head(
            head,
            torch.from_numpy(text.embeddings),
            logit_scale=store.provenance.logit_scale,
            generator=torch.Generator().manual_seed(training.seed),
        )
        if store.multi_label:
            model.take_several_classes(first_bias(store, usable, classes, training.frames, text))
        model.class_weights = weights
        if initial is not None:
            start_from(model, initial)
        model.origin = origin
        trainer, selection = None, None
        if validation is not None:
            selection = begin_selection(
                validation,
                Beginning(
                    *(model, initial is not None, store, usable, labels, classes),
                    *(training, repeats, run_dir, where, precision),
                ),
                progress,
            )
        if not chosen.trains:
            log.info("a mean of frames has nothing to train")
            metrics, resumed_from = [], 0
            write_metrics(run_dir, metrics)
        elif chosen.fitted:
            taken, seed = training.frames, training.seed
            found = fit_on_store(
                model.to(where), store, usable, labels, taken, seed, progress=progress
            )
            more = {} if after_epoch is None else after_epoch(model, 1)
            metrics, resumed_from = [{**found, **more}], 0
            write_metrics(run_dir, metrics)
        else:
            features = load_features(store, usable, holding=holding)
            if where.type == "cuda" and isinstance(features, torch.Tensor):
                free, _ = torch.cuda.mem_get_info(where)
                if features.nbytes <= GPU_SHARE * free:
                    features = features.to(where)
            loader = FeatureLoader(
                features,
                labels,
                batch_size=training.batch_size,
                frames=training.frames,
                seed=training.seed,
                rows=usable,
                repeats=repeats,
                balanced=bool(training.class_sampling),
            )
            trainer, resumed_from = _train(
                *(model, loader, training, run_dir, where, progress, selection, after_epoch)
            )
            metrics = trainer.position.metrics
        if selection is None:
            kept = shrunk(model, training.shrinkage)
        else:
            kept = selection.close(model, trainer)
        save_head(kept.to("cpu"), run_dir / HEAD_FILE)
        return _summary(run_dir, settings, metrics, resumed_from, balance)


def training_rows(store: Store, split: str | None) -> RowArray:
    """Return the array rows to train on: the rows of `split`, or all if the store has no splits.

    Raises UserError when the store has splits and none is named: training on everything would
    also train on the videos that are to be evaluated.
    """
    if split is not None:
        return store.split(split)
    if store.split_names:
        raise UserError(
            f"{store.path.name} has the splits {', '.join(store.split_names)}: name the one to "
            "train on with --split"
        )
    return store.rows


def _train(
    model: Head,
    loader: FeatureLoader,
    training: TrainConfig,
    run_dir: Path,
    device: torch.device,
    progress: ProgressSink,
    selection: Selection | None,
    after_epoch: AfterEpoch | None,
) -> tuple[Trainer, int]:
    """Run the remaining epochs; return the trainer and how many epochs were done before."""
    before = 0 if selection is None else selection.parts

    def speed(position: Position) -> float:
        return position.samples / max(position.seconds, 1e-9)

    def report(done: float, total: float, **details: float | int | str) -> None:
        progress(done + before * total, (before + 1) * total, **details)

    def measured(epoch: int) -> dict[str, Any]:
        found = {} if selection is None else selection.measured(trainer, epoch)
        more = {} if after_epoch is None else after_epoch(model, epoch)
        return {"samples_per_second": speed(trainer.position), **found, **more}

    trainer = Trainer.on_features(
        model,
        training,
        len(loader),
        device=device,
        run_dir=run_dir,
        batches=batches_of(loader),
        progress=report,
        details=lambda position: {"samples_per_second": round(speed(position), 1)},
        **({} if selection is None else {"finished": selection.finished}),
    )
    trainer.resume()
    resumed_from = trainer.epochs_trained
    trainer.train(measured)
    write_metrics(run_dir, trainer.position.metrics)
    return trainer, resumed_from


GPU_SHARE = 0.5
"""Share of a GPU's free memory that features may take; the head and its optimiser need the rest."""


BLOCK_ORDER = "blocks"
"""Value of data.order in config.json of a run whose features are streamed."""


def _holding(run_dir: Path, nbytes: int, mappable: bool) -> Holding:
    """Choose how to hold the features; a run keeps the order of videos that it began with.

    Streamed features come in another order than resident and mapped ones, and how much memory is
    free differs between machines and days.
    """
    holding = choose_holding(nbytes, mappable=mappable)
    settings = read_config(run_dir)
    if settings is None or not isinstance(data := settings.get("data"), dict):
        return holding
    begun = data.get("order")
    if begun == BLOCK_ORDER and holding != "streamed":
        log.info("the run was begun with streamed features: they are streamed again")
        return "streamed"
    if begun is None and holding == "streamed":
        log.warning("the run was begun in shuffled order: features are memory-mapped, not streamed")
        return "mapped"
    return holding


def _summary(
    run_dir: Path,
    settings: Mapping[str, Any],
    metrics: list[dict[str, Any]],
    resumed_from: int,
    balance: Balance,
) -> TrainSummary:
    data = settings["data"]
    seconds = sum(record["seconds"] for record in metrics)
    samples = sum(record["samples"] for record in metrics)
    return TrainSummary(
        run=run_dir.name,
        head=settings["head"]["kind"],
        dataset=data["dataset"],
        epochs=len(metrics),
        n_listed=data["n_listed"],
        n_trained=data["n_trained"],
        n_failed=data["n_listed"] - data["n_trained"],
        loss=metrics[-1]["loss"] if metrics else None,
        precision=settings["precision"],
        device=settings["device"],
        seconds=seconds,
        samples_per_second=samples / seconds if seconds else None,
        resumed_from=resumed_from,
        path=str(run_dir),
        trained_on=data.get("trained_on", ""),
        validation=read_validation(run_dir),
        class_balance=balance.to_json(),
    )
