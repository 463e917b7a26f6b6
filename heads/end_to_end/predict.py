"""Predict the classes of videos that belong to no data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from featstore.errors import UserError
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.progress import ProgressSink, no_progress
from featstore.workspace import Workspace
from heads.arithmetic import resolve_device
from heads.compatibility import check_encoder, mean_head
from heads.files.head_file import choose_head
from heads.scoring.scores import can_modulate, predict_scores
from pipeline.clip_encoder import load_encoder
from pipeline.decoding import decoder_named
from pipeline.decoding.contract import DecodeError
from pipeline.encoders.specs import DEFAULT_ENCODER
from pipeline.extraction.cpu_pool import encode_video
from pipeline.prompts import as_prompt_set, trained_prompt_set
from pipeline.sampling import parse_sampling

logger = logging.getLogger(__name__)

FRAMES_WITHOUT_HEAD = 8


def predict(
    workspace: Workspace,
    videos: Sequence[Path],
    classes: Sequence[str] | None = None,
    *,
    head: str | None = None,
    encoder: str | None = None,
    top: int = 5,
    frames: int | None = None,
    prompts: str | None = None,
    modulate: bool = True,
    precision: str = "auto",
    device: str = "auto",
    progress: ProgressSink = no_progress,
) -> dict[str, Any]:
    """Return the `top` best classes of each video; the scores of all classes add up to 1.

    Classes, encoder, frames and prompts default to the head's own. `head` is the name of a run or
    "mean" (the mean of frames); None means the newest run, or the mean if there is none. Returns
    `head`, `encoder` and `videos`, JSON-ready: `path`, `num_frames`, `predictions` of `class_name`
    and `score`, and `error` if a video cannot be decoded, which is also logged. Raises UserError
    for files, classes, a head or an encoder that do not exist or do not fit.
    """
    for path in videos:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"{path} {what}: predict takes video files")
    model, run_dir = choose_head(workspace, head, or_mean=True)
    name = workspace.head_name(run_dir)
    origin = None if model is None else model.origin
    known = classes if classes is not None or origin is None else origin.class_names
    if known is None:
        raise UserError('no classes to choose from: name them with --classes "a,b,c"')
    if model is not None:
        model.require_classes(known)
    spec = encoder or (DEFAULT_ENCODER if origin is None else origin.encoder)
    on = resolve_device(device).type
    try:
        clip = load_encoder(spec, precision, on, encoders_dir=workspace.root / "encoders")
    except UserError as error:
        if encoder is not None or origin is None:
            raise
        raise UserError(f"head {name}: {error}; name its encoder with --encoder") from error
    if origin is not None:
        check_encoder(origin, spec, clip.fingerprint)
    if prompts is not None or origin is None:
        prompt_set = as_prompt_set(prompts or DEFAULT_PROMPTS)
    else:
        prompt_set = trained_prompt_set(origin.prompt_set, origin.prompt_templates)
    texts = clip.class_embeddings(known, prompt_set).cpu()
    scorer = model or mean_head(clip.dim, clip.logit_scale)
    modulate = modulate and can_modulate(scorer, len(known))
    usual = FRAMES_WITHOUT_HEAD if origin is None else origin.frames
    sampling = parse_sampling(f"uniform:{frames or usual}")
    decoder = decoder_named("auto")
    answers: list[dict[str, Any]] = []
    for path in videos:
        answer: dict[str, Any] = {"path": str(path), "num_frames": None, "predictions": []}
        try:
            video = encode_video(path, decoder, clip, sampling)
        except DecodeError as error:
            logger.warning("%s: %s", path, error.reason)
            answer["error"] = error.reason
        else:
            features = torch.from_numpy(video.features)
            scores = predict_scores(scorer, features, texts, known, modulate)
            answer["num_frames"] = video.info.num_frames
            answer["predictions"] = [{"class_name": c, "score": score} for c, score in scores[:top]]
        answers.append(answer)
        progress(len(answers), len(videos))
    return {"head": name, "encoder": spec, "videos": answers}
