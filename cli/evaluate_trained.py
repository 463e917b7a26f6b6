"""`mote-cli eval --fewshot` and `--base-to-novel`: heads are trained, then tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import percent, print_json, print_table, progress_of, results
from featstore.durable import write_json
from featstore.errors import UserError
from featstore.reader import Store
from featstore.workspace import Workspace

if TYPE_CHECKING:
    from heads.protocol_types import Protocol
    from heads.shot_plans import GivenList
    from heads.trained_protocols import ShotOutcome

FewShot = Annotated[
    str | None,
    typer.Option(
        "--fewshot", metavar="NAME", help="Train on K videos per class, then test (--shots)."
    ),
]
BaseToNovel = Annotated[
    str | None,
    typer.Option(
        "--base-to-novel",
        metavar="NAME",
        help="Train on 16 videos of each frequent class, test frequent and rare classes.",
    ),
]
Shots = Annotated[
    str | None,
    typer.Option(
        "--shots", metavar="K,K,...", help="Videos per class; default: 2,4,8,16 (base-to-novel 16)."
    ),
]
DrawSeeds = Annotated[
    str | None,
    typer.Option(
        "--draw-seeds",
        metavar="S,S,...",
        help="Draws of the shots; default: 1, for base-to-novel 1,2,3.",
    ),
]
ListsFrom = Annotated[
    Path | None,
    typer.Option(
        "--lists-from",
        metavar="DIR",
        help="Take the shots from a clone of a repository with published lists.",
    ),
]
LabelMapOption = Annotated[
    str,
    typer.Option(
        "--label-map",
        metavar="corrected|as-published",
        help="Class names that published label files exchange (HMDB51): right, or as they are.",
    ),
]
TrainStore = Annotated[
    str | None,
    typer.Option("--train-store", metavar="NAME", help="Store to train from, where several fit."),
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME|FILE", help="Settings of training, as train-head's."),
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Epochs of training.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Of training.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate of training.")]
Repeat = Annotated[
    str,
    typer.Option(
        "--repeat", metavar="N|full", help="Repeat the shots N times an epoch, or to the full size."
    ),
]
RunName = Annotated[
    str | None,
    typer.Option("--name", metavar="RUN", help="Name that the runs trained here begin with."),
]
BestEpoch = Annotated[
    bool,
    typer.Option(
        "--best-epoch/--no-best-epoch",
        help="Test every epoch too, and report the best one separately.",
    ),
]
AllowLeak = Annotated[
    bool,
    typer.Option("--allow-leak", help="Test videos that are trained on, with a warning."),
]


@dataclass(frozen=True)
class TrainedRequest:
    """What was asked for; the fields are options of `eval` of the same names."""

    protocol: Protocol
    dataset: str
    head: str | None
    split: str | None
    views: str | None
    sampling: str | None
    store_name: str | None
    prompts: str | None
    modulate: bool
    fusion: str
    precision: str
    device: str
    shots: str | None
    draw_seeds: str | None
    lists_from: Path | None
    label_map: str
    train_store: str | None
    recipe: str | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    repeat: str
    name: str | None
    best_epoch: bool
    allow_leak: bool

    @property
    def few(self) -> bool:
        """Whether it is a few-shot protocol."""
        return self.protocol.kind == "fewshot"


def evaluate_trained(ask: TrainedRequest, workspace: Workspace, json: bool) -> None:
    """Run the protocol: a training per number of shots or seed, continued where it stopped."""
    from heads.evaluation import evaluate_store
    from heads.fitting import check_fits
    from heads.label_maps import check_label_map
    from heads.recipes import DEFAULT_RECIPE, load_recipe
    from heads.results import save_result
    from heads.shot_plans import ShotPlan
    from heads.trained_protocols import (
        DRAW_SEEDS,
        EPOCHS,
        EPOCHS_OF,
        NOVEL_SHOTS,
        SHOTS,
        train_and_test,
    )

    check_label_map(ask.label_map)
    known = ask.protocol.dataset or ask.dataset
    kind = ask.protocol.kind
    initial, head_dir = (None, None) if ask.head is None else options.head(workspace, ask.head)
    train, test, splits = _stores(ask, workspace, None if initial is None else initial.origin)
    recipe = load_recipe(ask.recipe or DEFAULT_RECIPE)
    epochs = EPOCHS_OF.get((kind, known), EPOCHS[kind]) if ask.recipe is None else None
    training = recipe.train_config(
        epochs=ask.epochs or epochs, batch_size=ask.batch_size, lr=ask.lr
    )
    if initial is not None:
        check_fits(initial, train)
        shape = initial.config
    else:
        mean = ask.head == options.MEAN_HEAD
        shape = recipe.head_config(train.provenance.dim, kind="mean" if mean else None)
    shots = numbers("--shots", ask.shots, SHOTS if ask.few else (NOVEL_SHOTS,))
    draws = numbers("--draw-seeds", ask.draw_seeds, (1,) if ask.few else DRAW_SEEDS)
    if len(draws if ask.few else shots) > 1:
        raise UserError(
            "few-shot has one draw seed for all numbers of shots, base-to-novel one number of "
            "shots for all seeds: run the command once for each"
        )
    given, label_map = _lists(ask, known, train, shots if ask.few else draws)
    if ask.label_map == "as-published" or label_map:
        train, test, label_map = _named(ask, known, train, test, label_map)
    prefix = ask.name or (
        f"{ask.dataset}-{shape.kind}"
        if head_dir is None or initial is None
        else f"{head_dir.name}-{ask.dataset}"
    )
    prefix += "-as-published" if ask.label_map == "as-published" and not ask.name else ""
    plan = ShotPlan(
        *(train, test, *splits),
        run_dir=lambda suffix: workspace.run_dir(prefix + suffix),
        repeat=ask.repeat,
        allow_leak=ask.allow_leak,
    )
    runs = (
        plan.fewshot(shots, draws[0], given)
        if ask.few
        else plan.base_to_novel(shots[0], draws, given)
    )
    prompt_set = ask.prompts or train.prompt_sets[0]
    device = options.device(ask.device)

    def evaluate(head: Any, tests: Any, facts: Any, name: str) -> Any:
        return evaluate_store(
            test,
            head,
            protocol=ask.protocol,
            dataset=ask.dataset,
            tests=tests,
            head_name=name,
            views=ask.views,
            modulate=ask.modulate,
            prompt_set=prompt_set,
            fusion=ask.fusion,  # type: ignore[arg-type]  # evaluate_store checks it
            precision=ask.precision,
            facts=replace(facts, label_map=label_map or None),
            device=device,
        )

    outcomes = []
    files = []
    for run in runs:
        with progress_of(f"train {run.run_dir.name}", "steps") as progress:
            outcome = train_and_test(
                run,
                train,
                shape,
                training,
                prompt_set=prompt_set,
                evaluate=evaluate,
                initial=initial,
                best_epoch=ask.best_epoch,
                device=device,
                progress=progress,
            )
        found = [outcome.last] if outcome.best is None else [outcome.last, outcome.best]
        files += [str(save_result(result, run.run_dir)) for result in found]
        outcomes.append(outcome)
    value = {
        "protocol": kind,
        "protocol_name": ask.protocol.name,
        "dataset": ask.dataset,
        "head": ask.head if initial is not None or ask.head else shape.kind,
        "runs": [outcome.to_json() for outcome in outcomes],
        "files": files,
    }
    if ask.few:
        _print_fewshot(value, outcomes, json)
    else:
        _print_base_to_novel(value, outcomes, runs[0].run_dir, json)


def numbers(option: str, text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers of "2,4,8"; UserError for other text and for a number named twice."""
    if text is None:
        return tuple(default)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"{option} {text!r}: give different whole numbers, such as 2,4,8")
    return tuple(map(int, parts))


def _stores(
    ask: TrainedRequest, workspace: Workspace, origin: Any
) -> tuple[Store, Store, tuple[str, str]]:
    """The store to train from, the one to test, and their splits."""
    from heads.fitting import count_views

    train_split = workspace.default_split(ask.dataset, ("train1", "train"))
    test_split = ask.split or workspace.default_split(ask.dataset, ("test1", "val", "test"))
    if train_split is None or test_split is None:
        lacking = "training" if train_split is None else "test"
        raise UserError(
            f"no store of {ask.dataset} has a {lacking} split: pack the data set with its "
            f"annotations and extract its videos (`mote-cli extract --dataset {ask.dataset}`)"
        )
    encoder = {
        "encoder_fingerprint": None if origin is None else origin.encoder_fingerprint,
        "encoder": None if origin is None else origin.encoder,
    }
    test = workspace.choose_store(
        ask.dataset,
        split=test_split,
        views=None if ask.views is None else count_views(ask.views),
        sampling=ask.sampling,
        name=ask.store_name,
        **encoder,
    )
    name = ask.train_store
    if name is None and train_split in test.split_names and len(test.split(train_split)):
        name = ask.store_name  # the store that was named has both
    return (
        workspace.choose_store(ask.dataset, split=train_split, name=name, **encoder),
        test,
        (train_split, test_split),
    )


