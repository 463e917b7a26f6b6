"""What does training DiST cost beside tuning the whole tower, and what is its fast path worth?

ViT-B/16 with random weights, 8 + 16 frames. The baseline of a training step is a step of the same
tower with MoTE's head on the slow frames, in float32; that of a forward pass is DiST in float32.
Each kind of step runs in a process of its own, which says its seconds and its peak of memory. The
two kinds take turns, so that a machine that slows down does so for both.
"""

from __future__ import annotations

import json
import sys
import time

import common
import torch

from featstore.files.machine import peak_rss_mb, return_large_blocks
from heads import HeadConfig, RoutingDraw, TrainConfig, build_head
from heads.end_to_end import EndToEndModel
from heads.end_to_end.models.pixel_model import PixelHeadModel, pixel_head_config, tower_precision
from heads.methods.dist import DistModel
from heads.methods.dist.config import DistConfig
from heads.recipes import load_recipe
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import Encoder, load_encoder

ALPHA, DENSE, CLASSES = 2, 16, 8
MAX_TIME, MAX_MEMORY, MIN_FORWARD = 0.60, 0.45, 1.8


def loaded(precision: str, quick: bool) -> Encoder:
    folder = common.tiny_clip_folder() if quick else common.vit_b16_folder()
    return load_encoder(str(folder), precision)


def data(encoder: Encoder, batch: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [batch,frames,3,s,s] and class embeddings [CLASSES,D], random."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(batch, frames, 3, *encoder.preprocessing.size, generator=generator)
    return clips, torch.randn(CLASSES, encoder.dim, generator=generator)


def dist(encoder: Encoder) -> DistModel:
    config = DistConfig(dim=encoder.dim, dense_frames=DENSE, alpha=ALPHA)
    model = DistModel(encoder.image_tower, config, torch.tensor(encoder.logit_scale).log())
    model.branch.reset_parameters(torch.Generator().manual_seed(0))
    return model


def tower_step(batch: int, quick: bool, steps: int) -> list[float]:
    """Seconds of steps that train the whole tower on the slow frames."""
    encoder = loaded("fp32", quick)
    clips, classes = data(encoder, batch, DENSE // ALPHA)
    head = build_head(HeadConfig(dim=encoder.dim), classes, generator=torch.Generator())
    model = EndToEndModel(encoder.image_tower, head, encoder.logit_scale).train()
    optimizer = build_optimizer(model.head, model.tower_parameters(), TrainConfig())
    draws, labels = torch.Generator().manual_seed(1), torch.arange(batch) % CLASSES

    def step() -> None:
        draw = RoutingDraw.sample(model.head.config, draws)
        model.training_loss(clips, labels, classes, draw).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, steps)


def dist_step(batch: int, quick: bool, steps: int) -> list[float]:
    """Seconds of steps that train DiST as `finetune` does, its tower in the fast precision."""
    encoder = loaded("fp32", quick)
    training = load_recipe("dist-k400-vit-b16").finetune_config()
    config = pixel_head_config(DistConfig(dim=encoder.dim), training, encoder.image_tower)
    clips, classes = data(encoder, batch, DENSE)
    head = build_head(config, classes, generator=torch.Generator().manual_seed(0))
    precision = tower_precision(training, encoder.dim, torch.device("cpu"))
    parts = encoder.image_tower, head, torch.tensor(encoder.logit_scale).log()
    model = PixelHeadModel(*parts, precision=precision).train()
    optimizer = build_optimizer(model.head, model.tower_parameters(), training)
    draws, labels = torch.Generator().manual_seed(1), torch.arange(batch) % CLASSES

    def step() -> None:
        draw = head.draw(draws)
        weights = model.weights_of(training)
        model.training_loss(clips, labels, classes, draw, **weights).total.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return timed(step, steps)


def forward(precision: str, batch: int, quick: bool, steps: int) -> list[float]:
    encoder = loaded(precision, quick)
    model = dist(encoder).eval()
    clips, classes = data(encoder, batch, DENSE)

    def step() -> None:
        with torch.no_grad():
            model(clips, classes)

    return timed(step, steps)


def timed(step: object, steps: int) -> list[float]:
    assert callable(step)
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times[1:]  # the first one sets things up


KINDS = {
    "tower": tower_step,
    "dist": dist_step,
    "fp32": lambda *sizes: forward("fp32", *sizes),
    "auto": lambda *sizes: forward("auto", *sizes),
}


def main() -> None:
    if sys.argv[1:2] == ["--of"]:
        kind, (batch, quick, steps) = sys.argv[2], map(int, sys.argv[3:6])
        if kind in ("tower", "dist"):
            return_large_blocks()  # as `finetune` does
        seconds = common.middle(KINDS[kind](batch, bool(quick), steps))
        print(json.dumps({"seconds": seconds, "mb": peak_rss_mb()}))
        return
    chosen = common.options(__doc__, steps=3, batch=4, repetitions=3)
    if chosen.quick:
        chosen.steps, chosen.batch, chosen.repetitions = 1, 2, 1
    where = common.machine()
    sizes = chosen.batch, chosen.quick, chosen.steps
    runs = [
        {kind: common.own_process(kind, *sizes) for kind in KINDS}
        for _ in range(chosen.repetitions)
    ]

    asked: list[common.Asked] = [
        ("training step", "dist", "tower", "seconds", "s", f"<= {MAX_TIME}"),
        ("peak memory of training", "dist", "tower", "mb", "MB", f"<= {MAX_MEMORY}"),
        ("forward, fp32 against auto", "fp32", "auto", "seconds", "s", f">= {MIN_FORWARD}"),
    ]
    common.compare_kinds("dist", where, f"DiST, {{}}, batch {chosen.batch}", runs, asked)


if __name__ == "__main__":
    main()
