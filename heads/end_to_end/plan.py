"""The plan of a fine-tuning: request, data, encoder and head, checked before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from featstore.balance import Balance
from featstore.commands import command
from featstore.errors import UserError
from featstore.files.key_lists import Excluded
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.opened_stores import no_labels
from featstore.reading.store import Store
from featstore.workspace import Workspace
from heads.end_to_end.begun_head import continued_head, first_bias
from heads.end_to_end.chosen_videos import (
    choose_videos,
    evaluation_split,
    excluded_videos,
    trained_on,
    training_split,
)
from heads.end_to_end.kept_tokens import kept_tokens
from heads.end_to_end.memory import cores_here
from heads.end_to_end.models.end_to_end_model import EndToEndModel
from heads.end_to_end.models.trained_parts import trained_blocks
from heads.end_to_end.request import FinetuneRequest
from heads.end_to_end.run_folder import MODE, RUN_FORMAT, starting_head
from heads.end_to_end.setups import NewTexts, Parts, setup_of
from heads.end_to_end.sharding import sharded
from heads.files.head_file import head_fingerprint, load_head
from heads.files.kept_texts import KeptTexts
from heads.methods.head import Head, build_head
from heads.methods.msta.config import MstaConfig
from heads.methods.registry import method
from heads.methods.settings import HeadOrigin
from heads.training.class_weights import class_weights, require_possible
from heads.training.ranks import Ranks
from heads.training.trainer import require_trainable
from heads.training.validation import check_balance
from pipeline.clip_encoder import load_encoder
from pipeline.encoders.specs import lasting_spec
from pipeline.prompts import (
    PromptSet,
    as_prompt_set,
    is_descriptions_file,
    read_descriptions,
    trained_prompt_set,
)
from pipeline.tars.dataset import Dataset, load_dataset
from pipeline.video_clips.stream import ClipStream, EvaluationClips
from pipeline.video_clips.token_clips import TokenEvaluationClips, TokenStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first step; the same on all processes."""

    dataset: Dataset
    model: EndToEndModel
    """On this process's device."""
    origin: HeadOrigin
    """Origin of the head to be published, except that it names the encoder training begins with."""
    clip_shape: tuple[int, ...]
    """The shape of a clip: T, 3, height and width in pixels."""
    clips: ClipStream
    balance: Balance | None
    """None if no training video can be decoded."""
    tokens: Store | None
    """The store of tokens that clips are read from; None for videos."""
    evaluation: EvaluationClips | None
    eval_split: str | None
    excluded: Excluded | None
    settings: dict[str, Any]
    new_texts: NewTexts
    """Texts that training begins with, [C,D] each, and where to keep those not read there."""
    precision: str
    shard: bool
    trained: str
    """What is trained, for people."""
    taught: bool
    """Whether a teacher holds it, and the mean of its weights is kept."""