def _lists(
    ask: TrainedRequest, known: str, train: Store, wanted: Sequence[int]
) -> tuple[Mapping[int, GivenList] | None, Any]:
    """Published lists by number of shots or seed, and the exchange of names they come with."""
    from heads.shot_plans import GivenList
    from pipeline.annotations.key_index import KeyIndex
    from pipeline.annotations.published_lists import (
        ListRepository,
        label_exchange,
        read_published_list,
    )

    if ask.lists_from is None:
        return None, ""
    repository = ListRepository(ask.lists_from, known)
    index = KeyIndex(train.keys)
    files = {n: repository.shots(n) if ask.few else repository.seed(n) for n in wanted}
    lists = {number: read_published_list(path, index) for number, path in files.items()}
    names = repository.names("" if ask.few else "base")
    exchange, done = label_exchange(
        [(listed, names) for listed in lists.values()],
        dict(zip(train.keys, map(int, train.labels), strict=True)),
        train.class_names,
        ask.label_map,  # type: ignore[arg-type]  # checked by the caller
    )
    given = {
        number: GivenList(str(listed.path.relative_to(ask.lists_from)), listed.keys)
        for number, listed in lists.items()
    }
    return given, exchange or done


def _named(
    ask: TrainedRequest, known: str, train: Store, test: Store, label_map: Any
) -> tuple[Store, Store, str]:
    """The stores with names as the label map has them, and what results say of it."""
    from heads.label_maps import AS_PUBLISHED, named_as, with_exchanged_names

    if ask.label_map != AS_PUBLISHED:
        return train, test, str(label_map)
    if ask.lists_from is None:
        train, test = (named_as(store, known, ask.label_map) for store in (train, test))
    else:
        train, test = (with_exchanged_names(store, label_map or {}) for store in (train, test))
    return train, test, test.provenance.label_map


def _print_fewshot(value: dict[str, Any], outcomes: Sequence[ShotOutcome], json: bool) -> None:
    if json:
        print_json(value)
        return
    print_table(
        f"few-shot on {value['dataset']}, tested on {outcomes[0].last.per_split[0].split} "
        f"({outcomes[0].last.n_evaluated} videos)",
        ["shots", "trained on", "top-1 % (last epoch)", "top-5 %", "top-1 % (best epoch on test)"],
        [
            [
                str(outcome.run.shots),
                f"{outcome.training.n_trained} videos",
                percent(outcome.last.top1),
                percent(outcome.last.top5),
                _best(outcome),
            ]
            for outcome in outcomes
        ],
    )
    results.print(f"kept under {Path(value['files'][0]).parents[2]}", markup=False)


def _best(outcome: ShotOutcome) -> str:
    if outcome.best is None:
        return "-"
    return f"{percent(outcome.best.top1)} (epoch {outcome.best.epoch})"


def _print_base_to_novel(
    value: dict[str, Any], outcomes: Sequence[ShotOutcome], first: Path, json: bool
) -> None:
    from heads.trained_protocols import base_to_novel

    last, best = base_to_novel(outcomes), base_to_novel(outcomes, best=True)
    assert last is not None
    value |= last.to_json() | {"best": None if best is None else best.to_json()}
    write_json(first / "base-to-novel.json", value)
    if json:
        print_json({**value, "file": str(first / "base-to-novel.json")})
        return
    rows = [
        [f"draw {seed}", percent(base), percent(novel), ""] for seed, base, novel in last.per_seed
    ]
    for title, summary in (("mean (last epoch)", last), ("mean (best epoch on test)", best)):
        if summary is not None:
            rows.append(
                [
                    title,
                    f"{summary.base:.2f} +- {summary.base_std:.2f}",
                    f"{summary.novel:.2f} +- {summary.novel_std:.2f}",
                    f"{summary.harmonic_mean:.2f}",
                ]
            )
    print_table(
        f"base to novel on {value['dataset']}", ["", "base top-1 %", "novel top-1 %", "HM"], rows
    )
    results.print(
        f"HM of the means; the mean of the draws' HMs is {last.mean_of_harmonic_means:.2f}. "
        f"Kept as {first / 'base-to-novel.json'}",
        markup=False,
    )
