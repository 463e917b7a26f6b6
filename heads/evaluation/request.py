"""Evaluates an existing head as one request says: data set, protocol, head and score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.commands import Extraction
from featstore.errors import UserError, one_line
from featstore.opened_stores import MissingStore
from featstore.progress import Stages, no_stages
from featstore.reading.store import Store
from featstore.workspace import OpenedStores, Workspace
from heads.evaluation import sweeps
from heads.evaluation.label_maps import CORRECTED, named_as
from heads.evaluation.leaks import ContentMarks, copies_tested, require_no_leak
from heads.evaluation.protocols.choose import (
    build_test_sets,
    count_views,
    usual_protocol,
    views_of,
)
from heads.evaluation.protocols.protocol import Kind, Protocol
from heads.evaluation.protocols.unseen import PackedClassNames, UnseenChoice
from heads.evaluation.results import EvalResult, run_facts, save_result
from heads.evaluation.wanted_store import extraction_for
from heads.files.head_cards import HeadCard, likely_stores, newest_card, read_card
from heads.methods.registry import MEAN_OF_FRAMES, method
from heads.methods.settings import HeadOrigin
from pipeline.annotations.known_sets import known_dataset

if TYPE_CHECKING:  # both need torch
    from heads.arithmetic import Precision
    from heads.methods.head import Head

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are computed; None means the setting of the head or the protocol."""

    modulate: bool = True
    modulation_neighbours: int | None = None
    modulation_temperature: float | None = None
    ensemble: float | None = None
    fusion: str | None = None
    projection: bool | None = None
    """Whether the head's projection is used; None: for the classes of its training alone."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What `evaluate` or `evaluate_trained` should measure, and on what.

    `kind` and `dataset` choose the usual protocol of a data set, unless `protocol` is given.
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
    """Name of the store, or its URL, if several fit."""
    frames: int | None = None
    """T, frames per view that are tested; None for the head's, or without a head for all."""
    prompt_set: Callable[[Store], str | None] = lambda store: None
    """Chooses one of the store's prompt sets; None means the head's, or the store's only one."""
    score: ScoreSettings = field(default_factory=ScoreSettings)
    swept: sweeps.Values = field(default_factory=dict)
    """Values to sweep, by name, as `heads.evaluation.sweeps.parse_sweeps` returns them."""
    weights: tuple[str, ...] = ()
    """Which weights of a run that keeps several (`featstore.workspace.WEIGHTS`); none: those that
    it published."""
    clip_store: str | None = None
    """Store with CLIP's own features, for an ensemble with a head whose tower was tuned."""
    allow_overlap: bool = False
    """Measure even if tested videos are training videos of the head."""
    label_map: str = CORRECTED
    unseen: UnseenChoice = field(default_factory=UnseenChoice)
    packed_class_names: PackedClassNames = lambda dataset: None
    video_paths: Callable[[str], Mapping[str, str]] = lambda dataset: {}
    """Finds the paths of a data set's videos by key, for the tables beside a result."""
    content_marks: ContentMarks = lambda dataset: {}
    """Finds what tells the content of a data set's videos by key, so that copies are known."""
    precision: Precision = "auto"
    device: str = "auto"

    @cached_property
    def stores(self) -> OpenedStores:
        """The stores of the data set, each opened once for the whole evaluation."""
        return self.workspace.opened(self.dataset)

    def require_held(self) -> None:
        """Raise UserError if there is no such head or no store at all; this needs no torch."""
        run_dir, stores = None, self.workspace.stores(self.dataset)
        # With a head and a store, the choice of the newest head is said when it is made.
        newest = self.head is None and stores and self.workspace.own_runs()
        if self.head != MEAN_OF_FRAMES and not newest:
            run_dir = self.workspace.choose_run(self.head)
        if self.store is None and not stores and not self.weights:  # whose encoder is not made yet
            _store(self, None if run_dir is None else read_card(run_dir))

    def fitting_store(
        self, split: str | None, head: Head | HeadCard | None, protocol: Protocol, **others: Any
    ) -> Store:
        """Return the one store that fits the request and `head`; `others` override the request.

        If several fit, it is the one with the views of `protocol`, else the one like that which
        the head (for the mean of frames, the newest head) was trained on.
        """
        origin = None if head is None else head.origin
        newest = newest_card(self.workspace) if origin is None else None
        views = None if self.views is None else count_views(self.views)
        wanted = {
            "views": views,
            "crops": None if self.views is None else int(self.views.partition("x")[2]),
            "encoder_fingerprint": None if origin is None else origin.encoder_fingerprint,
            "sampling": self.sampling,
            "name": self.store,
            "making": self.making(origin, protocol, head),
            "likely": (
                (
                    f"with the {' or '.join(protocol.views)} views of {protocol.name}",
                    lambda store: views_of(store) in protocol.views,
                ),
                *(() if origin is None else likely_stores(origin, "the head was trained")),
                *(() if newest is None else newest.likely_stores()),
            ),
        }
        return self.stores.choose(split=split, **(wanted | others))

    def held_split(
        self, names: Sequence[str], head: Head | HeadCard | None, protocol: Protocol
    ) -> str | None:
        """Return the first split of `names` that a store has rows of; None if there is none.

        Raises UserError, with the command that extracts one, if it is packed or nothing is
        extracted yet.
        """
        found = self.stores.default_split(names)
        packed = self.workspace.packed_splits(self.dataset) or ()
        possible = next((name for name in names if name in packed), None)
        if found is None and (possible is not None or not self.workspace.stores(self.dataset)):
            self.fitting_store(possible, head, protocol)
        return found

    def making(
        self,
        origin: HeadOrigin | None,
        protocol: Protocol,
        head: Head | HeadCard | None = None,
    ) -> Extraction:
        """Return the extraction that makes a missing store for a head of this origin.

        A `head` that looks at pixels makes it itself.
        """
        if head is not None and origin is not None and method(head.config.kind).pixels:
            name = self.head or next(iter(self.workspace.own_runs())).name
            clips, _, crops = (self.views or "3x1").partition("x")
            how = f"dist:{origin.frames}x{clips}"
            return Extraction(self.dataset, origin.encoder, how, int(crops), head=name)
        newest = newest_card(self.workspace) if origin is None else None
        return extraction_for(
            self.dataset,
            origin or (None if newest is None else newest.origin),
            protocol=protocol,
            views=self.views,
            sampling=self.sampling,
        )

    @property
    def ensembles(self) -> bool:
        """Whether CLIP's own cosines have a share in the scores, under one setting at least."""
        return self.score.ensemble is not None or sweeps.ENSEMBLE in self.swept

    def chosen_clip_store(self) -> Store | None:
        """Return the store of CLIP's own features; UserError if no ensemble would use it."""
        if self.clip_store is None:
            return None
        if not self.ensembles:
            raise UserError(
                "--clip-store works only with --ensemble WEIGHT or --sweep ensemble=...: "
                "add one of them, or leave --clip-store out"
            )
        return self.stores.choose(name=self.clip_store, option="--clip-store")


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation with the folders of their runs, and the missing results."""

    request: EvaluationRequest
    measured: list[tuple[EvalResult, Path]]
    missing: list[dict[str, Any]]
    """One entry per blend of a sweep, or of several weights, that could not be measured: blend or
    weights, reason and remedy."""

    def save(self) -> list[Path]:
        """Save every result in the folder of its run; return the files in order of `measured`."""
        paths = {} if self.request.swept else known_paths(self.request)
        return [save_result(result, run_dir, paths) for result, run_dir in self.measured]

    def save_if_possible(self) -> tuple[list[Path | None], str]:
        """Save as `save` does; where files cannot be written, return None for each, and why."""
        try:
            return [*self.save()], ""
        except OSError as error:
            where = error.filename or self.measured[0][1]
            return [None] * len(self.measured), f"{where} ({error.strerror or one_line(error)})"


def known_paths(request: EvaluationRequest) -> Mapping[str, str]:
    """Return the paths of the tested data set's videos by key; say so if they are not known."""
    paths = request.video_paths(request.dataset)
    if not paths:
        log.info("the tables name videos by key: data set %s is not packed here", request.dataset)
    return paths


