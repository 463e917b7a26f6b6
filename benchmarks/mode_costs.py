"""Which mode for which machine? What the frozen store and end-to-end training cost, computed.

Floating-point operations are counted by torch on tensors without content (two per multiplication
and addition), memory from the tensors that the backward pass keeps. Nothing is timed but one rate:
what this machine's processor reaches in a training step of the smallest tower.

Letters: T frames of a clip, D embedding width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import common
import open_clip
import torch
from open_clip.model import CLIP
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from heads import HeadConfig, RoutingDraw, build_head, mote_loss

TOWERS = {"ViT-B-32": 4, "ViT-B-16": 4, "ViT-L-14": 6}  # layers of the head that goes with each
FRAMES, STORED_FRAMES, CLASSES = 8, 16, 400
# Training videos: of the first official split, and of the most common copy of Kinetics-400.
VIDEOS = {"HMDB51": 3_570, "UCF101": 9_537, "Kinetics-400": 240_436}
EPOCHS = {"ViT-B-32": 30, "ViT-B-16": 30, "ViT-L-14": 20}  # of the released configurations
RATES = (1, 20, 100, 400)  # 10^12 operations per second, sustained
ADAMW_BYTES = 16  # of a parameter: weight, gradient and two moments in float32
GIGA, TERA, MB = 1e9, 1e12, 1e6


@dataclass(frozen=True)
class Costs:
    """Costs of one tower with its head; operations per clip of T frames, memory in bytes."""

    tower: str
    tower_parameters: int
    head_parameters: int
    encode: int
    """Operations of the tower's forward pass over one clip."""
    head_step: int
    """Operations of a training step of the head over one clip."""
    full_step: int
    """Operations of a training step of tower and head over one clip."""
    activations: int
    """Bytes that the backward pass through the tower keeps for one clip, in float32."""
    checkpointed: int
    """The same with gradient checkpointing."""


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def kept_bytes(module: nn.Module, work: Callable[[], object]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward one, parameters left out."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    del result
    return sum(kept.values())


def tower_of(name: str) -> Any:
    """The image tower of an open_clip architecture, with random weights."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip knows no {name}")
    return CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).visual.train()


def training_loss(tower: Any, head: Any, clips: int) -> torch.Tensor:
    """The loss of one step of tower and head on `clips` clips."""
    side = tower.image_size[0]
    frames = torch.zeros(clips * FRAMES, 3, side, side)
    return head_loss(head, tower(frames).view(clips, FRAMES, -1))


def head_loss(head: Any, features: torch.Tensor) -> torch.Tensor:
    """The loss of one step of the head on `features` [clips,T,D]."""
    layers = head.config.layers  # which expert and temperature does not matter for the cost
    draw = RoutingDraw((0,) * layers, (math.inf,) * layers)
    classes = torch.ones(CLASSES, features.shape[-1])
    labels = torch.zeros(len(features), dtype=torch.int64)
    return mote_loss(head.training_pass(features, classes, draw), features, labels, 100.0).total


def head_of(dim: int, layers: int) -> Any:
    """The released head of that size."""
    return build_head(HeadConfig(dim=dim, layers=layers)).train()


def costs_of(name: str) -> Costs:
    """Count everything for one tower."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes only
        tower = tower_of(name)
        head = head_of(tower.output_dim, TOWERS[name])
        side = tower.image_size[0]
        frames = torch.zeros(FRAMES, 3, side, side)
        features = torch.zeros(2, FRAMES, tower.output_dim)
        with torch.no_grad():
            encode = operations(lambda: tower(frames))
        activations = kept_bytes(tower, lambda: tower(frames))
        # of a second clip: experts are merged once for a batch
        head_step = operations(lambda: head_loss(head, features).backward()) - operations(
            lambda: head_loss(head, features[:1]).backward()
        )
        full_step = operations(lambda: training_loss(tower, head, 2).backward()) - operations(
            lambda: training_loss(tower, head, 1).backward()
        )
        tower.set_grad_checkpointing(True)
        checkpointed = kept_bytes(tower, lambda: tower(frames))
    return Costs(
        name,
        sum(p.numel() for p in tower.parameters()),
        sum(p.numel() for p in head.parameters()),
        encode,
        head_step,
        full_step,
        activations,
        checkpointed,
    )


def measured_rate(clips: int) -> float:
    """Operations per second of a training step of ViT-B/32 on this machine's processor, float32."""
    tower, head = tower_of("ViT-B-32"), head_of(512, TOWERS["ViT-B-32"])
    training_loss(tower, head, clips).backward()  # the first one sets things up
    started = time.perf_counter()
    count = operations(lambda: training_loss(tower, head, clips).backward())
    return count / (time.perf_counter() - started)


def hours(count: float, rate: float) -> str:
    """Time for `count` operations at `rate` per second, in a unit that reads well."""
    value = count / rate / 3600
    if value >= 48:
        return f"{value / 24:,.0f} days"
    if value >= 1:
        return f"{value:.1f} h"
    return f"{value * 60:.0f} min" if value >= 1 / 60 else "< 1 min"


def main() -> None:
    arguments = common.options(__doc__)
    where = common.machine()
    counted = [costs_of(name) for name in TOWERS]
    rate = measured_rate(1 if arguments.quick else 4)
    print(f"\nper clip of {FRAMES} frames (10^9 operations, two per multiplication and addition)")
    common.table(
        ["tower", "encode once", "head, a step", "end to end, a step", "end to end / head"],
        [
            [
                c.tower,
                c.encode / GIGA,
                c.head_step / GIGA,
                c.full_step / GIGA,
                f"{c.full_step / c.head_step:.0f}x",
            ]
            for c in counted
        ],
    )
    print(f"\nmemory of training (MB); activations are float32, per clip of {FRAMES} frames")
    common.table(
        ["tower", "head + AdamW", "tower + head + AdamW", "activations", "with checkpointing"],
        [
            [
                c.tower,
                round(c.head_parameters * ADAMW_BYTES / MB),
                round((c.tower_parameters + c.head_parameters) * ADAMW_BYTES / MB),
                round(c.activations / MB),
                round(c.checkpointed / MB),
            ]
            for c in counted
        ],
    )
    print(
        "\narithmetic alone, at sustained rates in 10^12/s; "
        f"{rate / TERA:.3f} is what this machine reached"
    )
    lines = []
    for c in counted:
        epochs = EPOCHS[c.tower]
        frozen = c.encode * STORED_FRAMES / FRAMES + c.head_step * epochs
        for name, videos in VIDEOS.items():
            for mode, count in (
                (f"extract {STORED_FRAMES} frames, train the head", frozen),
                ("end to end", c.full_step * epochs),
            ):
                total = count * videos
                speeds = [hours(total, r * TERA) for r in RATES]
                described = (c.tower, name, f"{mode}, {epochs} epochs")
                lines.append([*described, f"{total:.1e}", hours(total, rate), *speeds])
    header = ["tower", "data set", "work", "operations", "this machine"]
    common.table([*header, *(f"at {r}" for r in RATES)], lines)
    rows = [
        common.Row(
            f"{c.tower}: end to end, {EPOCHS[c.tower]} epochs, against extracting once and "
            "training the head",
            f"{c.full_step * EPOCHS[c.tower] / GIGA:,.0f} GFLOP a video",
            f"{baseline / GIGA:,.0f} GFLOP a video",
            c.full_step * EPOCHS[c.tower] / baseline,
            "none",
        )
        for c in counted
        for baseline in [c.encode * STORED_FRAMES / FRAMES + c.head_step * EPOCHS[c.tower]]
    ]
    if not all(math.isfinite(row.ratio) for row in rows):
        raise SystemExit("a cost could not be computed")
    common.save(
        "mode_costs",
        where,
        rows,
        {"costs": [asdict(c) for c in counted], "operations_per_second_here": rate},
    )


if __name__ == "__main__":
    main()
