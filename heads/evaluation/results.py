"""What an evaluation says about itself, and the files it is kept in.

Nothing that explains a different number may be missing here: which videos, which names and
sentences, which frames and pixels, which weights, which score.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.errors import WorkError
from featstore.files.durable import write_bytes, write_json
from heads.evaluation.outcomes import write_outcomes
from heads.evaluation.protocols.protocol import LabelIds
from heads.files.imported_run import tower_facts
from heads.files.run_files import CONFIG_FILE
from heads.methods.registry import untrained

RESULT_FORMAT: Final = 2
NAMED_SPLITS: Final = 3  # in a file's name; a hash in it stands for all of them


@dataclass(frozen=True)
class SplitResult:
    """Accuracy in percent over the samples of one test set that could be evaluated."""

    split: str
    n_listed: int
    n_evaluated: int
    n_failed: int
    top1: float
    top5: float | None
    """None with fewer than five classes."""
    n_classes: int
    """Candidates the samples were scored against."""


@dataclass(frozen=True, eq=False)
class SplitDetail:
    """Every prediction of one test set, n samples evaluated, in the store's order."""

    split: str
    classes: LabelIds
    """Label ids of the candidates."""
    labels: LabelIds
    """[n] the true label ids."""
    predicted: LabelIds
    """[n] the label ids with the best score; ties go to the candidate named first."""
    places: LabelIds
    """[n] place of the true class, 0 = best."""
    keys: tuple[str, ...]
    """[n] keys of the videos."""

    def confusion(self) -> npt.NDArray[np.int64]:
        """Counts [true class, predicted class] of the candidates, in the order of `classes`."""
        n = len(self.classes)
        order = np.argsort(self.classes)
        true, said = (
            order[np.searchsorted(self.classes, which, sorter=order)]
            for which in (self.labels, self.predicted)
        )
        return np.bincount(true * n + said, minlength=n * n).reshape(n, n).astype(np.int64)


