"""What differs between methods that train end to end: options, head, clips, precision, model.

A method trains the towers, holds trained towers by a teacher, looks at pixels beside a frozen
tower, or adapts both frozen towers. `setup_of` chooses one of these by what the method says of
itself; everything else in this folder is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, cast

import torch
from torch import Tensor

from featstore.errors import UserError
from featstore.workspace import Workspace
from heads.arithmetic import resolve_training_precision
from heads.end_to_end.config import AVERAGES, BOTH_TOWERS, FinetuneConfig
from heads.end_to_end.models.adapter_model import (
    adapter_head_config,
    guided_model,
    read_guides,
    require_adapter_training,
    store_of_texts,
)
from heads.end_to_end.models.end_to_end_model import EndToEndModel
from heads.end_to_end.models.pixel_model import (
    PixelHeadModel,
    pixel_head_config,
    require_pixel_training,
    tower_precision,
)
from heads.end_to_end.models.taught_model import TaughtModel
from heads.end_to_end.models.trained_texts import TrainedTexts
from heads.end_to_end.request import FinetuneRequest
from heads.files.kept_texts import KeptTexts
from heads.methods.head import Head
from heads.methods.registry import Method
from heads.methods.settings import MethodConfig
from heads.methods.taco.head import TacoHead
from heads.methods.taco.training import teacher_momentum
from heads.prediction.pixel_encoder import FloatPreprocessing
from pipeline.clip_encoder import Encoder
from pipeline.preprocessing import Preprocessing
from pipeline.prompts import PromptSet
from pipeline.video_clips.float_clips import FloatClipStream, FloatEvaluationClips, mirrored
from pipeline.video_clips.mirroring import label_swaps
from pipeline.video_clips.stream import ClipStream, EvaluationClips

TRAINED: Final = {"head": "head and logit scale", BOTH_TOWERS: "both towers and head"}
"""Words for values of `--train`; every other value is named together with the head."""

NewTexts = tuple[tuple[KeptTexts, Tensor], ...]
"""Texts [C,D] that training begins with, and where a run keeps them."""


@dataclass(frozen=True)
class Parts:
    """What the model of a training is made of."""

    encoder: Encoder
    head: Head
    logit_scale: Tensor
    """[] the natural logarithm."""
    class_names: Sequence[str]
    """Those that are trained."""
    all_names: Sequence[str]
    """Those of the data set."""
    prompt_set: PromptSet
    precision: str
    texts_from: str
    """Name of the data set whose stores may hold embeddings of descriptions."""
    first: bool
    """Whether this is the process that writes."""


class Setup:
    """Towers that train together with a head: the usual setup."""

    frozen: ClassVar[bool] = False
    """Whether the towers keep their weights."""

    def __init__(self, chosen: Method) -> None:
        self.method = chosen

    def require_options(
        self, request: FinetuneRequest, encoder: Encoder, prompts: PromptSet
    ) -> None:
        """Raise UserError for options, an encoder or prompts that only other methods can take."""
        title = self.method.title
        if encoder.clip_frames > 1:
            raise UserError(
                f"{encoder.name} encodes clips, and {title} trains with towers of single frames: "
                "name a CLIP, or use --method msta"
            )
        if request.guides is not None:
            raise UserError(f"--guides are for --method msta, not for {title}: leave them out")
        if request.tokens:
            raise UserError(f"--tokens is for --method msta, not for {title}: leave it out")

    def head_config(
        self, wanted: MethodConfig, config: FinetuneConfig, encoder: Encoder
    ) -> MethodConfig:
        """Return the configuration of a new head, fitted to encoder and clips."""
        return wanted

    def require(self, head: Head, config: FinetuneConfig, encoder: Encoder) -> None:
        """Raise UserError for settings of training that the method cannot follow."""
        given = [name for name, value in config.mixing.items() if value]
        given += ["mirror"] if config.mirror else []
        title = self.method.title
        if given:
            raise UserError(
                f"{' and '.join(given)} cannot be set for {title}, which trains on whole clips "
                "and plain labels: leave it out of the recipe"
            )
        _refuse_averages(config, title)

    def precision(self, config: FinetuneConfig, encoder: Encoder, device: torch.device) -> str:
        """Return the number type that training computes in."""
        return resolve_training_precision(config.precision, device)

    def clips(
        self, config: FinetuneConfig, class_names: Sequence[str], dataset: Any, **drawn: Any
    ) -> ClipStream:
        """Return the training clips of a data set; `drawn` are the further arguments."""
        return ClipStream(dataset, **drawn)

    def fit(self, head: Head, steps: int, epochs: int) -> None:
        """Set what is left to the length of the training, `epochs` epochs of `steps` batches."""

    @property
    def evaluation_clips(self) -> type[EvaluationClips]:
        """The kind of clips that an evaluation in training looks at."""
        return EvaluationClips

    def origin(self, config: FinetuneConfig, spec: str, made: Preprocessing) -> dict[str, Any]:
        """Return what the origin of the head says of the features that it takes."""
        return {
            "sampling": f"uniform:{config.frames}",
            "preprocessing": made.to_json(),
            "frames": config.frames,
        }

    def model(
        self, parts: Parts, request: FinetuneRequest, workspace: Workspace
    ) -> tuple[EndToEndModel, dict[str, str], NewTexts]:
        """Return the model, what the run records of its texts, and texts to be kept in the run."""
        config = request.config
        model = EndToEndModel(
            *(parts.encoder.image_tower, parts.head, parts.logit_scale),
            train=config.train,
            checkpointing=config.checkpointing,
            texts=_trained_texts(parts) if config.train == BOTH_TOWERS else None,
        )
        return model, {}, ()

    def words(self, config: FinetuneConfig) -> str:
        """Return what is trained, for people."""
        return TRAINED.get(config.train, f"{config.train} and head")


class TaughtTowers(Setup):
    """Both towers train with a head, held by a teacher; the mean of their weights is kept."""

    def require(self, head: Head, config: FinetuneConfig, encoder: Encoder) -> None:
        """See `Setup.require`."""
        if config.train != BOTH_TOWERS:
            raise UserError(
                f"{self.method.title} trains both towers, so --train {config.train} is not "
                f"possible: use --train {BOTH_TOWERS}"
            )
        if len(head.training_class_embeddings) < 2:
            raise UserError(
                f"{self.method.title} needs at least 2 classes, not "
                f"{len(head.training_class_embeddings)}: it learns how classes lie to each other"
            )
        super().require(head, replace(config, save="last", mirror=""), encoder)

    def fit(self, head: Head, steps: int, epochs: int) -> None:
        """See `Setup.fit`: the teacher's momentum."""
        if not head.config.teacher_momentum:
            head.config = replace(head.config, teacher_momentum=teacher_momentum(steps, epochs))

    def clips(
        self, config: FinetuneConfig, class_names: Sequence[str], dataset: Any, **drawn: Any
    ) -> ClipStream:
        """See `Setup.clips`."""
        return ClipStream(dataset, mirrored=label_swaps(config.mirror, class_names), **drawn)

    def model(
        self, parts: Parts, request: FinetuneRequest, workspace: Workspace
    ) -> tuple[EndToEndModel, dict[str, str], NewTexts]:
        """See `Setup.model`."""
        model = TaughtModel(
            parts.encoder.model,
            cast(TacoHead, parts.head),
            parts.logit_scale,
            texts=_trained_texts(parts),
            checkpointing=request.config.checkpointing,
        )
        return model, {}, ()

    def words(self, config: FinetuneConfig) -> str:
        """See `Setup.words`."""
        return f"both towers and {self.method.title}, held by a teacher"


