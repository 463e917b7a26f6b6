"""Golden files of DiST recomputed (tests/data/golden_dist/README.md)."""

from __future__ import annotations

import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heads import import_dist_checkpoint
from heads.methods.dist.branch import DistBranch
from heads.methods.dist.config import DistConfig
from heads.methods.dist.model import DistModel
from heads.methods.dist.training import (
    MIRRORED,
    Mix,
    RateSchedule,
    draw_mix,
    mixed,
    parameter_groups,
    pass_order,
    set_rates,
    soft_targets,
    training_step_parts,
)
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.float_frames import FloatDraw, evaluation_floats, random_part, training_floats
from pipeline.prompts import bare_sentence
from pipeline.sampling import dist_test_indices, dist_train_indices
from tests.support.golden.checks import DTYPES, SAME_DISTRIBUTION, Check, tensor, worst

CENTRE = {"hmdb51": "center-fraction"}


def stored(file: Path) -> dict[str, Any]:
    """The arrays of a file, with those of its other half where it is kept in two."""
    data = dict(np.load(file))
    other = file.with_name(file.name.replace("dist_model_", "dist_clip_"))
    if other != file and other.exists():
        data |= np.load(other)
    return data


def below(data: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): tensor(v) for k, v in data.items() if k.startswith(prefix)}


def config_of(c: Mapping[str, Any], **more: Any) -> DistConfig:
    return DistConfig(
        dim=c["E"],
        dense_frames=c["T"],
        alpha=c["a"],
        selected_layers=tuple(c["sel"]),
        integration_dim=c["Di"],
        temporal_dim=c["Dt"],
        pooling_layers=c["pool"],
        stem_kernel=c["tps"],
        temporal_kernel=c["tk"],
        temporal_ratio=c["tmr"],
        integration_ratio=c["imr"],
        integration_temporal_ratio=c["itmr"],
        **more,
    )