def make_plan(request: FinetuneRequest, ranks: Ranks) -> Plan:
    """Load and check everything; an error may occur on some processes only."""
    config, workspace = request.config, Workspace(request.encoders_dir.parent)
    dataset = load_dataset(request.dataset_dir)
    if not dataset.class_names:
        raise no_labels(dataset.name)
    split = training_split(dataset, request.split)
    eval_split = evaluation_split(dataset, request.eval_split, config, split)
    excluded = None
    if request.exclude is not None:
        excluded = excluded_videos(dataset, request.exclude, split, eval_split)
    unwanted = frozenset(() if excluded is None else excluded.keys)
    part = choose_videos(dataset, split, request.choice, unwanted)
    packed, dataset = dataset, part.dataset  # tars are read with all classes
    begun = None
    if request.from_head is not None:
        begun = load_head(starting_head(request.run_dir, request.from_head))
    spec = request.encoder
    if spec is None:
        if begun is None or begun.origin is None:
            raise UserError("name the CLIP to begin with: --encoder SPEC")
        spec = begun.origin.adapted_encoder or begun.origin.encoder
    spec = lasting_spec(spec, request.encoders_dir)
    encoder = load_encoder(spec, "fp32", str(ranks.device), request.encoders_dir)
    wanted = request.head(encoder.dim) if begun is None else begun.config
    chosen = method(wanted.kind)
    if request.method is not None and request.method != chosen.name:
        asked = method(request.method).title
        first = "the recipe" if request.from_head is None else f"run {request.from_head.name}"
        raise UserError(
            f"{asked} is to be trained, and {first} is {chosen.title}: begin with a run of "
            f"{asked}, or without one"
        )
    named = {"dataset": dataset.name, "head": chosen.name}
    on_features = command("train-head", **named, root=workspace.root)
    chosen.require(
        "trained end to end",
        chosen.end_to_end,
        f"train another method, or this one on stored features with `{on_features}`",
    )
    prompt_set = _prompt_set(request, begun, chosen.prompts or DEFAULT_PROMPTS)
    setup = setup_of(chosen)
    setup.require_options(request, encoder, prompt_set)
    # The text tower is the same on all processes, but its output may differ in the last bit.
    names, sentences_hash = dataset.class_names, prompt_set.hash(dataset.class_names)
    texts = KeptTexts(request.run_dir, encoder.fingerprint, sentences_hash)
    kept = texts.read(len(names), encoder.dim)
    classes = encoder.class_embeddings(names, prompt_set).cpu() if kept is None else kept
    new_texts: NewTexts = () if kept is not None else ((texts, classes),)
    if begun is None:
        head = build_head(
            setup.head_config(wanted, config, encoder),
            classes,
            generator=torch.Generator().manual_seed(config.seed),
        )
        logit_scale = cast(Tensor, encoder.model.logit_scale).detach().float().cpu()
    else:
        head = continued_head(begun, encoder, spec, dataset, classes)
        logit_scale = begun.logit_scale.clone()
    require_possible(chosen, config, dataset.multi_label)
    head.require_frames(config.frames)
    setup.require(head, config, encoder)
    precision = setup.precision(config, encoder, ranks.device)
    shared: dict[str, Any] = {
        "frames": config.frames,
        "preprocessing": encoder.preprocessing,
        "batch_size": config.batch_size,
        "decoder": request.decoder,
        "device": ranks.device,
        "workers": request.workers or cores_here(),
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "excluded": unwanted,
        "classes": part.classes,
    }
    drawn: dict[str, Any] = shared | {
        "excluded": unwanted | part.left_out,
        "split": split,
        "seed": config.seed,
        "augment": config.augment,
        "balanced": bool(config.class_sampling),
    }
    tokens = None
    if request.tokens:
        adapters = cast(MstaConfig, head.config)
        tokens = kept_tokens(workspace, packed, spec, encoder, adapters, config, split)
    if tokens is None:
        clips = setup.clips(config, dataset.class_names, packed, **drawn)
    else:
        clips = TokenStream(packed, store=tokens, **drawn)
    setup.fit(head, clips.steps_per_epoch, config.epochs)
    balance, weights = None, None
    if len(clips.labels):  # else no video can be decoded, which training says
        evenly = bool(config.class_sampling)
        balance = check_balance(dataset.class_names, clips.labels, balanced=evenly)
        weights = class_weights(config.class_weights, clips.labels, dataset.class_names)
    head.class_weights = weights
    evaluation: EvaluationClips | None = None
    if eval_split is not None and config.evaluate_every:
        if tokens is not None and tokens.provenance.split in ("", eval_split):
            evaluation = TokenEvaluationClips(packed, store=tokens, split=eval_split, **shared)
        else:
            evaluation = setup.evaluation_clips(packed, split=eval_split, **shared)
    origin = HeadOrigin(
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        encoder=spec,
        encoder_fingerprint=encoder.fingerprint,
        encoder_precision=precision,
        crops=1,
        prompt_set=prompt_set.name,
        class_names=dataset.class_names,
        prompt_templates=prompt_set.templates,
        initial_head="" if begun is None else head_fingerprint(begun),
        label_map=dataset.label_map,
        trained_on=trained_on(split, part.words, excluded),
        **setup.origin(config, spec, encoder.preprocessing),
    )
    settings: dict[str, Any] = {
        "format": RUN_FORMAT,
        "mode": MODE,
        "head": head.config.to_json(),
        "training": config.to_json(),
        "data": {
            **origin.to_json(),
            "split": split,
            "eval_split": eval_split,
            "n_listed": clips.n_listed,
            "order": clips.digest,
            "prompts_hash": sentences_hash,
            "decoder": clips.decoder_name,
            **({"multi_label": True} if dataset.multi_label else {}),
            **({} if tokens is None else {"tokens": _made_as(tokens)}),
            **request.choice.to_json(),
            **({} if weights is None else {"class_weights": list(map(str, weights.tolist()))}),
        },
        "batch": {
            "videos_per_step": config.batch_size * ranks.world_size,
            "processes": ranks.world_size,
        },
        "from_head": {
            "run": None if request.from_head is None else request.from_head.name,
            "fingerprint": None if begun is None else head_fingerprint(begun),
        },
        "precision": precision,
        "device": ranks.device.type,
    }
    parts = Parts(
        encoder=encoder,
        head=head,
        logit_scale=logit_scale,
        class_names=names,
        all_names=packed.class_names,
        prompt_set=prompt_set,
        precision=precision,
        texts_from=dataset.name,
        first=ranks.first,
    )
    model, said, more_texts = setup.model(parts, request, workspace)
    settings["data"] |= said
    model = model.to(ranks.device)
    if dataset.multi_label and head.logit_bias is None:
        alone = shared | {"rank": 0, "world_size": 1}
        head.take_several_classes(
            first_bias(model, EvaluationClips(packed, split=split, **alone), clips.labels)
        )
    whole = setup.frozen or model.texts is not None
    shard = not whole and sharded(ranks, config.shard, encoder.image_tower)
    if shard:
        trained_blocks(encoder.image_tower)  # UserError if the tower has no blocks
    require_trainable(head, config, clips.steps_per_epoch)
    return Plan(
        dataset=dataset,
        model=model,
        origin=origin,
        clip_shape=(config.frames, 3, *encoder.preprocessing.size),
        clips=clips,
        tokens=tokens,
        balance=balance,
        evaluation=evaluation,
        eval_split=eval_split,
        excluded=excluded,
        settings=settings,
        new_texts=(*new_texts, *more_texts),
        precision=precision,
        shard=shard,
        trained=setup.words(config),
        taught=chosen.taught,
    )


def _made_as(tokens: Store) -> str:
    """Return what a run records of the tokens that it reads."""
    return f"{tokens.tier} in {tokens.provenance.precision}"


def _prompt_set(request: FinetuneRequest, begun: Head | None, usual: str) -> PromptSet:
    if isinstance(request.prompt_set, str) and is_descriptions_file(request.prompt_set):
        return read_descriptions(Path(request.prompt_set))
    if request.prompt_set is not None:
        return as_prompt_set(request.prompt_set)
    if begun is None or begun.origin is None:
        return as_prompt_set(usual)
    return trained_prompt_set(begun.origin.prompt_set, begun.origin.prompt_templates)