class BesideTower(Setup):
    """A head that looks at pixels beside a frozen tower."""

    frozen = True

    def require_options(
        self, request: FinetuneRequest, encoder: Encoder, prompts: PromptSet
    ) -> None:
        """See `Setup.require_options`."""
        super().require_options(request, encoder, prompts)
        if not prompts.templates:
            raise UserError(
                f"prompt set {prompts.name} has sentences of its own for every class, which "
                f"evaluations of {self.method.title} cannot take: use --prompts name or a "
                "template file"
            )

    def head_config(
        self, wanted: MethodConfig, config: FinetuneConfig, encoder: Encoder
    ) -> MethodConfig:
        """See `Setup.head_config`."""
        return pixel_head_config(wanted, config, encoder.image_tower)

    def require(self, head: Head, config: FinetuneConfig, encoder: Encoder) -> None:
        """See `Setup.require`."""
        require_pixel_training(head, config)
        _refuse_averages(config, self.method.title)

    def precision(self, config: FinetuneConfig, encoder: Encoder, device: torch.device) -> str:
        """See `Setup.precision`: that of the frozen tower."""
        return tower_precision(config, encoder.dim, device)

    def clips(
        self, config: FinetuneConfig, class_names: Sequence[str], dataset: Any, **drawn: Any
    ) -> ClipStream:
        """See `Setup.clips`."""
        return FloatClipStream(dataset, **mirrored(config.mirror, class_names), **drawn)

    @property
    def evaluation_clips(self) -> type[EvaluationClips]:
        """See `Setup.evaluation_clips`."""
        return FloatEvaluationClips

    def origin(self, config: FinetuneConfig, spec: str, made: Preprocessing) -> dict[str, Any]:
        """See `Setup.origin`."""
        return {
            "sampling": f"dist:{config.frames}x1",
            "preprocessing": FloatPreprocessing.of(made).to_json(),
            "frames": config.frames,
        }

    def model(
        self, parts: Parts, request: FinetuneRequest, workspace: Workspace
    ) -> tuple[EndToEndModel, dict[str, str], NewTexts]:
        """See `Setup.model`."""
        model = PixelHeadModel(
            *(parts.encoder.image_tower, parts.head, parts.logit_scale),
            precision=parts.precision,
            train=request.config.train,
            checkpointing=request.config.checkpointing,
        )
        return model, {}, ()

    def words(self, config: FinetuneConfig) -> str:
        """See `Setup.words`."""
        return f"{self.method.title} beside the frozen tower"


