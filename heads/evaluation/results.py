"""The result of an evaluation, and the files it is saved in.

A result must hold everything that can explain a different number: the videos, the class names and
sentences, the frames and pixels, the weights, and the score settings.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from featstore.errors import counted
from featstore.files.durable import write_bytes, write_json
from heads.evaluation.answers import save_answers
from heads.evaluation.details import SplitDetail
from heads.evaluation.outcomes import write_outcomes
from heads.evaluation.several_classes import LabelsDetail, save_details
from heads.files.run_files import CONFIG_FILE, best_epoch, read_config, read_metrics
from heads.methods.registry import keeps_several_weights, untrained

RESULT_FORMAT: Final = 2
NAMED_SPLITS: Final = 3  # how many splits a file name lists; its hash covers all of them


@dataclass(frozen=True)
class SplitResult:
    """Accuracy in percent over the samples of one test set that could be evaluated.

    Where a video may show several classes there is no accuracy, but `mean_ap`.
    """

    split: str
    n_listed: int
    n_evaluated: int
    n_failed: int
    top1: float | None
    top5: float | None
    """None with fewer than five classes."""
    n_classes: int
    """The number of candidates that the samples were scored against."""
    mean_ap: float | None = None
    """Mean average precision in percent, over the classes that some evaluated video shows."""
    n_classes_shown: int | None = None
    """How many classes that are."""

    def to_json(self) -> dict[str, Any]:
        """The fields, without those of the other kind of labels where these are not used."""
        return _without_unused(asdict(self), ("mean_ap", "n_classes_shown"))


@dataclass(frozen=True)
class RunFacts:
    """What a result records besides the facts of the store and the head; None means unknown."""

    blend: float | None = None
    """Share of the tuned tower in the blended one; the rest is CLIP's own."""
    epoch: int | None = None
    epoch_choice: str | None = None
    """Either "last" or "best on ...", with the test set or the split evaluated in training."""
    class_names_source: str | None = None
    """Where the class names come from, for example the file of the annotations."""
    label_map: str | None = None
    """Either "corrected" or "as-published", for data sets whose published names are wrong."""
    prompt_templates: tuple[str, ...] | None = None
    """The sentences of the prompt set, with {} for the class name."""
    n_trained_on: int | None = None
    """How many tested videos are training videos of the head."""
    shots: int | None = None
    """Training videos per class, in few-shot and base-to-novel."""
    n_copied: int | None = None
    """How many tested videos are copies of training videos; `n_trained_on` counts them, too."""
    weights: str | None = None
    """Which weights of a training that keeps several these are: "mean", "last", ..."""


Group = Literal["what was tested", "how", "with what", "arithmetic", "other"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)


# One function per group: it returns the metadata of a field of `EvalResult` in that group.
_tested: Callable[..., dict[str, Any]] = partial(dict, group="what was tested")
_how: Callable[..., dict[str, Any]] = partial(dict, group="how")
_with: Callable[..., dict[str, Any]] = partial(dict, group="with what")
_arithmetic: Callable[..., dict[str, Any]] = partial(dict, group="arithmetic")


