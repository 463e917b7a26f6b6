"""The demo: runs a generated world through every stage, from making its videos to accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from featstore import Store, open_store
from featstore.errors import UserError, one_of
from featstore.progress import Stages, no_stages
from featstore.workspace import Workspace
from heads.end_to_end.finetune import finetune
from heads.end_to_end.request import FinetuneRequest
from heads.evaluation.evaluate import evaluate_store
from heads.evaluation.protocols.choose import PROTOCOLS, build_test_sets
from heads.files.head_file import load_head
from heads.files.run_files import HEAD_FILE
from heads.methods.head import Head
from heads.methods.registry import MEAN_OF_FRAMES, Method, method
from heads.methods.registry import names as registered
from heads.prediction.views import prepare_views
from heads.recipes import load_recipe
from heads.training.ranks import Ranks
from heads.training.train_head import train_head, training_rows
from pipeline.demo import world
from pipeline.demo.small_clip import ENCODER_NAME, make_encoder_folder
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.run import extract
from pipeline.sampling import parse_sampling
from pipeline.tars.packing import pack

PROMPTS: Final = "name"  # the demo's small CLIP learned from captions, not from prompt sentences
SAMPLING: Final = parse_sampling("uniform:16")
RECIPE = "demo"
PIXEL_RECIPE = "demo-dist"
TRAINED: Final = ("transformer", "mote")
"""The methods that are trained if none are named; the last of them is fine-tuned."""
ENSEMBLE: Final = 0.5
"""The weight of CLIP in the second row of a head that looks at pixels, as DiST publishes it."""
MEASURES: Final = ("closeset_top1", "zeroshot_top1", "harmonic_mean")


@dataclass(frozen=True)
class DemoRow:
    """One line of the table: a head, with temporal feature modulation on or off."""

    head: str
    modulated: bool
    ensemble: float | None = None
    """CLIP's share of the score; None: the head alone."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON values, without an ensemble that there is not."""
        return {name: value for name, value in vars(self).items() if value is not None}


def demo_rows(finetuned: bool, methods: Sequence[str] = TRAINED) -> list[DemoRow]:
    """Return the lines of the table; those of the fine-tuned head come last."""
    rows = [DemoRow(MEAN_OF_FRAMES, False)]
    for name in methods:
        if method(name).pixels:
            rows += [DemoRow(name, False), DemoRow(name, False, ENSEMBLE)]
        else:
            rows += [DemoRow(name, False), DemoRow(name, True)]
    if finetuned:
        rows += [DemoRow(f"{TRAINED[-1]}-finetuned", modulated) for modulated in (False, True)]
    return rows


def require_methods(names: Sequence[str], finetuned: bool = False) -> None:
    """Raise UserError unless the demo can train and test each of these methods."""
    possible = [name for name in registered() if _can_be_shown(method(name))]
    for name in names:
        if name not in possible:
            raise UserError(f"the demo has no method {name!r}: {one_of(name, possible)}")
    if not names or len(set(names)) < len(names):
        raise UserError("name methods of the demo once each, with commas, such as mote,dist")
    if finetuned and TRAINED[-1] not in names:
        raise UserError(f"the demo fine-tunes with the head {TRAINED[-1]}: name that method, too")


def _can_be_shown(found: Method) -> bool:
    return found.in_epochs and found.open_vocabulary and (found.from_store or found.pixels)


def run_world(
    workspace: Workspace,
    seed: int,
    finetune_epochs: int = 0,
    stages: Stages = no_stages,
    methods: Sequence[str] = TRAINED,
) -> list[dict[str, float]]:
    """Make, pack, extract, train and evaluate the world of one seed.

    Returns the `MEASURES` for each of `demo_rows`, in per cent. Stages that an earlier run of the
    same seed finished are not repeated. Raises UserError as `require_methods`.
    """
    require_methods(methods, finetune_epochs > 0)
    make_encoder_folder(workspace.encoder_dir(ENCODER_NAME))
    with stages(f"make videos (seed {seed})", "videos") as progress:
        folder = workspace.root / "demo" / f"videos-{seed}"
        folders = world.write_world(world.draw_world(seed), folder, progress=progress)
    datasets = {kind: f"demo-{kind}-{seed}" for kind in ("known", "new")}
    for kind, videos in (("known", folders.known), ("new", folders.new)):
        name = datasets[kind]
        with stages(f"pack {kind}", "videos") as progress:
            pack(videos, name, workspace.dataset_dir(name), progress=progress)
    stores = _extracted(workspace, datasets, ENCODER_NAME, stages)
    heads: dict[str, Head | None] = {MEAN_OF_FRAMES: None}
    recipe = load_recipe(RECIPE)
    for head in methods:
        if method(head).pixels:
            continue
        run_dir = workspace.run_dir(f"demo-{head}-{seed}")
        with stages(f"train {head}", "steps") as progress:
            train_head(
                stores["known"],
                run_dir,
                recipe.head_config(stores["known"].provenance.dim, kind=head),
                recipe.train_config(seed=seed),
                rows=training_rows(stores["known"], "train"),
                prompt_set=PROMPTS,
                resume=run_dir.exists(),
                device="cpu",
                progress=progress,
            )
        heads[head] = load_head(run_dir)
    viewed = {
        name: _looked_at(workspace, datasets, name, seed, stages)
        for name in methods
        if method(name).pixels
    }
    measured = [
        _measured(*(viewed.get(row.head) or (stores, heads[row.head])), row)
        for row in demo_rows(finetuned=False, methods=methods)
    ]
    if finetune_epochs:
        name = f"demo-finetuned-{seed}-{finetune_epochs}"
        run_dir = workspace.run_dir(name)
        with stages(f"finetune {datasets['known']}", "steps") as progress:
            finetune(
                FinetuneRequest(
                    dataset_dir=workspace.dataset_dir(datasets["known"]),
                    run_dir=run_dir,
                    encoder_dir=workspace.encoder_dir(name),
                    encoders_dir=workspace.root / "encoders",
                    config=recipe.finetune_config(seed=seed, epochs=finetune_epochs),
                    head=recipe.head_config,
                    from_head=workspace.run_dir(f"demo-{TRAINED[-1]}-{seed}"),
                    resume=run_dir.exists(),
                ),
                Ranks(),
                progress,
            )
        stores = _extracted(workspace, datasets, name, stages)
        tuned = load_head(run_dir)
        measured += [
            _measured(stores, tuned, row)
            for row in demo_rows(finetuned=True, methods=methods)[len(measured) :]
        ]
    return measured


