"""Export heads for use outside this package: with experts merged, as safetensors or ONNX.

B = batch (views), T = frames, D = embedding width, C = classes tested, S = training classes, or the
side of a frame in pixels, K = neighbours.
"""

from __future__ import annotations

import json
import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import UserError
from featstore.files.durable import write_bytes
from heads.methods.head import Head
from heads.methods.registry import method
from heads.methods.text_classifier import class_cosines, video_embeddings

if TYPE_CHECKING:
    from heads.methods.dist.model import DistModel

ONNX_OUTPUT = "cosines"
ONNX_LIMIT: Final = (1 << 31) - (1 << 20)  # bytes of weights: one protobuf file holds 2 GiB


def merged_head(head: Head) -> Head:
    """Return `head` as one plain network on the CPU, with the same cosines and the same origin.

    MoTE's experts are merged as evaluation merges them; `save_head` can write the result like any
    head. Raises UserError for a head that no single network can replace, and for a method that runs
    in mote only.
    """
    chosen = method(head.config.kind)
    chosen.require("used by other programs", chosen.portable, "export a run of another method")
    return head.merged()


def require_one_class(head: Head) -> None:
    """Raise UserError for a head of several classes a video, whose bias no official file has."""
    if head.logit_bias is not None:
        raise UserError(
            "the head gives every class of a video a probability of its own, which the authors' "
            "code has no place for: export it with --format safetensors or onnx"
        )


def save_onnx(head: Head, path: Path, image_tower: nn.Module | None = None) -> None:
    """Write `head`, experts merged, as one ONNX file.

    Inputs: `features` float32 [B,T,D], `class_embeddings` float32 [C,D], `modulate` bool [];
    output: `cosines` float32 [B,C]. B, T (up to the head's positions) and C are free. With fewer
    classes than modulation compares (K) a modulated output is NaN. The metadata entry "mote" is a
    JSON text with configuration, origin, logit scale and, of a head for several classes a video,
    logit bias.

    A head that looks at pixels is written together with the `image_tower` it sees the tokens of.
    Its inputs are `frames` float32 [B,T',3,S,S], preprocessed, `class_embeddings` and `ensemble`
    float32 [], the weight of CLIP's own cosines: 0 for the head alone, 0.5 as in DiST's zero-shot.

    Raises UserError if the packages for ONNX are not installed, for a tower that is missing, does
    not fit or is too large for one file, and as `merged_head`.
    """
    absent = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if absent:
        raise UserError(
            f"ONNX export needs {' and '.join(absent)}: install them with "
            "`pip install 'mote-video[export]'`"
        )
    if method(head.config.kind).adapts:
        raise UserError(
            f"{method(head.config.kind).title} changes both towers of its CLIP, and only its "
            "adapters can be exported: use --format safetensors or official"
        )
    merged = merged_head(head.cpu() if head.logit_scale.is_cuda else head)
    pixels = method(merged.config.kind).pixels
    graph = _pixel_graph(merged, image_tower) if pixels else _feature_graph(merged)
    held = sum(p.numel() * p.element_size() for p in graph.network.parameters())
    if held > ONNX_LIMIT:
        raise UserError(
            f"the head and its tower have {held / 1e9:.1f} GB of weights, more than the 2 GiB that "
            "one ONNX file holds: write them with --format safetensors or official"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        exported = torch.export.export(
            graph.network.eval(), graph.example, dynamic_shapes=graph.free, strict=False
        )
        program: Any = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=[ONNX_OUTPUT],
            dynamic_shapes=graph.free,  # for the names of the axes
            verbose=False,
        )
    bias = {} if merged.logit_bias is None else {"logit_bias": float(merged.logit_bias.detach())}
    model = program.model_proto
    note = model.metadata_props.add()
    note.key = "mote"
    note.value = json.dumps(
        {
            "head": merged.config.to_json(),
            "origin": None if merged.origin is None else merged.origin.to_json(),
            "logit_scale": float(merged.logit_scale.exp()),
            **bias,
        },
        ensure_ascii=False,
        allow_nan=False,
    )
    write_bytes(path, model.SerializeToString())


class _Graph(NamedTuple):
    """What is exported: a network, the names of its inputs, an example of each, and free sizes."""

    network: nn.Module
    inputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    free: tuple[dict[int, Any], ...]


def _feature_graph(head: Head) -> _Graph:
    """Return the graph of a merged head that takes features of frames."""
    config, most, axis = head.config, head.most_frames, torch.export.Dim
    frames = 8 if most is None else min(8, most)
    example = (
        torch.zeros(2, frames, config.dim),
        torch.ones(config.modulation_neighbours + 3, config.dim),
        torch.tensor(True),
    )
    free: tuple[dict[int, Any], ...] = ({0: axis("batch")}, {0: axis("classes")}, {})
    if most is None:
        free[0][1] = axis("frames")
    elif most > 1:
        free[0][1] = axis("frames", max=most)
    return _Graph(_Cosines(head), ("features", "class_embeddings", "modulate"), example, free)


def _pixel_graph(head: Head, image_tower: nn.Module | None) -> _Graph:
    """Return the graph of a head that looks at pixels, with the tower; UserError without one."""
    from heads.methods.dist.branch import DistBranch  # few heads need these
    from heads.methods.dist.model import DistModel

    if image_tower is None:
        raise UserError(
            f"a graph of {method(head.config.kind).title} holds the image tower, too: give the one "
            "that the head was trained with"
        )
    assert isinstance(head.branch, DistBranch)
    model = DistModel(image_tower, head.branch, head.logit_scale)
    example = (
        torch.zeros(2, head.config.dense_frames, 3, *model.image_size),
        torch.ones(3, head.config.dim),
        torch.tensor(0.5),
    )
    axis = torch.export.Dim
    free: tuple[dict[int, Any], ...] = ({0: axis("batch")}, {0: axis("classes")}, {})
    return _Graph(_PixelCosines(model), ("frames", "class_embeddings", "ensemble"), example, free)


class _PixelCosines(nn.Module):
    """DiST's cosines with classes, mixed with CLIP's own."""

    def __init__(self, model: DistModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, class_embeddings: Tensor, ensemble: Tensor) -> Tensor:
        """[B,T',3,S,S], [C,D] and [] -> [B,C]."""
        with torch.no_grad():  # without it activations are of a kind that keeps inputs
            video, clip = self.model.view_vectors(frames)
        return class_cosines(video + ensemble * (clip - video), class_embeddings)


class _Cosines(nn.Module):
    """A merged head whose modulation is switched by an input, in operations that ONNX has.

    The model's own forward checks shapes and refuses too few classes; a graph cannot, so here the
    output is NaN instead.
    """

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, class_embeddings: Tensor, modulate: Tensor) -> Tensor:
        """[B,T,D], [C,D] and [] bool -> [B,C]."""
        frames = features
        hidden = self.head.hidden(features)
        if hidden is not None:
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
    """Return the `count` rows of `classes` [C,D] nearest to `video` [B,D] -> [B,count,D].

    A shorter list is filled up with rows of zeros, which are chosen last.
    """
    scores = functional.pad(video @ classes.T, (0, count), value=-math.inf)
    table = functional.pad(classes, (0, 0, 0, count))
    return table[scores.topk(count, dim=-1).indices]
