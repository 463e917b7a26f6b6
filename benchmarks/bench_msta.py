"""What does a training step of MSTA cost from kept tokens beside one from pixels?

ViT-B/16 with random weights, 8 frames, adapters in blocks 8 to 12, 51 classes. Three pairs, each of
a step from the tokens of block 7 against its baseline, the same step from pixels: the arithmetic of
the step alone in float32, the same in the precision that training takes, and the step as trained,
by `finetune` from packed videos of Kinetics' size (decoded and augmented) or from the store that
`extract` makes of them, with the workers that `finetune` takes. Memory is that of steps of a whole
batch of 32 clips with the recipe's recomputation. Each kind runs in a process of its own, which
says its seconds and its peak of memory; the kinds take turns.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

from featstore.files.machine import peak_rss_mb, return_large_blocks
from heads import build_head
from heads.end_to_end.models.adapter_model import AdapterModel, adapter_head_config, guided_model
from heads.end_to_end.models.pixel_model import tower_precision
from heads.recipes import load_recipe
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import load_encoder
from pipeline.prompts import as_prompt_set

CLASSES, BATCH, FRAMES = 51, 32, 8
MAX_STEP, MAX_MB = 0.45, 4000
NAMES = [f"action {number}" for number in range(CLASSES)]
ROOT = common.WORK / "msta-root"
CPU = torch.device("cpu")


def encoder_folder(quick: bool) -> Path:
    return common.tiny_clip_folder() if quick else common.vit_b16_folder()


def model_of(quick: bool, checkpointing: bool, precision: str) -> AdapterModel:
    encoder = load_encoder(str(encoder_folder(quick)), "fp32")
    recipe = load_recipe("msta-few-shot")
    layers = {"first": 1, "last": 1} if quick else {}
    wanted = recipe.head_config(encoder.dim, **layers)
    training = recipe.finetune_config()
    config = adapter_head_config(wanted, training, encoder)
    classes = torch.zeros(CLASSES, encoder.dim)
    head = build_head(config, classes, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(encoder.logit_scale).log()
    named = NAMES, as_prompt_set("video")
    if precision == "auto":
        precision = tower_precision(replace(training, precision="auto"), encoder.dim, CPU)
    joined: dict[str, Any] = {"checkpointing": checkpointing, "precision": precision}
    model = guided_model(encoder, head, scale, *named, **joined).model
    model.train()
    return model


def steps_alone(what: str, precision: str, batch: int, quick: bool, steps: int) -> list[float]:
    """Seconds of steps on clips in memory: from "pixels" or "tokens", or of "memory"."""
    model = model_of(quick, what == "memory", precision)
    if what == "memory":
        batch = 2 * batch if quick else BATCH
    frames = torch.randn(batch, FRAMES, 3, *model.towers.image_size)
    given = model.towers.tokens_before(frames) if what == "tokens" else frames
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


def mote(*words: object) -> None:
    """Run a command of `mote-cli` in the benchmark's workspace."""
    line = [sys.executable, "-m", "cli.main", *map(str, words), "--root", str(ROOT)]
    subprocess.run(line, check=True, capture_output=True, cwd=Path(__file__).parent.parent)


def prepare(batch: int, quick: bool, steps: int) -> None:
    """Pack videos of all classes, and keep the tokens of their frames; not for --quick."""
    if quick:
        return
    common.fresh(ROOT)
    videos = -(-max(steps * batch, CLASSES) // batch) * batch
    folder = common.class_folders(
        common.WORK / "msta-videos", common.kinetics_clips(24), videos, CLASSES
    )
    mote("pack", "--dataset", "bench", "--videos", folder)
    tier = ("--sampling", f"uniform:{FRAMES}", "--tier", "tokens:6")
    mote("extract", "--dataset", "bench", "--encoder", encoder_folder(quick), *tier)


def steps_trained(what: str, batch: int, quick: bool) -> tuple[float, float]:
    """(Seconds of a step, MB) of `finetune`'s second epoch, with recipe `msta`."""
    begin = ("--dataset", "bench", "--encoder", encoder_folder(quick), "--method", "msta")
    shape = ("--frames", FRAMES, "--batch-size", batch, "--epochs", 2, "--warmup-epochs", 1)
    kept = ("--tokens", "--no-augment") if what == "tokens" else ()
    mote("finetune", *begin, *shape, "--name", what, *kept)
    run = ROOT / "heads" / what
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    listed = json.loads((run / "config.json").read_text())["data"]["n_listed"]
    shutil.rmtree(run)  # for the next repetition
    return record["seconds"] / -(-listed // batch), record["peak_rss_mb"]


def one(kind: str, batch: int, quick: bool, steps: int) -> dict[str, float]:
    """What one kind of step takes."""
    precision, what = kind.split("-")
    if precision == "trained":
        seconds, mb = steps_trained(what, batch, quick)
    else:
        return_large_blocks()  # as `finetune` does
        seconds = common.middle(steps_alone(what, precision, batch, quick, steps))
        mb = peak_rss_mb()
    return {"seconds": seconds, "mb": mb}


PAIRS = {
    "fp32": "arithmetic of a step alone, fp32",
    "auto": "arithmetic of a step alone, bf16 where training takes it",
    "trained": "a step of `finetune`, with decoding or reading",
}


def main() -> None:
    if sys.argv[1:2] == ["--of"]:
        kind, (batch, quick, steps) = sys.argv[2], map(int, sys.argv[3:6])
        print(json.dumps(one(kind, batch, bool(quick), steps)))
        return
    chosen = common.options(__doc__, steps=3, batch=4, repetitions=3)
    if chosen.quick:
        chosen.steps, chosen.batch, chosen.repetitions = 1, 2, 1
    where, sizes = common.machine(), (chosen.batch, chosen.quick, chosen.steps)
    prepare(chosen.batch, chosen.quick, chosen.steps)
    # Nothing lies below the only block of the tiny tower of --quick, so no store can keep it.
    pairs = [pair for pair in PAIRS if not (chosen.quick and pair == "trained")]
    runs = [
        {f"{pair}-{what}": common.own_process(f"{pair}-{what}", *sizes)
         for pair in pairs for what in ("pixels", "tokens")}
        for _ in range(chosen.repetitions)
    ]  # fmt: skip
    rows = []
    for pair in pairs:
        both = [
            (run[f"{pair}-tokens"]["seconds"], run[f"{pair}-pixels"]["seconds"]) for run in runs
        ]
        tokens, pixels = (common.middle(list(values)) for values in zip(*both, strict=True))
        ratio = common.middle([a / b for a, b in both])
        claim = f"MSTA from kept tokens, batch {chosen.batch}: {PAIRS[pair]}"
        rows.append(
            common.Row(claim, f"{tokens:.2f} s", f"{pixels:.2f} s", ratio, f"<= {MAX_STEP}")
        )
    memory = common.own_process("auto-memory", chosen.batch, chosen.quick, 1)["mb"]
    claim = f"MSTA, peak memory of training, batch {BATCH}, {CLASSES} classes"
    rows.append(common.Row(claim, f"{memory:.0f} MB", f"{MAX_MB} MB", memory / MAX_MB, "<= 1"))
    print(where["name"])
    common.table(
        ["measure", "value", "baseline", "ratio", "limit"],
        [[row.claim, row.measured, row.baseline, row.ratio, row.limit] for row in rows],
    )
    common.save("msta", where, rows, {"runs": runs, "memory_mb": memory})


if __name__ == "__main__":
    main()
