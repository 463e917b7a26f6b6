"""Heads for use outside this package: experts merged for good, as safetensors or ONNX.

B = batch (views), T = frames, D = embedding width, C = classes tested, S = training classes,
K = neighbours.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import UserError
from featstore.files.durable import write_bytes
from heads.files.head_file import save_head
from heads.methods.mote.model import TemporalHead
from heads.methods.text_classifier import class_cosines, video_embeddings

ONNX_INPUTS = ("features", "class_embeddings", "modulate")
ONNX_OUTPUT = "cosines"


@torch.no_grad()
def merged_head(head: TemporalHead) -> TemporalHead:
    """`head` with every block's experts merged into one, as evaluation merges them; on the CPU.

    It gives the same cosines and says the same about its origin. Raises UserError for a head that
    averages its experts' outputs: no single network gives those.
    """
    config = head.config
    if head.transformer is None:
        return head
    if config.aggregation == "outputs" and config.placement == "ffn" and config.experts > 1:
        raise UserError(
            "the head averages its experts' outputs, which no single network gives: only a head "
            "with aggregation weights can be merged"
        )
    merged = TemporalHead(
        replace(config, experts=1, placement="ffn", aggregation="weights", expert_prior=()),
        head.training_class_embeddings.shape[0],
    )
    state = {name: value.detach().cpu() for name, value in head.state_dict().items()}
    for place, block in enumerate(head.transformer.blocks):
        prefix = f"transformer.blocks.{place}.feed_forward."
        weights = block.feed_forward.evaluation_weights()  # type: ignore[union-attr, operator]
        state |= {f"{prefix}{name}": value.cpu() for name, value in weights._asdict().items()}
        state[f"{prefix}fusion_logits"] = torch.zeros(1)
    merged.load_state_dict(state)
    merged.origin = head.origin
    return merged.eval()


def save_merged_head(head: TemporalHead, path: Path) -> None:
    """Write `merged_head(head)` as safetensors; `load_head` reads it back.

    The tensors are those named in `heads.methods.mote.model`, with one expert; the metadata entry
    "mote" is a JSON text with the configuration and the origin.
    """
    save_head(merged_head(head), path)


def save_onnx(head: TemporalHead, path: Path) -> None:
    """Write `head`, experts merged, as one ONNX file.

    Inputs: `features` float32 [B,T,D], `class_embeddings` float32 [C,D], `modulate` bool [];
    output: `cosines` float32 [B,C]. B, T (up to the head's positions) and C are free. With fewer
    classes than modulation compares (K) a modulated output is NaN. The metadata entry "mote" is a
    JSON text with configuration, origin and logit scale.

    Raises UserError when the packages for it are not installed, and as `merged_head`.
    """
    absent = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if absent:
        raise UserError(
            f"ONNX export needs {' and '.join(absent)}: install them with "
            "`pip install 'mote-video[export]'`"
        )
    merged = merged_head(head.cpu() if head.logit_scale.is_cuda else head)
    config = merged.config
    axis = torch.export.Dim
    frames = min(8, config.positions)
    example = (
        torch.zeros(2, frames, config.dim),
        torch.ones(config.modulation_neighbours + 3, config.dim),
        torch.tensor(True),
    )
    free: tuple[dict[int, Any], ...] = ({0: axis("batch")}, {0: axis("classes")}, {})
    if merged.transformer is None:
        free[0][1] = axis("frames")
    elif config.positions > 1:
        free[0][1] = axis("frames", max=config.positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        exported = torch.export.export(
            _Cosines(merged).eval(), example, dynamic_shapes=free, strict=False
        )
        program: Any = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=list(ONNX_INPUTS),
            output_names=[ONNX_OUTPUT],
            dynamic_shapes=free,  # for the names of the axes
            verbose=False,
        )
    model = program.model_proto
    note = model.metadata_props.add()
    note.key = "mote"
    note.value = json.dumps(
        {
            "head": config.to_json(),
            "origin": None if merged.origin is None else merged.origin.to_json(),
            "logit_scale": float(merged.logit_scale.exp()),
        },
        ensure_ascii=False,
        allow_nan=False,
    )
    write_bytes(path, model.SerializeToString())


class _Cosines(nn.Module):
    """A merged head whose modulation is switched by an input, in operations ONNX has.

    The model's own forward refuses too few classes by looking at shapes; a graph cannot, so here
    such an output is NaN.
    """

    def __init__(self, head: TemporalHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, class_embeddings: Tensor, modulate: Tensor) -> Tensor:
        """[B,T,D], [C,D] and [] bool -> [B,C]."""
        frames = features
        if self.head.transformer is not None:
            hidden = self.head.transformer(features)[0]
            if self.head.config.modulates:
                scale = torch.where(modulate, self._scale(features, class_embeddings), 1.0)
                hidden = scale[:, None, None] * hidden
            frames = hidden + features
        return class_cosines(video_embeddings(frames), class_embeddings)

    def _scale(self, features: Tensor, class_embeddings: Tensor) -> Tensor:
        """[B]: `heads.methods.mote.modulation.modulation` for any number of classes."""
        config, training = self.head.config, self.head.training_class_embeddings
        neighbours = config.modulation_neighbours
        video = video_embeddings(features)
        tested = _nearest(video, class_embeddings, neighbours)
        trained = _nearest(video, training, neighbours)
        similarity = (tested @ trained.transpose(-1, -2)).amax(-1).mean(-1)
        scale = torch.exp(-(1 - similarity) / config.modulation_temperature)
        if training.shape[0] < neighbours:
            return scale * math.nan
        # A sum, because comparing a free dimension itself would fix it.
        enough = torch.ones_like(class_embeddings[:, 0]).sum() >= neighbours
        return torch.where(enough, scale, math.nan)


def _nearest(video: Tensor, classes: Tensor, count: int) -> Tensor:
    """The `count` rows of `classes` [C,D] nearest to `video` [B,D] -> [B,count,D].

    Rows of zeros that are chosen last fill up a shorter list.
    """
    scores = functional.pad(video @ classes.T, (0, count), value=-math.inf)
    table = functional.pad(classes, (0, 0, 0, count))
    return table[scores.topk(count, dim=-1).indices]