def encoder_of(clip: Mapping[str, Tensor]) -> Encoder:
    """The whole CLIP, as a user loads it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.pt"
        torch.save(dict(clip), file)
        return load_encoder(file, precision="fp32")


def model_of(data: Mapping[str, Any]) -> tuple[DistModel, Encoder, dict[str, Any]]:
    """The model of a `dist_model_*` file, its CLIP, and its configuration."""
    config = json.loads(str(data["config_json"]))
    encoder = encoder_of(below(data, "clip/"))
    scale = tensor(data["clip/logit_scale"]).float()
    model = DistModel(encoder.image_tower, config_of(config), scale)
    model.branch.load_state_dict(below(data, "dist/"))
    return model.eval(), encoder, config


def clips_of(video: Any, dtype: torch.dtype) -> Tensor:
    """[B,3,T',H,W] as our [B,T',3,H,W]."""
    return tensor(video, dtype).transpose(1, 2)


def check_model(file: Path) -> Iterator[Check]:
    data = stored(file)
    model, encoder, _ = model_of(data)
    for suffix, dtype in DTYPES.items():
        model = model.to(dtype)
        encoder.model.to(dtype)
        frames = clips_of(data["video"], dtype)
        with torch.no_grad():
            text = encoder.encode_tokens(tensor(data["tokens"]).long())
            v = model.video_features(frames)
            logits, ensemble = model(frames, text), model.zero_shot_logits(frames, text)
            found = {
                "text_features": text,
                "frame_embed": model.frame_embeddings(frames).flatten(0, 1),
                "v": v,
                "vid_logits": nn.functional.normalize(v, dim=-1),
                "logits": logits,
                "prob": logits.softmax(-1),
                "logits_zeroshot": ensemble,
                "prob_zeroshot": ensemble.softmax(-1),
            }
        for name, got in found.items():
            limit = 1e-10 if suffix == "f64" else 2e-5
            yield Check(f"{name} {suffix}", worst(got, data[f"{name}_{suffix}"]), limit)


def check_intermediates(file: Path) -> Iterator[Check]:
    """Every step inside the f64 run, found by hooks on the parts that make it."""
    stem = file.name.removeprefix("dist_intermediates_").removesuffix(".npz")
    source = stored(file.with_name(f"dist_model_{stem}.npz"))
    model, _, _ = model_of(source)
    model = model.double()
    found = inner_values(model, clips_of(source["video"], torch.float64))
    for name, expected in np.load(file).items():
        got = found[name.removeprefix("int/")]
        unit = max(float(np.abs(expected).max()), 1e-30)
        yield Check(name, worst(got, expected) / unit, 1e-6)


def inner_values(model: DistModel, frames: Tensor) -> dict[str, Tensor]:
    """What the parts of the model give out for `frames`, in the layouts of the golden files."""
    found: dict[str, Tensor] = {}
    kept: dict[str, Any] = {}
    branch, blocks = model.branch, list(model.image_tower.transformer.resblocks)

    def maps(x: Tensor) -> Tensor:  # [B,T,G,G,C] -> [B,C,T,G,G]
        return x.permute(0, 4, 1, 2, 3)

    def tokens(x: Tensor) -> Tensor:  # [B,T,M,C] or [B*T,M,C] -> [M,B*T,C]
        return (x.flatten(0, 1) if x.ndim == 4 else x).transpose(0, 1)

    def keep(name: str, layout: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def hook(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept[name] = inputs
            found[name] = layout(output.clone())

        return hook

    handles = []

    def watch(part: nn.Module, name: str, layout: Callable[[Tensor], Tensor]) -> None:
        handles.append(part.register_forward_hook(keep(name, layout)))

    for i, block in enumerate(blocks):
        watch(block, f"f{i}", tokens)
    for i in range(len(branch.temporal_nets)):
        watch(branch.temporal_nets[i], f"L{i}/temporal_out", maps)
        watch(branch.temporal2integration_nets[i], f"L{i}/u", tokens)
        watch(branch.integration_nets[i].ffn, f"L{i}/ffn", tokens)
        watch(branch.integration_nets[i], f"L{i}/r", tokens)
    for j, block in enumerate(branch.adapooling_nets):
        watch(block.spatial_transformer.attn, f"P{j}/spatial_attn", lambda x: x.transpose(0, 1))
        watch(block.temporal_transformer.attn, f"P{j}/temporal_attn", lambda x: x.transpose(0, 1))
        watch(block.output_map_spatial_cls_token, f"P{j}/s", lambda x: x)
        watch(block.ln_out_spat_cls_token, f"P{j}/q_s", lambda x: x)
        watch(block.output_map_cls_token, f"P{j}/t", lambda x: x)
        watch(block.ln_out_temp_cls_token, f"P{j}/q_t", lambda x: x)
    watch(branch.proj_spatial_cls_token, "cls_skip", lambda x: x)
    watch(branch.ln_post, "ln_post", lambda x: x)
    watch(model.image_tower.ln_post, "vit_ln_post_cls", lambda x: x)
    with torch.no_grad():
        model.zero_shot_logits(frames, frames.new_ones(1, model.config.dim))
        found["stem"] = maps(branch.stem(frames))
        found["vit_in"] = tokens(kept["f0"][0])
        last = len(branch.temporal_nets) - 1
        for i in range(last + 1):
            joined = kept[f"L{i}/r"][0]
            found[f"L{i}/m_plus"] = tokens(joined)
            found[f"L{i}/m"] = found[f"L{i}/m_plus"] - found[f"L{i}/u"]
            mapped = found[f"L{i}/m"].transpose(0, 1).unflatten(0, joined.shape[:2])
            found[f"L{i}/to_temporal"] = maps(branch.integration2temporal_nets[i](mapped))
        found["F"] = found[f"L{last}/r"] + found[f"L{last}/m_plus"]
        for j in range(len(branch.adapooling_nets)):
            for side, feed in (("q_s", "s"), ("q_t", "t")):
                query = kept[f"P{j}/{side}"][0] + found[f"P{j}/{feed}"]
                found[f"P{j}/{side}"] = query.transpose(0, 1)
    for handle in handles:
        handle.remove()
    return found


def compact_sums(got: Tensor | None, sums: Any) -> float:
    """The error of a tensor's sum, length and cosine sum, per entry in units of its largest."""
    assert got is not None
    flat = got.detach().double().reshape(-1)
    k = torch.arange(len(flat), dtype=torch.float64)
    found = torch.stack([flat.sum(), flat.norm(), (flat * k.cos()).sum()])
    unit = max(float(flat.abs().max()), 1e-30)
    return worst(found, sums) / unit / math.sqrt(len(flat))