def _looked_at(
    workspace: Workspace, datasets: Mapping[str, str], name: str, seed: int, stages: Stages
) -> tuple[dict[str, Store], Head]:
    """Train a head that looks at pixels on the known classes; return stores of its views, and it.

    What is there already is not made again.
    """
    recipe, run = load_recipe(PIXEL_RECIPE), f"demo-{name}-{seed}"
    run_dir = workspace.run_dir(run)
    if not (run_dir / HEAD_FILE).is_file():
        request = FinetuneRequest(
            dataset_dir=workspace.dataset_dir(datasets["known"]),
            run_dir=run_dir,
            encoder_dir=workspace.encoder_dir(run),
            encoders_dir=workspace.root / "encoders",
            config=recipe.finetune_config(seed=seed),
            head=recipe.head_config,
            encoder=ENCODER_NAME,
            prompt_set=PROMPTS,
            method=name,
            resume=run_dir.exists(),
        )
        with stages(f"train {name}", "steps") as progress:
            finetune(request, Ranks(), progress)
    stores = {}
    for kind, dataset in datasets.items():
        path = prepare_views(workspace, dataset, run, views="1x1", device="cpu", stages=stages)
        assert path is not None, "the head looks at pixels"
        stores[kind] = open_store(path)
    return stores, load_head(run_dir)


def demo_table(
    runs: Sequence[list[dict[str, float]]], finetuned: bool, methods: Sequence[str] = TRAINED
) -> list[dict[str, Any]]:
    """Make the table of runs of `run_world`, JSON-ready: `head`, `modulated`, mean of each measure.

    A row with CLIP's share of the score has it as `ensemble`. For several runs, each measure also
    has `_std` (of the population) and `_per_seed`.
    """
    table = []
    for row, *measured in zip(demo_rows(finetuned, methods), *runs, strict=True):
        line = row.to_json()
        for measure in MEASURES:
            values = [run[measure] for run in measured]
            line[measure] = statistics.fmean(values)
            if len(values) > 1:
                line[f"{measure}_std"] = statistics.pstdev(values)
                line[f"{measure}_per_seed"] = values
        table.append(line)
    return table


def _extracted(
    workspace: Workspace, datasets: Mapping[str, str], encoder: str, stages: Stages
) -> dict[str, Store]:
    """Extract and open the stores of the data sets with an encoder of the workspace."""
    stores = {}
    for kind, dataset in datasets.items():
        path = workspace.store_path(dataset, encoder=encoder, sampling=SAMPLING.text)
        request = ExtractionRequest(
            dataset_dir=workspace.dataset_dir(dataset),
            store_path=path,
            encoder=encoder,
            sampling=SAMPLING,
            encoders_dir=workspace.root / "encoders",
            precision="fp32",
            prompt_sets=(PROMPTS,),
        )
        with stages(f"extract {dataset}", "videos") as progress:
            extract(request, progress=progress)
        stores[kind] = open_store(path)
    return stores


def _measured(stores: Mapping[str, Store], head: Head | None, row: DemoRow) -> dict[str, float]:
    """Measure close-set accuracy on the known classes and zero-shot accuracy on the new ones."""
    top1 = [
        evaluate_store(
            store,
            head,
            protocol=protocol,
            dataset=store.provenance.dataset,
            tests=build_test_sets(PROTOCOLS[protocol], store),
            head_name=row.head,
            modulate=row.modulated,
            ensemble=row.ensemble,
            device="cpu",
        ).mean
        for protocol, store in (("closeset", stores["known"]), ("zeroshot", stores["new"]))
    ]
    return dict(zip(MEASURES, (*top1, statistics.harmonic_mean(top1)), strict=True))
