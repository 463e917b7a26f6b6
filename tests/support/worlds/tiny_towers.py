"""Image towers of every kind open_clip has, small and random, and a model around one."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch.nn import functional

from heads.end_to_end import EndToEndModel
from heads.end_to_end.config import BOTH_TOWERS
from heads.end_to_end.models.trained_texts import TrainedTexts
from heads.methods.head import build_head
from heads.methods.mote.config import HeadConfig
from heads.methods.mote.routing import RoutingDraw
from pipeline.encoders.sources import build_model

DIM, SIZE, CLASSES = 24, 32, 7
DRAW = RoutingDraw((1, 0), (2.4, -0.6))
_TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
_VIT = {"image_size": SIZE, "patch_size": 8, "width": 64, "layers": 3}
_CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": _VIT, "text_cfg": _TEXT},
    "resnet": {
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": _TEXT,
    },
    "custom": {"custom_text": True, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "coca": {
        "vision_cfg": _VIT | {"attentional_pool": True, "attn_pooler_heads": 2}
        | {"output_tokens": True},
        "text_cfg": _TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": _TEXT,
    },
}  # fmt: skip


def tiny_tower(kind: str = "vit", dim: int = DIM) -> nn.Module:
    """A frozen tower as `load_encoder` gives it: "vit", "resnet", "coca" or "timm"."""
    torch.manual_seed(0)
    if kind == "timm":
        tower = TimmModel("test_vit", dim, image_size=SIZE, pretrained=False)
        return tower.eval().requires_grad_(False)
    tower = tiny_clip(kind, dim).visual
    assert isinstance(tower, nn.Module)
    return tower


def tiny_clip(kind: str = "vit", dim: int = DIM) -> nn.Module:
    """A frozen model with both towers: "vit", "resnet", "coca", or "custom", a text tower alone."""
    torch.manual_seed(0)
    return build_model({"embed_dim": dim, **_CONFIGS[kind]}, "test")


def sentences() -> tuple[Tensor, list[int]]:
    """Token ids of one to three sentences for each class, of 3 to 7 of 8 places, and the counts."""
    generator = torch.Generator().manual_seed(4)
    counts = [1, 3, 1, 2, 1, 1, 2]
    tokens = torch.zeros(sum(counts), 8, dtype=torch.int64)
    for number, row in enumerate(tokens):
        words = 1 + 3 * number % 5
        row[0], row[1 + words] = 62, 63
        row[1 : 1 + words] = torch.randint(1, 62, (words,), generator=generator)
    return tokens, counts


def tiny_texts(clip: nn.Module, **options: Any) -> TrainedTexts:
    """The trained texts of `sentences` by the text tower of a `tiny_clip`."""
    return TrainedTexts(clip, *sentences(), **options)


def class_embeddings(dim: int = DIM) -> Tensor:
    """Unit rows [CLASSES,dim]."""
    generator = torch.Generator().manual_seed(1)
    return functional.normalize(torch.randn(CLASSES, dim, generator=generator), dim=-1)


def tiny_model(kind: str = "vit", head: dict[str, Any] | None = None, **options: Any) -> Any:
    """An `EndToEndModel` around `tiny_tower(kind)`; two layers of two experts.

    With train "both-towers", its texts are `tiny_texts`.
    """
    tower = tiny_tower(kind)
    if options.get("train") == BOTH_TOWERS:
        clip: Any = tiny_clip(kind)
        tower, options["texts"] = clip.visual, tiny_texts(clip)
    config = HeadConfig(**{"dim": DIM, "layers": 2, "experts": 2, **(head or {})})
    built = build_head(config, class_embeddings(), generator=torch.Generator().manual_seed(2))
    return EndToEndModel(tower, built.train(), 100.0, **options)


def clips(number: int = 3, frames: int = 2) -> tuple[Tensor, Tensor]:
    """(frames [number,frames,3,SIZE,SIZE], labels [number])."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(number, frames, 3, SIZE, SIZE, generator=generator)
    return pixels, torch.arange(number) % CLASSES
