"""ViCLIP's towers: a video tower whose frames attend to each other, and a text tower of 32 tokens.

Wang et al., InternVid (arXiv 2307.06942). N clips, T frames, s side of a frame, G patches along it,
L = G * G * T patch tokens, W width of the tower, D embedding width, n sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from einops import rearrange
from open_clip.transformer import QuickGELU, TextTransformer, Transformer
from torch import Tensor, nn

HEAD_WIDTH: Final = 64
LOGIT_SCALE: Final = 100.0
"""The published code multiplies cosines by it and leaves the temperature of the file unused."""
# ImageNet's colours, on which it was trained, and the whole picture pressed into a square.
VICLIP_PREPROCESSING: Final[dict[str, Any]] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


class VideoTower(nn.Module):
    """A vision transformer over all patches of a clip at once.

    Tokens are ordered by patch, time fastest: token 1 + p * T + t is patch p of frame t. One class
    token stands for the whole clip and has no place in time.
    """

    def __init__(self, config: Mapping[str, int], dim: int) -> None:
        """`config` is the `vision_cfg` of `viclip_config`, `dim` is D."""
        super().__init__()
        width, patch = config["width"], config["patch_size"]
        self.image_size = (config["image_size"], config["image_size"])
        self.frames = config["frames"]
        side = config["image_size"] // patch
        kernel = (1, patch, patch)
        self.conv1 = nn.Conv3d(3, width, kernel, stride=kernel, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + side * side, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, self.frames, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(
            *(width, config["layers"], width // HEAD_WIDTH),
            act_layer=QuickGELU,
            norm_layer=nn.LayerNorm,
        )
        self.proj = nn.Parameter(torch.zeros(width, dim))

    def forward(self, frames: Tensor, kept: Tensor | None = None) -> Tensor:
        """Encode preprocessed clips [N,T,3,s,s], or images [N,3,s,s], to [N,D].

        T must be 1 or the tower's number of frames, else ValueError; a tower of one frame takes
        clips of any length. `kept` int64 [N,K] are the patch tokens to look at, in order
        (`kept_patches`); by default all.
        """
        tokens = self.tokens(frames if frames.ndim == 5 else frames[:, None])
        if kept is not None:
            chosen = 1 + kept[:, :, None].expand(-1, -1, tokens.shape[-1])
            tokens = torch.cat([tokens[:, :1], tokens.gather(1, chosen)], dim=1)
        hidden = self.transformer(self.ln_pre(tokens))
        return cast(Tensor, self.ln_post(hidden[:, 0]) @ self.proj)

    def tokens(self, frames: Tensor) -> Tensor:
        """Return the tokens [N,1+L,W] of clips [N,T,3,s,s] as the first norm takes them."""
        length = frames.shape[1]
        if self.frames > 1 and length not in (1, self.frames):
            raise ValueError(f"a clip has {length} frames: this tower takes {self.frames}, or 1")
        patches = self.conv1(rearrange(frames, "n t c h w -> n c t h w"))
        patches = rearrange(patches, "n w t r c -> n t (r c) w")
        places = self.positional_embedding.to(patches.dtype)
        times = self.temporal_positional_embedding.to(patches.dtype)
        if length < self.frames:
            times = times.mean(dim=1, keepdim=True)
        patches = patches + places[1:] + times[0, :, None]
        first = (self.class_embedding.to(patches.dtype) + places[0]).expand(len(frames), 1, -1)
        return torch.cat([first, rearrange(patches, "n t p w -> n (p t) w")], dim=1)


def kept_patches(draws: Tensor, share: float) -> Tensor:
    """Return the patch tokens that masking of `share` leaves, int64 [N,K] ascending.

    `draws` are uniform numbers [N,L]; those whose rank is below int(share * L) are dropped.
    """
    dropped = int(share * draws.shape[1])
    order: Tensor = draws.argsort(dim=1)
    return order[:, dropped:].sort(dim=1).values


class ViClip(nn.Module):
    """Both towers, under the names of the published files, with open_clip's names beside them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is what `viclip_config` returns. The weights are to be loaded."""
        super().__init__()
        text, dim = config["text_cfg"], config["embed_dim"]
        self.temp = nn.Parameter(torch.ones([]) / LOGIT_SCALE)
        self.vision_encoder = VideoTower(config["vision_cfg"], dim)
        self.text_encoder = TextTransformer(
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            width=text["width"],
            heads=text["heads"],
            layers=text["layers"],
            output_dim=dim,
            act_layer=QuickGELU,
            norm_layer=nn.LayerNorm,
        )
        self.vocab_size = int(text["vocab_size"])

    @property
    def visual(self) -> VideoTower:
        """The video tower."""
        return self.vision_encoder

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the scale, as open_clip keeps it."""
        return torch.tensor(math.log(LOGIT_SCALE))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode token ids int64 [n, up to 32] to [n,D], not normalised."""
        return cast(Tensor, self.text_encoder(tokens))


def viclip_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read the sizes of a ViCLIP off its tensors' shapes, as open_clip's `model_cfg` has them.

    Raises KeyError, IndexError or ZeroDivisionError where the tensors are not those of a ViCLIP.
    """
    width, colours, in_time, patch, _ = shapes["vision_encoder.conv1.weight"]
    if (colours, in_time) != (3, 1):
        raise IndexError(f"patches of {colours} colours and {in_time} frames")
    side = math.isqrt(shapes["vision_encoder.positional_embedding"][0] - 1)
    context, text_width = shapes["text_encoder.positional_embedding"]

    def layers(tower: str) -> int:
        inner = f"{tower}.transformer.resblocks."
        return len({name[len(inner) :].split(".")[0] for name in shapes if name.startswith(inner)})

    return {
        "embed_dim": shapes["vision_encoder.proj"][1],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": side * patch,
            "layers": layers("vision_encoder"),
            "width": width,
            "patch_size": patch,
            "frames": shapes["vision_encoder.temporal_positional_embedding"][1],
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": shapes["text_encoder.token_embedding.weight"][0],
            "width": text_width,
            "heads": text_width // HEAD_WIDTH,
            "layers": layers("text_encoder"),
        },
    }
