"""Computes what a store keeps of every frame, which is its tier (`featstore.format.tiers`).

T frames, H, W their height and width, h, w the input of the tower, L tokens (CLS first), C width
of the tower, D embedding width.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from open_clip.transformer import VisionTransformer

from featstore.errors import UserError
from featstore.format.tiers import FRAMES, TOKENS, Tier
from pipeline.clip_encoder import Encoder
from pipeline.preprocessing import FrameInput


class FrameOutput(Protocol):
    """Makes the items of one tier; may be called from several threads at the same time."""

    item: tuple[int, ...]
    """Shape of what is kept of one frame, or of one clip."""
    clip_frames: int
    """Successive frames that one item is of."""

    def __call__(self, frames: FrameInput, crops: int) -> torch.Tensor:
        """Decoded frames uint8 [T,H,W,3] -> [crops,T / clip_frames,*item], on any device."""
        ...


def frame_output(tier: Tier, encoder: Encoder) -> FrameOutput:
    """Return what makes the items of `tier`. Raises UserError if the encoder lacks the block."""
    if tier.kind == FRAMES:
        return CroppedFrames(encoder)
    if tier.kind == TOKENS:
        assert tier.block is not None
        return BlockTokens(encoder, tier.block)
    return PooledEmbeddings(encoder)


class PooledEmbeddings:
    """Projected embeddings of whole frames or clips, float32 [D], not normalised."""

    def __init__(self, encoder: Encoder) -> None:
        self.item: tuple[int, ...] = (encoder.dim,)
        self.clip_frames = encoder.clip_frames
        self._encoder = encoder

    def __call__(self, frames: FrameInput, crops: int) -> torch.Tensor:
        """See `FrameOutput`."""
        pixels = self._encoder.preprocessing.crops(frames, crops)
        embeddings = self._encoder.encode_pixels(rearrange(pixels, "c t ... -> (c t) ..."))
        return rearrange(embeddings.float(), "(c t) d -> c t d", c=crops)


class CroppedFrames:
    """The tower's input pixels before they are normalised, uint8 RGB [h,w,3]."""

    clip_frames = 1

    def __init__(self, encoder: Encoder) -> None:
        self.item: tuple[int, ...] = (*encoder.preprocessing.size, 3)
        self._preprocessing = encoder.preprocessing

    def __call__(self, frames: FrameInput, crops: int) -> torch.Tensor:
        """See `FrameOutput`."""
        return rearrange(self._preprocessing.crop_pixels(frames, crops), "k t c h w -> k t h w c")


class BlockTokens:
    """All tokens that one block of the image tower gives out, float16 [L,C].

    They are taken after both residuals of the block, computed in the tower's precision and then
    rounded. Neither `ln_post` nor the projection is applied, and later blocks are not computed.
    """

    clip_frames = 1

    def __init__(self, encoder: Encoder, block: int) -> None:
        """`block` counts from 0. Raises UserError if the tower is no ViT or has fewer blocks."""
        tower = encoder.image_tower
        if not isinstance(tower, VisionTransformer):
            raise UserError(
                f"the image tower of {encoder.name} is a {type(tower).__name__}: tokens are taken "
                "from open_clip's vision transformers only; use such an encoder, or --tier frames"
            )
        blocks = cast(Any, tower.transformer).resblocks
        if block >= len(blocks):
            raise UserError(
                f"tokens:{block}: the image tower of {encoder.name} has {len(blocks)} blocks, "
                f"counted from 0: choose tokens:0 to tokens:{len(blocks) - 1}"
            )
        self._encoder = encoder
        self._batch_first = bool(cast(Any, tower.transformer).batch_first)
        # Threads share the tower: the hook stops only the threads that want tokens.
        self._calling = threading.local()
        blocks[block].register_forward_hook(self._reached)
        blank = torch.zeros(1, 3, *encoder.preprocessing.size)
        self.item: tuple[int, ...] = tuple(self._tokens(blank).shape[1:])

    def __call__(self, frames: FrameInput, crops: int) -> torch.Tensor:
        """See `FrameOutput`."""
        pixels = self._encoder.preprocessing.crops(frames, crops)
        # One crop at a time, so that a batch has the same size as for embeddings of one crop.
        return torch.stack([self._tokens(crop) for crop in pixels])

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        self._calling.now = True
        try:
            self._encoder.run_image_tower(pixels)
        except _Reached as reached:
            tokens = reached.tokens if self._batch_first else reached.tokens.transpose(0, 1)
            return tokens.to(torch.float16)
        finally:
            self._calling.now = False
        raise AssertionError("the tower did not run the block")

    def _reached(self, block: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if getattr(self._calling, "now", False):
            raise _Reached(output)


class _Reached(Exception):
    """Carries the tokens out of the tower past the blocks that are not needed."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens
