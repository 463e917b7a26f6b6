"""Evaluating a head, or CLIP's mean of frames, on a store: what was measured, and on what.

N = videos, V = views, F = stored frames, T = frames used, D = embedding width, C = classes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from featstore.durable import write_json
from featstore.errors import UserError, WorkError
from featstore.progress import ProgressSink, no_progress
from featstore.reader import Store
from featstore.records import ClassText
from featstore.schema import STATUS_OK, RowArray
from featstore.segments import segment_positions
from heads.checkpoints import head_fingerprint
from heads.config import HeadConfig, HeadOrigin
from heads.model import TemporalHead, build_head
from heads.modulation import require_neighbours
from heads.precision import Precision, autocast, resolve_device, resolve_precision
from heads.scoring import (
    BATCH_FRAMES,
    TOP_K,
    Fusion,
    HalfClassResult,
    can_modulate,
    fuse_views,
    fused,
    half_class_accuracy,
    predict_scores,
    ranks,
    topk,
    view_cosines,
    view_features,
)
from heads.text_classifier import SAME_CLASS, class_cosines

__all__ = [
    "EvalResult",
    "Fusion",
    "HalfClassResult",
    "SplitResult",
    "can_modulate",
    "check_encoder",
    "check_fits",
    "closeset_splits",
    "count_views",
    "evaluate_store",
    "fuse_views",
    "half_class_accuracy",
    "mean_head",
    "predict_scores",
    "save_result",
    "topk",
    "view_cosines",
    "view_features",
    "views_of",
    "zeroshot_splits",
]

log = logging.getLogger(__name__)

ALL_ROWS = "all"
_NUMBERED_TEST = re.compile(r"test\d+")


@dataclass(frozen=True)
class SplitResult:
    """Accuracy in percent over the samples of one split that could be evaluated."""

    split: str
    n_listed: int
    n_evaluated: int
    n_failed: int
    top1: float
    top5: float | None
    """None with fewer than five classes."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation, with what is needed to compare it with another.

    Over several splits, `top1` and `top5` are means of the splits' and the counts are of distinct
    samples. `mean` and `std` (population) are of the splits' top-1.
    """

    protocol: str
    dataset: str
    head: str
    n_listed: int
    n_evaluated: int
    n_failed: int
    top1: float
    top5: float | None
    views: str
    """Clips x crops, for example "4x3"."""
    sampling: str
    """Sampling of the store, for example "clips:8x4"."""
    frames: int
    """T, frames per view the head was given."""
    prompt_set: str
    encoder: str
    encoder_fingerprint: str
    per_split: tuple[SplitResult, ...]
    mean: float
    std: float
    mean_top5: float | None
    std_top5: float | None
    kind: str
    modulate: bool
    fusion: str
    n_classes: int
    n_classes_trained: int | None
    """Tested classes whose name the head was trained on; None when that is not known."""
    head_fingerprint: str
    list_hash: str
    """Hash of the keys listed, in the store's order."""
    class_names_hash: str
    prompts_hash: str
    dataset_fingerprint: str
    preprocessing: dict[str, Any]
    encoder_precision: str
    decoder: str
    device: str
    precision: str
    """Arithmetic of the head: "fp32" or "bf16"."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return {**asdict(self), "per_split": [asdict(split) for split in self.per_split]}


def closeset_splits(store: Store, split: str | None = None) -> dict[str, RowArray]:
    """Rows of the split a close-set evaluation uses: the one named, else "val", else "test".

    Raises UserError when there is none of that name, or neither val nor test.
    """
    if split is not None:
        return {split: store.split(split)}
    for name in ("val", "test"):
        if name in store.split_names:
            return {name: store.split(name)}
    if not store.split_names:
        raise UserError(
            f"{store.path.name} has no splits: pack the videos under train/ and val/, or evaluate "
            "all of them with --zeroshot"
        )
    raise UserError(
        f"{store.path.name} has neither a val nor a test split (it has "
        f"{', '.join(store.split_names)}): name one with --split"
    )


def zeroshot_splits(store: Store, split: str | None = None) -> dict[str, RowArray]:
    """Rows of the splits a zero-shot evaluation uses.

    The one named; else test1, test2, ... of data sets with several official test lists (HMDB51,
    UCF101: the number reported is their mean); else all rows.
    """
    if split is not None:
        return {split: store.split(split)}
    numbered = sorted(name for name in store.split_names if _NUMBERED_TEST.fullmatch(name))
    if len(numbered) > 1:
        return {name: store.split(name) for name in numbered}
    return {ALL_ROWS: store.rows}


def views_of(store: Store) -> str:
    """The store's views as "clips x crops" text, for example "4x3"."""
    crops = store.provenance.crops
    return f"{store.schema.views // crops}x{crops}"


