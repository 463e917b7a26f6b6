"""DiST as one model: a frozen image tower of CLIP, and the branch that is trained beside it.

B = clips, T' = dense frames, a = alpha, T = T' / a slow frames, M = tokens of a frame (CLS first),
d = width of the image tower, E = embedding width, C = classes, S = input size of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from einops import rearrange
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.dist.branch import DistBranch
from heads.methods.dist.config import DistConfig
from heads.methods.text_classifier import class_cosines


class DistModel(nn.Module):
    """Dense frames in, logits of classes out.

    `image_tower` is used itself, not copied, and is frozen: it stays in evaluation mode, and
    nothing of it is kept for a backward pass. Its weights may have another number type than the
    branch's ("fp16", "bf16"): its blocks then run in that type, the branch in its own.

    `logit_scale` is the natural logarithm of CLIP's multiplier; it gets a gradient, as in the
    published code, and is never trained. Raises UserError for a tower that is no plain vision
    transformer, or that the branch was not made for.

    Attributes: `config`, `image_tower`, `branch`, `logit_scale` (parameter []).
    """

    def __init__(
        self,
        image_tower: nn.Module,
        branch: DistBranch | DistConfig,
        logit_scale: Tensor | float,
    ) -> None:
        super().__init__()
        given = branch.config if isinstance(branch, DistBranch) else branch
        self.config = for_tower(given, image_tower)
        self.image_tower = cast(VisionTransformer, image_tower.requires_grad_(False))
        self.branch = branch if isinstance(branch, DistBranch) else DistBranch(self.config)
        scale = torch.as_tensor(logit_scale).detach().to("cpu", torch.float32, copy=True)
        self.logit_scale = nn.Parameter(scale.reshape(()))
        self.train(self.branch.training)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the frames that the image tower takes."""
        height, width = cast(Any, self.image_tower).image_size
        return height, width

    def train(self, mode: bool = True) -> DistModel:
        """Switch the branch's mode; the tower stays in evaluation mode."""
        super().train(mode)
        self.image_tower.eval()
        return self

    def forward(self, frames: Tensor, class_embeddings: Tensor) -> Tensor:
        """Return logits [B,C]: the multiplier times cosines.

        `frames` floating [B,T',3,S,S], preprocessed; `class_embeddings` [C,E] of any length. Raises
        UserError for frames of another number or size, and for embeddings of another width.
        """
        unit = functional.normalize(self.video_features(frames), dim=-1)
        return self._logits(unit, class_embeddings)

    def video_features(self, frames: Tensor) -> Tensor:
        """Return the video features [B,E] of `frames`, not normalised; errors as `forward`."""
        self._check(frames)
        found: Tensor = self.branch(self._of_branch(frames), self._selected(self._embedded(frames)))
        return found

    def zero_shot_logits(self, frames: Tensor, class_embeddings: Tensor) -> Tensor:
        """Return logits [B,C] of the published zero-shot mode; arguments and errors as `forward`.

        They are the mean of DiST's logits and of CLIP's own, averaged over the slow frames.
        """
        video, clip = self.view_vectors(frames)
        return self._logits((video + clip) / 2, class_embeddings)

    def view_vectors(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return two vectors [B,E] of each clip, from one pass: all its scores come from them.

        The first is the unit video feature, the second the mean over slow frames of CLIP's unit
        embeddings. Errors as `forward`.
        """
        self._check(frames)
        embedded = self._embedded(frames)
        last: list[Tensor] = []
        video = self.branch(self._of_branch(frames), self._selected(embedded, last))
        frame = self._projected(last[0]).to(video)
        units = rearrange(functional.normalize(frame, dim=-1), "(b t) e -> b t e", b=frames.shape[0])
        return functional.normalize(video, dim=-1), units.mean(1)

    def frame_embeddings(self, frames: Tensor) -> Tensor:
        """Return CLIP's embeddings [B,T,E] of the slow frames, not normalised."""
        self._check(frames)
        last: list[Tensor] = []
        for _ in self._selected(self._embedded(frames), last):
            pass
        found = self._projected(last[0]).to(self.logit_scale.dtype)
        return rearrange(found, "(b t) e -> b t e", b=frames.shape[0])

    def _logits(self, vectors: Tensor, class_embeddings: Tensor) -> Tensor:
        if class_embeddings.ndim != 2 or class_embeddings.shape[1] != self.config.dim:
            raise UserError(
                f"class embeddings of shape {list(class_embeddings.shape)} do not fit a DiST model "
                f"of width {self.config.dim}: use the class texts of the same CLIP"
            )
        return self.logit_scale.exp() * class_cosines(vectors, class_embeddings)

    def _of_branch(self, frames: Tensor) -> Tensor:
        return frames.to(self.branch.proj.dtype)

    def _embedded(self, frames: Tensor) -> Tensor:
        """Return the slow frames' tokens [B*T,M,d] before the first block, in the tower's type."""
        slow = rearrange(frames[:, :: self.config.alpha], "b t c h w -> (b t) c h w")
        with _without_gradient():
            found: Tensor = self.image_tower._embeds(slow.to(self.image_tower.conv1.weight.dtype))
        return found

    def _selected(self, tokens: Tensor, last: list[Tensor] | None = None) -> Iterator[Tensor]:
        """Yield the tokens [B*T,M,d] of each selected block in the tower's type.

        With a list `last`, all blocks run and the last one's tokens are put into it; without one,
        blocks after the last selected one do not run.
        """
        wanted, blocks = self.config.selected_layers, _blocks(self.image_tower)
        for number, block in enumerate(blocks if last is not None else blocks[: wanted[-1] + 1]):
            with _without_gradient():
                tokens = block(tokens)
            if number in wanted:
                yield tokens
        if last is not None:
            last.append(tokens)

    def _projected(self, tokens: Tensor) -> Tensor:
        """Return CLIP's embeddings [B*T,E] from the last block's tokens."""
        with _without_gradient():
            found: Tensor = self.image_tower.ln_post(tokens[:, 0]) @ self.image_tower.proj
        return found.clone()

    def _check(self, frames: Tensor) -> None:
        config, size = self.config, self.image_size
        if frames.ndim != 5 or 0 in frames.shape or frames.shape[2] != 3:
            raise UserError(
                f"frames of shape {list(frames.shape)} are no clips: they must be "
                f"[clips, {config.dense_frames}, 3, {size[0]}, {size[1]}]"
            )
        if not frames.is_floating_point():
            raise UserError(f"frames are {frames.dtype}: they must be preprocessed, floating")
        if frames.shape[1] % config.alpha:
            raise UserError(
                f"{frames.shape[1]} frames are not divisible by alpha {config.alpha}: CLIP looks "
                f"at every alpha-th frame; give {config.dense_frames}"
            )
        if frames.shape[1] != config.dense_frames or tuple(frames.shape[3:]) != size:
            raise UserError(
                f"clips of {frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[4]} do not "
                f"fit this DiST model: it takes {config.dense_frames} of {size[0]}x{size[1]}"
            )


def for_tower(config: DistConfig, image_tower: nn.Module) -> DistConfig:
    """Return `config` with the sizes of `image_tower` set; UserError if they do not fit."""
    plain = (
        isinstance(image_tower, VisionTransformer)
        and image_tower.attn_pool is None
        and image_tower.pool_type == "tok"
        and isinstance(image_tower.proj, nn.Parameter)
    )
    if not plain:
        raise UserError(
            f"the image tower is a {type(image_tower).__name__} that DiST cannot use: it needs a "
            "vision transformer of CLIP whose class token is projected, such as ViT-B-16/openai"
        )
    tower = cast(VisionTransformer, image_tower)
    rows, columns = tower.grid_size
    patch_height, patch_width = tower.patch_size
    if rows != columns or patch_height != patch_width:
        raise UserError(
            f"the image tower has {rows}x{columns} patches of {patch_height}x{patch_width}: DiST "
            "needs a square of square patches"
        )
    width, dim = cast(nn.Parameter, tower.proj).shape
    return config.for_backbone(width, patch_height, len(_blocks(tower)), dim)


def _without_gradient() -> AbstractContextManager[Any]:
    """Return inference mode; where an exporter traces it, which cannot, only no gradients."""
    return torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode()


def _blocks(image_tower: nn.Module) -> list[nn.Module]:
    return list(cast(Any, image_tower).transformer.resblocks)