class Adapters(Setup):
    """Adapters on both frozen towers."""

    frozen = True

    def require_options(
        self, request: FinetuneRequest, encoder: Encoder, prompts: PromptSet
    ) -> None:
        """See `Setup.require_options`: nothing is refused."""

    def head_config(
        self, wanted: MethodConfig, config: FinetuneConfig, encoder: Encoder
    ) -> MethodConfig:
        """See `Setup.head_config`."""
        return adapter_head_config(wanted, config, encoder)

    def require(self, head: Head, config: FinetuneConfig, encoder: Encoder) -> None:
        """See `Setup.require`."""
        super().require(head, config, encoder)
        require_adapter_training(head, config, encoder)

    def precision(self, config: FinetuneConfig, encoder: Encoder, device: torch.device) -> str:
        """See `Setup.precision`: that of the frozen towers."""
        return tower_precision(config, encoder.dim, device)

    def origin(self, config: FinetuneConfig, spec: str, made: Preprocessing) -> dict[str, Any]:
        """See `Setup.origin`: a view has one embedding of all its frames."""
        return super().origin(config, spec, made) | {"frames": 1, "adapted_encoder": spec}

    def model(
        self, parts: Parts, request: FinetuneRequest, workspace: Workspace
    ) -> tuple[EndToEndModel, dict[str, str], NewTexts]:
        """See `Setup.model`."""
        encoder, names, guides = parts.encoder, parts.class_names, request.guides
        return guided_model(
            *(encoder, parts.head, parts.logit_scale, names, parts.prompt_set),
            None if guides is None else read_guides(guides, names, parts.all_names, encoder),
            store=store_of_texts(workspace, parts.texts_from, encoder) if parts.first else None,
            run_dir=request.run_dir,
            precision=parts.precision,
            train=request.config.train,
            checkpointing=request.config.checkpointing,
        )

    def words(self, config: FinetuneConfig) -> str:
        """See `Setup.words`."""
        return f"{self.method.title} on both frozen towers"


def setup_of(chosen: Method) -> Setup:
    """Return how a method is trained end to end."""
    if chosen.pixels:
        return BesideTower(chosen)
    if chosen.adapts:
        return Adapters(chosen)
    return (TaughtTowers if chosen.taught else Setup)(chosen)


def _trained_texts(parts: Parts) -> TrainedTexts:
    encoder = parts.encoder
    sentences = encoder.class_tokens(parts.class_names, parts.prompt_set)
    return TrainedTexts(encoder.model, *sentences)


def _refuse_averages(config: FinetuneConfig, title: str) -> None:
    if config.save in AVERAGES:
        raise UserError(
            f"save {config.save} is for methods with a teacher, and {title} has none: write "
            'save = "last" or "best" in the recipe'
        )
