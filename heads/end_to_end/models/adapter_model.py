"""Adapters on both towers of a frozen CLIP or ViCLIP, trained on their own: MSTA.

B = clips, T = frames, s = input size of the tower, M = tokens of a frame, d = width of the image
tower, n = sentences, L = tokens of a sentence, D = embedding width, C = classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from featstore.errors import UserError, WorkError
from featstore.files.machine import keep_freed_blocks
from featstore.format.class_texts import guiding_name
from featstore.format.metadata import read_metadata
from featstore.workspace import Workspace
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.models.end_to_end_model import EndToEndModel, check_labels
from heads.end_to_end.models.trained_parts import require_frozen
from heads.files.kept_texts import KeptTexts
from heads.methods.head import Head
from heads.methods.msta.config import MstaConfig
from heads.methods.msta.head import MstaHead
from heads.methods.msta.losses import MstaLosses, msta_losses, with_descriptions
from heads.methods.msta.towers import AdaptedTowers, for_clip
from heads.methods.registry import method
from heads.methods.settings import MethodConfig
from heads.methods.text_classifier import class_cosines
from pipeline.clip_encoder import PRECISIONS, Encoder
from pipeline.descriptions.check import read_class_descriptions
from pipeline.descriptions.class_descriptions import KINDS, SHAPE, ClassDescriptions, read_object
from pipeline.descriptions.wording import (
    SPATIAL_TEMPLATES,
    TEMPORAL_TEMPLATES,
    template_descriptions,
)
from pipeline.encoders.text_tower import mean_of_sentences
from pipeline.extraction.description_texts import descriptions_embeddings
from pipeline.prompts import PromptSet

log = logging.getLogger(__name__)

SENTENCES_KEPT: Final = 128
"""Sentences whose activations are kept for the backward pass, about 0.3 GB in five blocks of a
text tower 512 wide. Where there are more, they are computed again, so many at a time."""

CLIPS_AT_ONCE: Final = 4
"""Clips that go through the image tower together; in bfloat16 on a CPU, whose products are so fast
that what lies between them should stay in its caches, every clip goes alone. Where activations are
computed again, or gradients are taken clip by clip, those of so many clips are held at a time:
about 1.6 GB in blocks 8 to 12 of ViT-B/16 with 8 frames, and 0.2 GB of one clip in bfloat16."""

Descriptions = tuple[Tensor, Tensor]
"""Embeddings of the spatial and of the temporal descriptions of every class, [C,D] each."""


class AdapterModel(EndToEndModel):
    """A CLIP whose both towers are frozen and have adapters, which alone are trained.

    As `EndToEndModel`, but `train` must be "head", the logit scale stays CLIP's, and the class
    texts come from the adapted text tower in every step: `sentences` are the token ids [n,L] of
    all classes' sentences, `counts` how many each class has. `descriptions` are what class texts
    are held near; None turns that loss off. `checkpointing` trades time for memory. What lies below
    the first adapter runs without gradients, of the image tower in `precision`. With "bf16" the
    products of the other blocks and of the adapters are in bfloat16, too; parameters, norms, the
    sums of blocks and losses are in float32, as everything is with another one.
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
        adapters, dtype = cast(MstaHead, head).adapters, PRECISIONS[precision]
        upper = "bf16" if precision == "bf16" else "fp32"  # fp16 would need a scaler of gradients
        self.in_parts = upper == "bf16"
        """Whether a step goes through clips part by part and keeps nothing of those before."""
        self.towers = AdaptedTowers(clip, adapters, dtype, PRECISIONS[upper])
        self._counts, self._recomputes = list(counts), checkpointing
        self.register_buffer("_sentences", sentences, persistent=False)
        # Nothing below the first adapter is trained, so that it is computed once.
        self.register_buffer("_below", self.towers.text_tokens_before(sentences), persistent=False)
        for name, rows in zip(("_spatial", "_temporal"), descriptions or (None, None), strict=True):
            self.register_buffer(name, rows, persistent=False)
        self.train(head.training)

    @property
    def _at_once(self) -> int:
        alone = self.in_parts and self.logit_scale.device.type == "cpu"
        return 1 if alone else CLIPS_AT_ONCE

    def class_embeddings(self, fixed: Tensor) -> Tensor:
        """Return the unit embeddings [C,D] of the classes by the adapted text tower, as it is now.

        `fixed` is not used. A class with several sentences has the mean of theirs.
        """
        below, sentences = cast(Tensor, self._below), cast(Tensor, self._sentences)
        parts = zip(*(torch.split(x, SENTENCES_KEPT) for x in (below, sentences)), strict=True)
        many = len(below) > SENTENCES_KEPT
        again = (many or (self._recomputes and not self.in_parts)) and torch.is_grad_enabled()
        embed = self.towers.text_features_from
        found = [
            checkpoint(embed, *part, use_reentrant=False) if again else embed(*part)
            for part in parts
        ]
        return mean_of_sentences(torch.cat(found), self._counts)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the clips' embeddings [B,1,D] of frames [B,T,3,s,s], not normalised.

        Instead of frames everywhere the tokens [B,T,M,d] may stand that the block below the first
        adapter makes of them (`AdaptedTowers.tokens_before`).
        """
        self._check_frames(frames)
        again, embed = self._recomputes and torch.is_grad_enabled(), self.towers.video_features_from
        found = []
        for clips in torch.split(frames, self._at_once):
            tokens = clips if frames.ndim == 4 else self.towers.tokens_before(clips)
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
        labels = labels.to(self.logit_scale.device, non_blocking=True)
        spatial, temporal = (getattr(self, name) for name in ("_spatial", "_temporal"))
        described = None if spatial is None else (spatial, temporal)
        if self.in_parts and self.head.class_weights is None and torch.is_grad_enabled():
            texts = self.class_embeddings(class_embeddings)
            right = self._classification_in_parts(frames, labels, texts)
            return with_descriptions(self.towers.config, right, labels, texts, described)
        video = self.encode(frames)[:, 0]
        texts = self.class_embeddings(class_embeddings)
        rest = described, self.logit_scale.exp(), self.head.class_weights
        return msta_losses(self.towers.config, video, labels, texts, *rest)

    def _classification_in_parts(self, frames: Tensor, labels: Tensor, texts: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch with class texts [C,D].

        Every clip's is its own, so that its gradient is known as soon as its embedding is: what is
        kept for the backward pass is that of a few clips, and nothing is computed twice.
        """
        named = self.towers.adapters.named_parameters()
        beside = [value for name, value in named if not name.startswith("text_adapter.")]
        asked = [*beside, texts.detach().requires_grad_()]
        value, sums = torch.zeros((), device=texts.device), [torch.zeros_like(x) for x in asked]
        config, scale = self.towers.config, self.logit_scale.exp()
        parts = (torch.split(x, self._at_once) for x in (frames, labels))
        for clips, right in zip(*parts, strict=True):
            tokens = clips if frames.ndim == 4 else self.towers.tokens_before(clips)
            video = self.towers.video_features_from(tokens)
            loss = msta_losses(config, video, right, asked[-1], None, scale).total
            loss = loss * (len(clips) / len(frames))
            for total, part in zip(sums, torch.autograd.grad(loss, asked), strict=True):
                total += part
            value += loss.detach()
        return cast(Tensor, _Known.apply(value, sums, *beside, texts))

    def forward(self, frames: Tensor, class_embeddings: Tensor, modulate: bool = True) -> Tensor:
        """Return cosines [B,C], as `EndToEndModel.forward`; `modulate` has no effect."""
        unit = functional.normalize(self.encode(frames)[:, 0], dim=-1)
        return class_cosines(unit, class_embeddings)

    def weights_of(self, config: FinetuneConfig) -> dict[str, float]:
        """Return nothing: the weight of the second loss is in the head's configuration."""
        return {}

    def kept_bytes(self) -> int:
        """Return the bytes that a frame of a clip keeps for the backward pass of a batch."""
        if self.in_parts:
            return 0
        config, device = self.towers.config, self.logit_scale.device
        clip = torch.zeros(1, config.frames, 3, *self.towers.image_size, device=device)
        return self._kept(clip) // config.frames

    def _check_frames(self, frames: Tensor) -> None:
        if frames.ndim != 4:
            super()._check_frames(frames)
            return
        fits = not self.towers.joint and frames.shape[3] == self.towers.config.visual_width
        if not fits or 0 in frames.shape or not frames.is_floating_point():
            raise ValueError(f"{frames.dtype} {list(frames.shape)} are no tokens of this tower")
        self.head.require_frames(frames.shape[1])

    def tower_parameters(self) -> list[nn.Parameter]:
        """Return nothing: towers and logit scale stay as they are."""
        return []