@dataclass(frozen=True)
class EvalResult:
    """One evaluation, with everything that is needed to compare it with another.

    With several test sets, `top1` and `top5` are the means over the test sets, and the counts are
    of distinct samples. `mean` and `std` (population) are taken over the top-1 of the test sets. If
    videos may show several classes, `measure` says that `mean` is of their mean average precisions.

    Fields are declared here and nowhere else. The metadata of a field may have: `group`, the group
    it is compared in (numbers and remarks have none); `decisive`, if two results that differ in the
    field do not measure the same thing, whatever their heads are; `identity`, if the field is part
    of the hash in the file's name; `none_known`, if None means "none" and not "unknown";
    `optional`, if a field that is None is left out, so that results of versions without the field
    keep their names; `of`, the part of the evaluation that has an attribute of the same name
    (`taken_from`).
    """

    protocol: str = field(metadata=_tested(decisive=True))
    """Kind of the protocol: "closeset", "zeroshot", "halfclass", "fewshot", "base-to-novel"."""
    protocol_name: str = field(metadata=_tested(decisive=True, identity=True))
    dataset: str = field(metadata=_tested(decisive=True, identity=True))
    head: str = field(metadata=_with())
    n_listed: int = field(metadata=_tested(decisive=True))
    n_found: int = field(metadata=_tested())
    """Listed videos whose file was there when the data set was packed."""
    n_evaluated: int = field(metadata=_tested(decisive=True))
    n_failed: int = field(metadata=_tested())
    top1: float | None
    top5: float | None
    views: str = field(metadata=_how(decisive=True, identity=True))
    """Clips x crops, for example "4x3"."""
    sampling: str = field(metadata=_how(decisive=True, identity=True, of="provenance"))
    """How the store was sampled, for example "clips:8x4"."""
    sampler: str = field(metadata=_how(decisive=True))
    """How frames are chosen: the first word of `sampling`."""
    resize: str = field(metadata=_how(decisive=True, identity=True))
    """How frames were scaled, with the interpolation: "short side to 224, bicubic"."""
    crop: str = field(metadata=_how(decisive=True, identity=True))
    """What was cut from a scaled frame: "224x224 3 along the long side"."""
    frames: int = field(metadata=_how(decisive=True, identity=True))
    """The number of frames per view that the head was given, or that its encoder saw together."""
    prompt_set: str = field(metadata=_how(identity=True))
    prompt_templates: list[str] | None = field(metadata=_how(decisive=True))
    encoder: str = field(metadata=_with(of="provenance"))
    encoder_fingerprint: str = field(metadata=_with(identity=True, of="provenance"))
    per_split: tuple[SplitResult, ...] = field(metadata=_tested(decisive=True))
    mean: float
    std: float
    mean_top5: float | None
    std_top5: float | None
    kind: str = field(metadata=_with())
    modulate: bool = field(metadata=_with(identity=True, of="scoring"))
    modulation_neighbours: int | None = field(metadata=_with(identity=True, none_known=True))
    """None if the head was not modulated; so is the temperature."""
    modulation_temperature: float | None = field(metadata=_with(identity=True, none_known=True))
    fusion: str = field(metadata=_how(decisive=True, identity=True, of="scoring"))
    ensemble: float | None = field(metadata=_with(identity=True, none_known=True, of="scoring"))
    """Weight of CLIP's own scores; None for the head alone."""
    clip_store: str | None = field(metadata=_with(identity=True, none_known=True))
    """The store that CLIP's own scores come from, if it is not the tested one."""
    n_classes: int = field(metadata=_tested(decisive=True))
    """The number of candidates of a test set; the largest if the test sets differ in it."""
    n_classes_trained: int | None = field(metadata=_with())
    """How many candidates' names the head was trained on; None when that is not known."""
    head_fingerprint: str = field(metadata=_with())
    blend: float | None = field(metadata=_with(of="facts"))
    epoch: int | None = field(metadata=_with(of="facts"))
    epoch_choice: str | None = field(metadata=_with(decisive=True, identity=True, of="facts"))
    trained_on: str | None = field(metadata=_tested(decisive=True))
    """The data set that the head was trained on; None if it is not known."""
    training_videos: str | None = field(metadata=_tested())
    """The head's training videos, in words; None if they are not known."""
    shots: int | None = field(metadata=_tested(decisive=True, of="facts"))
    """Training videos per class, in few-shot and base-to-novel; None elsewhere."""
    n_trained_on: int | None = field(metadata=_tested(of="facts"))
    """How many listed videos are training videos of the head; None if that is not known."""
    n_copied: int | None = field(metadata={"of": "facts"})
    """How many of these are training videos by their content, under another key."""
    source: str = field(metadata={"of": "protocol"})
    """The publications that the protocol comes from."""
    test_list: str = field(metadata=_tested(of="protocol"))
    published_counts: list[str]
    """The sources that publish the same counts of videos as are listed here."""
    notes: list[str]
    """Differences from the published protocol (counts of videos, views, fusion), and videos of the
    store that are in no split."""
    list_hash: str = field(metadata=_tested(decisive=True, identity=True))
    """Hash of the keys of the listed videos, in the store's order."""
    class_names_hash: str = field(metadata=_tested(decisive=True))
    """Hash of all class names of the store."""
    class_list_hash: str = field(metadata=_tested(decisive=True, identity=True))
    """Hash of the names of the candidates of every test set."""
    class_names_source: str = field(metadata=_tested())
    label_map: str | None = field(metadata=_how(decisive=True, identity=True, none_known=True))
    prompts_hash: str = field(metadata=_how(decisive=True, identity=True))
    dataset_fingerprint: str = field(metadata=_tested(of="provenance"))
    store: str = field(metadata=_tested(identity=True))
    preprocessing: dict[str, Any] = field(metadata=_how(decisive=True, of="provenance"))
    encoder_precision: str = field(metadata=_arithmetic(identity=True))
    quantised: str = field(metadata=_arithmetic(identity=True, of="provenance"))
    decoder: str = field(metadata=_arithmetic(identity=True, of="provenance"))
    device: str = field(metadata=_arithmetic())
    precision: str = field(metadata=_arithmetic(identity=True))
    """The arithmetic that the head ran in: "fp32" or "bf16"."""
    result_format: int = RESULT_FORMAT
    measure: str | None = field(default=None, metadata=_tested(decisive=True, optional=True))
    """"mAP" where videos may show several classes; None: top-1."""
    mean_ap: float | None = field(default=None, metadata={"optional": True})
    """The mean average precision in percent, the mean over the test sets."""
    class_names_as: str | None = field(default=None, metadata=_how(decisive=True, optional=True))
    """"rephrased" where class texts were made of names with a sentence each; None: plain names."""
    tower_frames: int | None = field(default=None, metadata={"optional": True})
    """How many of `frames` the image tower looks at; None: all. Published figures count these."""
    weights: str | None = field(
        default=None, metadata=_with(decisive=True, identity=True, optional=True, of="facts")
    )
    """Which weights of its training a model has: "mean", "last", "best" or "teacher"; None where a
    training has one kind, or it is not known."""
    projection: str | None = field(
        default=None, metadata=_how(decisive=True, identity=True, optional=True)
    )
    """"on" or "off" for a head whose projection can be left out; None for others."""
    details: tuple[SplitDetail | LabelsDetail, ...] = field(default=(), repr=False, compare=False)
    """Every prediction. Not part of the JSON but written beside it, like the class names."""
    class_names: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Class names of the store, by label."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON values, without `details` and `class_names`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _BESIDE}
        plain["per_split"] = [split.to_json() for split in self.per_split]
        return _without_unused(plain, OPTIONAL)

    @property
    def words(self) -> str:
        """The measured number, with its name."""
        return f"{self.measure or 'top-1'} {self.mean:.1f} %"

    @property
    def file_name(self) -> str:
        """The name of the result's file, without a suffix; only equal measurements share it."""
        parts = [self.protocol_name]
        if self.dataset != self.protocol_name.partition("-")[0]:
            parts.append(self.dataset)
        if self.protocol_name in ("closeset", "zeroshot"):
            parts += [part.split for part in self.per_split[:NAMED_SPLITS]]
        parts += [self.views, self.sampling.replace(":", ""), self.prompt_set, self.fusion]
        parts += ["modulated" if self.modulate else "plain"]
        if self.ensemble is not None:
            parts.append(f"ensemble{self.ensemble:g}")
        if self.weights is not None:
            parts.append(f"{self.weights}-weights")
        if self.projection is not None:
            parts.append(f"projection-{self.projection}")
        return f"{'--'.join(parts)}--{self._identity()}"

    def _identity(self) -> str:
        """Return eight digits of a hash of everything that defines the measurement."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("identity")}
        chosen = _without_unused(chosen, OPTIONAL)
        splits = [part.split for part in self.per_split]
        text = json.dumps([chosen, splits], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


_BESIDE: Final = ("details", "class_names")
OPTIONAL: Final = tuple(f.name for f in fields(EvalResult) if f.metadata.get("optional"))
"""The fields that a result lacks where they are None."""


def _without_unused(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Leave out those of `names` that are None, so that other results stay as they always were."""
    return {name: value for name, value in values.items() if value is not None or name not in names}