def count_views(text: str) -> int:
    """Number of views of "clips x crops" text: "4x3" is 12. Raises UserError for other text."""
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if match is None:
        raise UserError(f"views {text!r} are not understood: write CLIPSxCROPS, for example 4x3")
    return int(match[1]) * int(match[2])


def save_result(result: EvalResult, run_dir: Path) -> Path:
    """Keep a result under `run_dir/eval`, one file per measurement; measuring again replaces it."""
    parts = [result.protocol, result.dataset, *(part.split for part in result.per_split)]
    parts += [result.views, result.sampling.replace(":", ""), result.prompt_set, result.fusion]
    parts += ["modulated" if result.modulate else "plain"]
    path = run_dir / "eval" / f"{'--'.join(parts)}.json"
    write_json(path, result.to_json())
    return path


def check_fits(head: TemporalHead, store: Store) -> None:
    """Raise UserError when `head` was trained on features of another encoder than the store's."""
    provenance = store.provenance
    if head.config.dim != provenance.dim:
        raise UserError(
            f"the head takes embeddings of width {head.config.dim} and {store.path.name} holds "
            f"{provenance.dim} ({provenance.encoder}): extract with the head's encoder"
        )
    if head.origin is not None:
        check_encoder(head.origin, provenance.encoder, provenance.encoder_fingerprint)


def check_encoder(origin: HeadOrigin, encoder: str, fingerprint: str) -> None:
    """Raise UserError when features of `encoder` are not those the head was trained on."""
    if origin.encoder_fingerprint != fingerprint:
        raise UserError(
            f"the head was trained on features of {origin.encoder} (weights "
            f"{origin.encoder_fingerprint[:12]}), these come from {encoder} (weights "
            f"{fingerprint[:12]}): use the head's encoder"
        )


def mean_head(dim: int, logit_scale: float = 100.0) -> TemporalHead:
    """The head without parameters: a video is the mean of its frames, as CLIP would have it."""
    return build_head(HeadConfig(kind="mean", dim=dim), logit_scale=logit_scale)


