"""Makes the features that a head which looks at pixels is evaluated on, from packed videos."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError
from featstore.opening import open_store
from featstore.progress import Stages, no_stages
from featstore.workspace import Workspace
from heads.files.head_cards import read_card
from heads.methods.registry import MEAN_OF_FRAMES, method
from pipeline.prompts import trained_prompt_set
from pipeline.sampling import parse_sampling

log = logging.getLogger(__name__)

PUBLISHED_VIEWS: Final = (3, 1)  # clips and crops of DiST's published protocol


def prepare_views(
    workspace: Workspace,
    dataset: str,
    head_name: str | None,
    *,
    views: str | None = None,
    sampling: str | None = None,
    device: str = "auto",
    stages: Stages = no_stages,
) -> Path | None:
    """Make the store of views that a head which looks at pixels is evaluated on, unless it exists.

    `head_name` None means the newest head. `views` are clips x crops, "3x1" by default. Returns the
    store's folder; None for a head that is evaluated on stored frame features. Raises UserError for
    a head or data set that does not exist, and what extraction raises.
    """
    if head_name is None:
        run_dir = next(iter(workspace.own_runs()), None)
    else:
        run_dir = None if head_name == MEAN_OF_FRAMES else workspace.choose_run(head_name)
    card = None if run_dir is None else read_card(run_dir)
    if run_dir is None or card is None or not method(card.config.kind).pixels:
        return None
    clips, crops = map(int, views.split("x")) if views is not None else PUBLISHED_VIEWS
    config: Any = card.config
    how = parse_sampling(sampling or f"dist:{config.dense_frames}x{clips}")
    if how.frames != config.dense_frames:
        raise UserError(
            f"sampling {how.text} takes {how.frames} frames, the head {run_dir.name} needs "
            f"{config.dense_frames}: use dist:{config.dense_frames}xV"
        )
    path = workspace.store_path(
        dataset, encoder=card.origin.encoder, sampling=how.text, crops=crops
    )
    if path.is_dir() and open_store(path).complete:
        return path
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "DiST first makes features of the videos, in one process: run the command without "
            "torchrun once"
        )
    from heads.arithmetic import resolve_device  # these load torch
    from heads.files.head_file import load_head
    from heads.prediction.pixel_encoder import encoder_of_head
    from pipeline.extraction.request import ExtractionRequest
    from pipeline.extraction.run import extract

    head, on = load_head(run_dir), resolve_device(device).type
    encoders = workspace.root / "encoders"
    request = ExtractionRequest(
        workspace.dataset_dir(dataset),
        path,
        card.origin.encoder,
        how,
        encoders_dir=encoders,
        crops=crops,
        device=on,
        prompt_sets=(trained_prompt_set(card.origin.prompt_set, card.origin.prompt_templates),),
    )
    log.info("features of the videos of %s are made with head %s", dataset, run_dir.name)
    with stages("extract", "videos") as progress:
        encoder = encoder_of_head(head, card.origin.encoder, "fp32", on, encoders)
        extract(request, encoder=encoder, progress=progress)
    return path
