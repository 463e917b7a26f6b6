"""`mote-cli store ...`: add to stores, join them, make them smaller, write them as other files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.commands.workspace.store_quality import duplicates, leaks, suspects
from cli.output import progress_of, report, table
from featstore.errors import UserError, counted

app = typer.Typer(
    rich_markup_mode="markdown",
    help=(
        "Add to a store, join stores, make a store smaller, write its rows for other programs, or "
        "find copies and doubtful labels in it.\n\n"
        "A store is named by its path, or by its name under `features/` of the workspace.\n\n"
        "Example: `mote-cli store export my-store --to parquet --out my-rows`"
    ),
)


# Options of several of these commands; those that other commands share are in `cli.options`.
StorePath = Annotated[
    str,
    typer.Argument(metavar="STORE", help="Path of a store, or its name (STORE or DATASET/STORE)."),
]
OutStore = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="STORE",
        help="Path of the new store; must not exist. `train-head` and `eval` find it if it lies "
        "under features/NAME/ of the workspace, where NAME is the value of their `--dataset`.",
    ),
]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="SPEC",
        help="The store's encoder, if it is not found by its recorded name.",
    ),
]


@app.command("add-tars")
def add_tars(
    store: StorePath,
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME|DIR",
            help="The store's data set, packed again with more tars: its name or folder.",
        ),
    ],
    encoder: TextEncoder = None,
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Add the new tars of its data set to a store; `extract` then does only those.

    The earlier tars must be unchanged. New classes and splits may only be added at the end of the
    lists; the texts of new classes are computed with the store's encoder.

    Example: `mote-cli store add-tars my-store --dataset my-clips`
    """
    workspace, path = options.workspace(root), options.store_path(root, store)
    from featstore.format.metadata import read_metadata
    from featstore.reading.repair import repair_command
    from heads.prediction.views import encoder_of_store
    from pipeline.extraction.grow import add_tars as run
    from pipeline.tars.dataset import DATASET_FILE

    folder = Path(dataset)
    if not (folder / DATASET_FILE).is_file():
        folder = workspace.dataset_dir(dataset)
    grown = run(
        path,
        folder,
        encoder=encoder,
        encoders_dir=workspace.root / "encoders",
        device=options.known_device(device),
        load=encoder_of_store,
    )
    pending = repair_command(path, read_metadata(path), root) if grown.pending else None
    report(
        json,
        grown.to_json() | ({"next": pending} if pending else {}),
        {
            "store": grown.store,
            "tars": f"{grown.tars}, {grown.tars_added} of them new",
            "rows": f"{grown.rows}, {grown.rows_added} of them new",
            "new classes": grown.classes_added,
            "next": f"{pending} (does {counted(grown.pending, 'tar')})"
            if pending
            else "nothing to extract",
        },
    )