def compact_error(got: Tensor, entries: Any, sums: Any) -> float:
    """The error of a tensor against a compact record, in units of its largest entry."""
    flat = got.detach().double().reshape(-1)
    step = math.ceil(len(flat) / 100)
    unit = max(float(flat.abs().max()), 1e-30)
    return max(worst(flat[::step], entries) / unit, compact_sums(got, sums))


def compact(got: Mapping[str, Tensor], data: Mapping[str, Any], what: str) -> float:
    """The largest error over tensors, each relative to its largest entry."""
    names = [k.removeprefix(f"{what}_sub/") for k in data if k.startswith(f"{what}_sub/")]
    assert names
    return max(
        compact_error(got[name], data[f"{what}_sub/{name}"], data[f"{what}_chk/{name}"])
        for name in names
    )


def check_branch(file: Path) -> Iterator[Check]:
    data = stored(file)
    weights = stored(file.with_name(file.name.replace("branch", "model")))
    model, _, config = model_of(weights)
    for suffix, dtype in DTYPES.items():
        branch = model.to(dtype).branch
        features = {
            number: value.to(dtype).transpose(0, 1).requires_grad_()
            for number, value in below(data, "feat/").items()
        }
        images = tensor(data["images"], dtype).unflatten(0, (-1, config["T"])).requires_grad_()
        v = branch(images, [features[str(number)] for number in config["sel"]])
        exact = suffix == "f64"
        yield Check(f"v {suffix}", worst(v, data[f"v_{suffix}"]), 1e-10 if exact else 2e-5)
        branch.zero_grad()
        (v * tensor(data["cotangent"], dtype)).sum().backward()
        sums = compact_sums(images.grad, data[f"grad_images_chk_{suffix}"])
        yield Check(f"gradient of the images {suffix}", sums, 1e-9 if exact else 2e-5)
        if not exact:
            continue
        gradients = {n: p.grad for n, p in branch.named_parameters() if p.grad is not None}
        without = sorted({n for n, _ in branch.named_parameters()} - set(gradients))
        differ = set(without) ^ set(json.loads(str(data["no_grad_names"])))
        yield Check("parameters without gradient that differ", len(differ), 0)
        yield Check("gradients f64", compact(gradients, data, "grad_f64"), 1e-9)
        error = 0.0
        for number, value in features.items():
            expected = data[f"grad_feat/{number}_f64"]
            assert value.grad is not None
            unit = float(np.abs(expected).max())
            error = max(error, worst(value.grad.transpose(0, 1), expected) / unit)
        yield Check("gradients of the features, rounded to float32", error, 1e-6)


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


def check_frame_indices(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())
    wrong = sum(
        dist_test_indices(c["n"], c["T"], c["views"])[c["view"]].tolist() != c["frames"]
        for c in cases["eval"]
    )
    yield Check(f"evaluation: wrong of {len(cases['eval'])}", wrong, 0)
    wrong = 0
    for c in cases["train"]:
        draws = {"frames": c["u"], "lowest": [0.0] * c["T"], "highest": [1.0] * c["T"]}
        wrong += sum(
            dist_train_indices(c["n"], c["T"], u).tolist() != c[key] for key, u in draws.items()
        )
    yield Check(f"training: wrong of {len(cases['train'])}", wrong, 0)


