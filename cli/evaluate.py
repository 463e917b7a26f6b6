"""`mote-cli eval`: accuracy of a head under a named protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import evaluate_trained as trained
from cli import evaluate_unseen as unseen
from cli import options, sweep
from cli.evaluate_report import report
from cli.output import leave_it_to_the_first, progress_of
from featstore.errors import UserError
from featstore.reader import Store
from featstore.workspace import Workspace

if TYPE_CHECKING:
    from heads.model import TemporalHead
    from heads.protocol_types import Kind, Protocol, TestSet
    from heads.results import EvalResult

KINDS: Final[dict[str, Kind]] = {
    "--closeset": "closeset",
    "--zeroshot": "zeroshot",
    "--fewshot": "fewshot",
    "--base-to-novel": "base-to-novel",
}
EVALUATION_SPLITS: Final = ("val", "test")


def evaluate(
    closeset: Annotated[
        str | None,
        typer.Option("--closeset", metavar="NAME", help="Data set with the head's own classes."),
    ] = None,
    zeroshot: Annotated[
        str | None, typer.Option("--zeroshot", metavar="NAME", help="Data set with new classes.")
    ] = None,
    fewshot: trained.FewShot = None,
    base_to_novel: trained.BaseToNovel = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="PROTOCOL",
            help="A protocol by its name: `mote-cli protocols list`.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", metavar="NAME", help="Data set of --protocol; default: the protocol's own."
        ),
    ] = None,
    head: options.Head = None,
    split: options.Split = None,
    views: Annotated[
        str | None,
        typer.Option("--views", metavar="CLIPSxCROPS", help="Take the store with these views."),
    ] = None,
    sampling: options.StoreSampling = None,
    store_name: options.StoreName = None,
    prompts: options.PromptSet = None,
    modulate: options.Modulate = True,
    modulation_neighbours: Annotated[
        str | None,
        typer.Option(
            "--modulation-neighbours",
            metavar="K",
            help="Classes modulation compares on either side; default: the head's, 5 as published.",
        ),
    ] = None,
    modulation_temperature: Annotated[
        str | None,
        typer.Option(
            "--modulation-temperature",
            metavar="T",
            help="The larger, the less the head is held back, none: not at all; default: the "
            "head's, 0.05 as published.",
        ),
    ] = None,
    ensemble: Annotated[
        float | None,
        typer.Option(
            "--ensemble",
            metavar="WEIGHT",
            min=0.0,
            max=1.0,
            help="Add CLIP's own cosines per frame with this weight; 0.5 as DiST in zero-shot.",
        ),
    ] = None,
    clip_store: Annotated[
        str | None,
        typer.Option(
            "--clip-store",
            metavar="NAME",
            help="Store of the same data set with CLIP's own features, for --ensemble with a head "
            "whose tower was tuned.",
        ),
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(
            "--fusion",
            metavar="softmax|cosine|features|all",
            help="How views become one score: mean of softmax, of cosines, or of features; "
            "default: the protocol's.",
        ),
    ] = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="NAME=V,V,...",
            help="Many settings from one pass: modulation-temperature, modulation-neighbours, "
            "ensemble, fusion; or blend, over imported towers. May be repeated.",
        ),
    ] = None,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Measure although tested videos are training videos."),
    ] = False,
    label_map: trained.LabelMapOption = "corrected",
    k600_source: unseen.K600Source = None,
    class_lists: unseen.ClassLists = None,
    k400_names: unseen.K400Names = None,
    shots: trained.Shots = None,
    draw_seeds: trained.DrawSeeds = None,
    lists_from: trained.ListsFrom = None,
    train_store: trained.TrainStore = None,
    recipe: trained.Recipe = None,
    epochs: trained.Epochs = None,
    batch_size: trained.BatchSize = None,
    lr: trained.LearningRate = None,
    repeat: trained.Repeat = "full",
    name: trained.RunName = None,
    best_epoch: trained.BestEpoch = True,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="auto|fp32|bf16",
            help="Arithmetic of the head; auto takes bf16 for wide heads where it is faster.",
        ),
    ] = "auto",
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Evaluate a head on a store: top-1, top-5, and how many videos were listed and failed.

    --closeset takes the val (or test) split, --zeroshot all videos, or the mean over the official
    test lists of HMDB51 and UCF101; --protocol any protocol by its name. The result is kept as
    JSON beside the head, with accuracy per class and confusion. torchrun shares the work.
    --fewshot and --base-to-novel train heads first, from the weights of --head where it is given.

    Example: `mote-cli eval --zeroshot hmdb51 --head k400-mote`
    """
    from heads.fitting import count_views
    from heads.process_group import process_group
    from heads.protocols import protocol_named

    named = None if protocol is None else protocol_named(protocol)
    given = {
        "--closeset": closeset,
        "--zeroshot": zeroshot,
        "--fewshot": fewshot,
        "--base-to-novel": base_to_novel,
        "--protocol": protocol,
    }
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(
            "eval takes exactly one of --closeset NAME, --zeroshot NAME, --fewshot NAME, "
            "--base-to-novel NAME and --protocol PROTOCOL"
        )
    if dataset is not None and named is None:
        raise UserError(f"--dataset goes with --protocol: {chosen[0]} names the data set itself")
    dataset = dataset or (named.dataset if named is not None else given[chosen[0]])
    if dataset is None:
        raise UserError(f"protocol {protocol} takes any data set: name one with --dataset")
    if views is None and named is not None and named.kind == "closeset" and named.views:
        (views,) = named.views
    if views is not None:
        count_views(views)  # a UserError before anything is read
    swept = sweep.parse_sweeps(sweeps or [])
    fused = sweep.value_of(sweep.FUSION, fusion)
    if isinstance(fused, list):
        if sweep.FUSION in swept:
            raise UserError("--fusion all and --sweep fusion contradict each other: give one")
        swept[sweep.FUSION] = fused
        fused = None
    kind = named.kind if named is not None else KINDS[chosen[0]]
    if kind in trained.KINDS and swept:
        raise UserError(f"--sweep goes with heads that are there: {kind} trains its own")
    request = Request(
        workspace=options.workspace(root),
        dataset=dataset,
        kind=kind,
        protocol=named,
        split=split,
        views=views,
        sampling=sampling,
        prompts=prompts,
        fixed={
            "modulate": modulate,
            "neighbours": sweep.value_of(sweep.NEIGHBOURS, modulation_neighbours),
            "temperature": sweep.value_of(sweep.TEMPERATURE, modulation_temperature),
            "ensemble": ensemble,
            "fusion": fused,
        },
        swept=swept,
        clip_store=clip_store,
        allow_overlap=allow_overlap,
        label_map=label_map,
        unseen=unseen.UnseenChoice(k600_source, tuple(class_lists or ()), k400_names),
        precision=precision,
        device=options.device(device),
    )
    training = trained.Training(
        *(shots, draw_seeds, lists_from, train_store, recipe, epochs, batch_size, lr, repeat),
        *(name, best_epoch),
    )
    if kind in trained.KINDS:
        request.unseen.require_unused(kind)
        trained.evaluate_trained(request, training, head, store_name, json)
        return
    training.require_unused(kind)
    with process_group() as rank:
        if rank:
            leave_it_to_the_first()
        model, run_dir = options.head(request.workspace, head)
        measured, missing = request.measure(model, run_dir, store_name)
        if rank == 0:
            report(request.workspace, measured, missing, bool(swept), json)


