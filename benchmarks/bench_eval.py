"""How long does a protocol take from a store, and what does one pass save?

10,000 videos x 3 views x 8 frames at a ViT-B/16's width, MoTE's head with 4 layers: every fusion
(mean of softmax, of cosines, of features) on the full list and on ten half-class draws. The
baseline loops over the same protocol: per list or draw, per batch of videos and per view one
forward pass of the same head in the same arithmetic, with the same functions for scores; the three
fusions share its passes, and merged experts are remembered, which a plain script would not do.
Both must give the same accuracies. Times are CPU seconds over all threads, wall clock beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, get_args

import common
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featstore import Store
from heads import (
    HeadConfig,
    Scoring,
    TemporalHead,
    TestSet,
    build_head,
    build_test_sets,
    evaluate_many,
)
from heads.arithmetic import autocast, resolve_precision
from heads.evaluation.protocols.choose import PROTOCOLS
from heads.methods.text_classifier import class_cosines
from heads.scoring.scores import Fusion, fuse_views, ranks

DIM, LAYERS, EXPERTS, FRAMES, VIEWS, CLASSES, TRAINED = 512, 4, 4, 8, 3, 101, 400
VIDEOS_PER_BATCH = 64
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
CPU = torch.device("cpu")
LIMIT = 5.0

Accuracies = dict[tuple[str, str], float]


def head_for(text: Tensor) -> TemporalHead:
    """A head trained on 400 other classes; its own contribution is small, as drawn."""
    generator = torch.Generator().manual_seed(1)
    trained = torch.randn(TRAINED, DIM, generator=generator) / 8 + text[torch.arange(TRAINED) % 101]
    config = HeadConfig(dim=DIM, layers=LAYERS, experts=EXPERTS)
    return build_head(config, functional.normalize(trained, dim=-1), generator=generator)


def tests_of_protocol(store: Store) -> list[TestSet]:
    """All videos, and the ten draws."""
    everything = TestSet("all", store.rows)
    return [everything, *build_test_sets(PROTOCOLS["halfclass"], store)]


def one_pass(store: Store, head: TemporalHead, tests: list[TestSet], precision: Any) -> Accuracies:
    """Ours."""
    scorings = [Scoring.of_head(head.config, fusion=fusion) for fusion in FUSIONS]
    measured = evaluate_many(
        store,
        head,
        scorings,
        protocol="zeroshot",
        dataset="random",
        tests=tests,
        device="cpu",
        precision=precision,
    )
    return {(r.fusion, part.split): part.top1 for r in measured for part in r.per_split}


@torch.no_grad()
def looped(store: Store, head: TemporalHead, tests: list[TestSet], precision: str) -> Accuracies:
    """The baseline."""
    text = torch.from_numpy(store.class_text("name").embeddings)
    found = {}
    for test in tests:
        classes = np.arange(CLASSES) if test.classes is None else test.classes
        labels = store.labels[store.positions(test.rows)]
        local = torch.from_numpy(np.searchsorted(classes, labels))
        places: dict[str, list[Tensor]] = {fusion: [] for fusion in FUSIONS}
        for start in range(0, len(test.rows), VIDEOS_PER_BATCH):
            part = slice(start, start + VIDEOS_PER_BATCH)
            features = torch.from_numpy(store.features(test.rows[part])).float()
            with autocast(precision, CPU):
                views = [head.aggregate(view, text).mean(1) for view in features.unbind(1)]
            video = torch.stack(views, 1)
            candidates = text[torch.from_numpy(classes)]
            cosines = class_cosines(functional.normalize(video, dim=-1), candidates)
            mean = functional.normalize(video.double().mean(1), dim=-1)
            scores = {
                "softmax": fuse_views(cosines),
                "cosine": fuse_views(cosines, "cosine"),
                "features": class_cosines(mean, candidates),
            }
            for fusion in FUSIONS:
                places[fusion].append(ranks(scores[fusion], local[part]))
        for fusion in FUSIONS:
            hits = torch.cat(places[fusion]) < 1
            found[fusion, test.name] = 100 * float(hits.double().mean())
    return found


def timed(work: Callable[[], Accuracies]) -> tuple[Accuracies, float, float]:
    """What came out, CPU seconds, wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    out = work()
    return out, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Measure both in turn."""
    chosen = common.options(__doc__, videos=9984, repetitions=3)
    if chosen.quick:
        chosen.videos, chosen.repetitions = 768, 1
    where = common.machine()
    tars = chosen.videos // common.TAR_ROWS
    store = common.random_store(
        "eval", tars, classes=CLASSES, dim=DIM, frames=FRAMES, views=VIEWS, split="test1"
    )
    head = head_for(torch.from_numpy(store.class_text("name").embeddings))
    tests = tests_of_protocol(store)
    precision = resolve_precision("auto", DIM, CPU)
    listed = sum(len(test.rows) for test in tests)
    print(
        f"{where['name']}; {torch.get_num_threads()} torch threads, {precision}; "
        f"load {where['load_average_before']}; {len(store)} videos, {listed} over all lists"
    )
    one_pass(store, head, tests[:1], precision)  # files in the page cache, experts merged
    shown: list[list[object]] = []
    ours, loop = [], []
    worst = 0.0
    for number in range(1, chosen.repetitions + 1):
        got, *seconds = timed(lambda: one_pass(store, head, tests, precision))
        expected, *baseline = timed(lambda: looped(store, head, tests, precision))
        worst = max(worst, *(abs(got[key] - expected[key]) for key in expected))
        ours.append(seconds)
        loop.append(baseline)
        shown.append([number, *seconds, *baseline, baseline[0] / seconds[0]])
    medians = [common.middle([s[kind] for s in side]) for side in (ours, loop) for kind in (0, 1)]
    ratio = common.middle([b[0] / a[0] for a, b in zip(ours, loop, strict=True)])
    shown.append(["median", *medians, ratio])
    common.table(["", "one pass CPU s", "wall s", "loop CPU s", "wall s", "ratio CPU"], shown)
    # Batches of other sizes round otherwise, which may exchange two classes that nearly tie.
    print(f"largest difference between the accuracies: {worst:.3f} points")
    if worst > 0.2:
        raise SystemExit("the baseline computes something else: nothing to compare")
    claim = (
        f"`eval` from a store: {len(store)} videos x {VIEWS} views x {FRAMES} frames, {precision}, "
        "three fusions, full list and ten half-class draws, against a forward per view batch and "
        "list"
    )
    row = common.Row(
        claim,
        f"{medians[0]:.1f} s CPU ({medians[1]:.1f} s)",
        f"{medians[2]:.1f} s CPU ({medians[3]:.1f} s)",
        ratio,
        f">= {LIMIT}",
    )
    details = {"one_pass": ours, "loop": loop, "largest_difference": worst, "videos": len(store)}
    common.save("eval", where, [row], details)


if __name__ == "__main__":
    main()
