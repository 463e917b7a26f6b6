"""`mote-cli finetune`: tower and head trained together, from packed videos."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.output import leave_it_to_the_first, percent, print_facts, print_json, progress_of
from featstore.errors import UserError, WorkError
from featstore.workspace import Workspace

if TYPE_CHECKING:
    from heads.training.ranks import Ranks


def finetune(
    dataset: options.Dataset,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="The CLIP to begin with, as --encoder of extract takes it; default: the one that "
            f"--from-head was trained on, else {options.DEFAULT_ENCODER}.",
        ),
    ] = None,
    from_head: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Begin with the head of this run instead of a new one; RUN may be --name: the "
            "first stage is kept in its folder frozen/.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Settings by name (end-to-end, the default; paper-vit-b16, paper-vit-l14, demo) "
            "or from a TOML file; options given beside it win.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Name of the run, of its head and of its encoder; default: DATASET-finetuned.",
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="tower|head|tower-last-N",
            help="What is trained: everything, all but the tower, or the tower's last N blocks "
            "with the head.",
        ),
    ] = None,
    split: options.Split = None,
    eval_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Evaluate on this split; default: val, else test."),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(metavar="EPOCHS", min=0, help="Epochs between evaluations; 0: none."),
    ] = None,
    prompts: options.PromptSet = None,
    epochs: options.Epochs = None,
    warmup_epochs: options.WarmupEpochs = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Videos per step of each process.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Batches per optimiser step.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the head; the tower's is a share of it.")
    ] = None,
    weight_decay: options.WeightDecay = None,
    frames: options.TrainedFrames = None,
    layers: options.Layers = None,
    experts: options.Experts = None,
    seed: options.TrainingSeed = None,
    draws: Annotated[
        str | None,
        typer.Option(
            metavar="shared|per-rank",
            help="Experts and temperatures of a step: one draw for all processes, or one each.",
        ),
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment", help="Random crop, flip and grey.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="auto|fp32|bf16|fp16",
            help="Arithmetic of training; auto takes bf16 (fp16 on older ones) on a GPU.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Compute the tower's activations twice instead of keeping them: less memory.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ddp|fsdp",
            help="Several processes: whole copies (DDP) or shares of the model (FSDP2); auto "
            "shards towers from 200 million parameters, which ViT-L has.",
        ),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(metavar="last|best", help="Which weights become the encoder and the head."),
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Share of the tuned tower in the encoder, the rest is the one it began with; "
            "0.99 as published.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            min=1,
            help="Steps between checkpoints inside an epoch; default: every ten minutes.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Decode threads of each process; default: its share of cores."),
    ] = None,
    decoder: Annotated[
        str, typer.Option(metavar="auto|pyav|dali", help="What decodes the videos.")
    ] = "auto",
    device: options.Device = "auto",
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    resume: options.Resume = False,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Train the image tower with the head, from packed videos; no store is needed.

    The tuned tower becomes encoders/RUN and the head heads/RUN, for extract, eval, predict and
    export. On several GPUs: `torchrun --nproc-per-node N -m cli.main finetune ...`. A run that was
    interrupted goes on with --resume (docs/finetuning.md).

    Example: `mote-cli finetune --dataset my-clips --encoder ViT-B-16/openai --name tuned`
    """
    from heads.end_to_end.finetune import finetune as run_finetune
    from heads.end_to_end.plan import FinetuneRequest
    from heads.methods.registry import require_run_name
    from heads.recipes import FINETUNE_RECIPE, load_recipe
    from heads.training.ranks import contact, joined, left

    ranks = joined(options.known_device(device))
    if not ranks.first:
        leave_it_to_the_first()
    try:
        with contact(ranks):
            with ranks.agreeing():
                workspace = options.workspace(root)
                run = name or f"{dataset}-finetuned"
                require_run_name(run)
                settings = load_recipe(recipe or FINETUNE_RECIPE)
                request = FinetuneRequest(
                    dataset_dir=workspace.dataset_dir(dataset),
                    run_dir=workspace.run_dir(run),
                    encoder_dir=workspace.encoder_dir(run),
                    encoders_dir=workspace.root / "encoders",
                    config=settings.finetune_config(
                        epochs=epochs,
                        warmup_epochs=warmup_epochs,
                        batch_size=batch_size,
                        accumulation=accumulation,
                        lr=lr,
                        weight_decay=weight_decay,
                        frames=frames,
                        seed=seed,
                        precision=precision,
                        train=train,
                        checkpointing=checkpointing,
                        draws=draws,
                        evaluate_every=evaluate_every,
                        save=save,
                        blend=blend,
                        shard=shard,
                        augment=augment,
                    ),
                    head=lambda dim: settings.head_config(dim, layers=layers, experts=experts),
                    encoder=encoder or (None if from_head else options.DEFAULT_ENCODER),
                    from_head=_first_stage(workspace, from_head, run),
                    split=split,
                    eval_split=eval_split,
                    prompt_set=prompts,
                    resume=resume,
                    decoder=decoder,
                    workers=workers,
                    checkpoint_every=checkpoint_every,
                )
            with progress_of("finetune", "steps") as progress:
                summary = SimpleNamespace(**run_finetune(request, ranks, progress))
    except BaseException as error:
        _say(error, ranks)
        raise
    left(ranks)
    if ranks.first:
        _print_summary(summary, json, options.same_root(root))
    failed = summary.n_failed + summary.n_evaluated_failed
    listed = summary.n_listed + summary.n_evaluated
    if not ranks.first:
        raise typer.Exit(int(failed > max_failures * listed))
    raise typer.Exit(
        options.exit_code(
            failed, listed, max_failures, f"{summary.path}/failures.csv has the reasons"
        )
    )