@app.command("merge")
def merge(
    stores: Annotated[
        list[str], typer.Argument(metavar="STORE...", help="Two or more stores: paths or names.")
    ],
    out: OutStore,
    prefix_keys: Annotated[
        bool, typer.Option("--prefix-keys", help="Put the data set's name before every key.")
    ] = False,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Join several stores that were made in the same way from different data sets.

    Classes and splits with the same name become one. Features files are linked if possible, so
    that the new store takes little room on the same disk.

    Example: `mote-cli store merge first.zarr second.zarr --out both.zarr`
    """
    from featstore.rewriting.merge import merge as run

    paths = [options.store_path(root, store) for store in stores]
    with progress_of("merge", "tars") as progress:
        merged = run(paths, out, prefix_keys=prefix_keys, progress=progress)
    report(
        json,
        merged.to_json() | _following(out),
        {
            "store": merged.store,
            "tars": f"{merged.tars}, {merged.tars_linked} linked",
            "rows": merged.rows,
            "classes": merged.classes,
            "splits": ", ".join(merged.splits) or "none",
            "class texts": ", ".join(merged.prompt_sets) or "none",
            "next": _use(out),
        },
    )


@app.command("export")
def export(
    store: StorePath,
    to: Annotated[
        str,
        typer.Option(
            metavar="safetensors|parquet|npy",
            help="Format; Hugging Face datasets and Arrow read parquet (needs pyarrow).",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make; must not exist.")],
    split: options.Split = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar='"A,B"',
            help="Only videos of these classes; a name with a comma goes in quotes, '\"a, b\",c'.",
        ),
    ] = None,
    rows_per_file: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Default: as many as fill 256 MB.")
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Write rows as files for other programs; the folder appears once it is complete.

    Videos that failed have no features: they are left out, counted, and named in export.json.

    Example: `mote-cli store export my-store --to safetensors --out my-rows`
    """
    from featstore.files.disk import in_bytes
    from featstore.rewriting.export import export as run
    from pipeline.annotations.class_names import class_list

    with progress_of("export", "rows") as progress:
        exported = run(
            options.store_path(root, store),
            out,
            to,
            split=split,
            classes=None if classes is None else class_list(classes),
            rows_per_file=rows_per_file,
            progress=progress,
        )
    report(
        json,
        exported.to_json(),
        {
            "folder": exported.folder,
            "rows": f"{exported.rows}, {exported.failed_left_out} failed left out",
            "files": f"{exported.files} ({in_bytes(exported.bytes)} in all)",
        },
    )


@app.command("convert")
def convert(
    store: StorePath,
    codec: Annotated[
        str,
        typer.Option(
            metavar="none|zstd|lz4", help="none reads fastest; zstd is smallest, lz4 is quicker."
        ),
    ],
    out: OutStore,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Rewrite a store with its features compressed or not; every number stays the same.

    Example: `mote-cli store convert my-store --codec zstd --out small.zarr`
    """
    from featstore.rewriting.convert import convert as run

    with progress_of("convert", "tars") as progress:
        converted = run(options.store_path(root, store), out, codec, progress=progress)
    report(
        json,
        converted.to_json() | _following(out),
        {
            "store": converted.store,
            "rows": converted.rows,
            "features": _sizes(converted.bytes_before, converted.bytes_after),
            "next": _use(out),
        },
    )


@app.command("quantize")
def quantize(
    store: StorePath,
    out: OutStore,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Rewrite a store with int8 features, half the size, and print the loss in accuracy.

    The loss is measured on the store's own rows: how far the embedding of each frame turns, and
    how often CLIP's mean of frames gives the same answer.

    Example: `mote-cli store quantize my-store --out half.zarr`
    """
    from featstore.rewriting.quantize import quantize as run

    with progress_of("quantize", "tars") as progress:
        quantised = run(options.store_path(root, store), out, progress=progress)
    facts = {
        "store": quantised.store,
        "rows": quantised.rows,
        "features": _sizes(quantised.bytes_before, quantised.bytes_after),
        "cosine error": f"mean {quantised.cosine_error_mean:.2e}, "
        f"largest {quantised.cosine_error_max:.2e}",
        **({} if quantised.agreement else {"accuracy": "not measured: no class texts"}),
        "next": _use(out),
    }
    costs = table(
        "CLIP, mean of frames",
        ["class texts", "same answer %", "top-1 % float16", "top-1 % int8"],
        [
            [a.prompt_set, *(f"{x:.2f}" for x in (a.agreement, a.top1_float16, a.top1_int8))]
            for a in quantised.agreement
        ],
    )
    value = quantised.to_json() | _following(out)
    report(json, value, [facts, costs] if quantised.agreement else facts)


@app.command("add-texts")
def add_texts(
    store: StorePath,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET|FILE.txt",
            help="Sentences for class names: mote28, name, video, or a file with one sentence per "
            "line and {} for the class name. May be repeated.",
        ),
    ] = None,
    descriptions: options.Descriptions = None,
    prompt_set_name: options.PromptSetName = None,
    encoder: TextEncoder = None,
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Add the class texts of another prompt set; the features do not change.

    Example: `mote-cli store add-texts my-store --prompts video`
    """
    path = options.store_path(root, store)
    from heads.prediction.views import encoder_of_store
    from pipeline.extraction.grow import add_texts as run
    from pipeline.prompts import prompt_sets_from, prompt_sets_of

    prompt_sets = prompt_sets_of(
        prompt_sets_from(prompts or [], descriptions or [], prompt_set_name)
    )
    if not prompt_sets:
        raise UserError("add-texts needs --prompts SET|FILE.txt or --descriptions FILE.json")
    added = {
        prompt_set.name: run(
            path,
            prompt_set,
            encoder=encoder,
            encoders_dir=options.workspace(root).root / "encoders",
            device=options.known_device(device),
            load=encoder_of_store,
        )
        for prompt_set in prompt_sets
    }
    state = {True: "added", False: "already in the store"}
    report(
        json,
        {
            "store": str(path),
            "prompts": ", ".join(added),
            "added": any(added.values()),
            "prompt_sets": added,
        },
        {
            "store": path,
            "class texts": ", ".join(f"{name} {state[new]}" for name, new in added.items()),
        },
    )


for _command in (duplicates, leaks, suspects):
    app.command(_command.__name__)(_command)


def _sizes(before: int, after: int) -> str:
    from featstore.files.disk import in_bytes

    share = f"{100 * after / max(before, 1):.1f} %"
    return f"{in_bytes(before)} before, {in_bytes(after)} after ({share})"


def _following(store: Path) -> dict[str, str]:
    """Return the next command for a new store; nothing if it lies in no workspace."""
    from heads.evaluation.next_steps import after_rewriting

    found = after_rewriting(store)
    return {} if found is None else {"next": found}


def _use(store: Path) -> str:
    """Return the next command for a new store, or where to move the store to use it."""
    return _following(store).get("next") or (
        "train-head and eval take stores at features/NAME/*.zarr of the workspace: move it there "
        "to use it"
    )
