"""How fast is the head against a straightforward one, and what does bfloat16 cost?

The baseline is `reference_head`: a module per expert, merged in every forward pass, time-major
attention, float32. A ViT-B/16's sizes: width 512, 8 heads, 4 layers, 4 experts, T 8, batch 64.
A second bound is the machine's own: the head's matrix products alone, in the same precision. What
bfloat16 gains depends on the processor's units for it, so its limits are shares of that bound.
The contestants take turns; times are CPU seconds of the process over its threads (other programs
then disturb least) and wall-clock seconds beside them. The second part trains the same head
on the same batches in float32 and bfloat16 and compares losses and predictions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import common
import torch
from reference_head import ReferenceHead
from torch import Tensor

from heads import HeadConfig, RoutingDraw, TrainConfig, build_head
from heads.arithmetic import autocast, resolve_precision
from heads.training.trainer import Trainer

DIM, HEADS, LAYERS, EXPERTS, FRAMES, BATCH, CLASSES = 512, 8, 4, 4, 8, 64, 400
HEAD = HeadConfig(dim=DIM, layers=LAYERS, experts=EXPERTS)
CPU = torch.device("cpu")
# Against the straightforward head in the same precision, and of the products' own speed.
LIMITS = {("training step", "fp32"): 1.0, ("evaluation", "fp32"): 1.1}
# With units as fast as AMX the products take a fifth of a step; casts and AdamW are the rest.
SHARES = {
    ("training step", "fp32"): 0.35,
    ("training step", "default"): 0.15,
    ("evaluation", "fp32"): 0.5,
    ("evaluation", "default"): 0.25,
}


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def ours(
    precision: str, text: Tensor, batch: tuple[Tensor, Tensor]
) -> dict[str, Callable[[], object]]:
    """A step and an evaluation of our head, as `train_head` and `evaluate_store` run them."""
    features, labels = batch
    generator = torch.Generator().manual_seed(0)
    trained = build_head(HEAD, text, generator=generator).train()
    chosen = "bf16" if precision == "bf16" else "fp32"
    trainer = Trainer.on_features(trained, TrainConfig(precision=chosen, epochs=1), 1)  # type: ignore[arg-type]
    rates = trainer.rates[0, 0]
    head = build_head(HEAD, text, generator=generator)

    def step() -> None:
        trainer.step(features, labels, RoutingDraw.sample(HEAD, generator))
        trainer.update(rates)

    @torch.no_grad()
    def evaluate() -> Tensor:
        with autocast(precision, CPU):
            return head(features, text)

    return {"training step": step, "evaluation": evaluate}


def reference(text: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    """The same of the straightforward head, with PyTorch's AdamW as it comes."""
    features, labels = batch
    generator = torch.Generator().manual_seed(0)
    trained, head = (ReferenceHead(DIM, HEADS, LAYERS, EXPERTS) for _ in range(2))
    head.eval()
    scale = torch.nn.Parameter(torch.tensor(100.0).log())
    optimizer = torch.optim.AdamW(
        [{"params": [scale], "lr": 3.5e-6}, {"params": trained.parameters(), "lr": 5e-5}],
        weight_decay=0.2,
    )

    def step() -> None:
        draw = RoutingDraw.sample(HEAD, generator)
        trained.loss(features, labels, text, scale.exp(), draw).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"training step": step, "evaluation": lambda: head.evaluate(features, text, text)}