def check_preprocess(file: Path) -> Iterator[Check]:
    data = np.load(file)
    error = 0.0
    for meta in json.loads(str(data["meta_json"])):
        i, crops = meta["index"], meta["crops"]
        more = {"scale": meta["test_scale"], "style": meta["style"]}
        got = evaluation_floats(data[f"in_{i}"], meta["crop"], crops, **more).transpose(1, 2)
        if f"out_{i}" in data:
            error = max(error, worst(got, data[f"out_{i}"]))
        else:
            error = max(error, worst(got[0, :, 0, ::16], data[f"out_{i}_row"]))
            error = max(error, compact_sums(got, data[f"out_{i}_chk"]))
    yield Check("evaluation crops", error, 1e-6)
    error = 0.0
    for meta in json.loads(str(data["train_json"])):
        draws = meta["draws_in_order"]
        box = next(d[1:] for d in draws if d[0] == "crop_top_left_h_w")
        grey = [d[-1] for d in draws if d[0] == "uniform"][1] < meta["grayscale_p"]
        flip = any(d[1] < 0.5 for d in draws if d[0] == "random")
        draw = FloatDraw(*box, flip_first=flip, grey=grey)
        got = training_floats(data[f"tr_in_{meta['index']}"], meta["size"], draw)
        error = max(error, worst(got.transpose(0, 1), data[f"tr_out_{meta['index']}"]))
    yield Check("training crops", error, 1e-6)
    for name in sorted(n for n in data.files if n.startswith("boxes_")):
        height, width = map(int, name.removeprefix("boxes_").split("x"))
        rng = np.random.default_rng(0)
        ours = np.array([random_part(height, width, rng) for _ in range(40_000)], np.float64)
        distance = box_distance(ours, data[name].astype(np.float64))
        yield Check(f"{name}, distance of distributions", distance, SAME_DISTRIBUTION)
    yield from _check_mixing(data)
    wrong = 0
    for u, cases in json.loads(str(data["flip_json"])).items():
        for before, after, flipped, _ in cases:
            assert flipped == (float(u) < 0.5)
            wrong += (MIRRORED.get(before, before) if flipped else before) != after
    yield Check("labels of mirrored clips that differ", wrong, 0)


def box_distance(ours: Any, theirs: Any) -> float:
    """The largest distance of the distributions of top, left, height, width, area, aspect."""
    distance = 0.0
    for of in (
        *(lambda b, i=i: b[:, i] for i in range(4)),
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
    ):
        a, b = of(ours), of(theirs)
        points = np.union1d(a, b)
        shares = [np.searchsorted(np.sort(v), points, side="right") / len(v) for v in (a, b)]
        distance = max(distance, float(np.abs(shares[0] - shares[1]).max()))
    return distance


def _check_mixing(data: Any) -> Iterator[Check]:
    errors = {"mixed clips": 0.0, "mixed targets": 0.0, "shares": 0.0}
    alphas = {"both": (0.8, 1.0), "mixup": (0.8, 0.0), "cutmix": (0.0, 1.0)}
    for meta in json.loads(str(data["mix_json"])):
        i = meta["index"]
        frames, labels = tensor(data[f"mix_in_{i}"]).float(), tensor(data[f"mix_labels_{i}"])
        mixup, cutmix = alphas[meta["mode"]]
        seeded = np.random.RandomState(meta["numpy_seed"])
        mix = draw_mix(seeded, *frames.shape[-2:], mixup=mixup, cutmix=cutmix)
        assert mix is not None
        expected = data[f"mix_targets_{i}"]
        targets = soft_targets(labels, expected.shape[1], meta["smoothing"], mix)
        for name, error in zip(
            errors,
            (
                worst(mixed(frames, mix), data[f"mix_out_{i}"]),
                worst(targets, expected),
                abs(mix.share - meta.get("lam_used", meta["lam_drawn"])),
            ),
            strict=True,
        ):
            errors[name] = max(errors[name], error)
    smooth = soft_targets(tensor(data["smooth_labels"]), data["smooth_targets"].shape[1], 0.1)
    errors["smoothed targets"] = worst(smooth, data["smooth_targets"])
    for name, error in errors.items():
        yield Check(name, error, 1e-6)


def check_tokens(file: Path) -> Iterator[Check]:
    import open_clip

    data = np.load(file)
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    names = json.loads(str(data["names_json"]))
    wrong = 0
    for k, prefix in enumerate(json.loads(str(data["prefixes_json"]))):
        ours = tokenizer([bare_sentence(name, prefix) for name in names]).numpy()
        wrong += int((ours != data[f"tokens_prefix_{k}"]).sum())
    yield Check("ids that differ", wrong, 0)


