"""Adapters on both towers of a frozen CLIP or ViCLIP, trained on their own: MSTA.

B = clips, T = frames, s = input size of the tower, n = sentences, L = tokens of a sentence, D =
embedding width, C = classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from featstore.errors import UserError
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.guides import class_guides, guides_hash
from heads.end_to_end.model import EndToEndModel, check_labels
from heads.methods.head import Head
from heads.methods.msta.config import MstaConfig
from heads.methods.msta.head import MstaHead
from heads.methods.msta.losses import MstaLosses, description_embeddings, msta_losses
from heads.methods.msta.towers import AdaptedTowers, for_clip
from heads.methods.registry import method
from heads.methods.settings import MethodConfig
from heads.methods.text_classifier import class_cosines
from pipeline.clip_encoder import PRECISIONS, Encoder
from pipeline.prompts import PromptSet

SENTENCES_KEPT: Final = 128
"""Sentences whose activations are kept for the backward pass, about 0.3 GB in five blocks of a
text tower 512 wide. Where there are more, they are computed again, so many at a time."""

CLIPS_AT_ONCE: Final = 4
"""Clips that go through the image tower together. Where activations are computed again, those of so
many clips are held at a time: about 1.6 GB in blocks 8 to 12 of ViT-B/16 with 8 frames."""

Descriptions = tuple[Tensor, Tensor]
"""Embeddings of the spatial and of the temporal descriptions of every class, [C,D] each."""


class AdapterModel(EndToEndModel):
    """A CLIP whose both towers are frozen and have adapters, which alone are trained.

    As `EndToEndModel`, but `train` must be "head", the logit scale stays CLIP's, and the class
    texts come from the adapted text tower in every step: `sentences` are the token ids [n,L] of
    all classes' sentences, `counts` how many each class has. `descriptions` are what class texts
    are held near; None turns that loss off. `checkpointing` trades time for memory. What lies below
    the first adapter runs without gradients, of the image tower in `precision`; everything else is
    in float32.
    """

    uses_autocast = False

    def __init__(
        self,
        clip: nn.Module,
        head: Head,
        logit_scale: float | Tensor,
        *,
        sentences: Tensor,
        counts: Sequence[int],
        descriptions: Descriptions | None = None,
        train: str = "head",
        checkpointing: bool = False,
        precision: str = "fp32",
    ) -> None:
        super().__init__(cast(nn.Module, clip.visual), head, logit_scale, train=train)
        self.logit_scale.requires_grad_(False)
        self.towers = AdaptedTowers(clip, cast(MstaHead, head).adapters, PRECISIONS[precision])
        self._counts, self._recomputes = list(counts), checkpointing
        self.register_buffer("_sentences", sentences, persistent=False)
        # Nothing below the first adapter is trained, so that it is computed once.
        self.register_buffer("_below", self.towers.text_tokens_before(sentences), persistent=False)
        for name, rows in zip(("_spatial", "_temporal"), descriptions or (None, None), strict=True):
            self.register_buffer(name, rows, persistent=False)
        self.train(head.training)

    def class_embeddings(self, fixed: Tensor) -> Tensor:
        """Return the unit embeddings [C,D] of the classes by the adapted text tower, as it is now.

        `fixed` is not used. A class with several sentences has the mean of theirs.
        """
        below, sentences = cast(Tensor, self._below), cast(Tensor, self._sentences)
        parts = zip(*(torch.split(x, SENTENCES_KEPT) for x in (below, sentences)), strict=True)
        again = (self._recomputes or len(below) > SENTENCES_KEPT) and torch.is_grad_enabled()
        embed = self.towers.text_features_from
        found = [
            checkpoint(embed, *part, use_reentrant=False) if again else embed(*part)
            for part in parts
        ]
        units = functional.normalize(torch.cat(found), dim=-1)
        means = [lines.mean(dim=0) for lines in torch.split(units, self._counts)]
        return functional.normalize(torch.stack(means), dim=-1)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the clips' embeddings [B,1,D] of frames [B,T,3,s,s], not normalised."""
        self._check_frames(frames)
        again, embed = self._recomputes and torch.is_grad_enabled(), self.towers.video_features_from
        found = []
        for clips in torch.split(frames, CLIPS_AT_ONCE):
            tokens = self.towers.tokens_before(clips)
            found.append(checkpoint(embed, tokens, use_reentrant=False) if again else embed(tokens))
        return torch.cat(found)[:, None]

    def training_loss(
        self,
        frames: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        draw: Any,
        subsets: Tensor | None = None,
        **weights: float,
    ) -> MstaLosses:
        """Return the losses of one batch, as `EndToEndModel.training_loss`.

        Of `class_embeddings` [C,D] only the number of classes is used; `draw`, `subsets` and
        `weights` have no effect.
        """
        self._check_frames(frames)
        check_labels(labels, len(frames), len(class_embeddings))
        spatial, temporal = (getattr(self, name) for name in ("_spatial", "_temporal"))
        video = self.encode(frames)[:, 0]
        return msta_losses(
            self.towers.config,
            video,
            labels.to(video.device, non_blocking=True),
            self.class_embeddings(class_embeddings),
            None if spatial is None else (spatial, temporal),
            self.logit_scale.exp(),
            self.head.class_weights,
        )

    def forward(self, frames: Tensor, class_embeddings: Tensor, modulate: bool = True) -> Tensor:
        """Return cosines [B,C], as `EndToEndModel.forward`; `modulate` has no effect."""
        unit = functional.normalize(self.encode(frames)[:, 0], dim=-1)
        return class_cosines(unit, class_embeddings)

    def weights_of(self, config: FinetuneConfig) -> dict[str, float]:
        """Return nothing: the weight of the second loss is in the head's configuration."""
        return {}

    def kept_bytes(self) -> int:
        """Return the bytes that a frame of a clip keeps for the backward pass."""
        config, device = self.towers.config, self.logit_scale.device
        clip = torch.zeros(1, config.frames, 3, *self.towers.image_size, device=device)
        return self._kept(clip) // config.frames

    def tower_parameters(self) -> list[nn.Parameter]:
        """Return nothing: towers and logit scale stay as they are."""
        return []


