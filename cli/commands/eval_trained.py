"""`mote-cli eval --fewshot` and `--base-to-novel`: heads are trained, then tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.commands.eval_print import report_base_to_novel, report_fewshot
from cli.output import progress_of
from featstore.errors import UserError
from featstore.reading.store import Store

if TYPE_CHECKING:
    from cli.commands.eval_request import Request
    from heads.evaluation.trained.plan import GivenList
    from heads.methods.settings import HeadOrigin

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
KINDS = ("fewshot", "base-to-novel")


@dataclass(frozen=True)
class Training:
    """How the heads are trained; the fields are options of `eval`."""

    shots: str | None
    draw_seeds: str | None
    lists_from: Path | None
    train_store: str | None
    recipe: str | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    repeat: str
    name: str | None
    best_epoch: bool

    def require_unused(self, kind: str) -> None:
        """UserError when something was asked for that a protocol of `kind` does not look at."""
        usual = {"repeat": "full", "best_epoch": True}
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if getattr(self, field.name) != usual.get(field.name)
        ]
        if given:
            raise UserError(
                f"{', '.join(given)} go with --fewshot and --base-to-novel, which train heads; "
                f"{kind} tests one that is there: leave them out"
            )


def evaluate_trained(
    ask: Request, how: Training, head: str | None, store_name: str | None, json: bool
) -> None:
    """Run the protocol: a training per number of shots or seed, continued where it stopped."""
    from heads.compatibility import check_fits
    from heads.evaluation.evaluate import evaluate_store
    from heads.evaluation.label_maps import check_label_map
    from heads.evaluation.leaks import require_no_leak, warn_of_known_classes
    from heads.evaluation.protocols.choose import usual_protocol
    from heads.evaluation.results import save_result
    from heads.evaluation.trained.plan import ShotPlan
    from heads.evaluation.trained.run import (
        DRAW_SEEDS,
        SHOTS,
        train_and_test,
        usual_epochs,
    )
    from heads.recipes import DEFAULT_RECIPE, load_recipe

    check_label_map(ask.label_map)
    few = ask.kind == "fewshot"
    protocol = ask.protocol or usual_protocol(ask.kind, ask.dataset, split=ask.split)
    initial, head_dir = (None, None) if head is None else options.head(ask.workspace, head)
    train, test, splits = _stores(ask, how, store_name, None if initial is None else initial.origin)
    recipe = load_recipe(how.recipe or DEFAULT_RECIPE)
    epochs = usual_epochs(ask.kind, ask.dataset) if how.recipe is None else None
    training = recipe.train_config(
        epochs=how.epochs or epochs, batch_size=how.batch_size, lr=how.lr
    )
    if initial is not None:
        check_fits(initial, train)
        shape = initial.config
    else:
        mean = head == options.MEAN_HEAD
        shape = recipe.head_config(train.provenance.dim, kind="mean" if mean else None)
    shots = numbers("--shots", how.shots, SHOTS[ask.kind])
    draws = numbers("--draw-seeds", how.draw_seeds, DRAW_SEEDS[ask.kind])
    if len(draws if few else shots) > 1:
        raise UserError(
            "few-shot has one draw seed for all numbers of shots, base-to-novel one number of "
            "shots for all seeds: run the command once for each"
        )
    given, label_map = _lists(ask, how, train, shots if few else draws)
    train, test, label_map = _named(ask, how, train, test, label_map)
    prefix = how.name or (
        f"{ask.dataset}-{shape.kind}"
        if head_dir is None or initial is None
        else f"{head_dir.name}-{ask.dataset}"
    )
    prefix += "-as-published" if label_map == "as-published" and not how.name else ""
    plan = ShotPlan(
        *(train, test, *splits),
        run_dir=lambda suffix: ask.workspace.run_dir(prefix + suffix),
        repeat=how.repeat,
        allow_overlap=ask.allow_overlap,
    )
    runs = (
        plan.fewshot(shots, draws[0], given) if few else plan.base_to_novel(shots[0], draws, given)
    )
    if initial is not None and head_dir is not None:
        require_no_leak(test, runs[0].tests, head_dir, allow=ask.allow_overlap)
        if not few:
            warn_of_known_classes(initial, test, runs[0].tests[1])
    prompt_set = options.training_prompts(train, ask.prompts, initial)
    clip_store = ask.chosen_clip_store()

    def evaluate(tested: Any, tests: Any, facts: Any, name: str) -> Any:
        return evaluate_store(
            test,
            tested,
            protocol=protocol,
            dataset=ask.dataset,
            tests=tests,
            modulate=ask.fixed["modulate"],
            modulation_neighbours=ask.fixed["neighbours"],
            modulation_temperature=ask.fixed["temperature"],
            ensemble=ask.fixed["ensemble"],
            fusion=ask.fixed["fusion"],
            head_name=name,
            views=ask.views,
            clip_store=clip_store,
            prompt_set=prompt_set,
            facts=replace(facts, label_map=label_map or None, **of_run[name]),
            precision=ask.precision,
            device=ask.device,
        )

    of_run: dict[str, dict[str, int]] = {
        run.run_dir.name: {"n_trained_on": run.overlap, "shots": run.shots} for run in runs
    }
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
                protocol=protocol.name,
                initial=initial,
                initial_run=head_dir,
                best_epoch=how.best_epoch,
                device=ask.device,
                progress=progress,
            )
        found = [outcome.last] if outcome.best is None else [outcome.last, outcome.best]
        files += [str(save_result(result, run.run_dir)) for result in found]
        outcomes.append(outcome)
    value = {
        "protocol": ask.kind,
        "protocol_name": protocol.name,
        "dataset": ask.dataset,
        "head": head or shape.kind,
        "runs": [outcome.to_json() for outcome in outcomes],
        "files": files,
    }
    if few:
        report_fewshot(ask.workspace, value, outcomes, json)
    else:
        report_base_to_novel(ask.workspace, value, outcomes, runs[0].run_dir, json)


def numbers(option: str, text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers of "2,4,8"; UserError for other text and for a number named twice."""
    if text is None:
        return tuple(default)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"{option} {text!r}: give different whole numbers, such as 2,4,8")
    return tuple(map(int, parts))