class _Known(torch.autograd.Function):
    """A number whose gradients to the other inputs are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        return None, None, *(given[0] * gradient for gradient in ctx.gradients)


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
    require_frozen(title, "both towers as they are", config, frames)
    if encoder.clip_frames not in (1, frames):
        raise UserError(
            f"clips of {frames} frames do not fit {encoder.name}, which looks at "
            f"{encoder.clip_frames} together: use --frames {encoder.clip_frames}"
        )


class GuidedModel(NamedTuple):
    """A model, and what belongs to its descriptions."""

    model: AdapterModel
    recorded: dict[str, str]
    """What a run records of them."""
    new_texts: tuple[tuple[KeptTexts, Tensor], ...]
    """Their embeddings [C,D], with the place in the run's folder where they are to be kept."""


def guided_model(
    encoder: Encoder,
    head: Head,
    logit_scale: Tensor,
    class_names: Sequence[str],
    prompt_set: PromptSet,
    descriptions: ClassDescriptions | None = None,
    *,
    store: Path | None = None,
    run_dir: Path | None = None,
    **more: Any,
) -> GuidedModel:
    """Return the model of an encoder and a head, guided by descriptions of the classes.

    Without `descriptions` they are made of templates, which is logged. Their embeddings are read
    from `run_dir` if a run has kept them there, else from `store`, which keeps new ones
    (`descriptions_embeddings`). `more` are further arguments of the model. Raises UserError for a
    class without descriptions and for a sentence that the tower does not take.
    """
    guides: Descriptions | None = None
    recorded: dict[str, str] = {}
    new_texts: list[tuple[KeptTexts, Tensor]] = []
    if not head.config.alpha:
        if descriptions is not None:
            log.warning("%s is not used: alpha is 0 in the recipe", descriptions.source)
    else:
        if descriptions is None:
            descriptions = template_descriptions(class_names)
            log.warning(
                "no descriptions are given (--guides FILE): class texts are held near templates, "
                "such as %r and %r",
                *(SPATIAL_TEMPLATES[0], TEMPORAL_TEMPLATES[0]),
            )
        first = head.config.normalise_descriptions
        held = descriptions.of(class_names)
        recorded["guides"] = held.hash
        names = [
            guiding_name(kind, held.prompt_set(kind, kind).hash(class_names), normalise_first=first)
            for kind in KINDS
        ]
        places = [KeptTexts(run_dir or Path(), encoder.fingerprint, name) for name in names]
        size = len(class_names), encoder.dim
        kept = [None if run_dir is None else place.read(*size) for place in places]
        if kept[0] is not None and kept[1] is not None:
            guides = kept[0], kept[1]
        else:
            guides = descriptions_embeddings(
                encoder, descriptions, class_names, store=store, normalise_first=first
            )
            new_texts = [] if run_dir is None else list(zip(places, guides, strict=True))
    lines = [prompt_set.sentences(name) for name in class_names]
    sentences = encoder.tokenize([text for of_class in lines for text in of_class])
    model = AdapterModel(
        *(encoder.model, head, logit_scale),
        sentences=sentences.to(encoder.device),
        counts=[len(of_class) for of_class in lines],
        descriptions=guides,
        **more,
    )
    _say_shares(model, encoder)
    if model.in_parts and encoder.device.type == "cpu":
        keep_freed_blocks()  # each clip takes the blocks that the one before has freed
    return GuidedModel(model, recorded, tuple(new_texts))