def adapter_head_config(
    config: MethodConfig, training: FinetuneConfig, encoder: Encoder
) -> MstaConfig:
    """Return the configuration of new adapters for an encoder and clips of `training.frames`.

    Raises UserError for towers, blocks or frames that are not possible.
    """
    wanted = replace(cast(MstaConfig, config), frames=training.frames)
    return for_clip(wanted, encoder.model)


def require_adapter_training(head: Head, config: FinetuneConfig, encoder: Encoder) -> None:
    """Raise UserError for settings of training that adapters on frozen towers cannot follow."""
    title, frames = method(head.config.kind).title, head.config.frames
    if config.train != "head":
        raise UserError(
            f"{title} keeps both towers as they are, so --train {config.train} is not possible: "
            'leave it out, or write train = "head" in the recipe'
        )
    if config.shard == "fsdp":
        raise UserError(
            f"--shard fsdp spreads a trained tower, and {title} keeps the towers as they are: "
            "leave it out"
        )
    if config.frames != frames:
        raise UserError(
            f"{config.frames} frames do not fit the head to begin with, which takes {frames}: use "
            f"--frames {frames}"
        )
    if encoder.clip_frames not in (1, frames):
        raise UserError(
            f"clips of {frames} frames do not fit {encoder.name}, which looks at "
            f"{encoder.clip_frames} together: use --frames {encoder.clip_frames}"
        )


def guided_model(
    encoder: Encoder,
    head: Head,
    logit_scale: Tensor,
    class_names: Sequence[str],
    prompt_set: PromptSet,
    guides: Path | None,
    **more: Any,
) -> tuple[AdapterModel, dict[str, str]]:
    """Return the model of an encoder and a head, and what a run records of its descriptions.

    `guides` is the file of descriptions, as for `class_guides`; `more` are further arguments of the
    model. Errors as `class_guides` and `embedded_descriptions`.
    """
    described, said = None, {}
    if head.config.alpha:
        sets = class_guides(guides, class_names)
        described = embedded_descriptions(
            encoder, class_names, sets, head.config.normalise_descriptions
        )
        said["guides"] = guides_hash(sets, class_names)
    lines = [prompt_set.sentences(name) for name in class_names]
    sentences = encoder.tokenize([text for of_class in lines for text in of_class])
    model = AdapterModel(
        *(encoder.model, head, logit_scale),
        sentences=sentences.to(encoder.device),
        counts=[len(of_class) for of_class in lines],
        descriptions=described,
        **more,
    )
    return model, said


def embedded_descriptions(
    encoder: Encoder, class_names: Sequence[str], sets: tuple[PromptSet, PromptSet], normalise: bool
) -> Descriptions:
    """Return the embeddings of descriptions by the towers as they are, [C,D] float32 on the CPU.

    `sets` are the spatial and the temporal sentences of the classes; every class must have as many
    as the others. `normalise` as in `description_embeddings`. Raises UserError for classes without
    sentences, for different numbers, and for sentences that are too long for the encoder.
    """
    found = []
    for prompts in sets:
        per_class = [prompts.sentences(name) for name in class_names]
        counts = sorted({len(lines) for lines in per_class})
        if len(counts) > 1:
            fewest = class_names[min(range(len(per_class)), key=lambda at: len(per_class[at]))]
            raise UserError(
                f"{prompts.source or prompts.name}: classes have {counts[0]} to {counts[-1]} "
                f"{prompts.name} descriptions (the fewest: {fewest!r}): give every class as many "
                "as the others"
            )
        rows = encoder.encode_text([text for lines in per_class for text in lines])
        rows = rearrange(rows, "(c n) d -> c n d", n=counts[0])
        found.append(description_embeddings(rows, normalise).cpu())
    return found[0], found[1]
