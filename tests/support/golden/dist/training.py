"""Training steps of DiST in golden files: losses, mixing, schedules, orders."""

from __future__ import annotations
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
import numpy as np
import torch
from torch import Tensor, nn
from heads.methods.dist.training import Mix, RateSchedule, parameter_groups, pass_order, set_rates, training_step_parts
from tests.support.golden.checks import DTYPES, Check, tensor, worst
from tests.support.golden.dist.model import clips_of, model_of, stored
from tests.support.golden.dist.branch import compact, compact_sums

def golden_mix(steps: list[dict[str, Any]], number: int) -> Mix | None:
    """The mixing that was forced in one iteration."""
    if not steps:
        return None
    step = steps[number]
    if not step["cutmix"]:
        return Mix(step["lam_drawn"])
    top, bottom, left, right = step["box_yl_yh_xl_xh"]
    return Mix(step["lam_used"], (top, bottom, left, right))


def check_trainstep(file: Path) -> Iterator[Check]:
    data = stored(file)
    run = json.loads(str(data["run_json"]))
    steps = json.loads(str(data["mix_json"]))
    weights = stored(file.with_name(run["model_file"]))
    text = tensor(data["text_features_f64"])
    schedule = RateSchedule(run["base_lr"], run["maxe"], run["warm"], run["warm0"])
    for suffix, dtype in DTYPES.items():
        exact = suffix == "f64"
        model, _, _ = model_of(weights)
        model = model.to(dtype).train()
        before = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("branch.")}
        groups = parameter_groups(model.branch, run["wd"], run["mult"])
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        worst_of: dict[str, float] = {}

        def note(name: str, error: float, kept: dict[str, float] = worst_of) -> None:
            kept[name] = max(kept.get(name, 0.0), error)

        for i in range(run["K"]):
            e = run["epoch"] + run["folds"] * i / run["iters"]
            set_rates(optimizer.param_groups, schedule.rate(e))
            rates = tensor([group["lr"] for group in optimizer.param_groups])
            note("rates, of the base rate", worst(rates, data["lrs"][i]) / run["base_lr"])
            parts = training_step_parts(
                model,
                clips_of(data["video"][i], dtype),
                tensor(data["labels"][i]),
                text.to(dtype),
                golden_mix(steps, i),
                run["ls"],
            )
            parts.loss.backward()
            when = "" if exact or i == 0 else ", later iterations"
            note("targets", worst(parts.targets, data["targets"][i]))
            note(f"logits{when}", worst(parts.logits, data[f"logits_{suffix}"][i]))
            note(f"loss{when}", worst(parts.loss, data[f"loss_{suffix}"][i]))
            if exact and steps:
                clips = parts.frames.transpose(1, 2)
                note("mixed clips", compact_sums(clips, data["mixed_video_chk"][i]))
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            if exact and i == 0:
                yield from _first_gradients(gradients, groups, data)
            optimizer.step()
            model.zero_grad()
            for what in [{0: "after1_f64"}.get(i), {run["K"] - 1: "afterK_f64"}.get(i)]:
                if exact and what:
                    error = _moved(model.branch, data, what, float(data["lrs"][i].max()))
                    note(f"parameters {what}, in units of the rate", error)
        for name, error in worst_of.items():
            limit = {"rates, of the base rate": 1e-12, "targets": 1e-7, "mixed clips": 1e-9}.get(
                name, (1e-9 if exact else 1e-3 if "later" in name else 2e-5)
            )
            yield Check(f"{name} {suffix}", error, 1e-6 if name.startswith("param") else limit)
        changed = sum(not before[n].equal(p) for n, p in model.named_parameters() if n in before)
        yield Check(f"tensors of CLIP that changed {suffix}", changed, 0)


def _first_gradients(
    gradients: Mapping[str, Tensor], groups: list[dict[str, Any]], data: Mapping[str, Any]
) -> Iterator[Check]:
    own = {n.removeprefix("branch."): g for n, g in gradients.items() if n.startswith("branch.")}
    yield Check("gradients f64", compact(own, data, "grad0_f64"), 1e-9)
    scale = worst(gradients["logit_scale"], data["logit_scale_grad0"])
    yield Check("gradient of the scale f64", scale, 1e-9)
    others = [n for n in gradients if not n.startswith("branch.")]
    yield Check("other tensors of CLIP with a gradient", len(set(others) - {"logit_scale"}), 0)
    theirs = json.loads(str(data["groups_json"]))
    keys = (("names", "names"), ("weight_decay", "weight_decay"), ("lr_mult", "rate_multiplier"))
    wrong = abs(len(theirs) - len(groups))
    for a, b in zip(theirs, groups, strict=False):
        wrong += sum(a[ours] != b[mine] for ours, mine in keys)
    yield Check("parameter groups that differ", wrong, 0)


def _moved(branch: nn.Module, data: Mapping[str, Any], what: str, rate: float) -> float:
    """The largest error of a parameter's entries in units of the rate."""
    error = 0.0
    for name, value in branch.named_parameters():
        flat = value.detach().reshape(-1)
        step = math.ceil(len(flat) / 100)
        error = max(error, worst(flat[::step], data[f"{what}_sub/{name}"]) / rate)
    return error


def check_lr_schedules(file: Path) -> Iterator[Check]:
    data = np.load(file)
    for i, meta in enumerate(json.loads(str(data["meta_json"]))):
        course = ("BASE_LR", "MAX_EPOCH", "WARMUP_EPOCHS", "WARMUP_START_LR")
        schedule = RateSchedule(*(meta[name] for name in course))
        ours = [[schedule.rate(e), schedule.rate(e) * meta["NEW_NET_LRMULT"]] for e in
                data[f"lr_{i}"][:, 0]]  # fmt: skip
        error = worst(torch.tensor(ours, dtype=torch.float64), data[f"lr_{i}"][:, 1:])
        yield Check(f"{meta['name']}, of the base rate", error / meta["BASE_LR"], 1e-12)


def check_sampler(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())
    wrong = sum(
        pass_order(c["dataset_len"], c["folds"], c["replicas"], c["rank"], c["epoch"])
        != c["indices"]
        for c in cases
    )
    yield Check(f"orders: wrong of {len(cases)}", wrong, 0)