def _say_shares(model: AdapterModel, encoder: Encoder) -> None:
    """Log how small the adapters are beside what they adapt."""
    trained = model.towers.config.parameters
    sizes = [
        sum(p.numel() for p in part.parameters()) for part in (model.image_tower, encoder.model)
    ]
    log.info(
        "adapters of blocks %d to %d: %s parameters, %.1f %% of those of the image tower and "
        "%.1f %% of those of both towers",
        *(model.towers.config.first, model.towers.config.last, f"{trained:,}"),
        *(100 * trained / size for size in sizes),
    )


def read_guides(
    path: Path, class_names: Sequence[str], all_names: Sequence[str], encoder: Encoder
) -> ClassDescriptions:
    """Read the descriptions of the classes that are trained, which may be half of `all_names`.

    The file describes either these or all classes of the data set. Errors as
    `read_class_descriptions`.
    """
    half = len(class_names) < len(all_names)
    described = len(read_object(path, f"write {SHAPE}, every class once")) if half else 0
    names = all_names if described > len(class_names) else class_names
    return read_class_descriptions(path, names, encoder)


def store_of_texts(workspace: Workspace, dataset: str, encoder: Encoder) -> Path | None:
    """Return a store of a data set that keeps texts of this encoder; None if there is none."""
    for path in workspace.stores(dataset):
        try:
            metadata = read_metadata(path)
        except (UserError, WorkError):
            continue
        made = metadata.provenance.encoder_fingerprint
        if metadata.schema.pooled and made == encoder.fingerprint:
            return path
    return None