def evaluate_store(
    store: Store,
    head: TemporalHead | None,
    *,
    protocol: str,
    dataset: str,
    splits: Mapping[str, npt.ArrayLike],
    head_name: str = "mean",
    views: str | None = None,
    modulate: bool = True,
    prompt_set: str | None = None,
    fusion: Fusion = "softmax",
    frames: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    progress: ProgressSink = no_progress,
) -> EvalResult:
    """Accuracy of `head` (None: CLIP's mean of frames) on array rows of `store`.

    `splits`: array rows by split name (`closeset_splits`, `zeroshot_splits`). Every listed row
    counts once per split: evaluated, or failed in extraction. Rows shared by splits are computed
    once. All of the store's views are fused; `views` ("4x3") only checks that they are as expected.
    `prompt_set` defaults to the head's, else to the store's only one. `frames` defaults to what
    the head was trained with, else to all stored ones; fewer than stored are taken at even steps.
    The head runs in `precision`, by default in bfloat16 where that is much faster (wide heads on
    processors that multiply it); means over frames, cosines and scores are float32 in any case.

    Raises UserError when head and store do not fit, the views are others, a close-set head knows
    other classes, modulation has fewer than five classes, or no row can be evaluated; WorkError
    when the store is not complete or a score is not finite.
    """
    store.require_embeddings()
    if not store.complete:
        raise WorkError(f"{store.path} is not complete: finish it with mote-cli extract first")
    if views is not None and views != views_of(store):
        raise UserError(
            f"{store.path.name} has {views_of(store)} views, {views} were asked for: choose or "
            "extract a store with those"
        )
    where = resolve_device(device)
    provenance = store.provenance
    arithmetic = resolve_precision(precision, provenance.dim, where)
    model = head or mean_head(provenance.dim, provenance.logit_scale)
    check_fits(model, store)
    if prompt_set is None:
        prompt_set = _default_prompt_set(store, model)
    text = store.class_text(prompt_set)
    names = None if model.origin is None else model.origin.class_names
    trained = None if names is None else set(names)
    if protocol == "closeset" and not _knows_classes(model, text):
        raise UserError(
            f"{head_name} was trained on {model.training_class_embeddings.shape[0]} classes that "
            f"are not the {len(text.names)} of {dataset}: evaluate it with --zeroshot {dataset}"
        )
    modulate = modulate and model.config.modulates
    if modulate:
        require_neighbours(
            len(text.names),
            model.training_class_embeddings.shape[0],
            model.config.modulation_neighbours,
        )

    stored = store.schema.frames
    wanted = frames or (model.origin.frames if model.origin is not None else stored)
    if wanted > stored:
        log.warning("%d frames asked for, %d are stored: using those", wanted, stored)
    used = min(wanted, stored)
    chosen = segment_positions(stored, used) if used < stored else None

    by_split = {name: np.unique(np.asarray(rows, np.int64)) for name, rows in splits.items()}
    listed = np.unique(np.concatenate([*by_split.values(), np.zeros(0, np.int64)]))
    place = np.full(len(listed), -1, np.int64)  # -1: failed in extraction
    positions = store.positions(listed) if len(listed) else listed
    usable = np.flatnonzero(store.status[positions] == STATUS_OK)
    class_embeddings = torch.from_numpy(text.embeddings).to(where)
    model = model.to(where).eval()
    step = max(1, BATCH_FRAMES // (store.schema.views * used))
    for start in range(0, len(usable), step):
        part = usable[start : start + step]
        features = torch.from_numpy(store.features(listed[part], chosen)).float()
        labels = torch.from_numpy(store.labels[positions[part]].astype(np.int64)).to(where)
        with torch.no_grad():
            with autocast(arithmetic, where):
                embeddings = view_features(model, features, class_embeddings, modulate)
            scores = fused(embeddings, class_embeddings, fusion)
        finite = scores.isfinite().all(1).cpu().numpy()
        if not finite.all():
            key = store.keys[int(positions[part[~finite][0]])]
            raise WorkError(f"scores of sample {key} are not finite: check head and features")
        place[part] = ranks(scores, labels).cpu().numpy()
        progress(start + len(part), len(usable))

    top5_counts = len(text.names) >= TOP_K
    results = [
        _split_result(name, place[np.searchsorted(listed, rows)], top5_counts)
        for name, rows in by_split.items()
    ]
    if not results:
        raise UserError(f"no split of {store.path.name} was chosen: name one with --split")
    top1 = [result.top1 for result in results]
    top5 = [result.top5 for result in results if result.top5 is not None]
    return EvalResult(
        protocol=protocol,
        dataset=dataset,
        head=head_name,
        n_listed=len(listed),
        n_evaluated=len(usable),
        n_failed=len(listed) - len(usable),
        top1=float(np.mean(top1)),
        top5=float(np.mean(top5)) if top5 else None,
        views=views_of(store),
        sampling=provenance.sampling,
        frames=used,
        prompt_set=prompt_set,
        encoder=provenance.encoder,
        encoder_fingerprint=provenance.encoder_fingerprint,
        per_split=tuple(results),
        mean=float(np.mean(top1)),
        std=float(np.std(top1)),
        mean_top5=float(np.mean(top5)) if top5 else None,
        std_top5=float(np.std(top5)) if top5 else None,
        kind=model.config.kind,
        modulate=modulate,
        fusion=fusion,
        n_classes=len(text.names),
        n_classes_trained=None if trained is None else len(trained & set(text.names)),
        head_fingerprint=head_fingerprint(model),
        list_hash=_hash(store.keys[position] for position in positions.tolist()),
        class_names_hash=_hash(text.names),
        prompts_hash=text.sentences_hash,
        dataset_fingerprint=provenance.dataset_fingerprint,
        preprocessing=dict(provenance.preprocessing),
        encoder_precision=provenance.precision,
        decoder=provenance.decoder,
        device=where.type,
        precision=arithmetic,
    )


def _knows_classes(head: TemporalHead, text: ClassText) -> bool:
    """Whether the tested classes are those the head was trained on, in whatever order.

    Told by their names; by their embeddings for a head that has only those.
    """
    if head.origin is None:
        return True
    if head.origin.class_names is not None:
        return set(head.origin.class_names) == set(text.names)
    trained = head.training_class_embeddings.cpu()
    if trained.shape != text.embeddings.shape:
        return False
    tested = functional.normalize(torch.from_numpy(text.embeddings), dim=-1)
    best, place = class_cosines(tested, trained).max(1)
    return bool((best >= SAME_CLASS).all()) and len(set(place.tolist())) == len(place)


def _split_result(name: str, place: npt.NDArray[np.int64], top5_counts: bool) -> SplitResult:
    """Counts and accuracy of one split from the places of its true classes (-1: failed)."""
    evaluated = place[place >= 0]
    if len(evaluated) == 0:
        raise UserError(
            f"split {name} lists {len(place)} samples and none of them was extracted: "
            "choose another split, or see the reasons with mote-cli inspect"
        )
    return SplitResult(
        split=name,
        n_listed=len(place),
        n_evaluated=len(evaluated),
        n_failed=len(place) - len(evaluated),
        top1=100.0 * float(np.mean(evaluated < 1)),
        top5=100.0 * float(np.mean(evaluated < TOP_K)) if top5_counts else None,
    )


def _default_prompt_set(store: Store, head: TemporalHead) -> str:
    if head.origin is not None:
        return head.origin.prompt_set
    known = store.prompt_sets
    if len(known) != 1:
        raise UserError(
            f"{store.path.name} has class texts for {', '.join(known) or 'no prompt set'}: "
            "name one prompt set"
        )
    return known[0]


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
