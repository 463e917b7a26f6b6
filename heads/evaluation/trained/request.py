"""Evaluates few-shot or base to novel as one request says: trains heads, then tests them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featstore.commands import command
from featstore.errors import UserError
from featstore.files.durable import write_json
from featstore.progress import Stages, no_stages
from featstore.reading.store import Store
from heads.compatibility import check_fits, training_prompt_set
from heads.evaluation.evaluate import evaluate_store
from heads.evaluation.label_maps import (
    AS_PUBLISHED,
    check_label_map,
    named_as,
    with_exchanged_names,
)
from heads.evaluation.leaks import require_no_leak, warn_of_known_classes
from heads.evaluation.protocols.choose import usual_protocol
from heads.evaluation.protocols.protocol import Protocol, TestSet
from heads.evaluation.request import EvaluationRequest, known_paths, require_unused
from heads.evaluation.results import EvalResult, RunFacts, save_result
from heads.evaluation.trained.plan import GivenList, ShotPlan
from heads.evaluation.trained.run import (
    DRAW_SEEDS,
    SHOTS,
    ShotOutcome,
    base_to_novel,
    train_and_test,
    usual_epochs,
)
from heads.files.head_file import choose_head
from heads.methods.head import Head
from heads.methods.registry import MEAN_OF_FRAMES, method
from heads.recipes import DEFAULT_RECIPE, load_recipe
from heads.scoring.scores import Scoring
from pipeline.annotations.known_sets import known_dataset
from pipeline.annotations.published_lists import (
    KeyIndex,
    ListRepository,
    label_exchange,
    read_published_list,
)

KINDS = ("fewshot", "base-to-novel")


@dataclass(frozen=True)
class Training:
    """How the heads are trained; None means the setting of the protocol or the recipe."""

    shots: str | None = None
    """Numbers of training videos per class, for example "2,4,8"."""
    draw_seeds: str | None = None
    lists_from: Path | None = None
    """Folder of a cloned repository with published lists of shots."""
    train_store: str | None = None
    recipe: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    repeat: str = "full"
    name: str | None = None
    """What the names of the runs begin with."""
    best_epoch: bool = True
    """Test every epoch too, and report the best one separately."""

    def require_unused(self, kind: str) -> None:
        """Raise UserError if any setting is given, because `kind` tests without training."""
        require_unused(
            self,
            f"--fewshot and --base-to-novel, which train heads; {kind} tests an existing head",
        )


@dataclass(frozen=True)
class TrainedEvaluation:
    """The outcomes of the runs of a protocol; their results are already saved."""

    kind: str
    protocol_name: str
    dataset: str
    head: str
    outcomes: list[ShotOutcome]
    files: list[Path]

    def to_json(self) -> dict[str, Any]:
        """Return the runs as strict JSON values; for base to novel also the means over draws."""
        value: dict[str, Any] = {
            "protocol": self.kind,
            **{name: getattr(self, name) for name in ("protocol_name", "dataset", "head")},
            "runs": [outcome.to_json() for outcome in self.outcomes],
            "files": [str(file) for file in self.files],
        }
        if self.kind != "fewshot":
            last, best = (base_to_novel(self.outcomes, best=best) for best in (False, True))
            assert last is not None, "every run has a last epoch"
            value |= last | {"best": best}
        return value

    def save_summary(self, value: Mapping[str, Any]) -> Path:
        """Save `value`, the report on all runs, in the folder of the first run."""
        file = self.outcomes[0].run.run_dir / "base-to-novel.json"
        write_json(file, dict(value))
        return file


def evaluate_trained(
    ask: EvaluationRequest, how: Training, stages: Stages = no_stages
) -> TrainedEvaluation:
    """Run the protocol: train once per number of shots or seed, or continue, and test each head.

    Every result is saved in the folder of its run as soon as it is measured. Raises UserError for a
    request that cannot be met, and the errors of `train_and_test`.
    """
    require_unused(ask.unseen, f"--zeroshot k600, not with {ask.kind}")
    check_label_map(ask.label_map)
    few = ask.kind == "fewshot"
    protocol = ask.protocol or usual_protocol(ask.kind, ask.dataset, split=ask.split)
    initial: Head | None = None
    head_dir: Path | None = None
    if ask.head is not None:
        initial, head_dir = choose_head(ask.workspace, ask.head)
    if initial is not None:
        chosen = method(initial.config.kind)
        remedy = "name another run with --head, or leave it out"
        chosen.require("trained from a store", chosen.from_store, remedy)
    train, test, splits = _stores(ask, how, initial, protocol)
    recipe = load_recipe(how.recipe or DEFAULT_RECIPE)
    epochs = usual_epochs(ask.kind, ask.dataset) if how.recipe is None else None
    training = recipe.train_config(
        epochs=how.epochs or epochs, batch_size=how.batch_size, lr=how.lr
    )
    if initial is not None:
        check_fits(initial, train)
        shape = initial.config
    else:
        mean = ask.head == MEAN_OF_FRAMES
        shape = recipe.head_config(train.provenance.dim, kind=MEAN_OF_FRAMES if mean else None)
    method(shape.kind).warn_of_epochs(
        {"--epochs": how.epochs, "--batch-size": how.batch_size, "--lr": how.lr}
    )
    Scoring.of_head(shape, **vars(ask.score))  # raises before anything is trained
    shots = numbers("--shots", how.shots, SHOTS[ask.kind])
    draws = numbers("--draw-seeds", how.draw_seeds, DRAW_SEEDS[ask.kind])
    if len(draws if few else shots) > 1:
        raise UserError(
            "few-shot takes one draw seed for all numbers of shots, and base-to-novel takes one "
            "number of shots for all seeds: run the command once for each"
        )
    given, train, test, label_map = _lists(ask, how, train, test, shots if few else draws)
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
        content_marks=ask.content_marks,
    )
    runs = (
        plan.fewshot(shots, draws[0], given) if few else plan.base_to_novel(shots[0], draws, given)
    )
    if initial is not None and head_dir is not None:
        require_no_leak(test, runs[0].tests, head_dir, allow=ask.allow_overlap)
        if not few:
            warn_of_known_classes(initial, test, runs[0].tests[1])
    prompt_set = ask.prompt_set(train) or training_prompt_set(train, initial)
    clip_store = ask.chosen_clip_store()

    def evaluate(tested: Head, tests: Sequence[TestSet], facts: RunFacts, name: str) -> EvalResult:
        return evaluate_store(
            test,
            tested,
            protocol=protocol,
            dataset=ask.dataset,
            tests=tests,
            **vars(ask.score),
            head_name=name,
            views=ask.views,
            clip_store=clip_store,
            prompt_set=prompt_set,
            facts=replace(
                facts,
                label_map=label_map or None,
                n_trained_on=of_run[name].overlap,
                n_copied=of_run[name].copied,
                shots=of_run[name].shots,
            ),
            precision=ask.precision,
            device=ask.device,
        )

    of_run = {run.run_dir.name: run for run in runs}
    paths = known_paths(ask)
    outcomes: list[ShotOutcome] = []
    files: list[Path] = []
    for run in runs:
        with stages(f"train {run.run_dir.name}", "steps") as progress:
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
        files += [save_result(result, run.run_dir, paths) for result in found]
        outcomes.append(outcome)
    return TrainedEvaluation(
        ask.kind, protocol.name, ask.dataset, ask.head or shape.kind, outcomes, files
    )


def numbers(option: str, text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """Parse "2,4,8" into whole numbers; UserError for other text and for repeated numbers."""
    if text is None:
        return tuple(default)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"{option} {text!r}: give different whole numbers, such as 2,4,8")
    return tuple(map(int, parts))


def _stores(
    ask: EvaluationRequest, how: Training, initial: Head | None, protocol: Protocol
) -> tuple[Store, Store, tuple[str, str]]:
    """Return the store to train from, the store to test, and the split of each."""
    train_split = ask.held_split(("train1", "train"), initial, protocol)
    test_split = ask.split or ask.held_split(("test1", "val", "test"), initial, protocol)
    if train_split is None or test_split is None:
        lacking = "training" if train_split is None else "test"
        options = {"dataset": f"{ask.dataset}-official", "videos": "DIR", "annotations": "PATH"}
        pack = command("pack", root=ask.workspace.root, **options)
        raise UserError(
            f"no store of {ask.dataset} has a {lacking} split: pack the data set with its "
            f"annotations (`{pack}`) and extract that one"
        )
    test = ask.fitting_store(test_split, initial, protocol)
    name = how.train_store
    if name is None and train_split in test.split_names and len(test.split(train_split)):
        name = ask.store  # the named store has both splits
    others = {"views": None, "crops": None, "sampling": None, "name": name}
    others["option"] = "--train-store"
    train = ask.fitting_store(train_split, initial, protocol, **others)
    return train, test, (train_split, test_split)


def _lists(
    ask: EvaluationRequest, how: Training, train: Store, test: Store, wanted: Sequence[int]
) -> tuple[Mapping[int, GivenList] | None, Store, Store, str]:
    """Return the published lists by number of shots or seed, the stores to train from and to test
    with the class names of the label map, and the label map that results record."""
    dataset, as_published = known_dataset(ask.dataset), ask.label_map == AS_PUBLISHED
    if how.lists_from is None:
        if not as_published:
            return None, train, test, ""
        train, test = (named_as(store, dataset, ask.label_map) for store in (train, test))
        return None, train, test, test.provenance.label_map
    few = ask.kind == "fewshot"
    repository = ListRepository(how.lists_from, dataset)
    index = KeyIndex(train.keys)
    files = {n: repository.shots(n) if few else repository.seed(n) for n in wanted}
    lists = {number: read_published_list(path, index) for number, path in files.items()}
    exchange, done = label_exchange(
        list(lists.values()),
        repository.names("" if few else "base"),
        dict(zip(train.keys, map(int, train.labels), strict=True)),
        train.class_names,
        ask.label_map,  # type: ignore[arg-type]  # checked by the caller
    )
    given = {
        number: GivenList(str(listed.path.relative_to(how.lists_from)), listed.keys)
        for number, listed in lists.items()
    }
    if as_published:
        train, test = (with_exchanged_names(store, exchange) for store in (train, test))
        done = test.provenance.label_map
    return given, train, test, done
