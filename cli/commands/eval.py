"""`mote-cli eval`: accuracy of a head under a named protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from cli import options
from cli.commands import eval_sweep
from cli.commands import eval_trained as trained
from cli.commands import eval_unseen as unseen
from cli.commands.eval_print import report
from cli.commands.eval_request import Request
from cli.output import leave_it_to_the_first
from featstore.errors import UserError

if TYPE_CHECKING:
    from heads.evaluation.protocols.protocol import Kind

KINDS: Final[dict[str, Kind]] = {
    "--closeset": "closeset",
    "--zeroshot": "zeroshot",
    "--fewshot": "fewshot",
    "--base-to-novel": "base-to-novel",
}


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
    from heads.evaluation.protocols.choose import count_views, protocol_named
    from heads.training.ranks import together

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
    swept = eval_sweep.parse_sweeps(sweeps or [])
    fused = eval_sweep.value_of(eval_sweep.FUSION, fusion)
    if isinstance(fused, list):
        if eval_sweep.FUSION in swept:
            raise UserError("--fusion all and --sweep fusion contradict each other: give one")
        swept[eval_sweep.FUSION] = fused
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
            "neighbours": eval_sweep.value_of(eval_sweep.NEIGHBOURS, modulation_neighbours),
            "temperature": eval_sweep.value_of(eval_sweep.TEMPERATURE, modulation_temperature),
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
    with together(device) as ranks:
        if not ranks.first:
            leave_it_to_the_first()
        model, run_dir = options.head(request.workspace, head)
        measured, missing = request.measure(model, run_dir, store_name)
        if ranks.first:
            report(request.workspace, measured, missing, bool(swept), json)