def _first_stage(workspace: Workspace, from_head: str | None, run: str) -> Path | None:
    """Folder of the head to begin with; the run's own may have been put aside already."""
    if from_head is None:
        return None
    return workspace.run_dir(run) if from_head == run else workspace.choose_run(from_head)


def _say(error: BaseException, ranks: Ranks) -> None:
    """Raise what this process should end with in place of `error`, if not that."""
    if ranks.alone:
        return
    # Whoever started the processes stops them all when one ends: they are ending already.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(error, KeyboardInterrupt):
        raise WorkError(
            f"rank {ranks.rank} of {ranks.world_size} was told to stop (another one ended, or the "
            "job): the same command with --resume goes on"
        ) from None
    if isinstance(error, UserError | WorkError) and not getattr(error, "speaks", True):
        # Another process says it.
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


def _print_summary(summary: SimpleNamespace, json: bool, same_root: str) -> None:
    if json:
        print_json(vars(summary))
        return
    memory = f"{summary.peak_rss_mb:.0f} MB per process" + (
        "" if summary.peak_gpu_mb is None else f", {summary.peak_gpu_mb:.0f} MB of its GPU"
    )
    accuracy = "not evaluated"
    if summary.best_top1 is not None:
        accuracy = (
            f"{percent(summary.top1)} % (the best was {percent(summary.best_top1)} after epoch "
            f"{summary.best_epoch})"
        )
    split, evaluate = "", {}
    if summary.eval_split is not None:
        split = f" --split {summary.eval_split}"
        evaluate = {
            "then": f"mote-cli eval --closeset {summary.dataset} --head {summary.run}{same_root}"
        }
    print_facts(
        {
            "run": f"{summary.run} in {summary.path}",
            "encoder": f"{summary.encoder_path} ({summary.blend:g} of the tower after epoch "
            f"{summary.published_epoch}, the rest {summary.encoder})",
            "trained on": f"{summary.n_listed - summary.n_failed} of {summary.n_listed} videos of "
            f"{summary.dataset}, {summary.videos_per_step} per step ({summary.processes} x "
            f"{summary.batch_size})",
            "loss": f"{summary.loss:.4f} after {summary.epochs} epochs",
            "top-1": accuracy,
            "time": f"{summary.seconds:.0f} s, {summary.clips_per_second:.2f} clips/s, "
            f"{summary.waiting:.0%} waiting for data ({summary.precision} on {summary.device})",
            "memory": memory,
            **{f"failed: {failure['key']}": failure["reason"] for failure in summary.failures},
            "next": f"mote-cli extract --dataset {summary.dataset}{split} --encoder {summary.run} "
            f"--sampling uniform:{summary.frames}{same_root}",
            **evaluate,
        }
    )
