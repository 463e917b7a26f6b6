"""Every kind of golden file recomputed: how far is the worst number from the authors'?

A check takes a file and yields one `Check` per quantity. The tolerances are those the files were
published with; benchmarks/golden_table.py prints them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn import functional

from heads.end_to_end import EndToEndModel
from heads.evaluation.protocols.half_class import half_class_accuracy
from heads.methods.mote.config import TEMPERATURES, HeadConfig
from heads.methods.mote.experts import ExpertFeedForward, temperature_weights
from heads.methods.mote.modulation import modulation
from heads.methods.mote.routing import RoutingDraw, expert_probabilities
from heads.methods.text_classifier import class_cosines, video_embeddings
from heads.training.config import TrainConfig
from heads.training.schedule import build_optimizer, learning_rates
from heads.training.trainer import Trainer
from pipeline.augmentation import AugmentationDraw, augmented_pixels, crop_size, resized_clip
from pipeline.clip_encoder import load_encoder
from pipeline.preprocessing import CLIP_STD, Preprocessing, evaluation_crops
from pipeline.prompts import as_prompt_set
from pipeline.sampling import (
    dense_train_indices,
    dense_train_starts,
    train_ranges,
    validation_indices,
)
from pipeline.sampling import test_indices as clip_indices
from tests.support.golden.head import golden_entries, golden_head, our_name

DTYPES = {"f32": torch.float32, "f64": torch.float64}
# Pillow resizes on both sides: 1e-6 of a normalised value, in grey levels.
LEVELS = MEAN_LEVELS = 1e-4
# Kolmogorov and Smirnov's distance of 3000 to 12,000 values is above this by chance in one of 8000
# cases.
SAME_DISTRIBUTION = 0.045


@dataclass(frozen=True)
class Check:
    """The largest error of one quantity of a golden file."""

    quantity: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # not so for NaN


def worst(got: Tensor | Any, expected: Any) -> float:
    """The largest difference between two arrays; infinite where their shapes differ.

    In float32 the difference is given in units of the largest expected magnitude, where that is
    above 1. Processors add the terms of a sum in different orders (vector width, fused
    multiply-add, matrix tiles), and each order rounds differently, in proportion to the size of
    the terms. An absolute tolerance met on one processor is therefore missed on another: a head
    output of magnitude 3 was 1.05e-5 away on an Intel Xeon with AMX. The digits of the method
    itself are held by float64, which stays absolute.
    """
    found = torch.as_tensor(got).detach()
    wanted = torch.as_tensor(np.asarray(expected)).double()
    if found.shape != wanted.shape:
        return float("inf")
    unit = 1.0
    if found.dtype == torch.float32 and wanted.numel():
        unit = max(1.0, float(wanted.abs().max()))
    return float((found.double() - wanted).abs().max()) / unit


def tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.asarray(value)).to(dtype)


def check_ffn(file: Path) -> Iterator[Check]:
    data = np.load(file)
    dim, experts = int(data["d_model"]), int(data["num_experts"])
    shares = torch.stack([temperature_weights(t, experts) for t in TEMPERATURES])
    yield Check("merging weights", worst(shares, data["fusion_w_train"]), 1e-7)
    yield Check(
        "routing prior",
        worst(expert_probabilities(HeadConfig(dim=64, experts=experts)), data["route_prob"]),
        1e-7,
    )
    for suffix, dtype in DTYPES.items():
        layer = ExpertFeedForward(HeadConfig(dim=dim, experts=experts)).eval()
        stacked = (layer.up_weight, layer.up_bias, layer.down_weight, layer.down_bias)
        with torch.no_grad():
            for ours, theirs in zip(stacked, ("up_w", "up_b", "dn_w", "dn_b"), strict=True):
                ours.copy_(tensor(data[theirs]))
        layer = layer.to(dtype)
        x = tensor(data["x"], dtype)
        limit = 2e-6 if suffix == "f32" else 1e-12

        def run(
            coefficients: Tensor | None, layer: ExpertFeedForward = layer, x: Tensor = x
        ) -> Tensor:
            with torch.no_grad():
                return layer(x.reshape(1, -1, x.shape[-1]), coefficients).reshape(-1, *x.shape)

        yield Check(
            f"each expert {suffix}",
            worst(run(torch.eye(experts)), data[f"y_expert_{suffix}"]),
            limit,
        )
        yield Check(
            f"every temperature {suffix}", worst(run(shares), data[f"y_merged_{suffix}"]), limit
        )
        yield Check(f"evaluation {suffix}", worst(run(None)[0], data[f"y_eval_{suffix}"]), limit)
        with torch.no_grad():
            layer.fusion_logits.copy_(tensor(data["custom_fusion_logits"]))
        custom = worst(run(None)[0], data[f"y_eval_custom_{suffix}"])
        yield Check(f"evaluation, fusion weights {suffix}", custom, limit)
        if suffix == "f32":
            merged = layer.combine(shares[data["merged_tau_idx"]])
            names = ("merged_up_w", "merged_up_b", "merged_dn_w", "merged_dn_b")
            error = max(worst(got, data[name]) for got, name in zip(merged, names, strict=True))
            yield Check("merged weights f32", error, limit)


def check_head(file: Path) -> Iterator[Check]:
    data = np.load(file)
    for suffix, dtype in DTYPES.items():
        head = golden_head(data, dtype)
        x, tested = tensor(data["x"], dtype), tensor(data["gen_cls"], dtype)
        own = head.training_class_embeddings
        features, cosines = (1e-5, 1e-6) if suffix == "f32" else (1e-10, 1e-10)
        with torch.no_grad():
            parts = modulation(x, tested, own)
            found = {
                "agg_plain": (head.aggregate(x), features),
                "agg_tfm": (head.aggregate(x, tested), features),
                "agg_tfm_same": (head.aggregate(x, own), features),
                "tfm_pair_sim": (parts.pair_similarities, cosines),
                "tfm_mean_max_sim": (parts.similarity, cosines),
                "tfm_scale": (parts.scale, features),
                "logits_eval": (head(x, tested, modulate=True), cosines),
                "logits_plain": (head(x, tested, modulate=False), cosines),
            }
        for name, (got, limit) in found.items():
            yield Check(f"{name} {suffix}", worst(got, data[f"{name}_{suffix}"]), limit)
        neighbours = (
            ("tested_neighbours", "tfm_gen_top5_idx"),
            (
                "training_neighbours",
                "tfm_spe_top5_idx",
            ),
        )
        wrong = sum(
            int((getattr(parts, ours).numpy() != data[theirs]).sum()) for ours, theirs in neighbours
        )
        yield Check(f"neighbours that differ {suffix}", wrong, 0)


def golden_recipe(solver: Mapping[str, Any]) -> TrainConfig:
    """A solver of the authors' configuration as ours."""
    return TrainConfig(
        epochs=int(solver["epochs"]),
        warmup_epochs=float(solver["lr_warmup_step"]),
        lr=solver["lr"],
        logit_scale_lr_ratio=solver["clip_ratio"],
        weight_decay=solver["weight_decay"],
        accumulation=int(solver["grad_accumulation_steps"]),
        lr_refresh=10,
        precision="fp32",
    )