def require_unused(settings: Any, words: str) -> None:
    """Raise UserError if a field of the dataclass `settings` does not have its default value.

    Every field is an option of the same name; `words` say what these options may be used with.
    """
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    if given:
        raise UserError(f"{', '.join(given)} can be used only with {words}: leave them out")


def evaluate(request: EvaluationRequest, stages: Stages = no_stages) -> Evaluation:
    """Measure an existing head, or a sweep of settings and towers, without writing anything.

    In a process group every process must call this; each does a part of the work, and all return
    the same. Raises UserError for a request that cannot be met, and the errors of `evaluate_many`.
    """
    from heads.files.head_file import choose_head  # loads torch, which `require_held` does not

    head, run_dir = choose_head(request.workspace, request.head)
    adapts = head is not None and method(head.config.kind).adapts
    if adapts and request.ensembles and request.clip_store is None:
        raise UserError(
            f"{run_dir.name} adapts both towers, so that its store has nothing of CLIP's own: name "
            "a store of CLIP's with --clip-store, or leave the ensemble out"
        )
    shares = request.swept.get(sweeps.BLEND)
    if request.weights:
        if head is None:
            raise UserError("--weights is for a run, which --head names: leave it out")
        return _of_weights(request, run_dir, stages)
    if shares is None:
        found = _measure(request, head, run_dir, *_store(request, head), stages)
        return Evaluation(request, found, [])
    sweeps.require_tuned(run_dir)
    if request.store is not None:
        raise UserError("--sweep blend chooses the store of every tower itself: leave --store out")
    measured: list[tuple[EvalResult, Path]] = []
    missing: list[dict[str, Any]] = []
    protocol = request.protocol or usual_protocol(
        request.kind, request.dataset, split=request.split
    )
    making = request.making(None if head is None else head.origin, protocol)
    for blended in sweeps.blended_runs(request.workspace, run_dir, shares, making):
        reason = "there is no head with this share"
        if blended.run_dir is not None:
            own, _ = choose_head(request.workspace, blended.run_dir.name)
            try:
                store, split = _store(request, own)
            except UserError as error:
                reason = error.why if isinstance(error, MissingStore) else str(error)
            else:
                measured += _measure(request, own, blended.run_dir, store, split, stages)
                continue
        missing.append({"blend": blended.share, "reason": reason, "remedy": blended.remedy})
    if not measured:
        raise UserError(
            f"no store of {request.dataset} was made with one of these blends: "
            f"{missing[0]['reason']}; make one with {missing[0]['remedy']}"
        )
    return Evaluation(request, measured, missing)


