"""Few-shot and base to novel as they are asked for: heads are trained, then tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

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
from heads.evaluation.protocols.choose import count_views, known_dataset, usual_protocol
from heads.evaluation.protocols.protocol import TestSet
from heads.evaluation.request import EvaluationRequest
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
from heads.methods.registry import MEAN_OF_FRAMES
from heads.methods.settings import HeadOrigin
from heads.recipes import DEFAULT_RECIPE, load_recipe
from pipeline.annotations.published_lists import (
    KeyIndex,
    ListRepository,
    label_exchange,
    read_published_list,
)

KINDS = ("fewshot", "base-to-novel")
SUMMARY_FILE = "base-to-novel.json"


@dataclass(frozen=True)
class Training:
    """How the heads are trained; None stands for the usual of the protocol or the recipe."""

    shots: str | None = None
    """Videos per class, "2,4,8"."""
    draw_seeds: str | None = None
    lists_from: Path | None = None
    """A clone of a repository with published lists of shots."""
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
        """UserError when something was asked for that a protocol of `kind` does not look at."""
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        if given:
            raise UserError(
                f"{', '.join(given)} go with --fewshot and --base-to-novel, which train heads; "
                f"{kind} tests one that is there: leave them out"
            )


@dataclass(frozen=True)
class TrainedEvaluation:
    """What the runs of a protocol gave; their results are kept already."""

    kind: str
    protocol_name: str
    dataset: str
    head: str
    outcomes: list[ShotOutcome]
    files: list[Path]

    def to_json(self) -> dict[str, Any]:
        """The runs as strict JSON values; of base to novel also the means over the draws."""
        value: dict[str, Any] = {
            "protocol": self.kind,
            "protocol_name": self.protocol_name,
            "dataset": self.dataset,
            "head": self.head,
            "runs": [outcome.to_json() for outcome in self.outcomes],
            "files": [str(file) for file in self.files],
        }
        if self.kind != "fewshot":
            last, best = (base_to_novel(self.outcomes, best=best) for best in (False, True))
            assert last is not None, "every run has a last epoch"
            value |= last.to_json() | {"best": None if best is None else best.to_json()}
        return value

    def save_summary(self, value: Mapping[str, Any]) -> Path:
        """Keep `value`, what was reported of all runs, beside the first of them."""
        file = self.outcomes[0].run.run_dir / SUMMARY_FILE
        write_json(file, dict(value))
        return file


def evaluate_trained(
    ask: EvaluationRequest, how: Training, stages: Stages = no_stages
) -> TrainedEvaluation:
    """Run the protocol: a training per number of shots or seed, continued where it stopped.

    Every result is kept beside its run as soon as it is there. Raises UserError for a request that
    cannot be met, and the errors of `train_and_test`.
    """
    ask.unseen.require_unused(ask.kind)
    check_label_map(ask.label_map)
    few = ask.kind == "fewshot"
    protocol = ask.protocol or usual_protocol(ask.kind, ask.dataset, split=ask.split)
    initial: Head | None = None
    head_dir: Path | None = None
    if ask.head is not None:
        initial, head_dir = choose_head(ask.workspace, ask.head)
    train, test, splits = _stores(ask, how, None if initial is None else initial.origin)
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
                shots=of_run[name].shots,
            ),
            precision=ask.precision,
            device=ask.device,
        )

    of_run = {run.run_dir.name: run for run in runs}
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
        files += [save_result(result, run.run_dir) for result in found]
        outcomes.append(outcome)
    return TrainedEvaluation(
        ask.kind, protocol.name, ask.dataset, ask.head or shape.kind, outcomes, files
    )


def numbers(option: str, text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers of "2,4,8"; UserError for other text and for a number named twice."""
    if text is None:
        return tuple(default)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"{option} {text!r}: give different whole numbers, such as 2,4,8")
    return tuple(map(int, parts))


def _stores(
    ask: EvaluationRequest, how: Training, origin: HeadOrigin | None
) -> tuple[Store, Store, tuple[str, str]]:
    """The store to train from, the one to test, and their splits."""
    train_split = ask.stores.default_split(("train1", "train"))
    test_split = ask.split or ask.stores.default_split(("test1", "val", "test"))
    if train_split is None or test_split is None:
        lacking = "training" if train_split is None else "test"
        raise UserError(
            f"no store of {ask.dataset} has a {lacking} split: pack the data set with its "
            f"annotations and extract its videos (`mote-cli extract --dataset {ask.dataset}`)"
        )
    fingerprint = None if origin is None else origin.encoder_fingerprint
    encoder = None if origin is None else origin.encoder
    test = ask.stores.choose(
        split=test_split,
        views=None if ask.views is None else count_views(ask.views),
        encoder_fingerprint=fingerprint,
        sampling=ask.sampling,
        name=ask.store,
        encoder=encoder,
    )
    name = how.train_store
    if name is None and train_split in test.split_names and len(test.split(train_split)):
        name = ask.store  # the store that was named has both
    train = ask.stores.choose(
        split=train_split,
        encoder_fingerprint=fingerprint,
        name=name,
        encoder=encoder,
        option="--train-store",
    )
    return train, test, (train_split, test_split)


def _lists(
    ask: EvaluationRequest, how: Training, train: Store, wanted: Sequence[int]
) -> tuple[Mapping[int, GivenList] | None, Any]:
    """Published lists by number of shots or seed, and the exchange of names they come with."""
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
    ask: EvaluationRequest, how: Training, train: Store, test: Store, label_map: Any
) -> tuple[Store, Store, str]:
    """The stores with names as the label map has them, and what results say of it."""
    if ask.label_map != AS_PUBLISHED:
        return train, test, str(label_map)
    if how.lists_from is None:
        train, test = (
            named_as(store, known_dataset(ask.dataset), ask.label_map) for store in (train, test)
        )
    else:
        train, test = (with_exchanged_names(store, label_map or {}) for store in (train, test))
    return train, test, test.provenance.label_map
