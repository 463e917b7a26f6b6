"""The model of a golden file of DiST: what it gives out, and every step inside."""

from __future__ import annotations
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
import numpy as np
import torch
from torch import Tensor, nn
from heads.methods.dist.config import DistConfig
from heads.methods.dist.model import DistModel
from pipeline.clip_encoder import Encoder, load_encoder
from tests.support.golden.checks import DTYPES, Check, tensor, worst

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
