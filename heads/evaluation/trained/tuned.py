"""Few-shot and base to novel for runs of `finetune`: they are trained already, and only tested.

A run tells the shots, the draw and the half of the classes that it was trained on. Every run has a
tower of its own, and so a store of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from featstore.commands import command
from featstore.errors import UserError
from featstore.progress import Stages, no_stages
from featstore.reading.store import Store
from featstore.spelling import comparable
from heads.compatibility import training_prompt_set
from heads.evaluation.evaluate import evaluate_store
from heads.evaluation.label_maps import check_label_map, named_as
from heads.evaluation.leaks import copies_tested, require_no_leak
from heads.evaluation.protocols.choose import usual_protocol
from heads.evaluation.protocols.protocol import TestSet
from heads.evaluation.request import (
    EvaluationRequest,
    head_of_weights,
    known_paths,
    require_unused,
)
from heads.evaluation.results import run_facts, save_result
from heads.evaluation.trained.plan import halves_tested
from heads.evaluation.trained.request import TrainedEvaluation, Training
from heads.evaluation.trained.run import ShotOutcome, ShotRun
from heads.files.head_file import choose_head
from heads.files.run_files import best_epoch, measure_of, read_config, read_metrics
from heads.methods.head import Head
from heads.training.training_set import TrainingSet
from pipeline.annotations.known_sets import known_dataset

_HALVES: Final = {"fewshot": "all", "base-to-novel": "base"}


def evaluate_tuned(
    ask: EvaluationRequest,
    how: Training,
    runs: Sequence[str],
    stores: Mapping[str, str],
    stages: Stages = no_stages,
) -> TrainedEvaluation:
    """Test fine-tuned runs as a few-shot or base-to-novel protocol says, and save every result.

    `runs` are names of runs, one for every number of shots or every draw; `stores` names the store
    of a run where it is known. The published weights must be those of the last epoch, which is what
    the protocol reports; the best epoch of the evaluations in training stands beside it. Raises
    UserError for a run that was trained on something else, and for settings of a training.
    """
    require_unused(ask.unseen, f"--zeroshot k600, not with {ask.kind}")
    require_unused(
        replace(how, best_epoch=True),
        f"heads that {ask.kind} trains; {runs[0]} is trained already",
    )
    check_label_map(ask.label_map)
    protocol = ask.protocol or usual_protocol(ask.kind, ask.dataset, split=ask.split)
    outcomes: list[ShotOutcome] = []
    files: list[Path] = []
    for name in runs:
        own = replace(ask, head=name, store=stores.get(name, ask.store))
        head, run_dir = choose_head(ask.workspace, name)
        assert head is not None, "a run of finetune has a head"
        weights = ask.weights[0] if ask.weights else None
        if weights is not None:
            head = head_of_weights(own, run_dir, weights)
        data = _data_of(run_dir, own)
        split = own.split or own.held_split(("test1", "val", "test"), head, protocol)
        store = own.fitting_store(split, head, protocol)
        store = named_as(store, known_dataset(ask.dataset), ask.label_map)
        tests = _tests(own.kind, store, split, head)
        overlap = require_no_leak(store, tests, run_dir, allow=ask.allow_overlap)
        copied = 0
        if overlap is not None:
            copied = copies_tested(store, tests, run_dir, ask.content_marks)
            overlap += copied
        known = {"n_trained_on": overlap, "n_copied": copied, "shots": data["shots"]}
        facts = run_facts(run_dir, weights, **known)
        with stages(f"eval {name}", "videos") as progress:
            result = evaluate_store(
                store,
                head,
                protocol=protocol,
                dataset=ask.dataset,
                tests=tests,
                **vars(ask.score),
                head_name=name,
                views=ask.views,
                clip_store=ask.chosen_clip_store(),
                prompt_set=ask.prompt_set(store) or training_prompt_set(store, head),
                facts=facts,
                precision=ask.precision,
                device=ask.device,
                progress=progress,
            )
        words = "" if head.origin is None else head.origin.trained_on
        none = np.zeros(0, np.int64)
        trained = TrainingSet(none, None, words, "", 1)
        run = ShotRun(
            run_dir, data["shots"], data["draw_seed"], trained, tests, overlap or 0, copied
        )
        best = _best_in_training(run_dir, data)
        outcomes.append(ShotOutcome(run, int(data["n_listed"]), result, None, best))
        files.append(save_result(result, run_dir, known_paths(own)))
    return TrainedEvaluation(ask.kind, protocol.name, ask.dataset, ",".join(runs), outcomes, files)


def _data_of(run_dir: Path, ask: EvaluationRequest) -> Mapping[str, Any]:
    """Return what the settings of a run say of its videos; UserError if they do not fit."""
    settings = read_config(run_dir) or {}
    data: Mapping[str, Any] = settings.get("data", {})
    half, name = data.get("half", "all"), run_dir.name
    wanted = _HALVES[ask.kind]
    again = command(
        "finetune",
        dataset=ask.dataset,
        shots=data.get("shots", 16),
        classes=None if wanted == "all" else wanted,
        root=ask.workspace.root,
    )
    if data.get("dataset") != ask.dataset:
        raise UserError(
            f"run {name} was trained on {data.get('dataset')}, not on {ask.dataset}: train one "
            f"with `{again}`"
        )
    if data.get("shots") is None or half != wanted:
        raise UserError(
            f"run {name} was trained on {half} classes, {data.get('shots') or 'all'} videos of "
            f"each, and {ask.kind} needs a number of videos of {wanted} classes: train one with "
            f"`{again}`"
        )
    if settings.get("training", {}).get("save") == "best":
        raise UserError(
            f"run {name} keeps its best epoch, and {ask.kind} reports the last one: train with "
            "--save last; the best one then stands beside it"
        )
    return data


def _tests(kind: str, store: Store, split: str | None, head: Head) -> tuple[TestSet, ...]:
    rows = store.rows if split is None else store.split(split)
    if kind == "fewshot":
        return (TestSet(split or "all", rows),)
    names = () if head.origin is None else head.origin.class_names or ()
    known = {comparable(name) for name in names}
    base = [at for at, name in enumerate(store.class_names) if comparable(name) in known]
    return halves_tested(store, rows, np.array(base, np.int64))


def _best_in_training(run_dir: Path, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the best epoch by the evaluations of the training, None without any."""
    metrics = read_metrics(run_dir)
    epoch = best_epoch(metrics)
    if epoch is None:
        return None
    (record,) = (held for held in metrics if held["epoch"] == epoch)
    return {
        "epoch": epoch,
        "top1": measure_of(record["evaluation"]),
        "epoch_choice": f"best on {data.get('eval_split')}",
        "n_evaluated": record["evaluation"]["n_evaluated"],
    }