def products(precision: str) -> dict[str, Callable[[], object]]:
    """The matrix products of a step and of an evaluation, with nothing around them.

    An evaluation has one pass. A step has two that share the first attention; its backward pass has
    two products for each of the forward pass.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokens = torch.randn(BATCH * FRAMES, DIM).to(dtype)
    wide = torch.randn(BATCH * FRAMES, 4 * DIM).to(dtype)
    attention = [torch.randn(DIM, 3 * DIM).to(dtype), torch.randn(DIM, DIM).to(dtype)]
    up, down = torch.randn(DIM, 4 * DIM).to(dtype), torch.randn(4 * DIM, DIM).to(dtype)

    def forward(attentions: int, feed_forwards: int) -> None:
        for _ in range(attentions):
            for weight in attention:
                tokens @ weight
        for _ in range(feed_forwards):
            tokens @ up, wide @ down

    return {
        "training step": lambda: forward(3 * (2 * LAYERS - 1), 3 * 2 * LAYERS),
        "evaluation": lambda: forward(LAYERS, LAYERS),
    }


def same_numbers(text: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    """Largest difference between the cosines of the two heads with the same weights."""
    head = build_head(HEAD, text, generator=torch.Generator().manual_seed(1))
    other = ReferenceHead(DIM, HEADS, LAYERS, EXPERTS).eval()
    state = head.state_dict()
    with torch.no_grad():
        other.positions.weight.copy_(state["transformer.positions"])
        for number, block in enumerate(other.blocks):
            prefix = f"transformer.blocks.{number}."
            pairs = {
                "attention.in_proj_weight": "attention.qkv_weight",
                "attention.in_proj_bias": "attention.qkv_bias",
                "attention.out_proj.weight": "attention.out_weight",
                "attention.out_proj.bias": "attention.out_bias",
            }
            parameters = dict(block.named_parameters())
            for theirs, name in pairs.items():
                parameters[theirs].copy_(state[prefix + name])
            for e in range(EXPERTS):
                for side in ("up", "down"):
                    for part in ("weight", "bias"):
                        value = state[f"{prefix}feed_forward.{side}_{part}"][e]
                        parameters[f"{side}.experts.{e}.{part}"].copy_(value)
        return float((other.evaluate(batch[0], text, text) - head(batch[0], text)).abs().max())


def measure(work: Callable[[], object], calls: int) -> tuple[float, float]:
    """(CPU seconds, wall-clock seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        work()
    return (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls


def speed(
    repetitions: int, text: Tensor, batch: tuple[Tensor, Tensor]
) -> tuple[list[list[object]], list[common.Row], dict[str, object]]:
    default = resolve_precision("auto", DIM, CPU)
    contestants = {"reference": reference(text, batch), "fp32": ours("fp32", text, batch)}
    contestants["products fp32"] = products("fp32")
    if default != "fp32":
        contestants["default"] = ours(default, text, batch)
        contestants["products default"] = products(default)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(repetitions):
        for task, calls in (("training step", 1), ("evaluation", 4)):
            for name, tasks in contestants.items():
                tasks[task]()  # the caches are its own again
                times.setdefault((task, name), []).append(measure(tasks[task], calls))
    shown, rows = [], []
    for (task, name), values in times.items():
        if name not in ("fp32", "default"):
            continue
        baseline = times[task, "reference"]
        precision = default if name == "default" else "fp32"
        middle = [common.middle([v[kind] for v in values]) for kind in (0, 1)]
        of_baseline = [common.middle([v[kind] for v in baseline]) for kind in (0, 1)]
        best = [min(v[0] for v in series) for series in (baseline, values)]
        ratios = [of_baseline[kind] / middle[kind] for kind in (0, 1)]
        limit = LIMITS.get((task, name))
        alone = common.middle([v[0] for v in times[task, f"products {name}"]])
        shown.append(
            [
                task,
                precision,
                1e3 * middle[0],
                1e3 * of_baseline[0],
                *ratios,
                best[0] / best[1],
                alone / middle[0],
            ]
        )
        rows.append(
            common.Row(
                f"head, {task}, {precision}, against a straightforward one in fp32",
                f"{1e3 * middle[0]:.0f} ms CPU",
                f"{1e3 * of_baseline[0]:.0f} ms CPU",
                ratios[0],
                "none set" if limit is None else f">= {limit}",
            )
        )
        rows.append(
            common.Row(
                f"head, {task}, {precision}, against its matrix products alone",
                f"{1e3 * middle[0]:.0f} ms CPU",
                f"{1e3 * alone:.0f} ms CPU",
                alone / middle[0],
                f">= {SHARES[task, name]}",
            )
        )
    details = {f"{task}, {name}": values for (task, name), values in times.items()}
    return shown, rows, {"seconds_cpu_and_wall": details}


class World:
    """Classes, and endless batches of videos whose frames drift from one part to another."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.text = unit(CLASSES, DIM, generator=generator)
        self.start, self.end = (unit(CLASSES, DIM, generator=generator) for _ in range(2))

    def batch(self, step: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        time_ = torch.linspace(0, 1, FRAMES)[:, None]
        drift = (1 - time_) * self.start[labels][:, None] + time_ * self.end[labels][:, None]
        noise = torch.randn(size, FRAMES, DIM, generator=generator) / DIM**0.5
        return 8 * (0.15 * self.text[labels][:, None] + drift + 4 * noise), labels


def curves(steps: int) -> tuple[list[list[object]], dict[str, object]]:
    """Train in both precisions on the same batches and draws; compare what comes out."""
    world = World()
    losses: dict[str, list[float]] = {}
    heads = {}
    for precision in ("fp32", "bf16"):
        generator = torch.Generator().manual_seed(2)
        head = build_head(HEAD, world.text, generator=generator).train()
        config = TrainConfig(epochs=1, warmup_epochs=0.1, lr=2e-4, precision=precision)  # type: ignore[arg-type]
        trainer = Trainer.on_features(head, config, steps)
        losses[precision] = []
        for step in range(steps):
            draw = RoutingDraw.sample(HEAD, generator)
            losses[precision].append(float(trainer.step(*world.batch(step), draw).total.detach()))
            trainer.update(trainer.rates[0, step])
        heads[precision] = head.eval()
    fp32, bf16 = (torch.tensor(losses[name]) for name in ("fp32", "bf16"))
    tenth = max(1, steps // 10)
    shown: list[list[object]] = [
        [
            f"steps {at + 1} to {at + tenth}",
            *(float(c[at : at + tenth].mean()) for c in (fp32, bf16)),
        ]
        for at in range(0, steps, tenth)
    ]
    features, labels = world.batch(10**6, 512)
    agreement: dict[str, object] = {}
    with torch.no_grad():
        exact = heads["fp32"](features, world.text)
        with autocast("bf16", CPU):
            low = heads["fp32"](features, world.text)
            own = heads["bf16"](features, world.text)
    agreement["evaluation in bf16 of a head trained in fp32"] = {
        "largest cosine difference": float((low - exact).abs().max()),
        "same top-1, per cent": 100 * float((low.argmax(1) == exact.argmax(1)).float().mean()),
        "top-1 fp32": 100 * float((exact.argmax(1) == labels).float().mean()),
        "top-1 bf16": 100 * float((low.argmax(1) == labels).float().mean()),
    }
    agreement["trained and evaluated in bf16"] = {
        "top-1": 100 * float((own.argmax(1) == labels).float().mean())
    }
    agreement["largest relative loss difference of a tenth"] = max(
        abs(row[2] / row[1] - 1)
        for row in shown  # type: ignore[operator]
    )
    return shown, {"losses": losses, "agreement": agreement}


def main() -> None:
    """Measure speed, then the effect of precision."""
    chosen = common.options(__doc__, repetitions=15, steps=300)
    if chosen.quick:
        chosen.repetitions, chosen.steps = 2, 10
    where = common.machine()
    generator = torch.Generator().manual_seed(0)
    text = unit(CLASSES, DIM, generator=generator)
    batch = (
        torch.randn(BATCH, FRAMES, DIM, generator=generator),
        torch.randint(CLASSES, (BATCH,), generator=generator),
    )
    print(
        f"{where['name']}; {torch.get_num_threads()} torch threads; "
        f"load {where['load_average_before']}"
    )
    difference = same_numbers(text, batch)
    print(f"both heads give the same cosines within {difference:.1e}")
    if difference > 1e-5:
        raise SystemExit("the baseline computes something else: nothing to compare")
    shown, rows, details = speed(chosen.repetitions, text, batch)
    header = [
        "",
        "precision",
        "ms CPU",
        "reference",
        "ratio CPU",
        "ratio wall",
        "of minima",
        "of products",
    ]
    common.table(header, shown)
    print("\nmean loss on the same batches and draws")
    curve, effect = curves(chosen.steps)
    common.table(["", "fp32", "bf16"], curve)
    for name, value in effect["agreement"].items():  # type: ignore[attr-defined]
        print(f"{name}: {value}")
    common.save("head", where, rows, {**details, "precision": effect})


if __name__ == "__main__":
    main()
