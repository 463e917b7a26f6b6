"""Golden files of ViCLIP recomputed (tests/data/golden_viclip/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from einops import rearrange
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.clip_encoder import load_encoder
from pipeline.encoders.viclip import (
    LOGIT_SCALE,
    VICLIP_PREPROCESSING,
    ViClip,
    VideoTower,
    kept_patches,
    viclip_config,
)
from pipeline.preprocessing import Preprocessing
from pipeline.prompts import caption_words
from pipeline.sampling import parse_sampling
from tests.support.golden.checks import DTYPES, Check, Kinds, tensor, worst

LIMITS = {"f32": 2e-5, "f64": 1e-12}


def stored(file: Path) -> dict[str, Any]:
    """The arrays of a file, with the weights where these are kept beside it."""
    data = dict(np.load(file))
    weights = file.with_name(f"weights_of_{file.name}")
    return {**data, **np.load(weights)} if weights.exists() else data


def weights_in(data: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k[6:]: tensor(v, dtype) for k, v in data.items() if k.startswith("param/")}


def video_tower(data: Mapping[str, Any], dtype: torch.dtype) -> VideoTower:
    names = ("width", "layers")
    config = {name: int(data[name]) for name in names}
    config |= {"patch_size": int(data["patch"]), "image_size": int(data["resolution"])}
    tower = VideoTower(config | {"frames": int(data["num_frames"])}, int(data["embed"]))
    tower = tower.to(dtype).eval()
    tower.load_state_dict(weights_in(data, dtype))
    return tower


@torch.no_grad()
def steps(tower: VideoTower, frames: Tensor) -> dict[str, Tensor]:
    """The inner values of the first clip, by the names that the files give them."""
    found = {"tokens": tower.tokens(frames[:1])}
    found["ln_pre"] = hidden = tower.ln_pre(found["tokens"])
    for number, block in enumerate(tower.transformer.resblocks):
        if not number:
            # As open_clip's block adds them, one after the other.
            found["attn0"] = block.attention(block.ln_1(hidden))
            found["mlp0"] = block.mlp(block.ln_2(hidden + found["attn0"]))
        hidden = found[f"block{number}"] = block(hidden)
    found["ln_post"] = tower.ln_post(hidden)
    patches = rearrange(frames[:1], "n t c h w -> n c t h w")
    found["patch_conv"] = rearrange(tower.conv1(patches), "n w t r c -> n t r c w")
    return {name: value[0] for name, value in found.items()}


def check_video(file: Path) -> Iterator[Check]:
    data = stored(file)
    lengths = sorted({key.split("/")[0] for key in data if key[0] == "T" and key[1].isdigit()})
    for suffix, dtype in DTYPES.items():
        tower = video_tower(data, dtype)
        for length in lengths:
            if f"{length}/error" in data:
                refused = 1.0
                try:
                    tower(torch.zeros(1, int(length[1:]), 3, *tower.image_size, dtype=dtype))
                except ValueError:
                    refused = 0.0
                yield Check(f"{length} is refused {suffix}", refused, 0.0)
                continue
            frames = tensor(data[f"{length}/frames"], dtype)
            with torch.no_grad():
                got = tower(frames)
            limit = LIMITS[suffix]
            yield Check(
                f"{length} embedding {suffix}", worst(got, data[f"{length}/embed_{suffix}"]), limit
            )
            inner = [
                worst(value, data[f"{length}/{name}_{suffix}"])
                for name, value in steps(tower, frames).items()
                if f"{length}/{name}_{suffix}" in data
            ]
            yield Check(f"{length} steps {suffix}", max(inner), limit)
    tower = video_tower(data, torch.float64)
    for share in (0.5, 0.9):
        if (name := f"mask{share}/") + "draw" not in data:
            continue
        kept = kept_patches(tensor(data[name + "draw"]), share)
        yield Check(f"kept tokens {share}", worst(kept, data[name + "kept"]), 0.0)
        frames = tensor(data[f"T{int(data['num_frames'])}/frames"], torch.float64)
        with torch.no_grad():
            got = tower(frames, kept)
        yield Check(f"masked embedding {share}", worst(got, data[name + "embed_f64"]), 1e-12)
    if "order_frame" in data:
        side, frames_ = tower.image_size[0] // int(data["patch"]), int(data["num_frames"])
        order = torch.stack(
            torch.meshgrid(*map(torch.arange, (side, side, frames_)), indexing="ij")
        ).flatten(1)
        wanted = np.stack([data[f"order_{name}"] for name in ("row", "col", "frame")])
        yield Check("order of tokens", worst(order, wanted), 0.0)


def check_text(file: Path) -> Iterator[Check]:
    data = dict(np.load(file))
    ids, known = tensor(data["tokens"]).long(), tensor(data["token_embedding_rows"]).long()
    for suffix, dtype in DTYPES.items():
        tower = TextTransformer(
            context_length=int(data["context"]),
            **{name: int(data[name]) for name in ("width", "heads", "layers")},
            output_dim=int(data["embed"]),
            act_layer=QuickGELU,
            norm_layer=nn.LayerNorm,
        ).to(dtype)
        table = torch.zeros(tower.vocab_size, int(data["width"]), dtype=dtype)
        table[known] = tensor(data["token_embedding_values"], dtype)
        weights = {"token_embedding.weight": table, **weights_in(data, dtype)}
        tower.load_state_dict(weights)
        with torch.no_grad():
            got = tower.eval()(ids)
        yield Check(f"embedding {suffix}", worst(got, data[f"embed_{suffix}"]), LIMITS[suffix])
        if suffix == "f64":
            yield Check("norms in fp32", worst(got, data["embed_f64_ln32"]), 3e-6)


def check_ckpt(file: Path) -> Iterator[Check]:
    data = np.load(file)
    frames, ids = tensor(data["frames"]), tensor(data["tokens"]).long()
    for layout in ("full.pth", "hf.safetensors"):
        path = file.with_name(file.name.replace("io.npz", layout))
        encoder = load_encoder(f"viclip:{path}", "fp32")
        video, text = encoder.encode_clips(frames.float()), encoder.encode_tokens(ids)
        image = encoder.encode_clips(tensor(data["image"])[:, None].float())
        for name, value in (("video", video), ("text", text), ("image", image)):
            yield Check(f"{layout} {name} f32", worst(value, data[f"{name}_embed_f32"]), 2e-5)
        unit = functional.normalize(video, dim=-1), functional.normalize(text, dim=-1)
        cosines = unit[0] @ unit[1].T
        for name, value in zip(("video", "text"), unit, strict=True):
            yield Check(f"{layout} {name} unit", worst(value, data[f"{name}_feature_f32"]), 2e-6)
        yield Check(f"{layout} cosines", worst(cosines, data["sims_f32"]), 2e-6)
        logits = encoder.logit_scale * cosines
        yield Check(f"{layout} logits f32", worst(logits, data["logits_f32"]), 1e-4)
        best = logits.softmax(-1).topk(5)
        yield Check(f"{layout} labels", worst(best.indices, data["top5_label"]), 0.0)
        yield Check(f"{layout} probabilities", worst(best.values, data["top5_prob_f32"]), 1e-4)
        model = encoder.model.double()
        with torch.no_grad():
            wide = model.visual(frames.double()), model.encode_text(ids)  # type: ignore[operator]
        for name, value in zip(("video", "text"), wide, strict=True):
            yield Check(f"{layout} {name} f64", worst(value, data[f"{name}_embed_f64"]), 1e-11)
        units = [functional.normalize(value, dim=-1) for value in wide]
        exact = LOGIT_SCALE * units[0] @ units[1].T
        yield Check(f"{layout} logits f64", worst(exact, data["logits_f64"]), 1e-11)


def check_tokens(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())["cases"]
    # The names of the marks, written in a text, are words here and marks in the published code.
    whole = [
        case
        for case in cases
        if case["error_if_truncate_false_32"] is None and "oftext|>" not in case["text"]
    ]
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    got = tokenizer([case["text"] for case in whole])
    yield Check("tokens", worst(got, [case["context32"] for case in whole]), 0.0)
    reads = got.argmax(-1)
    yield Check("read-out", worst(reads, [case["readout32"] for case in whole]), 0.0)
    pairs = json.loads(file.read_text())["pre_text"]
    wrong = sum(caption_words(raw) != cleaned for raw, cleaned in pairs)
    yield Check("cleaned captions", float(wrong), 0.0)


def check_frame_indices(file: Path) -> Iterator[Check]:
    for case in json.loads(file.read_text())["middle"]:
        got = parse_sampling(f"middle:{case['num']}").indices(case["n"])[0]
        yield Check(f"middle of {case['n']}", worst(got, case["frames"]), 0.0)


def check_preprocess(file: Path) -> Iterator[Check]:
    data = np.load(file)
    for key in sorted(name for name in data.files if name.startswith("tv_in_")):
        j, frames = key[6:], tensor(data[key])
        wanted = data[f"tv_out_{j}_antialias1"]
        how = Preprocessing.from_open_clip(VICLIP_PREPROCESSING, tuple(wanted.shape[-2:]))
        resized = how.resize(frames)
        yield Check(f"resized {j}", worst(resized, data[f"tv_u8_{j}_antialias1"]), 1.0)
        level = 1 / 255 / min(how.std)
        yield Check(f"normalised {j}", worst(how.normalise(resized), wanted), level * 1.001)


def check_shapes(file: Path) -> Iterator[Check]:
    published = json.loads(file.read_text())
    for size, of in published.items():
        shapes = {name: tuple(shape) for name, shape in of["shapes"].items()}
        with torch.device("meta"):
            model = ViClip(viclip_config(shapes))
        ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        yield Check(f"{size} tensors", float(ours != shapes), 0.0)
        count = sum(parameter.numel() for parameter in model.parameters())
        yield Check(f"{size} parameters", float(count - of["parameters"]), 0.0)


VICLIP_KINDS: Kinds = {
    "video_*.npz": check_video,
    "text_*.npz": check_text,
    "ckpt_*_io.npz": check_ckpt,
    "tokens.json": check_tokens,
    "frame_indices.json": check_frame_indices,
    "preprocess.npz": check_preprocess,
    "published_shapes.json": check_shapes,
}
"""Check of every kind of file, by the pattern of its name."""
