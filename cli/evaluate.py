"""`mote-cli eval`: accuracy of a head under a named protocol."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from cli import evaluate_trained as trained
from cli import evaluate_unseen as unseen
from cli import options
from cli.output import percent, print_json, print_table, progress_of, results
from featstore.errors import UserError

if TYPE_CHECKING:
    from heads.protocol_types import Kind, Protocol


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
    fusion: Annotated[
        str,
        typer.Option(
            "--fusion",
            metavar="softmax|cosine|features",
            help="How views become one score: mean of softmax (as published), of cosines, or "
            "of features.",
        ),
    ] = "softmax",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="auto|fp32|bf16",
            help="Arithmetic of the head; auto takes bf16 for wide heads where it is faster.",
        ),
    ] = "auto",
    shots: trained.Shots = None,
    draw_seeds: trained.DrawSeeds = None,
    lists_from: trained.ListsFrom = None,
    label_map: trained.LabelMapOption = "corrected",
    train_store: trained.TrainStore = None,
    recipe: trained.Recipe = None,
    epochs: trained.Epochs = None,
    batch_size: trained.BatchSize = None,
    lr: trained.LearningRate = None,
    repeat: trained.Repeat = "full",
    name: trained.RunName = None,
    best_epoch: trained.BestEpoch = True,
    allow_leak: trained.AllowLeak = False,
    k600_source: unseen.K600Source = None,
    class_lists: unseen.ClassLists = None,
    k400_names: unseen.K400Names = None,
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Evaluate a head on a store: top-1, top-5, and how many videos were listed and failed.

    --closeset takes the val (or test) split, --zeroshot all videos, or the mean over the official
    test lists of HMDB51 and UCF101. The result is kept as JSON beside the head.

    Example: `mote-cli eval --zeroshot hmdb51 --head k400-mote`
    """
    from heads.evaluation import evaluate_store
    from heads.fitting import count_views
    from heads.label_maps import named_as
    from heads.protocols import closeset_tests, known_dataset, usual_protocol, zeroshot_tests
    from heads.results import run_facts, save_result

    asked = {
        kind: given
        for kind, given in (
            ("closeset", closeset),
            ("zeroshot", zeroshot),
            ("fewshot", fewshot),
            ("base-to-novel", base_to_novel),
        )
        if given is not None
    }
    if len(asked) != 1:
        raise UserError(
            "eval takes exactly one of --closeset NAME, --zeroshot NAME, --fewshot NAME and "
            "--base-to-novel NAME"
        )
    ((protocol, dataset),) = asked.items()
    workspace = options.workspace(root)
    if protocol in ("fewshot", "base-to-novel"):
        kind: Kind = "fewshot" if fewshot is not None else "base-to-novel"
        trained.evaluate_trained(
            trained.TrainedRequest(
                protocol=usual_protocol(kind, dataset, split=split),
                dataset=dataset,
                head=head,
                split=split,
                views=views,
                sampling=sampling,
                store_name=store_name,
                prompts=prompts,
                modulate=modulate,
                fusion=fusion,
                precision=precision,
                device=device,
                shots=shots,
                draw_seeds=draw_seeds,
                lists_from=lists_from,
                label_map=label_map,
                train_store=train_store,
                recipe=recipe,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                repeat=repeat,
                name=name,
                best_epoch=best_epoch,
                allow_leak=allow_leak,
            ),
            workspace,
            json,
        )
        return
    model, run_dir = options.head(workspace, head)
    origin = None if model is None else model.origin
    if protocol == "closeset":
        split = split or workspace.default_split(dataset, ("val", "test"))
    named: Protocol | str = protocol
    facts = run_facts(run_dir)
    if protocol == "zeroshot" and split is None and known_dataset(dataset) == "k600":
        named = usual_protocol("zeroshot", dataset)
        found = unseen.unseen_tests(
            workspace,
            dataset,
            origin,
            source=k600_source,
            class_lists=class_lists,
            k400_names=k400_names,
            views=None if views is None else count_views(views),
            sampling=sampling,
            store_name=store_name,
        )
        store, tests = found.store, found.tests
        facts = replace(facts, class_names_source=found.source)
    else:
        store = workspace.choose_store(
            dataset,
            split=split,
            views=None if views is None else count_views(views),
            encoder_fingerprint=None if origin is None else origin.encoder_fingerprint,
            sampling=sampling,
            name=store_name,
            encoder=None if origin is None else origin.encoder,
        )
        store = named_as(store, known_dataset(dataset), label_map)
        choose = closeset_tests if protocol == "closeset" else zeroshot_tests
        tests = choose(store, split)
    with progress_of("eval", "videos") as progress:
        result = evaluate_store(
            store,
            model,
            protocol=named,
            dataset=dataset,
            tests=tests,
            facts=facts,
            head_name=run_dir.name,
            views=views,
            modulate=modulate,
            prompt_set=prompts,
            fusion=fusion,  # type: ignore[arg-type]  # evaluate_store checks it
            precision=precision,  # type: ignore[arg-type]  # evaluate_store checks it
            device=options.device(device),
            progress=progress,
        )
    file = save_result(result, run_dir)
    if json:
        print_json({**result.to_json(), "file": str(file)})
        return
    print_table(
        f"{protocol} on {dataset}, head {result.head}"
        f"{' with modulation' if result.modulate else ''}, views {result.views}, "
        f"{result.n_classes} classes, prompts {result.prompt_set}",
        ["split", "listed", "evaluated", "failed", "top-1 %", "top-5 %"],
        [
            [
                part.split,
                str(part.n_listed),
                str(part.n_evaluated),
                str(part.n_failed),
                percent(part.top1),
                percent(part.top5),
            ]
            for part in result.per_split
        ],
    )
    if len(result.per_split) > 1:
        results.print(f"mean top-1 {result.mean:.2f}, population std {result.std:.2f}")
    results.print(f"kept as {file}", markup=False)