def head_of_weights(request: EvaluationRequest, run_dir: Path, which: str) -> Head:
    """Return the head with the `which` weights of a run; it is made if it is not there yet.

    UserError if the run keeps no such weights.
    """
    from heads.end_to_end.publish import publish_weights
    from heads.files.head_file import load_head
    from heads.training.ranks import Ranks

    if run_facts(run_dir).weights == which:  # published, or imported
        return load_head(run_dir)
    make = partial(publish_weights, request.workspace, run_dir, which)
    return load_head(Ranks.joined_before().only_first(make))


def _of_weights(request: EvaluationRequest, run_dir: Path, stages: Stages) -> Evaluation:
    """Measure some weights of a run, each with the features of its own towers.

    Where several are asked for, those that cannot be measured are missing; one alone raises.
    """
    if sweeps.BLEND in request.swept:
        raise UserError("--sweep blend and --weights each choose the towers: give one")
    several = len(request.weights) > 1
    if several and request.store is not None:
        raise UserError("several --weights have a store each: leave --store out")
    measured: list[tuple[EvalResult, Path]] = []
    missing: list[dict[str, Any]] = []
    for which in request.weights:
        try:
            head = head_of_weights(request, run_dir, which)
            store, split = _store(request, head)
        except UserError as error:
            if not several:
                raise
            missing.append({"weights": which, "reason": str(error), "remedy": ""})
        else:
            measured += _measure(request, head, run_dir, store, split, stages, which)
    if not measured:
        raise UserError(
            f"none of the weights of {run_dir.name} can be measured on {request.dataset}: "
            f"{missing[0]['reason']}"
        )
    return Evaluation(request, measured, missing)


def _store(request: EvaluationRequest, head: Head | HeadCard | None) -> tuple[Store, str | None]:
    """Return the store to test, and the split that it was chosen for."""
    split = request.split
    protocol = request.protocol or usual_protocol(request.kind, request.dataset, split=split)
    if protocol.lists == "given":
        split = request.unseen.split(
            request.dataset, lambda names: request.held_split(names, head, protocol)
        )
    elif request.kind == "closeset" and split is None:
        split = request.held_split(("val", "test"), head, protocol)
    store = request.fitting_store(split, head, protocol)
    return named_as(store, known_dataset(request.dataset), request.label_map), split


def _measure(
    request: EvaluationRequest,
    head: Head | None,
    run_dir: Path,
    store: Store,
    split: str | None,
    stages: Stages,
    weights: str | None = None,
) -> list[tuple[EvalResult, Path]]:
    """Choose the protocol and its test sets, and measure every setting of the score on them."""
    from heads.compatibility import mean_head_of  # these load torch
    from heads.evaluation.evaluate import evaluate_many, usual_fusion, usual_projection

    protocol = request.protocol or usual_protocol(
        request.kind,
        request.dataset,
        split=request.split,
        views=views_of(store),
        split_names=store.split_names,
    )
    names_from = overlap = copied = None
    if protocol.lists == "given":
        origin = None if head is None else head.origin
        tests, names_from = request.unseen.tests(store, split, origin, request.packed_class_names)
    else:
        require_unused(request.unseen, f"--zeroshot k600, not with {protocol.name}")
        tests = build_test_sets(protocol, store, request.split)
    if head is not None:
        overlap = require_no_leak(store, tests, run_dir, allow=request.allow_overlap)
        if overlap is not None:
            copied = copies_tested(store, tests, run_dir, request.content_marks)
            overlap += copied
    model = head or mean_head_of(store)
    with stages("eval", "videos") as progress:
        measured = evaluate_many(
            store,
            model,
            sweeps.settings(
                *(model.config, vars(request.score), request.swept),
                fusion=usual_fusion(store, protocol),
                projection=usual_projection(model.config, protocol),
            ),
            protocol=protocol,
            dataset=request.dataset,
            tests=tests,
            head_name=request.workspace.head_name(run_dir),
            views=request.views,
            frames=request.frames,
            prompt_set=request.prompt_set(store),
            clip_store=request.chosen_clip_store(),
            facts=run_facts(
                run_dir,
                weights,
                n_trained_on=overlap,
                n_copied=copied,
                class_names_source=names_from,
            ),
            confident=not request.swept,
            device=request.device,
            precision=request.precision,
            progress=progress,
        )
    return [(result, run_dir) for result in measured]
