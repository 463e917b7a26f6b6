"""Both towers of a CLIP or a ViCLIP with adapters beside their blocks.

B = clips, T = frames, s = input size, M = tokens of a frame, P = patches of a frame, d = width of
the image or video tower, n = sentences, L = tokens of a sentence, D = embedding width.

A CLIP looks at every frame by itself: its tokens are [B,T,M,d], class tokens first, and a clip's
embedding is the mean of its frames'; only the adapters' convolution links frames. A ViCLIP looks at
all patches of a clip at once: its tokens are [B,1+P*T,d], one class token first, time fastest.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from einops import rearrange
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from featstore.errors import UserError
from heads.methods.msta.adapter import Adapters, Tower
from heads.methods.msta.config import MstaConfig
from heads.methods.msta.frozen_block import FrozenBlock, summed


class AdaptedTowers(nn.Module):
    """Frozen towers, and adapters that are trained.

    `clip` is used itself, not copied: an open_clip model or a ViCLIP, whose parameters are frozen;
    it stays in evaluation mode. What lies below the first adapter runs without gradients, in the
    image tower in `lower_dtype`, to which its weights are converted. The products of the other
    blocks of both towers, and of adapters, are in `upper_dtype`, where a block is one that
    `FrozenBlock` knows; everything else is in the adapters' type. Raises UserError for towers that
    cannot be adapted or that the adapters were not made for.

    Attributes: `config`, `adapters`, `clip`, `joint` (whether frames are looked at together).
    """

    def __init__(
        self,
        clip: nn.Module,
        adapters: Adapters | MstaConfig,
        lower_dtype: torch.dtype = torch.float32,
        upper_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        given = adapters.config if isinstance(adapters, Adapters) else adapters
        self.config = config = for_clip(given, clip)
        self.clip = clip.requires_grad_(False)
        self.adapters = adapters if isinstance(adapters, Adapters) else Adapters(config)
        self._visual, self._text = cast(Any, clip).visual, _text_tower(clip)
        self.joint = not isinstance(self._visual, VisionTransformer)
        self._blocks = list(self._visual.transformer.resblocks)
        below = [self._visual.conv1, self._visual.ln_pre, *self._blocks[: config.first - 1]]
        for part in below:
            part.to(lower_dtype)
        self._in_upper = nn.ModuleDict()  # by tower and number
        if upper_dtype != torch.float32:
            both = {"visual": self._blocks, "text": self._text.transformer.resblocks}
            for tower, blocks in both.items():
                for number, block in enumerate(blocks[config.first - 1 :], config.first):
                    if FrozenBlock.fits(block):
                        self._in_upper[f"{tower}_{number}"] = FrozenBlock(block, upper_dtype)
        self.train(self.adapters.training)

    def train(self, mode: bool = True) -> AdaptedTowers:
        """Switch the adapters' mode; the towers stay in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the frames that the image tower takes."""
        size = self._visual.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def video_features(self, frames: Tensor) -> Tensor:
        """Return the embeddings [B,D] of preprocessed clips [B,T,3,s,s], not normalised.

        Raises UserError for frames of another size, and for another number of frames than a ViCLIP
        takes.
        """
        return self.video_features_from(self.tokens_before(frames))

    def tokens_before(self, frames: Tensor) -> Tensor:
        """Return the tokens of clips [B,T,3,s,s] as the first adapted block takes them.

        They have the adapters' type and no gradient; errors as `video_features`.
        """
        self._check(frames)
        with torch.no_grad():
            dtype = self._visual.conv1.weight.dtype
            if self.joint:
                tokens = self._visual.ln_pre(self._visual.tokens(frames.to(dtype)))
            else:
                tokens = self._visual._embeds(rearrange(frames, "b t ... -> (b t) ...").to(dtype))
            for block in self._blocks[: self.config.first - 1]:
                tokens = block(tokens)
            tokens = tokens.to(self._dtype)
        if self.joint:
            return cast(Tensor, tokens)
        return cast(Tensor, rearrange(tokens, "(b t) m d -> b t m d", b=len(frames)))

    def video_features_from(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [B,D] of clips, from what `tokens_before` makes of them."""
        clips, frames = len(tokens), self._frames_in(tokens)
        tokens = (tokens if self.joint else rearrange(tokens, "b t m d -> (b t) m d")).to(
            self._dtype
        )
        for number, block in enumerate(self._blocks[self.config.first - 1 :], self.config.first):
            if number == len(self._blocks) and self._reads_class_tokens_only(block):
                tokens = self._class_tokens_after(number, tokens, clips)
                break
            tokens, read = self._through("visual", number, block, tokens)
            if read is not None:
                tokens = _plus(tokens, self._added(number, read, clips, frames))
        if self.joint:
            return cast(Tensor, self._visual.ln_post(tokens[:, 0]) @ self._visual.proj)
        pooled = self._visual._pool(tokens)[0] @ self._visual.proj
        return cast(Tensor, rearrange(pooled, "(b t) d -> b t d", b=clips).mean(1))

    def _through(
        self, tower: Tower, number: int, block: Any, tokens: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a block makes of tokens [N,M,d], and what its adapter, if any, reads."""
        adapted = number in self.adapters
        if (low := self._low(tower, number)) is None:
            output = block(tokens, attn_mask=mask)
            return output, (block.ln_1(tokens) if self.config.norm else tokens) if adapted else None
        read = low.read(tokens)
        output = low(tokens, read, mask)
        return output, (read if self.config.norm else tokens.to(read.dtype)) if adapted else None

    def _low(self, tower: Tower, number: int) -> FrozenBlock | None:
        name = f"{tower}_{number}"
        return cast(FrozenBlock, self._in_upper[name]) if name in self._in_upper else None

    def _reads_class_tokens_only(self, last: nn.Module) -> bool:
        """Return whether the tower's embedding comes from the class tokens of its last block."""
        pools = self.joint or self._visual.pool_type == "tok"
        return pools and type(last) is ResidualAttentionBlock

    def _class_tokens_after(self, number: int, tokens: Tensor, clips: int) -> Tensor:
        """Return the class tokens [N,1,d] that block `number` and its adapter make of [N,M,d].

        The other tokens are only looked at: what they would become is not computed.
        """
        block, config = cast(Any, self._blocks[number - 1]), self.config
        if (low := self._low("visual", number)) is not None:
            read = low.read(tokens)
            output = low.class_tokens(tokens, read)
        else:
            read = block.ln_1(tokens)
            output = tokens[:, :1] + block.ls_1(block.attention(read[:, :1], read, read))
            output = output + block.ls_2(block.mlp(block.ln_2(output)))
        if number not in self.adapters:
            return output
        taken = (read if config.norm else tokens)[:, :1].to(read.dtype)
        taken = rearrange(taken, "(b t) m d -> b t m d", b=clips)
        added = rearrange(self.adapters.class_tokens(number, taken), "b t m d -> (b t) m d")
        if torch.is_grad_enabled() and config.form != "none" and not config.conv_class_token:
            # Its convolution changes patches only. Optimisers and processes that train together
            # expect a gradient of every parameter, which here is 0.
            unread = self.adapters.temporal_adapter[str(number)].parameters()
            added = added + 0.0 * sum(p.sum() for p in unread)
        return output + added

    def _added(self, number: int, read: Tensor, clips: int, frames: int) -> Tensor:
        """Return what the adapter of a block adds to its tokens, in their layout."""
        if not self.joint:
            parts = rearrange(read, "(b t) m d -> b t m d", b=clips)
            if read.dtype != self._dtype:
                together = self.adapters.frames(number, parts)
                return rearrange(together, "b t m d -> (b t) m d")
            both = self.adapters.video(number, parts[:, :, :1], parts[:, :, 1:])
            return rearrange(torch.cat(both, dim=2), "b t m d -> (b t) m d")
        patches = rearrange(read[:, 1:], "b (p t) d -> b t p d", t=frames)
        first, patches = self.adapters.video(number, read[:, :1, None], patches)
        return torch.cat([first[:, :, 0], rearrange(patches, "b t p d -> b (p t) d")], dim=1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [n,D] of token ids int64 [n,L], not normalised."""
        return self.text_features_from(self.text_tokens_before(tokens), tokens)

    def text_tokens_before(self, tokens: Tensor) -> Tensor:
        """Return the tokens [n,L',d] of ids int64 [n,L] as the first adapted block takes them.

        They have no gradient and depend on nothing that is trained. In a CLIP, L' is the length of
        the longest sentence, since nothing looks at what comes after a sentence.
        """
        tower = self._text
        with torch.no_grad():
            if isinstance(tower, TextTransformer):
                hidden, _ = tower._embeds(tokens)
            else:
                used = int(tokens.argmax(dim=-1).max()) + 1
                hidden = tower.token_embedding(tokens[:, :used]) + tower.positional_embedding[:used]
            for block in tower.transformer.resblocks[: self.config.first - 1]:
                hidden = block(hidden, attn_mask=self._mask(hidden))
        return cast(Tensor, hidden)

    def text_features_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the embeddings [n,D] of sentences, from what `text_tokens_before` made of ids."""
        tower = self._text
        above = tower.transformer.resblocks[self.config.first - 1 :]
        for number, block in enumerate(above, self.config.first):
            hidden, read = self._through("text", number, block, hidden, self._mask(hidden))
            if read is not None:
                hidden = _plus(hidden, self.adapters.text(number, read))
        at = torch.arange(len(tokens), device=hidden.device), tokens.argmax(dim=-1)
        if isinstance(tower, TextTransformer):  # as it does it itself, to the bit
            found = tower.ln_final(hidden)[at]
        else:
            found = tower.ln_final(hidden[at])
        projection = tower.text_projection
        if projection is None:
            return cast(Tensor, found)
        return cast(
            Tensor, projection(found) if isinstance(projection, nn.Linear) else found @ projection
        )

    def _mask(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        return cast(Tensor, self._text.attn_mask[:length, :length])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.adapters.parameters()).dtype

    def _frames_in(self, tokens: Tensor) -> int:
        if not self.joint:
            return tokens.shape[1]
        patches: int = self._visual.positional_embedding.shape[0] - 1
        return (tokens.shape[1] - 1) // patches

    def _check(self, frames: Tensor) -> None:
        height, width = self.image_size
        if frames.ndim != 5 or 0 in frames.shape or tuple(frames.shape[2:]) != (3, height, width):
            raise UserError(
                f"frames of shape {list(frames.shape)} are no clips: they must be [clips, frames, "
                f"3, {height}, {width}]"
            )
        if not frames.is_floating_point():
            raise UserError(f"frames are {frames.dtype}: they must be preprocessed, floating")
        if self.joint and frames.shape[1] not in (1, self._visual.frames):
            raise UserError(
                f"clips of {frames.shape[1]} frames do not fit this ViCLIP: it takes "
                f"{self._visual.frames}"
            )


def _plus(tokens: Tensor, added: Tensor) -> Tensor:
    """Return what a block makes of tokens and what its adapter adds, in the type of the tokens."""
    return tokens + added if added.dtype == tokens.dtype else summed(tokens, added)


def for_clip(config: MstaConfig, clip: nn.Module) -> MstaConfig:
    """Return `config` with its widths and blocks set for the towers of `clip`.

    Raises UserError if they do not fit (`MstaConfig.for_towers`), or cannot be adapted.
    """
    visual = getattr(clip, "visual", None)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    projection = getattr(visual, "proj", None)
    pools = getattr(visual, "attn_pool", None) is not None
    if blocks is None or pools or not isinstance(projection, nn.Parameter):
        raise UserError(
            f"the image tower is a {type(visual).__name__} that MSTA cannot adapt: it needs a "
            "vision transformer whose class token is projected, such as ViT-B-16/openai or a ViCLIP"
        )
    text = _text_tower(clip)
    width, dim = projection.shape
    return config.for_towers(
        width, text.ln_final.weight.shape[0], dim, len(blocks), len(text.transformer.resblocks)
    )


def _text_tower(clip: nn.Module) -> Any:
    """Return the part of a model that holds the text tower; UserError for one of another kind."""
    text: Any = getattr(clip, "text_encoder", getattr(clip, "text", clip))
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    odd = getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False)
    blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
    if blocks is None or pool != "argmax" or odd or getattr(text, "attn_mask", None) is None:
        raise UserError(
            f"the text tower ({type(text).__name__}) is none that MSTA can adapt: it must look "
            "back only and be read at the end of a sentence, as in ViT-B-16/openai or a ViCLIP"
        )
    return text