def check_parameters(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())
    towers = {"b16": (768, 16, 12, 512), "l14": (1024, 14, 24, 768)}
    for name, case in cases.items():
        size, frames, pool = name.split("_")[:3]
        width, patch, blocks, dim = towers[size]
        dense = int(frames.rstrip("f").split("+")[1])
        config = DistConfig(dim=dim, dense_frames=dense, pooling_layers=int(pool[-1]))
        with torch.device("meta"):
            branch = DistBranch(config.for_backbone(width, patch, blocks, dim))
        counts: dict[str, int] = {}
        for key, value in branch.named_parameters():
            part = key.partition(".")[0]
            counts[part] = counts.get(part, 0) + value.numel()
        wrong = sum(counts.get(part) != count for part, count in case["parts"].items())
        wrong += sum(counts.values()) != case["total"]
        wrong += len(list(branch.parameters())) != case["tensors"]
        yield Check(f"{name}: counts that differ", wrong, 0)
        if "parameters" not in case:
            continue
        branch = branch.to_empty(device="cpu")
        branch.reset_parameters(torch.Generator().manual_seed(0))
        ours = dict(branch.named_parameters())
        listed = [[n, list(shape)] for n, shape, *_ in case["parameters"]]
        found = [[n, list(value.shape)] for n, value in ours.items()]
        yield Check(f"{name}: names and shapes that differ", int(listed != found), 0)
        error = 0.0
        for key, _, mean, std, _ in case["parameters"]:
            value = ours[key].detach()
            if not std:
                error = max(error, float((value - mean).abs().max()))
            elif value.numel() > 10_000:  # of fewer numbers chance moves it by more
                error = max(error, abs(float(value.std()) / std - 1))
        yield Check(f"{name}: spread of first weights, relative", error, 0.05)


def check_sampler(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())
    wrong = sum(
        pass_order(c["dataset_len"], c["folds"], c["replicas"], c["rank"], c["epoch"])
        != c["indices"]
        for c in cases
    )
    yield Check(f"orders: wrong of {len(cases)}", wrong, 0)


CHECKPOINTS = {
    "train": "checkpoint_epoch_00002.pyth",
    "released": "DIST_tiny_released_layout.pyth",
    "branch": "DIST_tiny_branch_only.pyth",
}


def check_checkpoints(file: Path) -> Iterator[Check]:
    """`ckpt/expected.npz`, with every kind of file in the archive beside it."""
    data = stored(file)
    clip = below(data, "clip/")
    frames, tokens = clips_of(data["video"], torch.float32), tensor(data["tokens"]).long()
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(file.with_name("checkpoints.zip")).extractall(folder)
        for kind, name in CHECKPOINTS.items():
            given = clip if kind == "branch" else None
            found = import_dist_checkpoint(Path(folder) / name, given)
            text = encoder_of(found.clip_state).encode_tokens(tokens)
            with torch.no_grad():
                unit = nn.functional.normalize(found.model.video_features(frames), dim=-1)
                results = {
                    "logits": found.model(frames, text),
                    "logits_zeroshot": found.model.zero_shot_logits(frames, text),
                    "video_embed_normalised": unit,
                }
            for what, got in results.items():
                yield Check(f"{kind}: {what} f32", worst(got, data[f"{what}_{kind}"]), 2e-5)
            wanted = json.loads(str(data["config_json"]))
            sizes = {"width": wanted["vw"], "patch": wanted["patch"]}
            wrong = int(found.config != config_of(wanted, **sizes))
            yield Check(f"{kind}: sizes that differ", wrong, 0)


def e2e_clip(folder: Path) -> dict[str, Tensor]:
    """The CLIP of the run on videos, with its whole vocabulary."""
    state = below(np.load(folder / "tinyclip_state.npz"), "")
    rows, values = state.pop("token_embedding_rows"), state.pop("token_embedding_values")
    vocabulary = json.loads((folder / "meta.json").read_text())["config"]["vocab"]
    table = torch.zeros(vocabulary, values.shape[1], dtype=values.dtype)
    table[rows.long()] = values
    return {**state, "token_embedding.weight": table}