def golden_draw(data: Mapping[str, Any], step: int) -> RoutingDraw:
    """The draw that was forced in one iteration."""
    return RoutingDraw(
        tuple(int(e) for e in data["experts"][step]),
        tuple(TEMPERATURES[t] for t in data["tau_idx"][step]),
    )


def our_tensor(values: Mapping[str, Tensor], name: str) -> Tensor:
    """The value of our tensors that the authors call `name` ("clip.x" or "head.x")."""
    if name.startswith("clip."):
        return values[name.removeprefix("clip.")]
    ours, expert = our_name(name.removeprefix("head."))
    return values[ours] if expert is None else values[ours][expert]


def largest_error(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], unit: Callable[[str, Tensor], float]
) -> float:
    """Largest error over tensors, each in units of `unit(name, expected)`.

    The key third of a packed attention bias is left out: its gradient is zero but for rounding,
    which Adam blows up to steps of the size of the learning rate.
    """
    error = 0.0
    for name, value in expected.items():
        ours, theirs = our_tensor(got, name).detach().double(), value.double()
        if name.endswith("in_proj_bias"):
            third = len(theirs) // 3
            ours, theirs = (torch.cat([v[:third], v[2 * third :]]) for v in (ours, theirs))
        error = max(error, float((ours - theirs).abs().max()) / unit(name, theirs))
    return error


def own_maximum(name: str, value: Tensor) -> float:
    return max(float(value.abs().max()), 1e-30)


