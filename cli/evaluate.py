"""`mote-cli eval`: accuracy of a head under a named protocol."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options
from cli.output import percent, print_json, print_table, progress_of, results
from featstore.errors import UserError


def evaluate(
    closeset: Annotated[
        str | None,
        typer.Option("--closeset", metavar="NAME", help="Data set with the head's own classes."),
    ] = None,
    zeroshot: Annotated[
        str | None, typer.Option("--zeroshot", metavar="NAME", help="Data set with new classes.")
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
    from heads.protocols import closeset_tests, zeroshot_tests
    from heads.results import save_result

    if (closeset is None) == (zeroshot is None):
        raise UserError("eval takes exactly one of --closeset NAME and --zeroshot NAME")
    protocol = "closeset" if closeset is not None else "zeroshot"
    dataset = closeset if closeset is not None else zeroshot
    assert dataset is not None
    workspace = options.workspace(root)
    model, run_dir = options.head(workspace, head)
    origin = None if model is None else model.origin
    if protocol == "closeset":
        split = split or workspace.default_split(dataset, ("val", "test"))
    store = workspace.choose_store(
        dataset,
        split=split,
        views=None if views is None else count_views(views),
        encoder_fingerprint=None if origin is None else origin.encoder_fingerprint,
        sampling=sampling,
        name=store_name,
        encoder=None if origin is None else origin.encoder,
    )
    choose = closeset_tests if protocol == "closeset" else zeroshot_tests
    with progress_of("eval", "videos") as progress:
        result = evaluate_store(
            store,
            model,
            protocol=protocol,
            dataset=dataset,
            tests=choose(store, split),
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