@dataclass(frozen=True)
class Request:
    """What was asked for, apart from the head and the store, which a sweep of blends changes."""

    workspace: Workspace
    dataset: str
    kind: Kind
    protocol: Protocol | None
    split: str | None
    views: str | None
    sampling: str | None
    prompts: str | None
    fixed: dict[str, Any]
    swept: sweep.Values
    clip_store: str | None
    allow_overlap: bool
    label_map: str
    unseen: unseen.UnseenChoice
    precision: str
    device: str

    def measure(
        self, model: TemporalHead | None, run_dir: Path, store_name: str | None
    ) -> tuple[list[tuple[EvalResult, Path]], list[dict[str, Any]]]:
        """(results with their run folders, blends that could not be measured and why)."""
        shares = self.swept.get(sweep.BLEND)
        if shares is None:
            return self._measure_run(model, run_dir, store_name), []
        if store_name is not None:
            raise UserError("--sweep blend takes the store of every tower: leave --store out")
        found, missing = [], []
        for blended in sweep.blended_runs(self.workspace, run_dir, shares, self.dataset):
            reason = "there is no head with this share"
            if blended.run_dir is not None:
                own, _ = options.head(self.workspace, blended.run_dir.name)
                try:
                    store = self._store(own, None)
                except UserError as error:
                    reason = str(error)
                else:
                    found += self._measure_run(own, blended.run_dir, store.path.name)
                    continue
            missing.append({"blend": blended.share, "reason": reason, "remedy": blended.remedy})
        if not found:
            raise UserError(
                f"no store of {self.dataset} was made with one of these blends: "
                f"{missing[0]['reason']}; make one with {missing[0]['remedy']}"
            )
        return found, missing

    def _measure_run(
        self, model: TemporalHead | None, run_dir: Path, store_name: str | None
    ) -> list[tuple[EvalResult, Path]]:
        from heads.evaluation import evaluate_many
        from heads.fitting import mean_head, views_of
        from heads.leaks import require_no_leak
        from heads.protocols import usual_protocol
        from heads.results import run_facts

        store = self._store(model, store_name)
        protocol = self.protocol or usual_protocol(
            self.kind,
            self.dataset,
            split=self.split,
            views=views_of(store),
            split_names=store.split_names,
        )
        tests, names_from = self._tests(protocol, store, model)
        overlap = None
        if model is not None:
            overlap = require_no_leak(store, tests, run_dir, allow=self.allow_overlap)
        scorer = model or mean_head(store.provenance.dim)
        scorings = sweep.settings(scorer.config, self.fixed, self.swept, protocol.fusion)
        with progress_of("eval", "videos") as progress:
            measured = evaluate_many(
                store,
                model,
                scorings,
                protocol=protocol,
                dataset=self.dataset,
                tests=tests,
                head_name=run_dir.name,
                views=self.views,
                prompt_set=options.prompt_set(store, self.prompts),
                clip_store=self.chosen_clip_store(),
                facts=run_facts(run_dir, n_trained_on=overlap, class_names_source=names_from),
                device=self.device,
                precision=self.precision,  # type: ignore[arg-type]  # it is checked there
                progress=progress,
            )
        return [(result, run_dir) for result in measured]

    def _store(self, model: TemporalHead | None, name: str | None) -> Store:
        from heads.fitting import count_views
        from heads.label_maps import named_as
        from heads.protocols import known_dataset, usual_protocol

        origin = None if model is None else model.origin
        split = self.split
        named = self.protocol or usual_protocol(self.kind, self.dataset, split=split)
        if named.lists == "given":
            split = self.unseen.split(self.workspace, self.dataset)
        if self.kind == "closeset":
            split = split or self.workspace.default_split(self.dataset, EVALUATION_SPLITS)
        store = self.workspace.choose_store(
            self.dataset,
            split=split,
            views=None if self.views is None else count_views(self.views),
            encoder_fingerprint=None if origin is None else origin.encoder_fingerprint,
            sampling=self.sampling,
            name=name,
            encoder=None if origin is None else origin.encoder,
        )
        return named_as(store, known_dataset(self.dataset), self.label_map)

    def _tests(
        self, protocol: Protocol, store: Store, model: TemporalHead | None
    ) -> tuple[tuple[TestSet, ...], str | None]:
        """The test sets, and where their class names are from where it is not the data set."""
        from heads.protocols import build_test_sets

        if protocol.lists == "given":
            return self.unseen.tests(self.workspace, store, model)
        self.unseen.require_unused(protocol.name)
        return build_test_sets(protocol, store, self.split), None

    def chosen_clip_store(self) -> Store | None:
        """The store of CLIP's own features; UserError where nothing would take them."""
        if self.clip_store is None:
            return None
        if self.fixed["ensemble"] is None and sweep.ENSEMBLE not in self.swept:
            raise UserError("--clip-store is for --ensemble WEIGHT or --sweep ensemble=...")
        return self.workspace.choose_store(self.dataset, name=self.clip_store)