def check_trainstep(file: Path) -> Iterator[Check]:
    data = dict(np.load(file))
    config = golden_recipe(json.loads(str(data["solver_json"])))
    for suffix, dtype in DTYPES.items():
        head = golden_head(data, dtype)
        head.logit_scale.fill_(float(data["logit_scale0"]))
        text = tensor(data["text"], dtype)
        trainer = Trainer.on_features(
            head, config, int(data["iters_per_epoch"]), class_embeddings=text
        )
        rates = trainer.rates[int(data["epoch"])]
        losses = dict.fromkeys(("loss", "ce_expert", "ce_merged", "mse"), 0.0)
        numbers: dict[str, float] = {}
        steps = 0
        for i, embedding in enumerate(data["vid_emb"]):
            draw = golden_draw(data, i)
            features = tensor(embedding, dtype).requires_grad_()
            if i == 0:
                with torch.no_grad():
                    passes = head.training_pass(features, text, draw)
                numbers["cosines"] = max(
                    worst(passes.expert_cosines, data[f"logits0_{suffix}"]),
                    worst(tensor(passes.merged_cosines), data[f"logits_reg0_{suffix}"]),
                )
            terms = trainer.step(features, tensor(data["labels"][i]), draw)
            found = (terms.total / config.accumulation, terms.expert, terms.merged, terms.feature)
            for name, value in zip(losses, found, strict=True):
                losses[name] = max(losses[name], worst(value, data[f"{name}_{suffix}"][i]))
            if i == 0:
                expected = data[f"grad_vid_emb0_{suffix}"]
                error = worst(tensor(features.grad), expected)
                numbers["gradient of the features"] = error / float(np.abs(expected).max())
            if (i + 1) % config.accumulation:
                continue
            if steps == 0:
                gradients = {k: p.grad for k, p in trainer.parameters.items()}
                numbers["gradients"] = largest_error(
                    {k: g for k, g in gradients.items() if g is not None},
                    golden_entries(data, "grad_f64/"),
                    own_maximum,
                )
            rate_error = np.abs(rates[steps] - data["lrs"][steps]).max() / config.lr
            numbers["learning rates"] = max(numbers.get("learning rates", 0), rate_error)
            trainer.update(rates[steps])
            steps += 1
            if steps == 1:
                numbers["parameters after one step"] = _moved(trainer, data, "after1_f64/")
        if any(name.startswith("afterK_f64/") for name in data):
            numbers["parameters after all steps"] = _moved(trainer, data, "afterK_f64/")
        exact = suffix == "f64"
        for name, error in losses.items():
            yield Check(f"{name} {suffix}", error, 1e-12 if exact else 1e-4)
        limits = {"cosines": 1e-12 if exact else 1e-6, "learning rates": 1e-12}
        for name, error in numbers.items():
            limit = limits.get(name, 1e-12 if exact else 5e-6)
            if name.startswith("parameters"):
                limit = 1e-5 if exact else 0.05
                name += ", in units of lr"
            yield Check(f"{name} {suffix}", float(error), limit)


def _moved(trainer: Trainer, data: Mapping[str, Any], prefix: str) -> float:
    expected = golden_entries(data, prefix)
    return largest_error(trainer.parameters, expected, lambda name, value: trainer.config.lr)


