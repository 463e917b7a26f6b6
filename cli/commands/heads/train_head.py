"""`mote-cli train-head`: train a temporal head on a feature store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.output import progress_of, report
from featstore.errors import UserError, counted
from heads.methods.registry import MEAN_OF_FRAMES, method, names, require_run_name

if TYPE_CHECKING:
    from heads.training.train_head import TrainSummary


def train_head(
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Data set; default: the only one extracted.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Settings by name (auto, the default, fits them to the videos; frozen-store, "
            "paper-vit-b16, paper-vit-l14, demo, end-to-end) or from a TOML file; options on the "
            "command line override them.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(names()),
            help="Mixture of temporal experts, the plain transformer, no parameters at all, or a "
            "cheap baseline (docs/baselines.md); default: the recipe's.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="RUN", help="Name of the run; default: DATASET-HEAD.")
    ] = None,
    split: options.Split = None,
    sampling: options.StoreSampling = None,
    store_name: options.StoreName = None,
    prompts: options.PromptSet = None,
    epochs: options.Epochs = None,
    warmup_epochs: options.WarmupEpochs = None,
    patience: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Stop after N epochs without a better validation; 0: train all epochs.",
        ),
    ] = None,
    shrinkage: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of what the head adds to the mean of frames that is taken away at the end.",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT|held-out|none",
            help="Videos that choose the epoch; default: split val, else a part of the training "
            "videos; none: train on all and keep the last epoch.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Videos per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the head.")] = None,
    weight_decay: options.WeightDecay = None,
    frames: options.TrainedFrames = None,
    layers: options.Layers = None,
    experts: options.Experts = None,
    class_sampling: options.ClassSampling = None,
    class_weights: options.ClassWeights = None,
    seed: options.TrainingSeed = None,
    precision: Annotated[
        str | None, typer.Option(metavar="auto|fp32|bf16", help="Arithmetic of training.")
    ] = None,
    device: options.Device = "auto",
    shots: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Train on K videos of each class, drawn by key."),
    ] = None,
    draw_seed: Annotated[
        int, typer.Option(metavar="S", min=0, help="Seed of --shots and of held-out videos.")
    ] = 1,
    classes: Annotated[
        str,
        typer.Option(
            metavar="all|base|novel",
            help="Train on all classes, or on the half with more (base) or fewer training videos.",
        ),
    ] = "all",
    repeat: Annotated[
        str | None,
        typer.Option(
            metavar="N|full",
            help="Use every video N times per epoch; full: until an epoch is as long as with all "
            "videos; default: the recipe's, else 1.",
        ),
    ] = None,
    from_head: Annotated[
        str | None, typer.Option(metavar="RUN", help="Start from the weights of this head.")
    ] = None,
    exclude: options.Exclude = None,
    resume: options.Resume = False,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Train a head on stored features; the encoder is not run again.

    A recipe holds every setting of head and training (docs/recipes.md); the default one fits them
    to the videos, keeps the epoch that is best on validation videos, and the last as RUN/last.
    --resume continues an interrupted run, with the same result, bit for bit, as without the
    interruption.

    Example: `mote-cli train-head --dataset my-clips --name first`
    """
    from heads.evaluation.next_steps import after_training
    from heads.evaluation.wanted_store import choose_training_store
    from heads.files.run_files import keeps_best
    from heads.recipes import DEFAULT_RECIPE, TRAIN_HEAD_RECIPE, load_recipe
    from heads.training.training_set import choose_training_set, usable_rows, without_excluded

    workspace = options.workspace(root)
    require_run_name(name or "")
    settings = load_recipe(recipe or TRAIN_HEAD_RECIPE)
    initial, initial_run = None, None
    if from_head is not None:
        if (head, layers, experts) != (None, None, None):
            raise UserError(
                "--from-head sets the shape of the head: leave --head, --layers and --experts out"
            )
        if from_head == MEAN_OF_FRAMES:
            raise UserError("--from-head mean: the mean of frames has no weights to start from")
        initial_run = workspace.choose_run(from_head)
    chosen, store, split = choose_training_store(
        workspace, dataset, split=split, sampling=sampling, name=store_name, initial=initial_run
    )
    options.known_device(device)
    if initial_run is None:
        dim = store.provenance.dim
        shape = settings.head_config(dim, kind=head, layers=layers, experts=experts)
        method(shape.kind).warn_of_epochs(
            {
                **{"--epochs": epochs, "--warmup-epochs": warmup_epochs, "--patience": patience},
                **{"--lr": lr, "--weight-decay": weight_decay, "--batch-size": batch_size},
                **{"--shrinkage": shrinkage, "--repeat": repeat, "--layers": layers},
                "--experts": experts,
            }
        )
    # Until here nothing imports torch, so that what is named wrong is said at once.
    from featstore.balance import Balance
    from heads.compatibility import check_fits, training_prompt_set
    from heads.files.head_file import load_head
    from heads.training.train_head import train_head as run
    from heads.training.train_head import training_rows
    from heads.training.validation import choose_validation

    if initial_run is not None:
        initial = load_head(initial_run)
        check_fits(initial, store)
        shape = initial.config
    listed, excluded = training_rows(store, split), None
    if exclude is not None:
        listed, excluded = without_excluded(store, listed, exclude)
    chosen_set = choose_training_set(
        store,
        listed,
        split=split,
        shots=shots,
        draw_seed=draw_seed,
        half=classes,
        repeat=repeat or "1",
    )
    run_dir = workspace.run_dir(name or f"{chosen}{chosen_set.suffix}-{shape.kind}")
    if resume and recipe is None and not keeps_best(run_dir):
        settings = load_recipe(DEFAULT_RECIPE)  # the default of version 0.2, which began it
    rows, judged = choose_validation(
        *(store, chosen_set.rows, chosen_set.classes),
        split=split,
        stores=workspace.opened(chosen),
        asked=validation,
        hold_out=bool(settings.training.get("keep_best")) and method(shape.kind).in_epochs,
        seed=draw_seed,
        excluded=frozenset(() if excluded is None else excluded.keys),
    )
    trained = store.class_names if chosen_set.classes is None else chosen_set.classes
    config, repeats = settings.fitted(
        videos=len(usable_rows(store, rows)),
        classes=len(trained),
        dim=store.provenance.dim,
        repeats=None if repeat is None else chosen_set.repeats,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        patience=patience,
        # What the head to start from adds is nothing that these videos taught.
        shrinkage=0.0 if shrinkage is None and initial is not None else shrinkage,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        frames=frames,
        seed=seed,
        precision=precision,
        class_sampling=class_sampling,
        class_weights=class_weights,
    )
    with progress_of("train", "steps") as progress:
        summary = run(
            store,
            run_dir,
            shape,
            config,
            rows=rows,
            classes=chosen_set.classes,
            trained_on=chosen_set.words
            + ("" if judged is None else judged.left_out)
            + ("" if excluded is None else excluded.of_training),
            repeats=repeats,
            validation=judged,
            initial=initial,
            initial_run=initial_run,
            prompt_set=options.prompt_set(store, prompts) or training_prompt_set(store, initial),
            resume=resume,
            device=options.device(device),
            progress=progress,
        )
    lines = {
        "run": f"{summary.run} in {summary.path}",
        "trained on": f"{summary.n_trained} of {counted(summary.n_listed, 'video')} of "
        + summary.dataset
        + (f" ({summary.trained_on})" if summary.trained_on else ""),
        **({} if excluded is None else {"excluded": excluded.words}),
        "classes": Balance(**summary.class_balance).words,
        "epochs": f"{summary.epochs} ({summary.resumed_from} done before)",
        "loss": "-" if summary.loss is None else f"{summary.loss:.4f}",
        **_gained(summary),
        "time": f"{summary.seconds:.0f} s ({summary.precision} on {summary.device})",
    }
    following = {"next": after_training(Path(summary.path), chosen, split)}
    left_out = None if excluded is None else excluded.to_json()
    report(json, {**summary.to_json(), "excluded": left_out, **following}, lines | following)


def _gained(summary: TrainSummary) -> dict[str, str]:
    """Return the lines about validation videos: what they are, what was gained, what is kept."""
    found = summary.validation
    if found is None:
        return {}
    measure = next(name for name in ("top1", "mAP") if name in found)
    above, unit = found[measure] - found["no_head"], " of mAP" * (measure == "mAP")
    others = {"no head": found["no_head"], **found["baselines"]}
    lines = {
        "validated on": found["videos"],
        "gained": f"{above:+.1f} points{unit}: {found[measure]:.1f} %, "
        + ", ".join(f"{name} {top1:.1f}" for name, top1 in others.items()),
    }
    if found["kept_epoch"] is not None:
        epoch = f"epoch {found['kept_epoch']}" if found["kept_epoch"] else "no epoch"
        best = found["kept_epoch"] != summary.epochs
        last = (
            f"; the last as {summary.run}/last ({found[f'last_{measure}']:.1f} %)" if best else ""
        )
        lines["kept"] = f"{epoch} of {summary.epochs} as {summary.run}{last}"
    return lines
