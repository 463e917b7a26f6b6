"""What does it cost to train the text tower too, and what do short texts and chunks save?

ViT-B/16 with random weights; the names of 400 classes as texts. The baseline of a training step is
a step of the same image tower and head on fixed class texts. The others are passes of the texts
alone, forward and backward: over all 77 places instead of up to the longest text, and with every
chunk computed twice instead of kept. Each kind runs in a process of its own, which says its seconds
and its peak of memory; the kinds take turns, so that a machine that slows down does so for all.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import common
import torch

from featstore.files.machine import peak_rss_mb, return_large_blocks
from heads import HeadConfig, RoutingDraw, TrainConfig, build_head
from heads.end_to_end import EndToEndModel
from heads.end_to_end.config import BOTH_TOWERS
from heads.end_to_end.models import trained_texts
from heads.end_to_end.models.trained_texts import TrainedTexts
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import Encoder, load_encoder

FRAMES, PROMPTS = 8, "video"
MIN_SHORT, MAX_MEMORY = ">= 3", "<= 0.5"
KINDS = ("fixed", "both", "kept", "whole", "twice")


def of_classes(encoder: Encoder, classes: int) -> TrainedTexts:
    """The texts of so many made-up classes, as long as names of actions are."""
    verbs, things = ("opening", "closing", "throwing"), ("a door", "the old wooden box", "water")
    names = [f"{verbs[n % 3]} {things[n // 3 % 3]} number {n}" for n in range(classes)]
    return TrainedTexts(encoder.model, *encoder.class_tokens(names, PROMPTS))


def training(kind: str, encoder: Encoder, texts: TrainedTexts, batch: int) -> Callable[[], None]:
    """A whole training step, on fixed texts or on texts that train."""
    fixed = texts().detach()
    train = BOTH_TOWERS if kind == "both" else "tower"
    if kind == "fixed":
        texts.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(batch, FRAMES, 3, *encoder.preprocessing.size, generator=generator)
    head = build_head(HeadConfig(dim=encoder.dim), fixed, generator=generator)
    given = texts if kind == "both" else None
    model = EndToEndModel(encoder.image_tower, head, 100.0, train=train, texts=given).train()
    optimizer = build_optimizer(model.head, model.tower_parameters(), TrainConfig())
    labels = torch.arange(batch) % len(fixed)

    def step() -> None:
        draw = RoutingDraw.sample(model.head.config, generator)
        model.training_loss(clips, labels, fixed, draw).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def alone(kind: str, texts: TrainedTexts) -> Callable[[], None]:
    """Forward and backward of the texts."""
    if kind == "whole":
        trained_texts.text_embeddings = lambda model, tokens: model.encode_text(tokens)  # type: ignore
    if kind == "twice":
        texts.keep_within(0)

    def step() -> None:
        texts().square().sum().backward()
        texts.zero_grad(set_to_none=True)

    return step


def run(kind: str, quick: bool, batch: int, classes: int, steps: int) -> dict[str, float]:
    """Seconds (the middle of the steps after the first) and peak MB of one kind."""
    return_large_blocks()  # as `finetune` does
    folder = common.tiny_clip_folder() if quick else common.vit_b16_folder()
    encoder = load_encoder(str(folder), "fp32")
    texts = of_classes(encoder, classes)
    trains = kind in ("fixed", "both")
    step = training(kind, encoder, texts, batch) if trains else alone(kind, texts)
    before, times = peak_rss_mb(), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    seconds = common.middle(times[1:])
    return {"seconds": seconds, "mb": peak_rss_mb(), "grown_mb": peak_rss_mb() - before}


def main() -> None:
    if sys.argv[1:2] == ["--of"]:
        quick, batch, classes, steps = map(int, sys.argv[3:7])
        print(json.dumps(run(sys.argv[2], bool(quick), batch, classes, steps)))
        return
    chosen = common.options(__doc__, steps=3, batch=4, classes=400, repetitions=3)
    if chosen.quick:
        chosen.steps, chosen.batch, chosen.classes, chosen.repetitions = 1, 2, 40, 1
    where = common.machine()
    sizes = int(chosen.quick), chosen.batch, chosen.classes, chosen.steps
    runs = [
        {kind: common.own_process(kind, *sizes) for kind in KINDS}
        for _ in range(chosen.repetitions)
    ]

    asked: list[common.Asked] = [
        ("training step, texts that train against fixed", "both", "fixed", "seconds", "s", "none"),
        ("peak memory of training, against fixed", "both", "fixed", "mb", "MB", "none"),
        ("texts, 77 places against the longest", "whole", "kept", "seconds", "s", MIN_SHORT),
        ("texts, computed twice against kept", "twice", "kept", "seconds", "s", "none"),
        ("memory of texts, twice against kept", "twice", "kept", "grown_mb", "MB", MAX_MEMORY),
    ]
    common.compare_kinds(
        "texts",
        where,
        f"both towers, {{}}, {chosen.classes} classes, batch {chosen.batch}",
        runs,
        asked,
    )


if __name__ == "__main__":
    main()
