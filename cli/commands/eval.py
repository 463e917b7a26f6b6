"""`mote-cli eval`: accuracy of a head under a named protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from cli import options
from cli.commands import eval_options
from cli.commands.eval_print import print_base_to_novel, print_evaluation, print_fewshot
from cli.output import leave_it_to_the_first, progress_of
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
    closeset: eval_options.CloseSet = None,
    zeroshot: eval_options.ZeroShot = None,
    fewshot: eval_options.FewShot = None,
    base_to_novel: eval_options.BaseToNovel = None,
    protocol: eval_options.ProtocolName = None,
    dataset: eval_options.ProtocolDataset = None,
    head: options.Head = None,
    split: options.Split = None,
    views: eval_options.Views = None,
    sampling: options.StoreSampling = None,
    store_name: options.StoreName = None,
    prompts: options.PromptSet = None,
    modulate: options.Modulate = True,
    modulation_neighbours: eval_options.ModulationNeighbours = None,
    modulation_temperature: eval_options.ModulationTemperature = None,
    ensemble: eval_options.Ensemble = None,
    clip_store: eval_options.ClipStore = None,
    fusion: eval_options.Fusion = None,
    sweeps: eval_options.Sweeps = None,
    allow_overlap: eval_options.AllowOverlap = False,
    label_map: eval_options.LabelMapOption = "corrected",
    k600_source: eval_options.K600Source = None,
    class_lists: eval_options.ClassLists = None,
    k400_names: eval_options.K400Names = None,
    shots: eval_options.Shots = None,
    draw_seeds: eval_options.DrawSeeds = None,
    lists_from: eval_options.ListsFrom = None,
    train_store: eval_options.TrainStore = None,
    recipe: eval_options.Recipe = None,
    epochs: eval_options.Epochs = None,
    batch_size: eval_options.BatchSize = None,
    lr: eval_options.LearningRate = None,
    repeat: eval_options.Repeat = "full",
    name: eval_options.RunName = None,
    best_epoch: eval_options.BestEpoch = True,
    precision: eval_options.HeadPrecision = "auto",
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
    from heads.evaluation import request as asked
    from heads.evaluation import sweeps as swept_values
    from heads.evaluation.comparing.published import published_beside
    from heads.evaluation.protocols.choose import count_views, protocol_named
    from heads.evaluation.protocols.unseen import UnseenChoice
    from heads.evaluation.trained import request as trained
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
    swept = swept_values.parse_sweeps(sweeps or [])
    fused = swept_values.value_of(swept_values.FUSION, fusion)
    if isinstance(fused, list):
        if swept_values.FUSION in swept:
            raise UserError("--fusion all and --sweep fusion contradict each other: give one")
        swept[swept_values.FUSION] = fused
        fused = None
    kind = named.kind if named is not None else KINDS[chosen[0]]
    if kind in trained.KINDS and swept:
        raise UserError(f"--sweep goes with heads that are there: {kind} trains its own")
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
        prompt_set=lambda store: options.prompt_set(store, prompts),
        score=asked.ScoreSettings(
            modulate,
            swept_values.value_of(swept_values.NEIGHBOURS, modulation_neighbours),
            swept_values.value_of(swept_values.TEMPERATURE, modulation_temperature),
            ensemble,
            fused,
        ),
        swept=swept,
        clip_store=clip_store,
        allow_overlap=allow_overlap,
        label_map=label_map,
        unseen=UnseenChoice(k600_source, tuple(class_lists or ()), k400_names),
        packed_class_names=lambda name: options.packed_class_names(workspace, name),
        precision=precision,  # type: ignore[arg-type]  # it is checked there
        device=options.device(device),
    )
    training = trained.Training(
        *(shots, draw_seeds, lists_from, train_store, recipe, epochs, batch_size, lr, repeat),
        *(name, best_epoch),
    )

    def published(result: Mapping[str, Any]) -> dict[str, Any]:
        return published_beside(result, options.architecture(workspace, result))

    if kind in trained.KINDS:
        runs = trained.evaluate_trained(request, training, progress_of)
        value = runs.to_json()
        if kind == "fewshot":
            beside = [published(outcome.last.to_json()) for outcome in runs.outcomes]
            found = zip(value["runs"], beside, strict=True)
            value["runs"] = [{**run, **figures} for run, figures in found]
            print_fewshot(value, runs.outcomes, json)
        else:
            measure = {**runs.outcomes[0].last.to_json(), "measure": "harmonic mean"}
            value |= published(measure)
            print_base_to_novel(value, runs.save_summary(value), json)
        return
    training.require_unused(kind)
    with together(device) as ranks:
        if not ranks.first:
            leave_it_to_the_first()
        evaluation = asked.evaluate(request, progress_of)
        if ranks.first:
            files = evaluation.save()
            first = evaluation.measured[0][0].to_json()
            print_evaluation(evaluation, files, published(first), bool(swept), json)
