"""The demo: runs a generated world through every stage, from making its videos to accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from featstore import Store, open_store
from featstore.commands import ADAPTED_BY
from featstore.errors import UserError, one_of
from featstore.progress import Stages, no_stages
from featstore.workspace import Workspace
from heads.end_to_end.finetune import finetune
from heads.end_to_end.request import FinetuneRequest
from heads.evaluation.evaluate import evaluate_store
from heads.evaluation.protocols.choose import PROTOCOLS, build_test_sets
from heads.files.head_file import load_head
from heads.methods.head import Head
from heads.methods.registry import MEAN_OF_FRAMES, Method, method
from heads.methods.registry import names as registered
from heads.prediction.adapted_encoder import encoder_of_run
from heads.prediction.views import prepare_views
from heads.recipes import Recipe, finetune_recipe
from heads.training.ranks import Ranks
from heads.training.train_head import train_head, training_rows
from pipeline.demo import world
from pipeline.demo.small_clip import ENCODER_NAME, make_encoder_folder
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.run import extract
from pipeline.sampling import parse_sampling
from pipeline.tars.packing import pack

if TYPE_CHECKING:
    from pipeline.clip_encoder import Encoder

PROMPTS: Final = "name"  # the demo's small CLIP learned from captions, not from prompt sentences
SAMPLING: Final = parse_sampling("uniform:16")
TRAINED: Final = ("transformer", "mote")
"""The methods that are trained if none are named; the last of them is fine-tuned."""
MEASURES: Final = ("closeset_top1", "zeroshot_top1", "harmonic_mean")
DATASETS: Final = ("known", "new")

Rows = Sequence[tuple[bool, float | None]]
"""Lines of the table for one head: whether modulation is on, and CLIP's share of the score."""

_ONE: Final = ((False, None),)
_MODULATED: Final = ((False, None), (True, None))
_ENSEMBLE: Final = ((False, None), (False, 0.5))  # as DiST publishes it


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


