"""Which part of the image tower is trained: all of it, nothing, or its last blocks.

The head and the logit scale are always trained. Frozen parameters have no gradient, and so no
weight decay and no optimiser state (`heads.training.schedule.build_optimizer` leaves them out).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from featstore.errors import UserError
from heads.end_to_end.config import BOTH_TOWERS, FinetuneConfig, last_blocks


def trained_blocks(image_tower: nn.Module, last: int | None = None) -> list[nn.Module]:
    """Return the transformer blocks of a tower that are trained, in order: all, or the `last` ones.

    Raises UserError for a tower that is not open_clip's `VisionTransformer` (a ResNet, a tower of
    timm), and for more blocks than the tower has.
    """
    if not isinstance(image_tower, VisionTransformer):
        raise UserError(
            f"the image tower is a {type(image_tower).__name__}: single blocks can be told apart "
            "in open_clip's vision transformers only; train the whole tower, or the head"
        )
    blocks: list[nn.Module] = list(cast(Any, image_tower.transformer).resblocks)
    if last is None:
        return blocks
    if not 1 <= last <= len(blocks):
        raise UserError(
            f"tower-last-{last}: the image tower has {len(blocks)} blocks; choose tower-last-1 to "
            f"tower-last-{len(blocks)}, or tower for all of it"
        )
    return blocks[-last:]


def freeze_all_but(image_tower: nn.Module, train: str) -> None:
    """Set `requires_grad` of every parameter of `image_tower` by `train`.

    "tower" and "both-towers": all of it. "head": nothing of it, the released code's `fix_video`.
    "tower-last-N": the last N blocks and what follows them: the last norm, the projection, and the
    pooling of towers that have one (CoCa). Raises UserError as `trained_blocks` does.
    """
    last = last_blocks(train)
    image_tower.requires_grad_(train in ("tower", BOTH_TOWERS))
    if last is None:
        return
    for block in trained_blocks(image_tower, last):
        block.requires_grad_(True)
    for parameter in _after_blocks(image_tower):
        parameter.requires_grad_(True)


def _after_blocks(image_tower: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of an open_clip vision transformer that follow its last block."""
    for name in ("attn_pool", "attn_pool_contrastive", "ln_post"):
        part = getattr(image_tower, name, None)
        if isinstance(part, nn.Module):
            yield from part.parameters()
    projection = getattr(image_tower, "proj", None)
    if isinstance(projection, nn.Parameter):
        yield projection


def checkpoint_gradients(image_tower: nn.Module) -> None:
    """Keep only each block's input for the backward pass, which computes the block again.

    Values and gradients stay the same; a step computes the tower's forward twice. The released code
    always does so. Raises UserError for a tower that does not support it.
    """
    # open_clip's ResNet has the method too, and it does nothing.
    if not isinstance(image_tower, VisionTransformer | TimmModel):
        raise UserError(
            f"the image tower is a {type(image_tower).__name__}, which cannot checkpoint its "
            "gradients: leave checkpointing off and lower the batch size instead"
        )
    image_tower.set_grad_checkpointing(True)


def require_frozen(title: str, kept: str, config: FinetuneConfig, frames: int) -> None:
    """Raise UserError for settings that a method cannot follow whose towers stay as they are.

    `kept` says what stays, as in "the tower as it is"; `frames` are those that the head takes.
    """
    if config.train != "head":
        raise UserError(
            f"{title} keeps {kept}, so --train {config.train} is not possible: leave it out, or "
            'write train = "head" in the recipe'
        )
    if config.shard == "fsdp":
        raise UserError(
            f"--shard fsdp spreads a trained tower, and {title} keeps {kept}: leave it out"
        )
    if config.frames != frames:
        raise UserError(
            f"{config.frames} frames do not fit the head to begin with, which takes {frames}: use "
            f"--frames {frames}"
        )
