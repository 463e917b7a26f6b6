"""Golden files of TACO recomputed (tests/data/golden_taco/README.md)."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from featstore import UserError
from heads import import_taco_checkpoint
from heads.evaluation.protocols.half_class import half_class_accuracy
from heads.methods.taco import (
    Projection,
    WeightMean,
    class_features,
    draw_anchors,
    few_shot_positions,
    relative_structure_loss,
    training_step_parts,
    update_teacher,
)
from heads.methods.taco.config import TacoConfig
from heads.methods.taco.head import TacoHead
from heads.methods.taco.official import WHICH
from heads.methods.text_classifier import class_cosines, video_embeddings
from heads.scoring.scores import fuse_views, percent, ranks
from heads.training.config import TrainConfig
from heads.training.schedule import build_optimizer, learning_rates
from pipeline.clip_encoder import Encoder
from pipeline.encoders.sources import clip_of_state
from pipeline.prompts import PROMPT_SETS
from pipeline.sampling import parse_sampling
from tests.support.golden.checks import DTYPES, Check, Kinds, tensor, worst
from tests.support.golden.dist.model import below

HEAD = "vision_proj."
VOCABULARY = 49408
KEY_THIRD = "in_proj_bias"
"""Its middle third has no gradient but rounding, of which Adam makes whole steps."""


def stored(file: Path) -> dict[str, Any]:
    """The arrays of a file, with the weights that lie in a file of their own."""
    data = dict(np.load(file))
    other = file.with_name(file.name.replace("taco_trainstep_", "taco_start_"))
    if other != file and other.exists():
        data |= np.load(other)
    return data


def head_of(weights: Mapping[str, Tensor], dim: int, dtype: torch.dtype) -> TacoHead:
    """The head with weights in official names; none: without a projection."""
    head = TacoHead(TacoConfig(dim=dim, projection=bool(weights)), 0)
    if head.projection is not None:
        head.projection.load_state_dict({k.removeprefix(HEAD): v for k, v in weights.items()})
    return head.to(dtype)


def relative(got: Tensor | None, expected: Any) -> float:
    """The error in units of the largest expected entry."""
    assert got is not None
    unit = max(float(np.abs(np.asarray(expected)).max()), 1e-30)
    return worst(got.double(), np.asarray(expected)) / unit


def check_anchors(file: Path) -> Iterator[Check]:
    data = np.load(file)
    count, dim = data["raw"].shape
    torch.manual_seed(int(data["torch_seed"]))
    yield Check("draws", worst(torch.randn(count, dim), data["raw"]), 0)
    torch.manual_seed(int(data["torch_seed"]))
    anchors = draw_anchors(count, dim)
    yield Check("anchors", worst(anchors, data["anchors"]), 1e-7)
    yield Check("mean of anchors", worst(anchors.mean(0), data["mean"]), 1e-7)
    gram = anchors.double().T @ anchors.double()
    yield Check("products of anchors", worst(gram, data["gram"]), 1e-5)


def check_projection(file: Path) -> Iterator[Check]:
    data = np.load(file)
    dim = data["x"].shape[-1]
    torch.manual_seed(int(data["init_torch_seed"]))
    new = Projection(dim)
    first = {HEAD + name: value for name, value in new.state_dict().items()}
    wanted = below(data, "init/")
    yield Check("names that differ", len(first.keys() ^ wanted.keys()), 0)
    yield Check("first weights", max(worst(first[k], v) for k, v in wanted.items()), 0)
    x = tensor(data["x"]).float()
    yield Check("what a new one adds", worst(new(x), x), 0)
    for suffix, dtype in DTYPES.items():
        head = head_of(below(data, "param/"), dim, dtype)
        x, text = tensor(data["x"], dtype), tensor(data["text"], dtype)
        assert head.projection is not None
        found = {
            "out": head.projection(x),
            "cosines_train": class_cosines(video_embeddings(head.projection(x)), text),
            "cosines_eval": head(x, text),
            "cosines_without": class_cosines(video_embeddings(x), text),
        }
        for name, got in found.items():
            limit = 1e-12 if suffix == "f64" else 1e-6
            yield Check(f"{name} {suffix}", worst(got, data[f"{name}_{suffix}"]), limit)
        head.shrink(1)
        error = worst(head(x, text), data[f"cosines_without_{suffix}"])
        yield Check(f"cosines of a head shrunk to nothing {suffix}", error, limit)


def check_loss(file: Path) -> Iterator[Check]:
    data = np.load(file)
    dim = data["student_frames"].shape[-1]
    for suffix, dtype in DTYPES.items():
        exact = suffix == "f64"
        head = head_of(below(data, "param/"), dim, dtype)
        names = ("student_frames", "student_text", "logit_scale")
        leaves = {name: tensor(data[name], dtype).requires_grad_() for name in names}
        frames, text, scale = leaves.values()
        others = [tensor(data[f"teacher_{what}"], dtype) for what in ("frames", "text")]
        anchors = tensor(data["anchors"])
        labels = tensor(data["labels"])
        parts = training_step_parts(head, frames, text, *others, labels, anchors, scale)
        found = {
            "scaled_cosines": parts.logits,
            "scaled_student": parts.student,
            "scaled_teacher": parts.teacher,
            "ce": parts.ce,
            "kl": parts.kl,
            "total": parts.total,
        }
        for name, got in found.items():
            limit = 1e-12 if exact else 1e-4 if name == "kl" else 1e-5
            yield Check(f"{name} {suffix}", relative(got, data[f"{name}_{suffix}"]), limit)
        alone = relative_structure_loss(
            parts.video, text, others[0].mean(1), others[1], anchors, scale
        )
        error = relative(alone, data[f"kl_{suffix}"])
        yield Check(f"relative_structure_loss {suffix}", error, 1e-12 if exact else 1e-4)
        ours: dict[str, Tensor] = {**leaves}
        ours |= {
            name.replace("projection.", f"head.{HEAD}"): p for name, p in head.named_parameters()
        }
        parts.total.backward(retain_graph=True)
        for name, value in ours.items():
            # where the published gradient is NaN, ours must be that of float64
            key = f"grad_{suffix}/{name}"
            expected = data[key if key in data.files else f"grad_f64/{name}"]
            error = relative(value.grad, expected)
            yield Check(f"gradient of {name} {suffix}", error, 1e-10 if exact else 1e-4)
        if exact:
            whole = parts.kl, parts.ce
            (kl, ce), weight = (grad_of(x, scale) for x in whole), head.config.distillation_weight
            held = parts.student.detach(), parts.teacher
            log_p = held[1].log_softmax(-1)
            target = (log_p.exp() * (log_p - held[0].log_softmax(-1))).sum(-1).mean()
            through = grad_of(target, scale)
            split = torch.stack([ce, weight * (kl - through), weight * through])
            error = relative(split, data["grad_logit_scale_parts_f64"])
            yield Check("parts of the gradient of logit_scale f64", error, 1e-10)


def grad_of(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def probes(value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A tensor's entries in steps, and its sum, length and cosine sum, in float64.

    About 120 or 24 entries are recorded, or all; `count` says which.
    """
    flat = value.detach().double().reshape(-1)
    steps = (1, math.ceil(len(flat) / 120), math.ceil(len(flat) / 24))
    step = next((s for s in steps if math.ceil(len(flat) / s) == count), 1)
    k = torch.arange(len(flat), dtype=torch.float64)
    return flat[::step], torch.stack([flat.sum(), flat.norm(), (flat * k.cos()).sum()])