@dataclass(frozen=True)
class RunFacts:
    """What a result records that neither store nor head hold; None where it is not known."""

    blend: float | None = None
    """Share of the tuned tower, the rest is CLIP's own."""
    epoch: int | None = None
    epoch_choice: str | None = None
    """ "last", or "best on" the test set or the split that was evaluated on while training."""
    class_names_source: str | None = None
    """Where class names come from, for example the file of the annotations."""
    label_map: str | None = None
    """ "corrected" or "as-published" for data sets whose published names are known to be wrong."""
    prompt_templates: tuple[str, ...] | None = None
    """The sentences of the prompt set, with {} for the class name."""
    n_trained_on: int | None = None
    """Tested videos that are training videos of the head."""
    shots: int | None = None
    """Training videos per class, of few-shot and base-to-novel."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation, with what is needed to compare it with another.

    Over several test sets, `top1` and `top5` are means of theirs and the counts are of distinct
    samples. `mean` and `std` (population) are of their top-1.
    """

    protocol: str
    """Kind of the protocol: "closeset", "zeroshot", "halfclass", "fewshot", "base-to-novel"."""
    protocol_name: str
    dataset: str
    head: str
    n_listed: int
    n_found: int
    """Listed videos whose file was there when the data set was packed."""
    n_evaluated: int
    n_failed: int
    top1: float
    top5: float | None
    views: str
    """Clips x crops, for example "4x3"."""
    sampling: str
    """Sampling of the store, for example "clips:8x4"."""
    sampler: str
    """How frames are chosen: the first word of `sampling`."""
    resize: str
    """What the short side was scaled to, with the interpolation, for example "224 bicubic"."""
    crop: str
    """What was cut from it, for example "224, 3 along the long side"."""
    frames: int
    """T, frames per view the head was given."""
    prompt_set: str
    prompt_templates: list[str] | None
    encoder: str
    encoder_fingerprint: str
    per_split: tuple[SplitResult, ...]
    mean: float
    std: float
    mean_top5: float | None
    std_top5: float | None
    kind: str
    modulate: bool
    modulation_neighbours: int | None
    """None where the head was not modulated; so is the temperature."""
    modulation_temperature: float | None
    fusion: str
    ensemble: float | None
    """Weight of CLIP's own scores; None for the head alone."""
    clip_store: str | None
    """Store CLIP's scores came from, where it is not the tested one."""
    n_classes: int
    """Candidates of a test set, the most where they differ."""
    n_classes_trained: int | None
    """Candidates whose name the head was trained on; None when that is not known."""
    head_fingerprint: str
    blend: float | None
    epoch: int | None
    epoch_choice: str | None
    trained_on: str | None
    """Data set the head was trained on; None where it is not known."""
    training_videos: str | None
    """Which of its videos, in words; None where it is not known."""
    shots: int | None
    """Videos per class among them, of few-shot and base-to-novel; None elsewhere."""
    n_trained_on: int | None
    """Listed videos that are training videos of the head; None where that is not known."""
    source: str
    """Publications the protocol comes from."""
    test_list: str
    published_counts: list[str]
    """Sources whose published counts of videos are the ones listed here."""
    notes: list[str]
    """In what this is not the protocol as published (counts of videos, views, fusion), and
    videos of the store that no split lists."""
    list_hash: str
    """Hash of the keys listed, in the store's order."""
    class_names_hash: str
    """Of all class names of the store."""
    class_list_hash: str
    """Of the candidates of every test set."""
    class_names_source: str
    label_map: str | None
    prompts_hash: str
    dataset_fingerprint: str
    store: str
    preprocessing: dict[str, Any]
    encoder_precision: str
    quantised: str
    decoder: str
    device: str
    precision: str
    """Arithmetic of the head: "fp32" or "bf16"."""
    result_format: int = RESULT_FORMAT
    details: tuple[SplitDetail, ...] = field(default=(), repr=False, compare=False)
    """Every prediction; not part of the JSON, written beside it. So are the names."""
    class_names: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Class names of the store, by label."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values, without `details` and `class_names`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _BESIDE}
        return {**plain, "per_split": [asdict(split) for split in self.per_split]}

    @property
    def file_name(self) -> str:
        """Name of the result's file, without a suffix: the same for the same measurement only."""
        parts = [self.protocol_name]
        if self.dataset != self.protocol_name.partition("-")[0]:
            parts.append(self.dataset)
        if self.protocol_name in ("closeset", "zeroshot"):
            parts += [part.split for part in self.per_split[:NAMED_SPLITS]]
        parts += [self.views, self.sampling.replace(":", ""), self.prompt_set, self.fusion]
        parts += ["modulated" if self.modulate else "plain"]
        if self.ensemble is not None:
            parts.append(f"ensemble{self.ensemble:g}")
        return f"{'--'.join(parts)}--{self._identity()}"

    def _identity(self) -> str:
        """Eight digits of a hash of what was measured, not of what came out."""
        chosen = {name: getattr(self, name) for name in _IDENTITY}
        splits = [part.split for part in self.per_split]
        text = json.dumps([chosen, splits], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


_BESIDE: Final = ("details", "class_names")
_IDENTITY: Final = (
    *("protocol_name", "dataset", "store", "views", "sampling", "frames", "prompt_set", "fusion"),
    *("prompts_hash", "list_hash", "class_list_hash", "label_map", "encoder_fingerprint"),
    *("modulate", "modulation_neighbours", "modulation_temperature", "ensemble", "clip_store"),
    *("epoch_choice", "precision", "encoder_precision", "quantised", "resize", "crop", "decoder"),
)


def save_result(result: EvalResult, run_dir: Path) -> Path:
    """Keep a result under `run_dir/eval`, one name per measurement; measuring again replaces it.

    Beside the JSON: `.per-class.csv`, accuracy of every class of every test set; `.outcomes.csv`,
    where the true class of every video came (`heads.evaluation.outcomes`); and `.confusion.npz`
    with, per test set NAME, the counts `NAME` [true, predicted] int64, the label ids `NAME_labels`
    of its classes, and `class_names` of all labels.
    """
    folder = run_dir / "eval"
    base = result.file_name
    file = folder / f"{base}.json"
    if result.details:
        names = result.class_names
        write_bytes(folder / f"{base}.per-class.csv", per_class_csv(result.details, names).encode())
        write_bytes(folder / f"{base}.confusion.npz", confusion_npz(result.details, names))
        outcomes = {
            part.split: dict(zip(part.keys, part.places.tolist(), strict=True))
            for part in result.details
        }
        write_outcomes(file, outcomes)
    write_json(file, result.to_json())
    return file


def per_class_csv(details: Iterable[SplitDetail], class_names: tuple[str, ...]) -> str:
    """`split,label,class_name,n_evaluated,top1,top5` for every candidate; percent, empty for none.

    Top-5 is empty with fewer than five candidates.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["split", "label", "class_name", "n_evaluated", "top1", "top5"])
    for part in details:
        for label in part.classes.tolist():
            places = part.places[part.labels == label]
            shares = [
                f"{100 * float(np.mean(places < k)):.4f}"
                if len(places) and len(part.classes) >= k
                else ""
                for k in (1, 5)
            ]
            table.writerow([part.split, label, class_names[label], len(places), *shares])
    return text.getvalue()


def confusion_npz(details: Iterable[SplitDetail], class_names: tuple[str, ...]) -> bytes:
    """The bytes of `.confusion.npz` as `save_result` describes it."""
    arrays: dict[str, npt.NDArray[Any]] = {"class_names": np.array(class_names)}
    for part in details:
        arrays[part.split] = part.confusion()
        arrays[f"{part.split}_labels"] = part.classes
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]  # names are the splits'
    return data.getvalue()


def run_facts(run_dir: Path, **known: Any) -> RunFacts:
    """What config.json of a run says about its weights, beside what is `known` otherwise.

    A run trained here has the weights of its last epoch, one that was imported or fine-tuned says
    which. WorkError when the file is not JSON; a folder without one says nothing.
    """
    try:
        settings = json.loads((run_dir / CONFIG_FILE).read_text())
    except OSError:
        return RunFacts(**known)
    except ValueError as error:
        raise WorkError(f"{run_dir / CONFIG_FILE} is not JSON: train or import again") from error
    facts = settings.get("imported")
    if isinstance(facts, Mapping):
        said = {name: facts.get(name) for name in ("blend", "epoch", "epoch_choice")}
        return RunFacts(**(said | known))
    tuned = tower_facts(run_dir)
    if tuned is not None:
        said = {"blend": tuned.get("blend"), "epoch_choice": tuned.get("epoch_choice")}
        return RunFacts(**(said | {"epoch": int(tuned["epoch"]) + 1} | known))
    epochs = settings.get("training", {}).get("epochs")
    if untrained(settings.get("head", {}).get("kind")):
        return RunFacts(**known)
    return RunFacts(**({"epoch": epochs, "epoch_choice": "last"} | known))