@dataclass(frozen=True)
class DemoWorld:
    """A generated world of one seed in a workspace: its packed videos, and heads trained on them.

    Everything that an earlier call finished is kept.
    """

    workspace: Workspace
    seed: int
    stages: Stages = no_stages

    @classmethod
    def make(cls, workspace: Workspace, seed: int, stages: Stages = no_stages) -> DemoWorld:
        """Make the videos of a world, pack them, and unpack the small CLIP."""
        made = cls(workspace, seed, stages)
        make_encoder_folder(workspace.encoder_dir(ENCODER_NAME))
        with stages(f"make videos (seed {seed})", "videos") as progress:
            folder = workspace.root / "demo" / f"videos-{seed}"
            folders = world.write_world(world.draw_world(seed), folder, progress=progress)
        for kind in DATASETS:
            name = made.dataset(kind)
            with stages(f"pack {kind}", "videos") as progress:
                pack(getattr(folders, kind), name, workspace.dataset_dir(name), progress=progress)
        return made

    def dataset(self, kind: str) -> str:
        """Return the name of the data set of "known" or "new" classes."""
        return f"demo-{kind}-{self.seed}"

    def run(self, head: str) -> str:
        """Return the name of the run that trains a head."""
        return f"demo-{head}-{self.seed}"

    def train_on_store(
        self, head: str, run: str, recipe: Recipe, encoder: str = ENCODER_NAME
    ) -> None:
        """Train a head on the features of an encoder, by default of the frozen CLIP."""
        store, run_dir = self.extract(encoder)["known"], self.workspace.run_dir(run)
        with self.stages(f"train {run}", "steps") as progress:
            train_head(
                store,
                run_dir,
                recipe.head_config(store.provenance.dim, kind=head),
                recipe.train_config(seed=self.seed),
                rows=training_rows(store, "train"),
                prompt_set=PROMPTS,
                resume=run_dir.exists(),
                device="cpu",
                progress=progress,
            )

    def train_on_videos(
        self, head: str, run: str, recipe: Recipe, begun: bool = False, **training: Any
    ) -> None:
        """Train a head end to end; one that has `begun` continues the head trained on a store.

        `training` are settings that count instead of the recipe's.
        """
        run_dir = self.workspace.run_dir(run)
        request = FinetuneRequest(
            dataset_dir=self.workspace.dataset_dir(self.dataset("known")),
            run_dir=run_dir,
            encoder_dir=self.workspace.encoder_dir(run),
            encoders_dir=self.workspace.root / "encoders",
            config=recipe.finetune_config(seed=self.seed, **training),
            head=recipe.head_config,
            encoder=None if begun else ENCODER_NAME,
            from_head=self.workspace.run_dir(self.run(head)) if begun else None,
            prompt_set=None if begun else PROMPTS,
            method=head,
            resume=run_dir.exists(),
        )
        with self.stages(f"finetune {run}" if begun else f"train {run}", "steps") as progress:
            finetune(request, Ranks(), progress)

    def frozen_features(self, run: str) -> dict[str, Store]:
        """Return the stores of the CLIP that no training changed."""
        return self.extract(ENCODER_NAME)

    def tuned_features(self, run: str) -> dict[str, Store]:
        """Return the stores of the encoder that a run published."""
        return self.extract(run)

    def adapted_features(self, run: str) -> dict[str, Store]:
        """Return the stores of the encoder whose towers the head of a run adapts."""
        encoder = encoder_of_run(self.workspace, run, "fp32", "cpu")
        return self.extract(f"{ADAPTED_BY}{run}", f"uniform:{encoder.clip_frames}", encoder)

    def views(self, run: str) -> dict[str, Store]:
        """Return the stores of views that a head which looks at pixels makes."""
        stores = {}
        for kind in DATASETS:
            name = self.dataset(kind)
            path = prepare_views(
                self.workspace, name, run, views="1x1", device="cpu", stages=self.stages
            )
            assert path is not None, "the head looks at pixels"
            stores[kind] = open_store(path)
        return stores

    def extract(
        self, encoder: str, sampling: str = SAMPLING.text, loaded: Encoder | None = None
    ) -> dict[str, Store]:
        """Extract and open the stores of both data sets with an encoder of the workspace."""
        stores = {}
        for kind in DATASETS:
            dataset = self.dataset(kind)
            path = self.workspace.store_path(dataset, encoder=encoder, sampling=sampling)
            request = ExtractionRequest(
                dataset_dir=self.workspace.dataset_dir(dataset),
                store_path=path,
                encoder=encoder,
                sampling=parse_sampling(sampling),
                encoders_dir=self.workspace.root / "encoders",
                precision="fp32",
                prompt_sets=(PROMPTS,),
            )
            with self.stages(f"extract {dataset}", "videos") as progress:
                extract(request, encoder=loaded, progress=progress)
            stores[kind] = open_store(path)
        return stores


@dataclass(frozen=True)
class Shown:
    """How the demo trains the methods of one kind, and how it looks at their heads."""

    fits: Callable[[Method], bool]
    recipe: str
    train: Callable[..., None]
    """A method of `DemoWorld`, called with head, run and recipe."""
    features: Callable[[DemoWorld, str], dict[str, Store]]
    """Returns the stores, by data set, on which the head of a run is evaluated."""
    rows: Rows = _ONE


KINDS: Final = (
    Shown(
        lambda m: m.from_store,
        "demo",
        DemoWorld.train_on_store,
        DemoWorld.frozen_features,
        _MODULATED,
    ),
    Shown(lambda m: m.pixels, "demo-dist", DemoWorld.train_on_videos, DemoWorld.views, _ENSEMBLE),
    Shown(lambda m: m.adapts, "demo-msta", DemoWorld.train_on_videos, DemoWorld.adapted_features),
    Shown(lambda m: m.taught, "demo-taco", DemoWorld.train_on_videos, DemoWorld.tuned_features),
    Shown(lambda m: m.end_to_end, "demo", DemoWorld.train_on_videos, DemoWorld.tuned_features),
)
"""The kinds of methods; the first that fits counts. The last one's towers are tuned themselves."""