def taken_from(**parts: Any) -> dict[str, Any]:
    """Return the fields of a result that `parts` have as attributes (metadata `of`), by name."""
    named = {f.name: f.metadata.get("of") for f in fields(EvalResult)}
    return {name: getattr(parts[of], name) for name, of in named.items() if of in parts}


def save_result(result: EvalResult, run_dir: Path, paths: Mapping[str, str] | None = None) -> Path:
    """Save a result under `run_dir/eval` and return its file; measuring again replaces it.

    Beside the JSON lie `.outcomes.csv`, the rank of every video's true class
    (`heads.evaluation.outcomes`); `.confusion.npz` with, for every test set NAME, the counts `NAME`
    int64 [true, predicted] and the label ids `NAME_labels` of its classes, and the `class_names` of
    all labels; and the files for people (`heads.evaluation.answers`), which name each video's path
    if `paths` holds it by key.
    """
    folder = run_dir / "eval"
    base = result.file_name
    file = folder / f"{base}.json"
    several = [part for part in result.details if isinstance(part, LabelsDetail)]
    details = [part for part in result.details if isinstance(part, SplitDetail)]
    if details:
        arrays: dict[str, npt.NDArray[Any]] = {"class_names": np.array(result.class_names)}
        for part in details:
            arrays |= {part.split: part.confusion(), f"{part.split}_labels": part.classes}
        data = io.BytesIO()
        np.savez_compressed(data, **arrays)  # type: ignore[arg-type]  # split names are the keys
        write_bytes(folder / f"{base}.confusion.npz", data.getvalue())
        outcomes = {
            part.split: dict(zip(part.keys, part.places.tolist(), strict=True)) for part in details
        }
        write_outcomes(file, outcomes)
    write_json(file, result.to_json())
    # Last: whatever may happen to a picture, the numbers are kept.
    title = f"{result.head} on {result.dataset} ({result.protocol_name}): "
    title += f"{result.words} of {counted(result.n_evaluated, 'video')}"
    if several:
        save_details(folder / base, several, result.class_names, paths or {}, title)
    if details:
        save_answers(file, details, result.class_names, title=title, paths=paths)
    return file


