"""What does end-to-end training cost beside the arithmetic? Steps of `finetune` from packed videos.

The baseline, in the same run and with the same model, precision and batch, is a bare loop: forward,
loss, backward and optimiser on clips that lie in memory as float32. Decoding, augmentation and
records share the two cores with the arithmetic; that is what is measured. A bare loop runs before
and after every measured one, so that a machine that slows down does so for both.

A second part trains for several hundred steps and looks at the process's memory.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from heads import HeadConfig, RoutingDraw, TrainConfig, build_head
from heads.arithmetic import autocast, resolve_device
from heads.end_to_end import EndToEndModel
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.finetune import finetune
from heads.end_to_end.request import FinetuneRequest
from heads.training.ranks import Ranks
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import load_encoder
from pipeline.tars.packing import pack

FRAMES, CLASSES = 4, 8
MAX_RATIO, MAX_WAITING, MAX_GROWTH = 1.15, 0.10, 1.02
MEMORY_STEPS = 500
CONFIG = FinetuneConfig(epochs=1, frames=FRAMES, precision="fp32", evaluate_every=0, seed=0)


def packed(name: str, videos: int, clips: list[Path]) -> Path:
    """A packed data set of `videos` files in class folders; its folder."""
    folder = common.class_folders(common.WORK / f"{name}-videos", clips, videos, CLASSES)
    target = common.fresh(common.WORK / f"{name}-dataset")
    pack(folder, name, target)
    return target


def request(dataset: Path, encoder: Path, **settings: Any) -> FinetuneRequest:
    """One epoch over the data set, as the command would ask for it; `settings` of the recipe."""
    place = common.fresh(common.WORK / "finetune-root")
    return FinetuneRequest(
        dataset_dir=dataset,
        run_dir=place / "heads" / "bench",
        encoder_dir=place / "encoders" / "bench",
        encoders_dir=place / "encoders",
        config=replace(CONFIG, **settings),
        head=lambda dim: HeadConfig(dim=dim),
        encoder=str(encoder),
        prompt_set="name",
    )


def measured(asked: FinetuneRequest) -> tuple[float, float]:
    """(Seconds per step, share of them spent waiting for data) of the last epoch of `finetune`.

    Seconds are the median over steps, as for the bare loop: the mean where steps are too short to
    be told apart. The share is that of the whole epoch.
    """
    said: list[tuple[float, float]] = []

    def look(done: float, total: float, **details: Any) -> None:
        if details["epoch"] == asked.config.epochs:
            said.append((done, time.perf_counter()))

    summary = finetune(asked, Ranks(device=resolve_device("auto")), look)
    record = json.loads((asked.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    steps = -(-summary.n_listed // asked.config.batch_size)
    spans = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(said)]
    step = common.middle(spans) if len(spans) > 1 else record["seconds"] / steps
    return step, record["waiting"]


class BareLoop:
    """Steps on clips in memory, with nothing around them."""

    def __init__(self, encoder: Path, batch_size: int, frames: int, precision: str) -> None:
        self.device = resolve_device("auto")
        self.precision = precision
        loaded = load_encoder(str(encoder), "fp32", self.device.type)
        generator = torch.Generator().manual_seed(0)
        self.classes = torch.nn.functional.normalize(
            torch.randn(CLASSES, loaded.dim, generator=generator), dim=-1
        )
        head = build_head(HeadConfig(dim=loaded.dim), self.classes, generator=generator)
        self.model = EndToEndModel(loaded.image_tower, head, loaded.logit_scale)
        self.model.to(self.device).train()
        config = TrainConfig(batch_size=batch_size, frames=frames)
        self.optimizer = build_optimizer(self.model.head, self.model.tower_parameters(), config)
        shape = (batch_size, frames, 3, *loaded.preprocessing.size)
        self.classes = self.classes.to(self.device)
        self.frames = torch.randn(shape, generator=generator).to(self.device)
        self.labels = torch.arange(batch_size) % CLASSES
        self.draws = torch.Generator().manual_seed(1)

    def seconds(self, steps: int) -> float:
        """Seconds per step, the median of `steps`."""
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            draw = RoutingDraw.sample(self.model.head.config, self.draws)
            with autocast(self.precision, self.device):
                terms = self.model.training_loss(self.frames, self.labels, self.classes, draw)
            terms.total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return common.middle(times)


def memory_over_steps(dataset: Path, encoder: Path, steps: int) -> tuple[float, float]:
    """Resident MB around steps steps/5 and `steps` of one epoch with a batch of one."""
    held: list[float] = []
    page = os.sysconf("SC_PAGE_SIZE") / 1e6

    def look(done: int, total: int, **details: Any) -> None:
        while len(held) < done:  # the sink is told ten times a second at most
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    finetune(request(dataset, encoder, batch_size=1), Ranks(), look)
    window = max(5, steps // 20)
    early = held[steps // 5 : steps // 5 + window]
    return float(np.median(early)), float(np.median(held[-window:]))


def main() -> None:
    chosen = common.options(__doc__, steps=12, batch=8, repetitions=3)
    if chosen.quick:
        chosen.steps, chosen.batch, chosen.repetitions = 2, 2, 1
    logging.getLogger().setLevel(logging.ERROR)
    where = common.machine()
    encoder = common.tiny_clip_folder() if chosen.quick else common.vit_b32_folder()
    clips = common.kinetics_clips(4 if chosen.quick else 24)
    dataset = packed("finetune", chosen.steps * chosen.batch, clips)
    bare = BareLoop(encoder, chosen.batch, FRAMES, CONFIG.precision)
    bare.seconds(1)  # sets things up
    runs = []
    for number in range(chosen.repetitions):
        before = bare.seconds(max(2, chosen.steps // 2))
        step, waiting = measured(request(dataset, encoder, batch_size=chosen.batch))
        after = bare.seconds(max(2, chosen.steps // 2))
        baseline = (before + after) / 2
        runs.append({"step": step, "bare": baseline, "ratio": step / baseline, "waiting": waiting})
        print(
            f"run {number + 1}: {step:.3f} s a step, bare {before:.3f} and {after:.3f} s, "
            f"{step / baseline:.3f}, waiting {waiting:.1%}",
            flush=True,
        )
    ratio, waiting, step, baseline = (
        common.middle([run[name] for run in runs]) for name in ("ratio", "waiting", "step", "bare")
    )
    steps = 20 if chosen.quick else MEMORY_STEPS
    early, late = memory_over_steps(packed("finetune-long", steps, clips), encoder, steps)
    print(where["name"])
    common.table(
        ["measure", "value", "baseline", "ratio", "limit"],
        [
            ["seconds per step", step, baseline, ratio, MAX_RATIO],
            ["waiting for data", waiting * step, step, waiting, MAX_WAITING],
            [f"MB after {steps} steps", late, early, late / early, MAX_GROWTH],
        ],
    )
    tower = "tiny CLIP" if chosen.quick else "ViT-B/32"
    name = f"{tower}, batch {chosen.batch} x {FRAMES} frames, fp32"
    rows = [
        common.Row(
            f"step of `finetune` from packed videos, {name}",
            f"{step:.2f} s",
            f"bare loop {baseline:.2f} s",
            ratio,
            f"<= {MAX_RATIO}",
        ),
        common.Row(
            "share of a step spent waiting for data",
            f"{waiting * step:.3f} s",
            f"{step:.2f} s",
            waiting,
            f"<= {MAX_WAITING}",
        ),
        common.Row(
            f"memory of `finetune` after {steps} steps against after {steps // 5}, batch 1",
            f"{late:.0f} MB",
            f"{early:.0f} MB",
            late / early,
            f"<= {MAX_GROWTH}",
        ),
    ]
    common.save("finetune", where, rows, {"runs": runs})


if __name__ == "__main__":
    main()
