"""`mote-cli eval`: measure the accuracy of a head under a named protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import options
from cli.commands.answers.compare import backbone_of
from cli.commands.answers.eval_shown import base_to_novel_shown, fewshot_shown, report_evaluation
from cli.output import leave_it_to_the_first, progress_of, report
from featstore.errors import UserError

if TYPE_CHECKING:
    from heads.evaluation.protocols.protocol import Kind

KINDS: Final[dict[str, Kind]] = {
    "--closeset": "closeset",
    "--zeroshot": "zeroshot",
    "--fewshot": "fewshot",
    "--base-to-novel": "base-to-novel",
}
TRAINING_KINDS: Final = ("fewshot", "base-to-novel")


def evaluate(
    closeset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Data set with the head's own classes.")
    ] = None,
    zeroshot: Annotated[
        str | None, typer.Option(metavar="NAME", help="Data set with new classes.")
    ] = None,
    fewshot: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Train on K videos per class, then test (--shots)."),
    ] = None,
    base_to_novel: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train on 16 videos of each frequent class, test frequent and rare classes.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(metavar="PROTOCOL", help="Name of a protocol in `mote-cli protocols list`."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Data set of --protocol; default: the protocol's own."),
    ] = None,
    head: options.Head = None,
    split: options.Split = None,
    views: Annotated[
        str | None, typer.Option(metavar="CLIPSxCROPS", help="Use the store with these views.")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames per view, of those stored; default: the head's, or all for mean."
        ),
    ] = None,
    sampling: options.StoreSampling = None,
    store_name: options.StoreName = None,
    prompts: options.PromptSet = None,
    modulate: options.Modulate = True,
    modulation_neighbours: Annotated[
        str | None,
        typer.Option(
            metavar="K",
            help="Nearest classes that modulation compares on either side; default: the head's "
            "setting, 5 as published.",
        ),
    ] = None,
    modulation_temperature: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="Temperature of modulation: a larger one holds the head back less, none not at "
            "all; default: the head's setting, 0.05 as published.",
        ),
    ] = None,
    crop_style: Annotated[
        str | None,
        typer.Option(
            metavar="short-side|center-fraction",
            help="How a head that looks at pixels cuts frames: the short side resized, or, as DiST "
            "tests HMDB51 and UCF101, the central 7/8 square.",
        ),
    ] = None,
    ensemble: Annotated[
        float | None,
        typer.Option(
            metavar="WEIGHT",
            min=0.0,
            max=1.0,
            help="Add CLIP's own cosines per frame with this weight; DiST has 0.5 in zero-shot.",
        ),
    ] = None,
    projection: options.Projection = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="mean|last|best|teacher|all",
            help="Which weights of a run that keeps several (TACO), several with commas; default: "
            "those that it published.",
        ),
    ] = None,
    clip_store: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Store of the same data set with CLIP's own features, for --ensemble with a head "
            "whose tower was tuned.",
        ),
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(
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
            help="Measure many settings in one pass: modulation-temperature, "
            "modulation-neighbours, ensemble, fusion, projection; or blend, over imported towers. "
            "May be repeated.",
        ),
    ] = None,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Measure even if training videos are tested."),
    ] = False,
    label_map: Annotated[
        str,
        typer.Option(
            metavar="corrected|as-published",
            help="Some published label files swap class names (HMDB51): correct them, or keep "
            "them.",
        ),
    ] = "corrected",
    k600_source: Annotated[
        str | None,
        typer.Option(
            metavar="test|val|FILE",
            help="Videos of Kinetics-600 zero-shot: a split, or a list of names or YouTube ids; "
            "default: test if it was extracted, else val.",
        ),
    ] = None,
    class_lists: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Class splits of Kinetics-600 zero-shot, one file of names or numbers per split "
            "(repeat the option, or name a folder); default: three that mote draws.",
        ),
    ] = None,
    k400_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Class names of Kinetics-400; default: the head's, else those of the packed k400.",
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...", help="Videos per class; default: 2,4,8,16 (base-to-novel 16)."
        ),
    ] = None,
    draw_seeds: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...", help="Seeds of the shots; default: 1, for base-to-novel 1,2,3."
        ),
    ] = None,
    lists_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Take the shots from a clone of a repository with published lists."
        ),
    ] = None,
    train_store: Annotated[
        str | None, typer.Option(metavar="NAME", help="Store to train from, if several fit.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Training recipe, as for train-head.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of training.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Videos per training step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of training.")] = None,
    repeat: Annotated[
        str,
        typer.Option(
            metavar="N|full", help="Repeat the shots N times per epoch, or to the full set's size."
        ),
    ] = "full",
    name: Annotated[
        str | None, typer.Option(metavar="RUN", help="First part of the trained runs' names.")
    ] = None,
    best_epoch: Annotated[
        bool,
        typer.Option(
            "--best-epoch/--no-best-epoch",
            help="Test every epoch too, and report the best one separately.",
        ),
    ] = True,
    precision: Annotated[
        str,
        typer.Option(
            metavar="auto|fp32|bf16",
            help="Number format of the head's arithmetic; auto takes bf16 for wide heads if it is "
            "faster.",
        ),
    ] = "auto",
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Evaluate a head on a store: top-1, top-5, and how many videos were listed and failed.

    --closeset tests the val (or test) split. --zeroshot tests all videos, or takes the mean over
    the official test lists of HMDB51 and UCF101. --protocol takes any protocol by its name.
    --fewshot and --base-to-novel train heads first, from the weights of --head if it is given.
    The result is kept as JSON beside the head, with tables for a spreadsheet (a row a video, a row
    a class, who was taken for whom) and a picture of the confusions. To share the work among
    processes, run it under torchrun.

    Example: `mote-cli eval --zeroshot hmdb51 --head k400-mote`
    """
    from heads.evaluation import request as asked
    from heads.evaluation import sweeps as swept_values
    from heads.evaluation.comparing.published import published_beside
    from heads.evaluation.protocols.choose import count_views, protocol_named
    from heads.evaluation.protocols.unseen import UnseenChoice
    from heads.files.run_files import tuned_runs
    from heads.prediction.views import prepare_views

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
        count_views(views)  # raises its UserError before anything is read
    swept = swept_values.parse_sweeps(sweeps or [])
    fused = swept_values.value_of(swept_values.FUSION, fusion)
    if isinstance(fused, list):
        if swept_values.FUSION in swept:
            raise UserError("--fusion all and --sweep fusion contradict each other: give one")
        swept[swept_values.FUSION] = fused
        fused = None
    which = swept_values.parse_weights(weights)
    kind = named.kind if named is not None else KINDS[chosen[0]]
    trains = kind in TRAINING_KINDS
    if trains and swept:
        raise UserError(f"--sweep needs a head that is trained already: {kind} trains its own")
    if trains and crop_style is not None:
        raise UserError(f"--crop-style needs a head that is trained already: {kind} trains its own")
    if trains and frames is not None:
        raise UserError(f"--frames needs a head that is trained already: {kind} has its recipe's")
    workspace = options.workspace(root)
    request = asked.EvaluationRequest(
        workspace,
        dataset,
        kind,
        head=head,
        protocol=named,
        split=split,
        views=views,
        sampling=sampling,
        store=store_name,
        frames=frames,
        prompt_set=lambda store: options.prompt_set(store, prompts),
        score=asked.ScoreSettings(
            modulate,
            swept_values.value_of(swept_values.NEIGHBOURS, modulation_neighbours),
            swept_values.value_of(swept_values.TEMPERATURE, modulation_temperature),
            ensemble,
            fused,
            options.projection(projection),
        ),
        swept=swept,
        weights=which,
        clip_store=clip_store,
        allow_overlap=allow_overlap,
        label_map=label_map,
        unseen=UnseenChoice(k600_source, tuple(class_lists or ()), k400_names),
        packed_class_names=lambda name: options.packed_class_names(workspace, name),
        video_paths=lambda name: options.video_paths(workspace, name),
        content_marks=lambda name: options.content_marks(workspace, name),
        precision=precision,  # type: ignore[arg-type]  # it is checked there
        device=options.known_device(device),
    )
    tuned = tuned_runs(workspace, head) if trains else []
    if which and trains and (not tuned or len(which) > 1):
        raise UserError(
            f"--weights {weights} cannot be tested with {kind}: name one kind of weights, and with "
            "--head a run of finetune that keeps them"
        )
    made_for: dict[str, str] = {}
    tested: list[str | None] = [*tuned] if trains else [head]
    for run in tested:
        made = prepare_views(
            *(workspace, dataset, run),
            views=views,
            sampling=sampling,
            style=crop_style,
            store=store_name,
            device=request.device,
            stages=progress_of,
        )
        if made is not None:
            made_for[str(run)] = made.stem
    if not trains:
        request = replace(request, store=made_for.get(str(head), store_name))
        request.require_held()
    # Until here nothing imports torch, so that what is named wrong is said at once.
    from heads.evaluation.trained import request as trained
    from heads.evaluation.trained.tuned import evaluate_tuned
    from heads.training.ranks import together

    request = replace(request, device=options.device(device))
    how = trained.Training(
        *(shots, draw_seeds, lists_from, train_store, recipe, epochs, batch_size, lr, repeat),
        name=name,
        best_epoch=best_epoch,
    )

    def published(result: Mapping[str, Any]) -> dict[str, Any]:
        return published_beside(result, backbone_of(workspace, result))

    if trains:
        if tuned:
            runs = evaluate_tuned(request, how, tuned, made_for, progress_of)
        else:
            runs = trained.evaluate_trained(request, how, progress_of)
        value = runs.to_json()
        if kind == "fewshot":
            beside = [published(outcome.last.to_json()) for outcome in runs.outcomes]
            found = zip(value["runs"], beside, strict=True)
            value["runs"] = [{**run, **figures} for run, figures in found]
            report(json, value, fewshot_shown(value, runs.outcomes))
        else:
            measure = {**runs.outcomes[0].last.to_json(), "measure": "harmonic mean"}
            value |= published(measure)
            value["file"] = str(runs.save_summary(value))
            report(json, value, base_to_novel_shown(value))
        return
    how.require_unused(kind)
    with together(device) as ranks:
        if not ranks.first:
            leave_it_to_the_first()
        evaluation = asked.evaluate(request, progress_of)
        if ranks.first:
            files, unwritten = evaluation.save_if_possible()
            figures = published(evaluation.measured[0][0].to_json())
            report_evaluation(json, evaluation, files, figures, bool(swept) or len(which) > 1)
            options.require_kept(
                unwritten,
                "the result is measured and",
                "make the folder writable, or copy the workspace and name the copy with --root",
            )
