"""`mote-cli train-head`: a temporal head from a feature store."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options
from cli.output import print_facts, print_json, progress_of
from featstore.errors import UserError

DEFAULTS = "the paper's ViT-B/16 recipe"


def train_head(
    dataset: options.OptionalDataset = None,
    head: Annotated[
        str,
        typer.Option(
            "--head",
            metavar="mote|transformer|mean",
            help="Mixture of temporal experts, the plain transformer, or no parameters at all.",
        ),
    ] = "mote",
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="RUN", help="Name of the run; default: DATASET-HEAD."),
    ] = None,
    split: options.Split = None,
    sampling: options.StoreSampling = None,
    store_name: options.StoreName = None,
    prompts: options.PromptSet = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 30,
    warmup_epochs: Annotated[float, typer.Option("--warmup-epochs", min=0)] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 192,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the head.")] = 5e-5,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0)] = 0.2,
    frames: Annotated[
        int, typer.Option("--frames", min=1, help="Frames per video in training and evaluation.")
    ] = 8,
    layers: Annotated[int, typer.Option("--layers", min=1)] = 4,
    experts: Annotated[int, typer.Option("--experts", min=1)] = 4,
    seed: Annotated[int, typer.Option("--seed")] = 1024,
    precision: Annotated[
        str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Arithmetic of training.")
    ] = "auto",
    device: options.Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run of this name where it stopped.")
    ] = False,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Train a head on stored features; the encoder is not run again.

    Defaults are the paper's ViT-B/16 recipe. A run that was interrupted goes on with --resume,
    bit for bit as if it had not been.

    Example: `mote-cli train-head --dataset my-clips --head mote --name first --epochs 30`
    """
    from heads.config import HeadConfig
    from heads.training import TrainConfig, training_rows
    from heads.training import train_head as run

    workspace = options.workspace(root)
    if name == options.MEAN_HEAD:
        raise UserError(
            f"--name {name}: --head {name} means no head in other commands; use another name"
        )
    chosen = workspace.choose_dataset(dataset)
    split = split or workspace.default_split(chosen, ("train",))
    store = workspace.choose_store(chosen, split=split, sampling=sampling, name=store_name)
    with progress_of("train", "steps") as progress:
        summary = run(
            store,
            workspace.run_dir(name or f"{chosen}-{head}"),
            HeadConfig(
                dim=store.provenance.dim,
                kind=head,  # type: ignore[arg-type]  # HeadConfig checks it and lists the kinds
                layers=layers,
                experts=experts,
            ),
            TrainConfig(
                epochs=epochs,
                warmup_epochs=warmup_epochs,
                batch_size=batch_size,
                lr=lr,
                weight_decay=weight_decay,
                frames=frames,
                seed=seed,
                precision=precision,  # type: ignore[arg-type]  # TrainConfig checks it
            ),
            rows=training_rows(store, split),
            prompt_set=prompts or store.prompt_sets[0],
            resume=resume,
            device=options.device(device),
            progress=progress,
        )
    if json:
        print_json(summary.to_json())
        return
    print_facts(
        {
            "run": f"{summary.run} in {summary.path}",
            "trained on": f"{summary.n_trained} of {summary.n_listed} videos of {summary.dataset}",
            "epochs": f"{summary.epochs} ({summary.resumed_from} done before)",
            "loss": "-" if summary.loss is None else f"{summary.loss:.4f}",
            "time": f"{summary.seconds:.0f} s ({summary.precision} on {summary.device})",
            "next": f"mote-cli eval --closeset {summary.dataset} --head {summary.run}",
        }
    )
