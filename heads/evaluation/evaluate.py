"""Evaluates a head, or CLIP's mean of frames, on a store, and records what was measured.

N = videos, V = views, F = stored frames, T = frames used, D = embedding width, C = classes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.commands import command
from featstore.errors import UserError, counted, counted_of
from featstore.format.class_texts import ClassText
from featstore.format.schema import STATUS_OK
from featstore.progress import ProgressSink, no_progress
from featstore.reading.store import Store
from featstore.segments import segment_positions
from featstore.spelling import comparable
from heads.arithmetic import Precision, resolve_device, resolve_precision
from heads.compatibility import knows_classes, mean_head_of, require_fits
from heads.evaluation.details import SplitDetail
from heads.evaluation.measure import ClipFeatures, Measurement, check_candidates
from heads.evaluation.protocols.choose import Protocol, count_notes, protocol_named, views_of
from heads.evaluation.protocols.protocol import TestSet
from heads.evaluation.results import EvalResult, RunFacts, SplitResult, taken_from
from heads.evaluation.several_classes import MEASURE, LabelsDetail
from heads.files.head_file import head_fingerprint
from heads.methods.head import Head
from heads.methods.registry import MEAN_OF_FRAMES
from heads.methods.settings import MethodConfig
from heads.scoring import TOP_K
from heads.scoring.average_precision import mean_average_precision
from heads.scoring.scores import Fusion, Scoring

log = logging.getLogger(__name__)

NAMED: Final = 3  # how many videos a note names


def evaluate_store(
    store: Store,
    head: Head | None,
    *,
    protocol: Protocol | str,
    dataset: str,
    tests: Sequence[TestSet],
    fusion: Fusion | None = None,
    modulate: bool = True,
    modulation_neighbours: int | None = None,
    modulation_temperature: float | None = None,
    ensemble: float | None = None,
    projection: bool | None = None,
    **options: Any,
) -> EvalResult:
    """Measure the accuracy of `head` (None: CLIP's mean of frames) on test sets of `store`.

    `protocol` is a protocol of `heads.evaluation.protocols.choose` or its name, and `tests` are its
    test sets (`build_test_sets`). `Scoring.of_head` explains the score settings; `fusion` defaults
    to the protocol's, `projection` to `usual_projection`. `options` are passed on to
    `evaluate_many`, which also lists the errors.
    """
    model = head or mean_head_of(store)
    named = protocol_named(protocol) if isinstance(protocol, str) else protocol
    scoring = Scoring.of_head(
        model.config,
        fusion=fusion or usual_fusion(store, named),
        modulate=modulate,
        modulation_neighbours=modulation_neighbours,
        modulation_temperature=modulation_temperature,
        ensemble=ensemble,
        projection=usual_projection(model.config, named) if projection is None else projection,
    )
    options = {"confident": True, **options}
    (result,) = evaluate_many(
        store, model, [scoring], protocol=named, dataset=dataset, tests=tests, **options
    )
    return result


def usual_fusion(store: Store, protocol: Protocol) -> Fusion:
    """Return how views are fused if nothing else is asked for: the mean of cosines where a video
    may show several classes, for a softmax would set them against each other."""
    return "cosine" if store.multi_label else protocol.fusion


def usual_projection(config: MethodConfig, protocol: Protocol) -> bool | None:
    """Return whether a head's projection is used if nothing else is asked for; None without one.

    It is used where all tested classes are those of the training. For other classes the encoder is
    tested as a CLIP, as TACO (Zhu et al., NeurIPS 2026) leaves its projection out.
    """
    return protocol.kind in ("closeset", "fewshot") if config.projects else None


def evaluate_many(
    store: Store,
    head: Head,
    scorings: Sequence[Scoring],
    *,
    protocol: Protocol | str,
    dataset: str,
    tests: Sequence[TestSet],
    head_name: str = MEAN_OF_FRAMES,
    views: str | None = None,
    prompt_set: str | None = None,
    frames: int | None = None,
    clip_store: Store | None = None,
    facts: RunFacts | None = None,
    confident: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    progress: ProgressSink = no_progress,
) -> list[EvalResult]:
    """Return one result per entry of `scorings`, all from one pass of the head over the store.

    Every listed row counts once per test set, as evaluated or as failed in extraction. Rows that
    several test sets share are computed once. All views of the store are fused; `views` ("4x3")
    only checks that the store has them. `prompt_set` defaults to the head's, else to the store's
    only one. `frames` of the video defaults to the number that the head was trained with, else to
    all stored frames; a smaller number is taken at even steps. `clip_store` holds raw CLIP features
    of the same keys and views for CLIP's part of an ensemble (default: `store` itself). `facts` go
    into the result. With `confident` the details of a result hold the five best classes of every
    video and how sure the model is of each, which `save_result` writes down. The head runs in
    `precision`, by default in bfloat16 if that is much faster (wide heads on processors that
    multiply it); means over frames, cosines and scores are always float32.

    In a process group (`torch.distributed`) every process evaluates every world-size-th row, and
    all of them return the same results: no row is repeated, and the counts are as in one process.

    Raises UserError when the head does not fit the store, the store has other views, a close-set
    head knows other classes, the class of a video is no candidate, modulation has fewer classes
    than it compares, or no row can be evaluated. Raises WorkError when a store is not complete or
    a score is not finite.
    """
    named = protocol_named(protocol) if isinstance(protocol, str) else protocol
    if named.kind not in ("closeset", "zeroshot"):
        store.require_one_label(f"protocol {named.name}")
    if not tests:
        raise UserError(f"no split of {store.path.name} was chosen: name one with --split")
    prompt_set, text = require_fits(store, head, prompt_set)
    stored_views = views_of(store)
    if views is not None and views != stored_views:
        raise UserError(
            f"{store.path.name} has {stored_views} views, but {views} were asked for: choose a "
            f"store with {views} views, or extract one"
        )
    if named.kind == "closeset" and not knows_classes(head, text):
        head.require_classes(text.names)  # a head without texts cannot do what follows either
        raise UserError(
            f"{head_name} was trained on {head.training_class_embeddings.shape[0]} classes that "
            f"are not the {len(text.names)} of {dataset}: evaluate it with --zeroshot {dataset}"
        )
    check_candidates(tests, scorings, text, head)
    where = resolve_device(device)
    arithmetic = resolve_precision(precision, head.config.dim, where)
    stored, together = store.schema.frames, store.provenance.clip_frames
    wanted = head.origin.frames if head.origin is not None else stored
    if frames is not None:
        if frames % together:
            raise UserError(
                f"{frames} frames are no whole clips: {store.path.name} has one embedding for "
                f"every {together}; ask for {together} or a multiple of it"
            )
        wanted = frames // together
    if wanted > stored:
        more, held = wanted * together, stored * together
        log.warning("asked for %d frames, but the store has %d: using those", more, held)
    used = min(wanted, stored)
    chosen = segment_positions(stored, used) if used < stored else None
    measured = Measurement(store, tests)
    clip = None
    if clip_store is not None and any(scoring.ensemble is not None for scoring in scorings):
        clip = ClipFeatures(clip_store, store, prompt_set, chosen, where)
        measured.usable = measured.usable[~clip.failed(measured.keys)[measured.usable]]
    measured.run(
        head.to(where).eval(),
        scorings,
        text,
        frames=chosen,
        precision=arithmetic,
        clip=clip,
        confident=confident,
        progress=progress,
    )
    record = _record(store, head, named, measured, text, stored_views, facts or RunFacts())
    record |= {
        "dataset": dataset,
        "head": head_name,
        "frames": used * together,
        "prompt_set": prompt_set,
        "device": where.type,
        "precision": arithmetic,
    }
    return [
        _result(measured, number, scoring, named, record, clip)
        for number, scoring in enumerate(scorings)
    ]


def _record(
    store: Store,
    head: Head,
    protocol: Protocol,
    measured: Measurement,
    text: ClassText,
    views: str,
    facts: RunFacts,
) -> dict[str, Any]:
    """Return the fields of a result that are the same under every setting."""
    provenance = store.provenance
    tested = [tuple(classes.tolist()) for classes in measured.candidates]
    names = {text.names[label] for labels in tested for label in labels}
    origin = head.origin
    known = None if origin is None else origin.class_names
    trained = None if known is None else set(map(comparable, known))
    missing = sum(
        store.reasons[at].startswith("no such file")  # it was missing when the data set was packed
        for at in measured.positions[store.status[measured.positions] != STATUS_OK].tolist()
    )
    listed = dict(
        test.drawn_from or (test.name, len(members))
        for test, members in zip(measured.tests, measured.members, strict=True)
    )
    pixels = pixels_text(provenance.preprocessing, provenance.crops)
    agreeing, notes = count_notes(protocol, listed)
    if protocol.views and views not in protocol.views:
        notes.append(f"{views} views, published with {', '.join(protocol.views)}")
    n_classes = max(len(labels) for labels in tested)
    if protocol.n_classes not in (None, n_classes):
        notes.append(
            f"{counted(n_classes, 'class', 'classes')}, published with {protocol.n_classes}"
        )
    in_splits = [store.split(name) for name in store.split_names]
    outside = np.flatnonzero(~np.isin(store.rows, np.concatenate([measured.listed, *in_splits])))
    if in_splits and len(outside):
        named = ", ".join(store.keys[at] for at in outside[:NAMED].tolist())
        named += ", ..." if len(outside) > NAMED else ""
        notes.append(f"{counted_of(len(outside), len(store), 'video')} in no split: {named}")
    for note in notes:
        log.warning("%s: %s", protocol.name, note)
    templates = facts.prompt_templates or text.templates
    return {
        **taken_from(protocol=protocol, provenance=provenance, facts=facts),
        **pixels,
        "protocol": protocol.kind,
        "protocol_name": protocol.name,
        "n_listed": len(measured.listed),
        "n_found": len(measured.listed) - missing,
        "n_evaluated": len(measured.usable),
        "n_failed": len(measured.listed) - len(measured.usable),
        "views": views,
        "sampler": provenance.sampling.partition(":")[0],
        "prompt_templates": list(templates) if templates else None,
        "kind": head.config.kind,
        "projection": head.config.projects,  # `_result` says whether it is used
        "tower_frames": getattr(head.config, "slow_frames", None),
        "n_classes": n_classes,
        "n_classes_trained": None
        if trained is None
        else sum(comparable(name) in trained for name in names),
        "head_fingerprint": head_fingerprint(head),
        "trained_on": origin.dataset or None if origin is not None else None,
        "training_videos": origin.trained_on or None if origin is not None else None,
        "published_counts": agreeing,
        "notes": notes,
        "list_hash": _hash(measured.keys),
        "class_names_hash": _hash(text.names),
        # Test sets with the same candidates count once.
        "class_list_hash": _hash(
            text.names[label] for labels in dict.fromkeys(tested) for label in labels
        ),
        "class_names_source": facts.class_names_source or f"data set {provenance.dataset}",
        "label_map": facts.label_map or provenance.label_map or None,
        "prompts_hash": text.sentences_hash,
        "class_names_as": "rephrased" if text.rephrased else None,
        "store": store.path.name,
        "encoder_precision": provenance.precision,
        "class_names": text.names,
    }


def _result(
    measured: Measurement,
    number: int,
    scoring: Scoring,
    protocol: Protocol,
    record: Mapping[str, Any],
    clip: ClipFeatures | None,
) -> EvalResult:
    """Return the result under one setting."""
    parts = [_split(measured, number, t) for t in range(len(measured.tests))]
    results = [result for result, _ in parts]
    several = measured.store.multi_label
    found = [result.mean_ap if several else result.top1 for result in results]
    top1 = [value for value in found if value is not None]
    top5 = [result.top5 for result in results if result.top5 is not None]
    notes = list(record["notes"])
    if scoring.fusion != protocol.fusion and not several:
        notes.append(f"views are fused by {scoring.fusion}, published with {protocol.fusion}")
    if scoring.scaled and scoring.fusion == "softmax":
        notes.append("views are fused by the softmax of logits, with the multiplier of cosines")
    mean, mean_top5 = float(np.mean(top1)), float(np.mean(top5)) if top5 else None
    values = {
        **record,
        **taken_from(scoring=scoring),
        "notes": notes,
        "top1": None if several else mean,
        **({"measure": MEASURE, "mean_ap": mean} if several else {}),
        "top5": mean_top5,
        "per_split": tuple(results),
        "mean": mean,
        "std": float(np.std(top1)),
        "mean_top5": mean_top5,
        "std_top5": float(np.std(top5)) if top5 else None,
        "projection": ("off", "on")[scoring.projection] if record["projection"] else None,
        "modulation_neighbours": scoring.modulation_neighbours if scoring.modulate else None,
        "modulation_temperature": scoring.modulation_temperature if scoring.modulate else None,
        "clip_store": clip.store.path.name if clip and scoring.ensemble is not None else None,
        "details": tuple(detail for _, detail in parts),
    }
    return EvalResult(**values)


def _split(
    measured: Measurement, number: int, t: int
) -> tuple[SplitResult, SplitDetail | LabelsDetail]:
    """Return the counts, the accuracy and the predictions of one test set under one setting."""
    name, members, classes = measured.tests[t].name, measured.members[t], measured.candidates[t]
    places = measured.places[number][t]
    done = np.isin(members, measured.usable)
    if not done.any():
        store = measured.store.path
        raise UserError(
            f"split {name} lists {counted(len(places), 'sample')}, but none was extracted: "
            f"choose another split, or see the reasons with `{command('inspect', store)}`"
        )
    best, sure = measured.predicted[number][t][done], measured.confidences
    if measured.shown:
        return _labels_split(measured, number, t, done)
    evaluated = places[done]
    assert (evaluated >= 0).all(), "every usable sample has a place"
    result = SplitResult(
        split=name,
        n_listed=len(places),
        n_evaluated=len(evaluated),
        n_failed=len(places) - len(evaluated),
        top1=100.0 * float(np.mean(evaluated < 1)),
        top5=100.0 * float(np.mean(evaluated < TOP_K)) if len(classes) >= TOP_K else None,
        n_classes=len(classes),
    )
    detail = SplitDetail(
        split=name,
        classes=classes,
        labels=measured.labels[members][done],
        predicted=best[:, 0],
        places=evaluated,
        keys=tuple(measured.listed_keys(members[done])),
        best=best if sure else None,
        confidences=sure[number][t][done] if sure else None,
        failed=tuple(measured.failed(members[~done])),
    )
    return result, detail


def _labels_split(
    measured: Measurement, number: int, t: int, done: npt.NDArray[np.bool_]
) -> tuple[SplitResult, LabelsDetail]:
    """Do the same as `_split` where videos may show several classes; `done` are the evaluated."""
    name, members, classes = measured.tests[t].name, measured.members[t], measured.candidates[t]
    sure = measured.confidences
    detail = LabelsDetail(
        split=name,
        classes=classes,
        keys=tuple(measured.listed_keys(members[done])),
        scores=measured.scores[number][t][done],
        shown=measured.shown[t][done],
        best=measured.predicted[number][t][done] if sure else None,
        confidences=sure[number][t][done] if sure else None,
        failed=tuple(measured.failed(members[~done])),
        failed_shown=measured.shown[t][~done],
    )
    shown = int(detail.shown.any(0).sum())
    if not shown:
        raise UserError(
            f"none of the {len(detail.keys)} videos of split {name} shows a class, so nothing can "
            "be ranked: choose another split"
        )
    result = SplitResult(
        split=name,
        n_listed=len(done),
        n_evaluated=len(detail.keys),
        n_failed=len(done) - len(detail.keys),
        top1=None,
        top5=None,
        n_classes=len(classes),
        mean_ap=mean_average_precision(detail.scores, detail.shown),
        n_classes_shown=shown,
    )
    return result, detail


def pixels_text(preprocessing: Mapping[str, Any], crops: int) -> dict[str, str]:
    """Describe a store's preprocessing in words: the fields `resize` and `crop` of a result.

    The second crop style of heads that look at pixels cuts out before it resizes.
    """
    size = preprocessing.get("size")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    mode = preprocessing.get("resize_mode", "shortest")
    known = isinstance(height, int) and isinstance(width, int)
    small, large = sorted((int(height), int(width))) if known else ("unknown", "unknown")  # type: ignore[arg-type]
    how = {
        "shortest": f"short side to {small}",
        "longest": f"long side to {large}, padded",
        "squash": f"to {height}x{width}",
    }.get(mode, str(mode))
    cut = {1: "centre", 3: "3 along the long side"}.get(crops, f"{crops} crops")
    interpolation = preprocessing.get("interpolation", "unknown interpolation")
    if preprocessing.get("style") == "center-fraction":
        square = "central square of 7/8 of the short side"
        return {"resize": f"{square} to {height}x{width}, {interpolation}", "crop": square}
    return {
        "resize": f"{how}, {interpolation}",
        "crop": f"{height}x{width} {cut}" if known else "unknown",
    }


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