def _kind(head: str) -> Shown | None:
    found = method(head)
    if not (found.in_epochs and found.open_vocabulary):
        return None
    return next((kind for kind in KINDS if kind.fits(found)), None)


def _taught(methods: Sequence[str]) -> str | None:
    """Return the first of `methods` that a teacher holds in training."""
    return next((name for name in methods if method(name).taught), None)


def _beside_taught(methods: Sequence[str]) -> list[tuple[str, str, Rows]]:
    """Return what is compared with a method that a teacher holds: (line, method, lines of it).

    They are the same training of both towers without teacher and head, and the heads that are
    trained on a store, on the features of the towers that the teacher held.
    """
    held = _taught(methods)
    if held is None:
        return []
    on_store = [name for name in methods if method(name).from_store]
    return [
        (f"{MEAN_OF_FRAMES}-finetuned", MEAN_OF_FRAMES, _ONE),
        *((f"{name}-on-{held}", name, _MODULATED) for name in on_store),
    ]


def demo_rows(finetuned: bool, methods: Sequence[str] = TRAINED) -> list[DemoRow]:
    """Return the lines of the table; those of the fine-tuned head come last."""
    shown: list[tuple[str, Rows]] = [(MEAN_OF_FRAMES, _ONE)]
    shown += [(name, kind.rows) for name in methods if (kind := _kind(name)) is not None]
    shown += [(line, rows) for line, _, rows in _beside_taught(methods)]
    shown += [(f"{TRAINED[-1]}-finetuned", _MODULATED)] if finetuned else []
    return [DemoRow(head, *row) for head, rows in shown for row in rows]


def require_methods(names: Sequence[str], finetuned: bool = False) -> None:
    """Raise UserError unless the demo can train and test each of these methods."""
    possible = [name for name in registered() if _kind(name) is not None]
    for name in names:
        if name not in possible:
            raise UserError(f"the demo has no method {name!r}: {one_of(name, possible)}")
    if not names or len(set(names)) < len(names):
        raise UserError("name methods of the demo once each, with commas, such as mote,dist")
    if finetuned and TRAINED[-1] not in names:
        raise UserError(f"the demo fine-tunes with the head {TRAINED[-1]}: name that method, too")


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
    made = DemoWorld.make(workspace, seed, stages)
    mean = (made.frozen_features(MEAN_OF_FRAMES), None)
    looked_at: dict[str, tuple[dict[str, Store], Head | None]] = {MEAN_OF_FRAMES: mean}
    for name in methods:
        kind, run = _kind(name), made.run(name)
        assert kind is not None, "require_methods"
        kind.train(made, name, run, finetune_recipe(kind.recipe, name))
        looked_at[name] = kind.features(made, run), load_head(workspace.run_dir(run))
    for line, name, _ in _beside_taught(methods):
        held, run = _taught(methods), made.run(line)
        assert held is not None
        if name == MEAN_OF_FRAMES:
            kind = _kind(held)
            assert kind is not None, "require_methods"
            plain = finetune_recipe(kind.recipe, name)
            made.train_on_videos(name, run, plain, save="last")
            features = made.tuned_features(run)
        else:
            tower = made.run(held)
            made.train_on_store(name, run, finetune_recipe(KINDS[0].recipe, name), tower)
            features = made.tuned_features(tower)
        looked_at[line] = features, load_head(workspace.run_dir(run))
    if finetune_epochs:
        name, run = TRAINED[-1], f"demo-finetuned-{seed}-{finetune_epochs}"
        made.train_on_videos(
            name,
            run,
            finetune_recipe(KINDS[-1].recipe, name),
            begun=True,
            epochs=finetune_epochs,
        )
        tuned = made.tuned_features(run), load_head(workspace.run_dir(run))
        looked_at[f"{name}-finetuned"] = tuned
    rows = demo_rows(finetune_epochs > 0, methods)
    return [_measured(*looked_at[row.head], row) for row in rows]


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


def _measured(stores: dict[str, Store], head: Head | None, row: DemoRow) -> dict[str, float]:
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
