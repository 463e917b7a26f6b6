"""`mote-cli finetune`: train tower and head together, from packed videos."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import leave_it_to_the_first, percent, progress_of, report
from featstore.errors import UserError, WorkError, counted
from featstore.workspace import DATASET_FILE

if TYPE_CHECKING:
    from heads.end_to_end.summary import FinetuneSummary
    from heads.training.ranks import Ranks


def finetune(
    dataset: options.Dataset,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="The CLIP to begin with, written as for --encoder of extract; default: the one "
            f"that --from-head was trained on, else {options.DEFAULT_ENCODER}.",
        ),
    ] = None,
    from_head: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Begin with the head of this run instead of a new one. RUN may be the same as "
            "--name: the earlier head is then kept in the folder frozen/ of the run.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The head: mote (the default), transformer, dist, which looks at the pixels "
            "beside a tower that stays as it is, msta, which adapts both towers, or taco, which "
            "tunes both.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Settings by name (end-to-end, the default; paper-vit-b16, paper-vit-l14, demo; "
            "for dist: dist, the default, dist-k400-vit-b16, dist-k400-vit-l14, dist-ssv2-vit-b16, "
            "dist-ssv2-vit-l14, demo-dist; for msta: msta, the default, msta-base-to-novel, "
            "msta-few-shot, msta-zero-shot, demo-msta; for taco: taco, the default, "
            "taco-k400-vit-b16, taco-k400-vit-l14, taco-k400-vit-b32, demo-taco) or from a TOML "
            "file; options on the command line override them.",
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
            metavar="tower|head|tower-last-N|both-towers",
            help="What to train: image tower and head, the head alone, the tower's last N blocks "
            "and the head, or both towers (image and text) and the head.",
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
    guides: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Descriptions that msta holds the class texts near, as `descriptions template` "
            "and `descriptions check` have them; default: templates.",
        ),
    ] = None,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Read what lies below the adapters of msta from a store (extract --tier tokens:K) "
            "instead of videos; needs --no-augment.",
        ),
    ] = False,
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
    shots: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Train on K videos of each class, drawn by key."),
    ] = None,
    draw_seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of --shots.")] = 1,
    classes: Annotated[
        str,
        typer.Option(
            metavar="all|base|novel",
            help="Train on all classes, or on the half with more (base) or fewer training videos.",
        ),
    ] = "all",
    lists_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Take the shots from a clone of a repository with published lists, as eval does.",
        ),
    ] = None,
    class_sampling: options.ClassSampling = None,
    class_weights: options.ClassWeights = None,
    seed: options.TrainingSeed = None,
    draws: Annotated[
        str | None,
        typer.Option(
            metavar="shared|per-rank",
            help="Draw the experts and temperatures of a step once for all processes, or once per "
            "process.",
        ),
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment", help="Random crop, flip, greyscale.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="auto|fp32|bf16|fp16",
            help="Number format of training; on a GPU, auto takes bf16 (fp16 on older GPUs).",
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
            help="With several processes, each holds a whole copy of the model (DDP) or a share "
            "of it (FSDP2); auto shards towers of 200 million parameters or more, such as ViT-L.",
        ),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(
            metavar="last|best|mean|teacher",
            help="Which weights become the encoder and the head; the last two are for --method "
            "taco.",
        ),
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Share of the tuned tower in the encoder; the rest is the tower it began with. "
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
        str, typer.Option(metavar="auto|pyav|dali", help="Decoder, as for extract.")
    ] = "auto",
    device: options.Device = "auto",
    exclude: options.Exclude = None,
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    resume: options.Resume = False,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Train the image tower together with the head, from packed videos and without a store.

    The tuned tower becomes encoders/RUN and the head heads/RUN, for extract, eval, predict and
    export. With `--method dist` the tower stays as it is, and the branch beside it is trained; with
    `--method msta` both towers stay, and small adapters inside them are. On
    several GPUs: `torchrun --nproc-per-node N -m cli.main finetune ...`. --resume continues an
    interrupted run (docs/finetuning.md).

    Example: `mote-cli finetune --dataset my-clips --name tuned`
    """
    folder = options.workspace(root).dataset_dir(dataset)
    if "WORLD_SIZE" not in os.environ and not (folder / DATASET_FILE).is_file():
        from pipeline.tars.dataset import load_dataset  # says what is missing, and needs no torch

        load_dataset(folder)
    from heads.end_to_end.chosen_videos import VideoChoice, training_videos
    from heads.end_to_end.finetune import finetune as run_finetune
    from heads.end_to_end.request import FinetuneRequest
    from heads.evaluation.next_steps import after_finetuning
    from heads.files.head_cards import kind_of
    from heads.methods.registry import require_run_name
    from heads.recipes import finetune_recipe
    from heads.training.ranks import contact, joined, left

    ranks = joined(options.known_device(device))
    if not ranks.first:
        leave_it_to_the_first()
    try:
        with contact(ranks):
            with ranks.agreeing():
                workspace = options.workspace(root)
                choice = VideoChoice(shots, draw_seed, classes, lists_from)
                run = name or f"{dataset}-finetuned{choice.suffix}"
                require_run_name(run)
                first = None
                if from_head is not None:  # the run's own head may be in frozen/ already
                    own = from_head == run
                    first = workspace.run_dir(run) if own else workspace.choose_run(from_head)
                begun = None if first is None or recipe is not None else kind_of(first)
                settings = finetune_recipe(recipe, method or begun)
                if blend is not None and settings.beside_tower:
                    raise UserError(
                        "--blend mixes a tuned tower with the one it began with, and here the "
                        "tower stays as it is: leave it out"
                    )
                request = FinetuneRequest(
                    dataset_dir=workspace.dataset_dir(dataset),
                    run_dir=workspace.run_dir(run),
                    encoder_dir=workspace.encoder_dir(run),
                    encoders_dir=workspace.root / "encoders",
                    config=settings.finetune_config(
                        videos=lambda: training_videos(
                            workspace.dataset_dir(dataset), split, choice
                        ),
                        epochs=epochs,
                        warmup_epochs=warmup_epochs,
                        batch_size=batch_size,
                        accumulation=accumulation,
                        class_sampling=class_sampling,
                        class_weights=class_weights,
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
                    from_head=first,
                    split=split,
                    eval_split=eval_split,
                    prompt_set=prompts,
                    guides=guides,
                    tokens=tokens,
                    exclude=exclude,
                    choice=choice,
                    method=method or settings.beside_tower,
                    resume=resume,
                    decoder=decoder,
                    workers=workers,
                    checkpoint_every=checkpoint_every,
                )
            with progress_of("finetune", "steps") as progress:
                summary = run_finetune(request, ranks, progress)
    except BaseException as error:
        _say(error, ranks)
        raise
    left(ranks)
    if ranks.first:
        steps = after_finetuning(Path(summary.path), summary.dataset, summary.eval_split, prompts)
        report(json, summary.to_json() | steps, _facts(summary, steps))
    failed = summary.n_failed + summary.n_evaluated_failed
    listed = summary.n_listed + summary.n_evaluated
    if not ranks.first:
        raise typer.Exit(int(failed > max_failures * listed))
    options.require_few_failures(
        failed, listed, max_failures, f"the reasons are in {summary.path}/failures.csv"
    )


def _say(error: BaseException, ranks: Ranks) -> None:
    """Raise the exception that should end this process instead of `error`, if there is one."""
    if ranks.alone:
        return
    # The launcher stops all processes when one ends, and this one is ending already.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(error, KeyboardInterrupt):
        raise WorkError(
            f"rank {ranks.rank} of {ranks.world_size} was stopped (another rank ended, or the "
            "job): run the same command with --resume to continue"
        ) from None
    if isinstance(error, UserError | WorkError) and not getattr(error, "speaks", True):
        # Another process prints this error.
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


def _facts(summary: FinetuneSummary, steps: Mapping[str, str]) -> dict[str, Any]:
    from featstore.balance import Balance
    from heads.methods.registry import method

    memory = f"{summary.peak_rss_mb:.0f} MB per process" + (
        "" if summary.peak_gpu_mb is None else f", {summary.peak_gpu_mb:.0f} MB of its GPU"
    )
    accuracy = "not evaluated"
    if summary.best_top1 is not None:
        best = f"{percent(summary.best_top1)} % after epoch {summary.best_epoch}"
        accuracy = f"{percent(summary.top1)} % (the best was {best})"
        if summary.top1 is None:
            accuracy = f"of the published weights not measured (an epoch's best was {best})"
    tower = f"{summary.blend:g} of the tower after epoch {summary.published_epoch}, the rest "
    if method(summary.head).pixels:
        tower = f"the head after epoch {summary.published_epoch} looks at its tokens; as it was in "
    encoder = f"{summary.encoder_path} ({tower}{summary.encoder})"
    if method(summary.head).adapts:
        encoder = f"{summary.encoder}, with the adapters of epoch {summary.published_epoch}"
    return {
        "run": f"{summary.run} in {summary.path}",
        "encoder": encoder,
        "trained on": f"{summary.n_listed - summary.n_failed} of "
        f"{counted(summary.n_listed, 'video')} of {summary.dataset}, {summary.videos_per_step} "
        f"per step ({summary.processes} x {summary.batch_size})",
        **({"tokens": f"from {summary.tokens}"} if summary.tokens else {}),
        **({} if summary.excluded is None else {"excluded": summary.excluded.words}),
        **({"classes": Balance(**found).words} if (found := summary.class_balance) else {}),
        "loss": f"{summary.loss:.4f} after {counted(summary.epochs, 'epoch')}",
        "top-1" if summary.measure == "top1" else summary.measure: accuracy,
        "time": f"{summary.seconds:.0f} s, {summary.clips_per_second:.2f} clips/s, "
        f"{summary.waiting:.0%} waiting for data ({summary.precision} on {summary.device})",
        "memory": memory,
        **{f"failed: {failure['key']}": failure["reason"] for failure in summary.failures},
        **steps,
    }
