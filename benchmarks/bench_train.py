"""What does training from a store cost beside the arithmetic? Samples/s of `train_head`.

The baseline is a bare loop in the same run: forward, loss, backward and optimiser on one batch that
lies in memory as float32, without store, sampling of frames, records or checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch

from featstore import Store
from heads import HeadConfig, RoutingDraw, TrainConfig, build_head, mote_loss, train_head
from heads.arithmetic import autocast, resolve_device, resolve_precision
from heads.training.schedule import build_optimizer

DIM, FRAMES, STORED_FRAMES, BATCH, CLASSES = 512, 8, 16, 192, 400  # ViT-B/16 on Kinetics-400
KINDS = ("mote", "transformer")


def bare_loop(head: HeadConfig, training: TrainConfig, steps: int, device: str) -> float:
    """Samples/s of forward, loss, backward and optimiser on one batch in memory."""
    where = resolve_device(device)
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=-1)
    model = build_head(head, text, logit_scale=100.0, generator=generator).to(where).train()
    text = text.to(where)
    scale = torch.nn.Parameter(torch.tensor(np.log(100.0), dtype=torch.float32, device=where))
    optimizer = build_optimizer(model, [scale], training)
    features = torch.randn(training.batch_size, FRAMES, DIM, generator=generator).to(where)
    labels = torch.randint(CLASSES, (training.batch_size,), generator=generator).to(where)
    precision = resolve_precision(training.precision, DIM, where)

    def step() -> None:
        draw = RoutingDraw.sample(head, generator)
        with autocast(precision, where):
            passes = model.training_pass(features, text, draw)
        mote_loss(passes, features, labels, scale.exp()).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # warm-up
    return training.batch_size * steps / _seconds(lambda: [step() for _ in range(steps)], where)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def whole_run(
    store: Store, head: HeadConfig, training: TrainConfig, run_dir: Path, device: str
) -> tuple[float, float]:
    """Samples/s of `train_head` over its epochs, and over the whole call (loads, saves)."""
    started = time.perf_counter()
    summary = train_head(
        store, run_dir, head, training, rows=store.rows, prompt_set="name", device=device
    )
    samples = summary.n_trained * summary.epochs
    return samples / summary.seconds, samples / (time.perf_counter() - started)


def main() -> None:
    """Measure both heads, the bare loop and the whole run in turn."""
    chosen = common.options(__doc__, samples=6144, epochs=2, repetitions=3, device="cpu")
    if chosen.quick:
        chosen.samples, chosen.epochs, chosen.repetitions = 512, 1, 1
    where = common.machine()
    if chosen.device == "cuda":
        where["name"] += f", {torch.cuda.get_device_name()}"
    tars = chosen.samples // common.TAR_ROWS
    store = common.random_store("train", tars, classes=CLASSES, dim=DIM, frames=STORED_FRAMES)
    training = TrainConfig(epochs=chosen.epochs, batch_size=BATCH, frames=FRAMES)
    precision = resolve_precision(training.precision, DIM, resolve_device(chosen.device))
    steps = chosen.epochs * chosen.samples // BATCH
    print(f"{where['name']}; {torch.get_num_threads()} torch threads, {precision}")
    rows, shown, details = [], [], {}
    for kind in KINDS:
        head = HeadConfig(dim=DIM, kind=kind)
        bare, epochs, whole = [], [], []
        for number in range(chosen.repetitions):
            run_dir = common.fresh(common.WORK / "train-runs") / f"{kind}-{number}"
            bare.append(bare_loop(head, training, steps, chosen.device))
            in_epochs, in_all = whole_run(store, head, training, run_dir, chosen.device)
            epochs.append(in_epochs)
            whole.append(in_all)
        ratios = [a / b for a, b in zip(epochs, bare, strict=True)]
        shown += [
            [kind, f"repetition {n}", *values]
            for n, values in enumerate(zip(bare, epochs, whole, ratios, strict=True), start=1)
        ]
        medians = [common.middle(values) for values in (bare, epochs, whole, ratios)]
        shown.append([kind, "median", *medians])
        details[kind] = {"bare": bare, "epochs": epochs, "whole": whole, "ratios": ratios}
        rows.append(
            common.Row(
                f"`train-head`, {kind}, {precision}, {DIM} wide, {FRAMES} frames, batch {BATCH}",
                f"{medians[1]:.0f} samples/s",
                f"{medians[0]:.0f} samples/s",
                medians[3],
                "none set",
            )
        )
    common.table(["head", "samples/s", "bare loop", "epochs", "whole call", "ratio"], shown)
    common.save("train", where, rows, {"samples": chosen.samples, "samples_per_second": details})


if __name__ == "__main__":
    main()
