"""Checkpoints of DiST in golden files, and runs from them on videos."""

from __future__ import annotations
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
import numpy as np
import torch
from torch import Tensor, nn
from heads import import_dist_checkpoint
from pipeline.float_frames import evaluation_floats
from pipeline.prompts import bare_sentence
from pipeline.sampling import dist_test_indices
from tests.support.golden.checks import Check, tensor, worst
from tests.support.golden.dist.model import below, clips_of, config_of, encoder_of, stored

CENTRE = {"hmdb51": "center-fraction"}
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
    """`e2e/branch_state.npz`: what it makes of the videos' pixels, in every `run_*.npz` beside it."""
    for run in sorted(file.parent.glob("run_*.npz")):
        for check in _check_run(run):
            yield replace(check, quantity=f"{run.stem}: {check.quantity}")


def _check_run(file: Path) -> Iterator[Check]:
    """Frames, crops, model, ensemble and fusion."""
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