def e2e_state(folder: Path) -> dict[str, Any]:
    """The branch of the run on videos, as a checkpoint that holds the branch alone."""
    branch = below(np.load(folder / "branch_state.npz"), "")
    return {
        "model_state": {f"backbone.base_encoder.dist_net.{n}": v for n, v in branch.items()},
    }


def check_e2e(file: Path) -> Iterator[Check]:
    """`e2e/run_*.npz`: frames, crops, model, ensemble and fusion, from the videos' pixels."""
    meta = json.loads((file.parent / "meta.json").read_text())
    run = meta["runs"][file.stem.removeprefix("run_")]
    expected, clip = np.load(file), e2e_clip(file.parent)
    model = import_dist_checkpoint(e2e_state(file.parent), clip).model
    names = [bare_sentence(name) for name in meta[run["classes"]]]
    text = encoder_of(clip).encode_text(names)
    size = meta["config"]["res"]
    style = CENTRE.get(run["dataset_style"], "short-side")
    more = {"style": style, "scale": 224 if style == CENTRE["hmdb51"] else size}
    videos = np.load(file.parent / "videos.npz")
    errors = {"frames that differ": 0.0}
    fused = []
    for n, name in enumerate(meta["video_names"]):
        video = videos[name]
        chosen = dist_test_indices(len(video), meta["config"]["T"], run["clips"])
        theirs = json.loads(str(expected["frames_json"]))[n]
        views = [video[frames] for frames in chosen for _ in range(run["crops"])]
        errors["frames that differ"] += theirs != [
            list(map(int, frames)) for frames in chosen for _ in range(run["crops"])
        ]
        pixels = torch.stack(
            [
                evaluation_floats(view, size, run["crops"], **more)[k % run["crops"]]
                for k, view in enumerate(views)
            ]
        )
        with torch.no_grad():
            score = model.zero_shot_logits if run["zeroshot"] else model
            logits = score(pixels, text)
            unit = nn.functional.normalize(model.video_features(pixels), dim=-1)
            embeddings = model.frame_embeddings(pixels)
            if run["zeroshot"]:  # the released code has scaled them by then
                embeddings = nn.functional.normalize(embeddings, dim=-1)
            found = {
                "logits": logits,
                "view_prob": logits.softmax(-1),
                "video_embed_normalised": unit,
                "frame_embed": embeddings,
            }
        for what, got in found.items():
            errors[what] = max(errors.get(what, 0.0), worst(got, expected[what][n]))
        fused.append(logits.softmax(-1).sum(0))
    total, labels = torch.stack(fused), tensor(expected["labels"])
    errors["fused"] = worst(total, expected["fused"])
    errors["text_features"] = worst(text, expected["text_features"])
    best = total.topk(5, -1).indices == labels[:, None]
    for k in (1, 5):
        found_rate = 100 * float(best[:, :k].any(-1).double().mean())
        errors[f"top{k}"] = abs(found_rate - float(expected[f"top{k}"]))
    limits = {"frames that differ": 0.0, "fused": 1e-5, "top1": 1e-4, "top5": 1e-4}
    for what, error in errors.items():
        yield Check(what, float(error), limits.get(what, 2e-5))


DIST_KINDS: dict[str, Callable[[Path], Iterator[Check]]] = {
    "dist_model_*.npz": check_model,
    "dist_intermediates_*.npz": check_intermediates,
    "dist_branch_*.npz": check_branch,
    "dist_trainstep_*.npz": check_trainstep,
    "dist_lr_schedules*.npz": check_lr_schedules,
    "dist_frame_indices*.json": check_frame_indices,
    "dist_preprocess*.npz": check_preprocess,
    "dist_tokens*.npz": check_tokens,
    "dist_parameters*.json": check_parameters,
    "dist_sampler*.json": check_sampler,
    "ckpt/expected.npz": check_checkpoints,
    "e2e/run_*.npz": check_e2e,
}
"""Check of every kind of file, by the pattern of its name."""