def whole_model(file: Path) -> tuple[dict[str, Any], EndToEndModel]:
    """`fullmodel_step_*` with its gradients, and the model that it starts from."""
    data = dict(np.load(file))
    gradients = file.with_name(file.name.replace("_step_", "_grad_"))
    if gradients.exists():  # where the file is kept in two parts
        data |= np.load(gradients)
    for weights in _clips_of(file):
        encoder = load_encoder(weights, precision="fp32")
        names = {f"visual.{n}" for n, _ in encoder.image_tower.named_parameters()} | {"logit_scale"}
        if names == {str(n) for n in data["video_keys"]} and encoder.dim == data["text"].shape[1]:
            break
    else:
        raise FileNotFoundError(f"{file.name} needs the clip_*_openai_state.pt it was made with")
    start = golden_entries(data, "head0/")
    shape = {
        "layers": data["experts"].shape[1],
        "num_experts": len({n.split(".")[5] for n in start if "fc_up" in n}),
        "n_heads": max(1, encoder.model_config["text_cfg"]["width"] // 64),
    }
    entries = {f"param/{name}": value.numpy() for name, value in start.items()}
    head = golden_head(entries | shape, torch.float32).train()
    return data, EndToEndModel(encoder.image_tower, head, encoder.logit_scale)


def our_parameters(model: EndToEndModel) -> dict[str, torch.nn.Parameter]:
    """All parameters, by the names that `our_tensor` looks for."""
    return {
        name.replace("image_tower.", "visual.").removeprefix("head."): parameter
        for name, parameter in model.named_parameters()
    }


def check_fullmodel(file: Path) -> Iterator[Check]:
    """Image tower, head and logit scale trained together from pixels for a few steps."""
    data, model = whole_model(file)
    config = golden_recipe(json.loads(str(data["solver_json"])))
    optimizer = build_optimizer(model.head, model.tower_parameters(), config)
    rates = learning_rates(config, int(data["iters_per_epoch"]))[int(data["epoch"])]
    parameters = our_parameters(model)
    frames, labels, text = (tensor(data[name]) for name in ("frames", "labels", "text"))
    with torch.no_grad():
        passes = model.head.training_pass(model.encode(frames[0]), text, golden_draw(data, 0))
    yield Check("cosines f32", worst(passes.expert_cosines, data["logits0"]), 1e-5)
    merged = worst(tensor(passes.merged_cosines), data["logits_reg0"])
    yield Check("cosines of the merged pass f32", merged, 1e-5)
    yield Check("learning rates", worst(tensor(rates[: len(frames)]), data["lrs"]), 1e-12)
    bases = dict(zip(("clip", "head"), data["lrs"][0].tolist(), strict=True))
    losses, squares = 0.0, 0.0
    for i, batch in enumerate(frames):
        terms = model.training_loss(batch, labels[i], text, golden_draw(data, i))
        losses = max(losses, worst(terms.total, data["loss"][i]))
        squares = max(squares, worst(terms.feature, data["mse"][i]))
        terms.total.backward()
        if i == 0:
            yield Check("gradients f32", gradient_error(model, data), 5e-6)
        for group, rate in zip(optimizer.param_groups, rates[i], strict=True):
            group["lr"] = float(rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if i == 0:
            expected = golden_entries(data, "after1/")
            for name in data["no_grad_names"]:
                expected.pop(str(name), None)
            after = largest_error(parameters, expected, lambda n, _: bases[n.split(".")[0]])
            yield Check("parameters after one step, in units of the group's lr f32", after, 0.01)
    yield Check("loss f32", losses, 1e-4)
    yield Check("mse f32", squares, 1e-4)


def gradient_error(model: EndToEndModel, data: Mapping[str, Any]) -> float:
    """Of every gradient of the first step, in units of the tensor's largest."""
    gradients = {n: p.grad for n, p in our_parameters(model).items() if p.grad is not None}
    return largest_error(gradients, golden_entries(data, "grad/"), own_maximum)


def _clips_of(file: Path) -> list[Path]:
    """The towers beside a file of the whole model, that of its own number first."""
    number = file.stem.rpartition("_")[2]
    found = sorted(file.parent.glob("clip_*_openai_state.pt"))
    return sorted(found, key=lambda path: path.name.split("_")[1] != number)


def check_lr_schedules(file: Path) -> Iterator[Check]:
    data = np.load(file)
    for i, meta in enumerate(json.loads(str(data["meta_json"]))):
        config = golden_recipe(meta["solver"])
        ours = torch.from_numpy(learning_rates(config, meta["iters_per_epoch"]))
        yield Check(
            f"{meta['name']}, relative to lr", worst(ours, data[f"lr_{i}"]) / config.lr, 1e-12
        )


def check_get_logits(file: Path) -> Iterator[Check]:
    data = np.load(file)
    for suffix, dtype in DTYPES.items():
        error = 0.0
        for i in range(sum(name.startswith("vid_") for name in data)):
            frames, classes = tensor(data[f"vid_{i}"], dtype), tensor(data[f"cls_{i}"], dtype)
            cosines = class_cosines(video_embeddings(frames), classes)
            error = max(error, worst(cosines, data[f"logits_{i}_{suffix}"]))
        yield Check(f"cosines {suffix}", error, 1e-6 if suffix == "f32" else 1e-12)


def check_frame_indices(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())

    def tested(case: dict[str, Any]) -> bool:
        arguments = case["n"], case["segs"], case["clips"], case["dense"]
        try:
            return clip_indices(*arguments).reshape(-1).tolist() == case["frames"]
        except ValueError:
            return bool(case["error"])

    def dense(case: dict[str, Any]) -> bool:
        start = dense_train_starts(case["n"])
        ends = [dense_train_indices(case["n"], case["segs"], s).tolist() for s in start]
        return [list(start), *ends] == [
            case["start_range"],
            case["frames_at_lo"],
            case["frames_at_hi"],
        ]

    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "val": lambda c: validation_indices(c["n"], c["segs"]).tolist() == c["frames"],
        "test": tested,
        "train_uniform": lambda c: train_ranges(c["n"], c["segs"]).T.tolist() == [c["lo"], c["hi"]],
        "train_dense": dense,
    }
    for kind, agrees in kinds.items():
        wrong = sum(not agrees(case) for case in cases[kind])
        yield Check(f"{kind}: wrong of {len(cases[kind])}", wrong, 0)


def check_preprocess(file: Path) -> Iterator[Check]:
    data = np.load(file)
    names = set(data.files)
    metas = json.loads(str(data["meta_json"]))
    evaluation = [meta for meta in metas if "train" not in meta]
    levels = []
    for i, meta in enumerate(evaluation):
        if f"in_{i}" not in names:
            continue
        frames, size, crops = data[f"in_{i}"], meta["size"], meta["crops"]
        pixels = Preprocessing(size=(size, size)).crop_pixels(frames, crops)
        normalised = evaluation_crops(frames, size, crops)
        levels.append(_levels(data, f"out_{i}", pixels, normalised))
    yield from _level_checks("evaluation crops", levels)
    levels = []
    for meta in metas:
        if "train" not in meta:
            continue
        name, size = f"tr_out_{meta['train']}", meta["size"]
        resized = resized_clip(data[f"tr_in_{meta['train']}"], size)
        width, height = meta["scaled_wh"]
        part = crop_size(width, height, meta["area_fraction"], meta["aspect"], meta["swap"])
        draw = AugmentationDraw(meta["x1"], meta["y1"], *part, meta["flip"], meta["gray"])
        pixels = augmented_pixels(resized, size, draw)
        levels.append(_levels(data, name, pixels, Preprocessing().normalise(pixels)))
    yield from _level_checks("training crops", levels)
    for name in sorted(n for n in names if n.startswith("boxes_")):
        width, height = map(int, name.removeprefix("boxes_").split("x"))
        yield Check(
            f"{name}, distance of distributions",
            _box_distance(data[name].astype(np.int64), width, height),
            SAME_DISTRIBUTION,
        )


def _levels(data: Any, name: str, pixels: Tensor, normalised: Tensor) -> Tensor:
    """Differences in grey levels, from whichever form the file holds."""
    if f"{name}_u8" in data:
        return (pixels.double() - tensor(data[f"{name}_u8"]).double()).abs()
    scale = 255 * torch.tensor(CLIP_STD).view(3, 1, 1)
    return (normalised - tensor(data[name])).abs() * scale


def _level_checks(what: str, differences: list[Tensor]) -> Iterator[Check]:
    if differences:
        largest = max(float(levels.max()) for levels in differences)
        yield Check(f"{what}, grey levels", largest, LEVELS)
        mean = max(float(levels.mean()) for levels in differences)
        yield Check(f"{what}, mean of grey levels", mean, MEAN_LEVELS)


def _box_distance(theirs: Any, width: int, height: int) -> float:
    rng = np.random.default_rng(0)
    draws = [AugmentationDraw.sample(width, height, 224, rng) for _ in range(12_000)]
    ours = np.array([[d.x, d.y, d.x + d.width, d.y + d.height] for d in draws if not d.fitted])
    distance = 0.0
    for number in range(6):
        a, b = (_box_quantity(boxes, number) for boxes in (ours, theirs))
        points = np.union1d(a, b)
        shares = (np.searchsorted(np.sort(v), points, side="right") / len(v) for v in (a, b))
        distance = max(distance, float(np.abs(next(shares) - next(shares)).max()))
    return distance


def _box_quantity(boxes: Any, number: int) -> Any:
    """Left, top, width, height, area or aspect of boxes [n,4]."""
    x1, y1, x2, y2 = boxes.T
    w, h = x2 - x1, y2 - y1
    return (x1, y1, w, h, w * h, w / h)[number]


def check_clip(file: Path) -> Iterator[Check]:
    """`clip_*_io.npz` with every weights file beside it that has its prefix."""
    data = {name: tensor(value) for name, value in np.load(file).items()}
    prefix = file.name.removesuffix("_io.npz")
    for weights in sorted(file.parent.glob(f"{prefix}_openai_*.pt")):
        encoder = load_encoder(weights)
        kind = weights.stem.removeprefix(f"{prefix}_")
        images = encoder.encode_pixels(data["images"])
        yield Check(f"images, {kind}", worst(images, data["image_features"]), 1e-5)
        text = encoder.encode_tokens(data["tokens"])
        yield Check(f"texts, {kind}", worst(text, data["text_features"]), 1e-5)
        prompts, classes, length = data["recipe_tokens"].shape
        raw = encoder.encode_tokens(data["recipe_tokens"].view(-1, length))
        raw = raw.view(prompts, classes, -1)
        features = functional.normalize(functional.normalize(raw, dim=-1).mean(0), dim=-1)
        yield Check(f"prompt features, {kind}", worst(raw, data["recipe_raw"]), 1e-5)
        yield Check(f"class features, {kind}", worst(features, data["recipe_class_features"]), 1e-6)
        scale = abs(encoder.logit_scale / float(data["exp_logit_scale"]) - 1)
        yield Check(f"logit scale, relative, {kind}", scale, 1e-6)


def check_token_hashes(file: Path) -> Iterator[Check]:
    for name, case in json.loads(file.read_text()).items():
        tokens = prompt_tokens(case["classes"])
        digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
        wrong = int(list(tokens.shape) != case["shape"] or digest != case["sha256_int64_C_order"])
        yield Check(f"{name}: hashes that differ", wrong, 0)


def check_tokens(file: Path) -> Iterator[Check]:
    """`tokens_*.npz`; the class names are in e2e/meta.json beside it."""
    meta = json.loads((file.parent / "e2e" / "meta.json").read_text())
    tokens = np.load(file)["tokens"]
    ours = prompt_tokens([*meta["k400_classes"], *meta["zs_classes"]])
    wrong = int((ours != tokens).sum()) if ours.shape == tokens.shape else tokens.size
    yield Check("ids that differ", wrong, 0)


def prompt_tokens(classes: list[str]) -> Any:
    """Tokens of the 28 prompts, int64 [28, classes, 77]."""
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    per_class = [as_prompt_set("mote28").sentences(name) for name in classes]
    return np.stack(
        [tokenizer([texts[prompt] for texts in per_class]).numpy() for prompt in range(28)]
    )


def check_halfclass(file: Path) -> Iterator[Check]:
    data = np.load(file)
    result = half_class_accuracy(tensor(data["vis"]), tensor(data["text"]), data["labels"])
    pairs = {
        "split_top1": result.split_top1,
        "split_top5": result.split_top5,
        "top1_mean": result.mean_top1,
        "top1_std": result.std_top1,
        "top5_mean": result.mean_top5,
        "top5_std": result.std_top5,
        "full_top1": result.full_top1,
        "full_top5": result.full_top5,
    }
    error = max(worst(tensor(value), data[name]) for name, value in pairs.items())
    yield Check("accuracies, per cent", error, 1e-4)


Kinds = Mapping[str, Callable[[Path], Iterator[Check]]]
KINDS: Kinds = {
    "ffn_*.npz": check_ffn,
    "head_*.npz": check_head,
    "trainstep_*.npz": check_trainstep,
    "fullmodel_step_*.npz": check_fullmodel,
    "lr_schedules*.npz": check_lr_schedules,
    "get_logits*.npz": check_get_logits,
    "frame_indices*.json": check_frame_indices,
    "preprocess*.npz": check_preprocess,
    "clip_*_io.npz": check_clip,
    "token_hashes*.json": check_token_hashes,
    "tokens_*.npz": check_tokens,
    "halfclass_*.npz": check_halfclass,
}
"""Check of every kind of file, by the pattern of its name."""


def check_folder(folder: Path, kinds: Kinds = KINDS) -> Iterator[tuple[Path, Check]]:
    """All checks of all golden files in `folder`, in the order of `kinds`."""
    for pattern, check in kinds.items():
        for file in sorted(folder.glob(pattern)):
            for result in check(file):
                yield file, result
