"""One evaluation as it is asked for: data set, protocol, head and score in, results out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError
from featstore.progress import Stages, no_stages
from featstore.reading.store import Store
from featstore.workspace import OpenedStores, Workspace
from heads.arithmetic import Precision
from heads.compatibility import mean_head
from heads.evaluation import sweeps
from heads.evaluation.evaluate import evaluate_many
from heads.evaluation.label_maps import CORRECTED, named_as
from heads.evaluation.leaks import require_no_leak
from heads.evaluation.protocols.choose import (
    build_test_sets,
    count_views,
    known_dataset,
    takes_given_lists,
    usual_protocol,
    views_of,
)
from heads.evaluation.protocols.protocol import Kind, Protocol, TestSet
from heads.evaluation.protocols.unseen import PackedClassNames, UnseenChoice, nothing_packed
from heads.evaluation.results import EvalResult, run_facts, save_result
from heads.files.head_file import choose_head
from heads.methods.head import Head

EVALUATION_SPLITS: Final = ("val", "test")

PromptSetOf = Callable[[Store], str | None]


def usual_prompt_set(store: Store) -> None:
    """A `PromptSetOf` that leaves the choice to the head, or to the store if it has only one."""


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are made, where it is not as the head and the protocol have it (None)."""

    modulate: bool = True
    modulation_neighbours: int | None = None
    modulation_temperature: float | None = None
    ensemble: float | None = None
    fusion: str | None = None


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure, and on what; `evaluate` and `evaluate_trained` do it.

    `kind` and `dataset` choose the usual protocol of a data set, unless `protocol` names one.
    """

    workspace: Workspace
    dataset: str
    kind: Kind
    head: str | None = None
    """Name of a run, or "mean"; None for the newest run."""
    protocol: Protocol | None = None
    split: str | None = None
    views: str | None = None
    """Clips x crops that the store must have, for example "4x3"."""
    sampling: str | None = None
    store: str | None = None
    """Name of the store, or its URL, where several fit."""
    prompt_set: PromptSetOf = usual_prompt_set
    """Chooses one of the prompt sets of the store."""
    score: ScoreSettings = field(default_factory=ScoreSettings)
    swept: sweeps.Values = field(default_factory=dict)
    """Values to sweep, by name, as `heads.evaluation.sweeps.parse_sweeps` gives them."""
    clip_store: str | None = None
    """Store with CLIP's own features, for an ensemble with a head whose tower was tuned."""
    allow_overlap: bool = False
    """Measure although tested videos are training videos of the head."""
    label_map: str = CORRECTED
    unseen: UnseenChoice = field(default_factory=UnseenChoice)
    packed_class_names: PackedClassNames = nothing_packed
    precision: Precision = "auto"
    device: str = "auto"

    @cached_property
    def stores(self) -> OpenedStores:
        """The stores of the data set, each opened once for the whole evaluation."""
        return self.workspace.opened(self.dataset)

    def chosen_clip_store(self) -> Store | None:
        """The store of CLIP's own features; UserError where nothing would take them."""
        if self.clip_store is None:
            return None
        if self.score.ensemble is None and sweeps.ENSEMBLE not in self.swept:
            raise UserError("--clip-store is for --ensemble WEIGHT or --sweep ensemble=...")
        return self.stores.choose(name=self.clip_store)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave: results with the folders of their runs, and what is missing."""

    measured: list[tuple[EvalResult, Path]]
    missing: list[dict[str, Any]]
    """Blends of a sweep that could not be measured: blend, reason, and the remedy."""

    def save(self) -> list[Path]:
        """Keep every result beside its head; returns the files in the order of `measured`."""
        return [save_result(result, run_dir) for result, run_dir in self.measured]


@dataclass(frozen=True)
class Opened:
    """A head, the store it is tested on, the protocol and the test sets, each made once."""

    head: Head | None
    run_dir: Path
    store: Store
    protocol: Protocol
    tests: tuple[TestSet, ...]
    names_from: str | None
    """Where the class names are from, when it is not the data set."""


def evaluate(request: EvaluationRequest, stages: Stages = no_stages) -> Evaluation:
    """Measure a head that is there, or a sweep of settings and towers; nothing is written.

    In a process group every process calls it, does its share and returns the same. Raises UserError
    for a request that cannot be met, and the errors of `evaluate_many`.
    """
    head, run_dir = choose_head(request.workspace, request.head)
    shares = request.swept.get(sweeps.BLEND)
    if shares is None:
        return Evaluation(_measure(request, open_for(request, head, run_dir), stages), [])
    if request.store is not None:
        raise UserError("--sweep blend takes the store of every tower: leave --store out")
    measured: list[tuple[EvalResult, Path]] = []
    missing: list[dict[str, Any]] = []
    for blended in sweeps.blended_runs(request.workspace, run_dir, shares, request.dataset):
        reason = "there is no head with this share"
        if blended.run_dir is not None:
            own, _ = choose_head(request.workspace, blended.run_dir.name)
            try:
                store, split = _store(request, own)
            except UserError as error:
                reason = str(error)
            else:
                opened = _opened(request, own, blended.run_dir, store, split)
                measured += _measure(request, opened, stages)
                continue
        missing.append({"blend": blended.share, "reason": reason, "remedy": blended.remedy})
    if not measured:
        raise UserError(
            f"no store of {request.dataset} was made with one of these blends: "
            f"{missing[0]['reason']}; make one with {missing[0]['remedy']}"
        )
    return Evaluation(measured, missing)


def open_for(request: EvaluationRequest, head: Head | None, run_dir: Path) -> Opened:
    """Choose the store, the protocol and the test sets of a request; UserError if none fit."""
    return _opened(request, head, run_dir, *_store(request, head))


def _store(request: EvaluationRequest, head: Head | None) -> tuple[Store, str | None]:
    """The store that is tested, and the split that it was chosen for."""
    split = request.split
    if _given(request):
        split = request.unseen.split(request.stores)
    elif request.kind == "closeset":
        split = split or request.stores.default_split(EVALUATION_SPLITS)
    origin = None if head is None else head.origin
    store = request.stores.choose(
        split=split,
        views=None if request.views is None else count_views(request.views),
        encoder_fingerprint=None if origin is None else origin.encoder_fingerprint,
        sampling=request.sampling,
        name=request.store,
        encoder=None if origin is None else origin.encoder,
    )
    return named_as(store, known_dataset(request.dataset), request.label_map), split


def _given(request: EvaluationRequest) -> bool:
    """Whether the test sets are made of lists of their own, as those of Kinetics-600 are."""
    if request.protocol is not None:
        return request.protocol.lists == "given"
    return takes_given_lists(request.kind, request.dataset, request.split)


def _opened(
    request: EvaluationRequest,
    head: Head | None,
    run_dir: Path,
    store: Store,
    split: str | None,
) -> Opened:
    protocol = request.protocol or usual_protocol(
        request.kind,
        request.dataset,
        split=request.split,
        views=views_of(store),
        split_names=store.split_names,
    )
    if protocol.lists == "given":
        origin = None if head is None else head.origin
        tests, names_from = request.unseen.tests(store, split, origin, request.packed_class_names)
        return Opened(head, run_dir, store, protocol, tests, names_from)
    request.unseen.require_unused(protocol.name)
    tests = build_test_sets(protocol, store, request.split)
    return Opened(head, run_dir, store, protocol, tests, None)


def _measure(
    request: EvaluationRequest, opened: Opened, stages: Stages
) -> list[tuple[EvalResult, Path]]:
    head, run_dir, store = opened.head, opened.run_dir, opened.store
    overlap = None
    if head is not None:
        overlap = require_no_leak(store, opened.tests, run_dir, allow=request.allow_overlap)
    model = head or mean_head(store.provenance.dim, store.provenance.logit_scale)
    scorings = sweeps.settings(
        model.config, vars(request.score), request.swept, opened.protocol.fusion
    )
    with stages("eval", "videos") as progress:
        measured = evaluate_many(
            store,
            model,
            scorings,
            protocol=opened.protocol,
            dataset=request.dataset,
            tests=opened.tests,
            head_name=request.workspace.head_name(run_dir),
            views=request.views,
            prompt_set=request.prompt_set(store),
            clip_store=request.chosen_clip_store(),
            facts=run_facts(run_dir, n_trained_on=overlap, class_names_source=opened.names_from),
            device=request.device,
            precision=request.precision,
            progress=progress,
        )
    return [(result, run_dir) for result in measured]