def _stores(
    ask: Request, how: Training, store_name: str | None, origin: HeadOrigin | None
) -> tuple[Store, Store, tuple[str, str]]:
    """The store to train from, the one to test, and their splits."""
    from heads.evaluation.protocols.choose import count_views

    train_split = ask.workspace.default_split(ask.dataset, ("train1", "train"))
    test_split = ask.split or ask.workspace.default_split(ask.dataset, ("test1", "val", "test"))
    if train_split is None or test_split is None:
        lacking = "training" if train_split is None else "test"
        raise UserError(
            f"no store of {ask.dataset} has a {lacking} split: pack the data set with its "
            f"annotations and extract its videos (`mote-cli extract --dataset {ask.dataset}`)"
        )
    fingerprint = None if origin is None else origin.encoder_fingerprint
    encoder = None if origin is None else origin.encoder
    test = ask.workspace.choose_store(
        ask.dataset,
        split=test_split,
        views=None if ask.views is None else count_views(ask.views),
        encoder_fingerprint=fingerprint,
        sampling=ask.sampling,
        name=store_name,
        encoder=encoder,
    )
    name = how.train_store
    if name is None and train_split in test.split_names and len(test.split(train_split)):
        name = store_name  # the store that was named has both
    train = ask.workspace.choose_store(
        ask.dataset,
        split=train_split,
        encoder_fingerprint=fingerprint,
        name=name,
        encoder=encoder,
        option="--train-store",
    )
    return train, test, (train_split, test_split)


def _lists(
    ask: Request, how: Training, train: Store, wanted: Sequence[int]
) -> tuple[Mapping[int, GivenList] | None, Any]:
    """Published lists by number of shots or seed, and the exchange of names they come with."""
    from heads.evaluation.protocols.choose import known_dataset
    from heads.evaluation.trained.plan import GivenList
    from pipeline.annotations.key_index import KeyIndex
    from pipeline.annotations.published_lists import (
        ListRepository,
        label_exchange,
        read_published_list,
    )

    if how.lists_from is None:
        return None, ""
    few = ask.kind == "fewshot"
    repository = ListRepository(how.lists_from, known_dataset(ask.dataset))
    index = KeyIndex(train.keys)
    files = {n: repository.shots(n) if few else repository.seed(n) for n in wanted}
    lists = {number: read_published_list(path, index) for number, path in files.items()}
    names = repository.names("" if few else "base")
    exchange, done = label_exchange(
        [(listed, names) for listed in lists.values()],
        dict(zip(train.keys, map(int, train.labels), strict=True)),
        train.class_names,
        ask.label_map,  # type: ignore[arg-type]  # checked by the caller
    )
    given = {
        number: GivenList(str(listed.path.relative_to(how.lists_from)), listed.keys)
        for number, listed in lists.items()
    }
    return given, exchange or done


def _named(
    ask: Request, how: Training, train: Store, test: Store, label_map: Any
) -> tuple[Store, Store, str]:
    """The stores with names as the label map has them, and what results say of it."""
    from heads.evaluation.label_maps import AS_PUBLISHED, named_as, with_exchanged_names
    from heads.evaluation.protocols.choose import known_dataset

    if ask.label_map != AS_PUBLISHED:
        return train, test, str(label_map)
    if how.lists_from is None:
        train, test = (
            named_as(store, known_dataset(ask.dataset), ask.label_map) for store in (train, test)
        )
    else:
        train, test = (with_exchanged_names(store, label_map or {}) for store in (train, test))
    return train, test, test.provenance.label_map