def probed(
    got: Mapping[str, Tensor],
    data: Mapping[str, Any],
    what: str,
    unit: Callable[[str, Tensor], float],
    *,
    without: str = "no name has this",
) -> tuple[float, float]:
    """The largest errors of entries, in units of `unit`, and of sums, relative.

    Of tensors whose name contains `without` only two thirds of the entries count.
    """
    names = [k.removeprefix(f"{what}_sub/") for k in data if k.startswith(f"{what}_sub/")]
    assert names
    entries = sums = 0.0
    for name in names:
        wanted, sums_wanted = (tensor(data[f"{what}_{kind}/{name}"]) for kind in ("sub", "chk"))
        found, sums_found = probes(got[name], len(wanted))
        keep = torch.ones(len(found), dtype=torch.bool)
        if without in name:
            assert len(found) % 3 == 0, "every entry is kept"
            keep[len(found) // 3 : 2 * len(found) // 3] = False
        else:
            flat = math.sqrt(got[name].numel()) * max(float(got[name].detach().abs().max()), 1e-30)
            sums = max(sums, worst(sums_found, sums_wanted) / flat)
        error = worst(found[keep], wanted[keep].double()) / unit(name, wanted)
        entries = max(entries, error)
    return entries, sums


def largest(name: str, wanted: Tensor) -> float:
    return max(float(wanted.abs().max()), 1e-30)


def official_parameters(clip: nn.Module, head: TacoHead) -> dict[str, nn.Parameter]:
    ours = {f"clip.{name}": p for name, p in clip.named_parameters()}
    return ours | {
        name.replace("projection.", f"head.{HEAD}"): p for name, p in head.named_parameters()
    }


def of_texts(names: Iterable[str]) -> list[str]:
    from heads.methods.clip_tensors import is_text

    return [name for name in names if is_text(name)]


def check_trainstep(file: Path) -> Iterator[Check]:
    data = stored(file)
    solver = json.loads(str(data["solver"]))
    config = TrainConfig(
        epochs=solver["epochs"],
        warmup_epochs=float(solver["warm"]),
        lr=solver["lr"],
        logit_scale_lr_ratio=solver["ratio"],
        weight_decay=solver["wd"],
        accumulation=solver["acc"],
        lr_refresh=10,
        precision="fp32",
    )
    for suffix, dtype in DTYPES.items():
        yield from _run_steps(data, solver, config, suffix, dtype)


def _run_steps(
    data: Mapping[str, Any],
    solver: Mapping[str, Any],
    config: TrainConfig,
    suffix: str,
    dtype: torch.dtype,
) -> Iterator[Check]:
    exact, acc = suffix == "f64", config.accumulation
    clip = (
        clip_of_state(below(data, "param/"), "tiny", tuned=True)
        .model.to(dtype)
        .requires_grad_(True)
    )
    teacher = copy.deepcopy(clip).requires_grad_(False)
    for name, value in teacher.named_parameters():
        value.copy_(tensor(data[f"teacher0/{name}"], dtype))
    if solver["fix_text"]:
        for name in of_texts(dict(clip.named_parameters())):
            clip.get_parameter(name).requires_grad_(False)
    weights = below(data, "head/")
    head = head_of(weights, data["anchors"].shape[-1], dtype).train()
    optimizer = build_optimizer(head, clip.parameters(), config)
    groups = [
        {
            **{key: group[key] for key in ("weight_decay", "eps")},
            "betas": list(group["betas"]),
            "tensors": len(group["params"]),
        }
        for group in optimizer.param_groups
    ]
    theirs = [{k: v for k, v in g.items() if k != "lr"} for g in json.loads(str(data["groups"]))]
    yield Check(f"parameter groups that differ {suffix}", int(groups != theirs), 0)
    rates = learning_rates(config, solver["ipe"])[solver["epoch"]]
    errors: dict[str, float] = {}

    def note(name: str, error: float) -> None:
        errors[name] = max(errors.get(name, 0.0), error)

    def features(model: Any, frames: Tensor) -> Tensor:
        images: Tensor = model.visual(frames.flatten(0, 1))
        return images.unflatten(0, frames.shape[:2])

    def texts(model: Any) -> Tensor:
        tokens = tensor(data["tokens"])
        return class_features(torch.stack([model.encode_text(part) for part in tokens]))

    named = official_parameters(clip, head)
    steps, last = 0, len(data["frames"]) - 1
    for i, batch in enumerate(data["frames"]):
        frames = tensor(batch, dtype)
        v, c = features(clip, frames), texts(clip)
        update_teacher(
            dict(teacher.named_parameters()), dict(clip.named_parameters()), solver["beta"]
        )
        with torch.no_grad():
            vt, ct = features(teacher, frames), texts(teacher)
        parts = training_step_parts(
            head, v, c, vt, ct, tensor(data["labels"][i]), tensor(data["anchors"][i]),
            clip.logit_scale,
        )  # fmt: skip
        (parts.total / acc).backward()
        compared = {
            "scaled_student": (parts.student, i),
            "scaled_teacher": (parts.teacher, i),
            "ce": (parts.ce, i),
            "kl": (parts.kl, i),
            "loss": (parts.total / acc, i),
            "scale": (clip.logit_scale.exp(), i),
        }
        if i == 0:
            first = {
                "image_features0": v,
                "text_features0": c,
                "projected0": v if head.projection is None else head.projection(v),
                "cosines0": parts.logits / clip.logit_scale.exp(),
                "teacher_text_features0": ct,
            }
            compared |= {name: (value, None) for name, value in first.items()}
        if i == last:
            compared["teacher_text_featuresK"] = (ct, None)
        held = data[f"teacher_image_features_{suffix}"]
        place = i if len(held) == last + 1 else {0: 0, last: len(held) - 1}.get(i)
        if place is not None:
            note("teacher_image_features", relative(vt, held[place]))
        for name, (got, at) in compared.items():
            wanted = data[f"{name}_{suffix}"]
            note(name, relative(got, wanted if at is None else wanted[at]))
        if (i + 1) % acc == 0:
            if steps == 0:
                grads = {n: p.grad for n, p in named.items() if p.grad is not None}
                wanted_names = {k.partition("/")[2] for k in data if k.startswith("grad_f64_sub/")}
                note("tensors with a gradient that differ", len(grads.keys() ^ wanted_names))
                found = probed(grads, data, "grad_f64", largest)
                note("gradients", found[0])
                note("sums of gradients", found[1])
            for group, rate in zip(optimizer.param_groups, rates[steps], strict=True):
                group["lr"] = float(rate)
            note("learning rates", worst(tensor(rates[steps]), data["lrs"][steps]) / config.lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bases = {"clip": config.lr * config.logit_scale_lr_ratio, "head": config.lr}

            def rate_of(name: str, wanted: Tensor, bases: dict[str, float] = bases) -> float:
                return 1.0 if exact else bases[name.partition(".")[0]]

            if steps == 0:
                note_pair = probed(named, data, "after1_f64", rate_of, without=KEY_THIRD)
                note("parameters after one step", note_pair[0])
                note("sums of parameters", note_pair[1])
            steps += 1
        if i == last:
            found = probed(named, data, "afterK_f64", rate_of, without=KEY_THIRD)
            note("parameters after all steps", found[0])
            note("sums of parameters", found[1])
            kept = dict(teacher.named_parameters())
            found = probed(kept, data, "teacherK_f64", lambda n, w: 1.0, without=KEY_THIRD)
            note("teacher", found[0])
            note("sums of the teacher", found[1])
    limits = {"learning rates": 1e-12, "tensors with a gradient that differ": 0}
    if exact:
        limits |= {
            **dict.fromkeys(("gradients", "teacher"), 1e-7) | {"teacher": 1e-9},
            **dict.fromkeys((n for n in errors if n.startswith("sums")), 1e-5),
        }
    else:
        limits |= {
            "gradients": 5e-5,
            "teacher": 2e-5,
            "parameters after one step": 0.25,
            "parameters after all steps": 0.25,
            **dict.fromkeys((n for n in errors if n.startswith("sums")), 1e-4),
        }
    for name, error in errors.items():
        yield Check(f"{name} {suffix}", error, limits.get(name, 1e-9 if exact else 1e-4))


def check_lr_schedules(file: Path) -> Iterator[Check]:
    data = np.load(file)
    for i, meta in enumerate(json.loads(str(data["meta"]))):
        solver = meta["solver"]
        config = TrainConfig(
            epochs=solver["epochs"],
            warmup_epochs=float(solver["warm"]),
            lr=solver["lr"],
            logit_scale_lr_ratio=solver["ratio"],
            lr_refresh=10,
        )
        ours = learning_rates(config, meta["iters_per_epoch"])
        error = worst(torch.from_numpy(ours), data[f"lr_{i}"]) / config.lr
        yield Check(f"{meta['name']}, relative to lr", error, 1e-12)
        # The released code computes a course of the momentum and does not use it: neither do we.
        unused = data[f"momentum_unused_{i}"]
        at = np.arange(len(unused)) / len(unused)
        course = 1 + 0.5 * (0.9998 - 1) * (1 + np.cos(np.pi * at))
        yield Check(
            f"{meta['name']}, unused momentum", worst(torch.from_numpy(course), unused), 1e-12
        )


def check_few_shot(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())
    wrong = sum(
        few_shot_positions(c["labels"], c["shots"], c["seed"]) != c["chosen"] * c["repeats"]
        for c in cases
    )
    yield Check(f"choices: wrong of {len(cases)}", wrong, 0)
    case = cases[0]
    try:
        few_shot_positions(case["labels"], len(case["labels"]), 0)
        refused = False
    except UserError:
        refused = True
    yield Check("more videos than a class has, not refused", int(not refused), 0)


def check_weight_ensemble(file: Path) -> Iterator[Check]:
    data = np.load(file)
    mean, error = WeightMean(below(data, "start/")), 0.0
    for epoch in range(sum(name.startswith("epoch") for name in data.files) // len(mean.weights)):
        mean.add(below(data, f"epoch{epoch}/"))
        mean = WeightMean.of_state(mean.state())  # as a training that continues does
        wanted = below(data, f"ensemble{epoch}/")
        error = max(error, *(worst(mean.weights[k], v) for k, v in wanted.items()))
    yield Check("mean of weights", error, 1e-6)


def token_digest(tokens: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()


def check_tokens(file: Path) -> Iterator[Check]:
    """Rephrased names; the published lists of classes are not kept here."""
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    case = json.loads(file.read_text())["rephrased_examples"]

    def tokens(template: str) -> Any:
        return tokenizer([template.replace("{}", name) for name in case["names"]]).numpy()

    (template,) = PROMPT_SETS["taco"]
    wrong = int((tokens(template) != np.array(case["tokens_train"])).sum())
    yield Check("ids of the training prompt that differ", wrong, 0)
    digest = token_digest(np.stack([tokens(line) for line in PROMPT_SETS["mote28"]]))
    yield Check("hashes of the test prompts that differ", int(digest != case["sha256_test"]), 0)


def unpacked(folder: Path, name: str, work: Path) -> Path:
    """A checkpoint of the run as the released code wrote it."""
    file = work / f"{name}.pt"
    file.write_bytes(gzip.decompress((folder / f"{name}.pt.gz").read_bytes()))
    return file


def plain_clip(folder: Path) -> dict[str, Tensor]:
    """The CLIP that the run began with."""
    state = below(np.load(folder / "tinyclip_state.npz"), "")
    rows, values = state.pop("token_embedding_rows"), state.pop("token_embedding_values")
    table = torch.zeros(VOCABULARY, values.shape[1])
    table[rows.long()] = values.float()
    state["token_embedding.weight"] = table
    return {
        k: v
        for k, v in state.items()
        if k not in ("input_resolution", "context_length", "vocab_size")
    }


def check_end_to_end(file: Path) -> Iterator[Check]:
    """`e2e/`: every checkpoint imported, every tested video encoded and scored."""
    folder, meta = file.parent, json.loads((file.parent / "meta.json").read_text())
    known = np.load(file)
    videos = np.load(folder / "videos.npz")
    with tempfile.TemporaryDirectory() as work:
        imported = {}
        for name in WHICH:
            if not (folder / f"{name}.pt.gz").exists():
                continue
            found = imported[name] = import_taco_checkpoint(unpacked(folder, name, Path(work)))
            projection = found.head.projection
            own = {} if projection is None else projection.state_dict()
            tensors = {f"model.{k}": v for k, v in found.encoder_state.items()}
            tensors |= {f"head.{HEAD}{k}": v for k, v in own.items()}
            error = max(probed(tensors, known, name, largest))
            yield Check(f"{name}: tensors, relative", error, 1e-6)
            wrong = int(found.which != WHICH[name])
            wrong += found.epoch != meta["checkpoint_keys"][name]["epoch"]
            yield Check(f"{name}: facts that differ", wrong, 0)
    for run, told in meta["runs"].items():
        found = imported[told["weights"]] if told["weights"] else None
        state = plain_clip(folder) if found is None else found.encoder_state
        encoder = Encoder(clip_of_state(state, "tiny", tuned=True))
        names = meta[f"{told['classes']}_classes"]
        frames = [videos[name] for name in meta["video_names"]]
        with torch.no_grad():
            yield from _check_run(
                dict(np.load(folder / f"run_{run}.npz")),
                run, told, encoder, None if found is None else found.head, names, frames,
                meta["T"],
            )  # fmt: skip


def _check_run(
    data: Mapping[str, Any],
    run: str,
    told: Mapping[str, Any],
    encoder: Encoder,
    head: TacoHead | None,
    names: list[str],
    videos: list[Any],
    length: int,
) -> Iterator[Check]:
    templates = PROMPT_SETS["taco" if told["templates"] == 1 else "mote28"]
    per_prompt = [[line.replace("{}", name) for name in names] for line in templates]
    text = class_features(torch.stack([encoder.encode_text(lines) for lines in per_prompt]))
    wanted = data.get("text_normalised", data["text_features"])
    yield Check(f"{run}: texts", worst(text, wanted), 1e-5)
    clips = told["clips"]
    sampling = parse_sampling(f"uniform:{length}" if clips == 1 else f"clips:{length}x{clips}")
    features = []
    for frames in videos:
        indices = sampling.indices(len(frames))
        pixels = encoder.preprocessing.crops(frames[indices.reshape(-1)], told["crops"])
        found = encoder.encode_pixels(pixels.flatten(0, 1))
        features.append(found.unflatten(0, (told["crops"] * clips, length)))
    views = torch.stack(features)
    yield Check(f"{run}: images", worst(views, data["image_features"]), 1e-4)
    without = class_cosines(video_embeddings(views), text)
    with_projection = without
    if head is not None:
        flat = head(views.flatten(0, 1), text)
        with_projection = flat.unflatten(0, views.shape[:2])
    yield Check(f"{run}: cosines with", worst(with_projection, data["cosines_with"]), 1e-5)
    yield Check(f"{run}: cosines without", worst(without, data["cosines_without"]), 1e-5)
    scores = fuse_views(with_projection)
    yield Check(f"{run}: scores", worst(scores.softmax(-1).float(), data["final_similarity"]), 1e-6)
    labels = torch.from_numpy(data["labels"])
    places = {"with": ranks(scores, labels)}
    if "top1_without" in data:
        vectors = torch.nn.functional.normalize(views.mean(2), dim=-1)
        yield Check(f"{run}: views", worst(vectors, data["view_features"]), 1e-5)
        places["without"] = ranks(fuse_views(without, "cosine"), labels)
        half = half_class_accuracy(vectors, text, labels)
        for top in (1, 5):
            got = np.array(getattr(half, f"split_top{top}"))
            yield Check(f"{run}: halves, top-{top}", worst(got, data[f"split_top{top}"]), 1e-4)
    for name, found in places.items():
        for top in (1, 5):
            got = percent(found < top)
            error = abs(got - float(data[f"top{top}_{name}"]))
            yield Check(f"{run}: top-{top} {name}", error, 1e-4)


TACO_KINDS: Kinds = {
    "taco_anchors_*.npz": check_anchors,
    "taco_projection_*.npz": check_projection,
    "taco_loss_*.npz": check_loss,
    "taco_trainstep_*.npz": check_trainstep,
    "taco_lr_schedules*.npz": check_lr_schedules,
    "taco_few_shot*.json": check_few_shot,
    "taco_weight_ensemble*.npz": check_weight_ensemble,
    "taco_tokens*.json": check_tokens,
    "e2e/checkpoint_probes.npz": check_end_to_end,
}
"""Check of every kind of file, by the pattern of its name."""
