"""What does TACO's teacher cost beside plain fine-tuning of both towers?

ViT-B/16 with random weights, 8 frames, 51 classes with one sentence each. A step is forward, loss,
backward and optimiser; the baseline is the same with the cross-entropy of the mean of frames alone.
Each kind of step runs in a process of its own, which says its seconds and its peak of memory; kinds
take turns.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn import functional

from featstore.files.machine import peak_rss_mb, return_large_blocks
from heads import build_head
from heads.arithmetic import autocast, resolve_training_precision
from heads.end_to_end.models.end_to_end_model import EndToEndModel
from heads.end_to_end.models.taught_model import TaughtModel
from heads.end_to_end.models.trained_texts import TrainedTexts
from heads.methods.taco.head import TacoHead
from heads.methods.text_classifier import class_cosines
from heads.recipes import load_recipe
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import load_encoder
from pipeline.prompts import as_prompt_set

CLASSES, FRAMES = 51, 8
MAX_STEP, MAX_MB = 1.45, 1.25
NAMES = [f"action {number}" for number in range(CLASSES)]


class Plain(EndToEndModel):
    """Both towers, tuned by the cross-entropy of the mean of frames: what a baseline must do."""

    def training_loss(self, frames: Tensor, labels: Tensor, *given: Any, **weights: Any) -> Tensor:
        """Return the loss of a batch."""
        video = functional.normalize(self.encode(frames).float().mean(1), dim=-1)
        cosines = class_cosines(video, self.class_embeddings(given[0]))
        return functional.cross_entropy(self.logit_scale.exp() * cosines, labels)


def model_of(kind: str, quick: bool) -> EndToEndModel:
    folder = common.tiny_clip_folder() if quick else common.vit_b16_folder()
    encoder = load_encoder(str(folder), "fp32")
    recipe = load_recipe("taco-k400-vit-b16")
    classes = torch.zeros(CLASSES, encoder.dim)
    wanted = recipe.head_config(encoder.dim, projection=kind == "taco")
    head = build_head(wanted, classes, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(encoder.logit_scale).log()
    texts = TrainedTexts(encoder.model, *encoder.class_tokens(NAMES, as_prompt_set("taco")))
    if kind == "taco":
        assert isinstance(head, TacoHead)
        return TaughtModel(encoder.model, head, scale, texts=texts)
    return Plain(encoder.image_tower, head, scale, train="both-towers", texts=texts)


def seconds_of(kind: str, batch: int, quick: bool, steps: int) -> list[float]:
    model = model_of(kind, quick)
    model.train()
    config = load_recipe("taco-k400-vit-b16").finetune_config()
    optimizer = build_optimizer(model.head, model.tower_parameters(), config)
    size = 32 if quick else 224
    frames = torch.randn(batch, FRAMES, 3, size, size)
    labels, classes = torch.arange(batch) % CLASSES, model.head.training_class_embeddings
    precision = resolve_training_precision("auto", frames.device)
    draws, times = torch.Generator().manual_seed(0), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        with autocast(precision, frames.device):
            loss = model.training_loss(frames, labels, classes, model.head.draw(draws))
        total: Tensor = getattr(loss, "total", loss)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return times[1:]  # the first one sets things up


def main() -> None:
    if sys.argv[1:2] == ["--of"]:
        kind, (batch, quick, steps) = sys.argv[2], map(int, sys.argv[3:6])
        return_large_blocks()  # as `finetune` does
        seconds = common.middle(seconds_of(kind, batch, bool(quick), steps))
        print(json.dumps({"seconds": seconds, "mb": peak_rss_mb()}))
        return
    chosen = common.options(__doc__, steps=3, batch=4, repetitions=3)
    if chosen.quick:
        chosen.steps, chosen.batch, chosen.repetitions = 1, 2, 1
    where, sizes = common.machine(), (chosen.batch, chosen.quick, chosen.steps)
    runs = [
        {kind: common.own_process(kind, *sizes) for kind in ("plain", "taco")}
        for _ in range(chosen.repetitions)
    ]
    asked = [
        ("training step", "taco", "plain", "seconds", "s", f"<= {MAX_STEP}"),
        ("peak memory of training", "taco", "plain", "mb", "MB", f"<= {MAX_MB}"),
    ]
    whole = f"TACO, {{}}, batch {chosen.batch}, against both towers alone"
    common.compare_kinds("taco", where, whole, runs, asked)


if __name__ == "__main__":
    main()