def run_facts(run_dir: Path, weights: str | None = None, **known: Any) -> RunFacts:
    """Return the facts about a run's weights from its config.json; `known` ones override them.

    A run trained here has the weights of its last epoch; the file of an imported or fine-tuned run
    names the epoch. `weights` names some of a run that keeps several, None the published ones.
    WorkError when the file is not JSON; without a file only `known` counts.
    """
    from heads.files.imported_run import tower_facts  # it loads torch, reading results does not

    settings = read_config(run_dir)
    said: dict[str, Any] = {}
    if settings is None:
        return RunFacts(**known)
    if isinstance(facts := settings.get("imported"), Mapping):
        said = {name: facts.get(name) for name in ("blend", "epoch", "epoch_choice", "weights")}
    elif (tuned := tower_facts(run_dir)) is not None:
        said = {"blend": tuned.get("blend"), "epoch_choice": tuned.get("epoch_choice")}
        said["epoch"] = int(tuned["epoch"]) + 1
    elif not untrained(settings.get("head", {}).get("kind")):
        training, split = settings.get("training", {}), settings.get("data", {}).get("eval_split")
        said = {"epoch": training.get("epochs"), "epoch_choice": "last"}
        if training.get("save") == "best" and (best := best_epoch(read_metrics(run_dir))):
            said = {"epoch": best, "epoch_choice": f"best on {split}"}
    several = keeps_several_weights(settings.get("head", {}).get("kind"))
    if several and "imported" not in settings:
        of_run = (run_dir.parent / CONFIG_FILE).is_file()  # `RUN/teacher` and the like
        weights = weights or (run_dir.name if of_run else str(settings["training"]["save"]))
        said |= _weights_facts(settings, run_dir, weights)
    return RunFacts(**(said | known))


def _weights_facts(settings: Mapping[str, Any], run_dir: Path, which: str) -> dict[str, Any]:
    """Return the facts about some weights of a run that keeps several."""
    epoch, choice = settings.get("training", {}).get("epochs"), "last"
    if which == "best" and (best := best_epoch(read_metrics(run_dir))):
        epoch, choice = best, f"best on {settings.get('data', {}).get('eval_split')}"
    return {"weights": which, "epoch": epoch, "epoch_choice": choice}
