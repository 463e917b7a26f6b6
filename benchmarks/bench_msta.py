"""What does a training step of MSTA cost from kept tokens beside one from pixels?

ViT-B/16 with random weights, 8 frames, adapters in blocks 8 to 12, 51 classes. The baseline of a
step from the tokens of block 7 is the same step from pixels. Memory is that of steps of a whole
batch of 32 clips with the recipe's recomputation. Each kind of step runs in a process of its own,
which says its seconds and its peak of memory.
"""

from __future__ import annotations

import json
import sys
import time

import common
import torch

from featstore.files.machine import peak_rss_mb, return_large_blocks
from heads import build_head
from heads.end_to_end.models.adapter_model import AdapterModel, adapter_head_config, guided_model
from heads.recipes import load_recipe
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import load_encoder
from pipeline.prompts import as_prompt_set

CLASSES, BATCH = 51, 32
MAX_STEP, MAX_MB = 0.45, 4000
NAMES = [f"action {number}" for number in range(CLASSES)]


def model_of(quick: bool, checkpointing: bool) -> AdapterModel:
    folder = common.tiny_clip_folder() if quick else common.vit_b16_folder()
    encoder = load_encoder(str(folder), "fp32")
    recipe = load_recipe("msta-few-shot")
    layers = {"first": 1, "last": 1} if quick else {}
    wanted = recipe.head_config(encoder.dim, **layers)
    config = adapter_head_config(wanted, recipe.finetune_config(), encoder)
    classes = torch.zeros(CLASSES, encoder.dim)
    head = build_head(config, classes, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(encoder.logit_scale).log()
    named = NAMES, as_prompt_set("video")
    model = guided_model(encoder, head, scale, *named, checkpointing=checkpointing).model
    model.train()
    return model


def seconds_of(kind: str, batch: int, quick: bool, steps: int) -> list[float]:
    model = model_of(quick, checkpointing=kind == "memory")
    if kind == "memory":
        batch = 2 * batch if quick else BATCH
    frames = torch.randn(batch, 8, 3, *model.towers.image_size)
    given = model.towers.tokens_before(frames) if kind == "tokens" else frames
    labels, classes = torch.arange(batch) % CLASSES, model.head.training_class_embeddings
    optimizer = build_optimizer(model.head, [], load_recipe("msta-few-shot").finetune_config())
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss = model.training_loss(given, labels, classes, None).total
        loss.backward()
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
        {kind: common.own_process(kind, *sizes) for kind in ("pixels", "tokens")}
        for _ in range(chosen.repetitions)
    ]
    memory = common.own_process("memory", chosen.batch, chosen.quick, 1)["mb"]
    step = common.middle([run["tokens"]["seconds"] / run["pixels"]["seconds"] for run in runs])
    shown = [common.middle([run[kind]["seconds"] for run in runs]) for kind in ("tokens", "pixels")]
    rows = [
        common.Row(
            f"MSTA, training step from kept tokens, batch {chosen.batch}",
            *(f"{value:.2f} s" for value in shown),
            step,
            f"<= {MAX_STEP}",
        ),
        common.Row(
            f"MSTA, peak memory of training, batch {BATCH}, {CLASSES} classes",
            f"{memory:.0f} MB",
            f"{MAX_MB} MB",
            memory / MAX_MB,
            "<= 1",
        ),
    ]
    print(where["name"])
    common.table(
        ["measure", "value", "baseline", "ratio", "limit"],
        [[row.claim, row.measured, row.baseline, row.ratio, row.limit] for row in rows],
    )
    common.save("msta", where, rows, {"runs": runs, "memory_mb": memory})


if __name__ == "__main__":
    main()
