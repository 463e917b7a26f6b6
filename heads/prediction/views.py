"""Makes the features that a head which looks at pixels is evaluated on, from packed videos."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from featstore.commands import ADAPTED_BY, Extraction
from featstore.errors import UserError, WorkError, one_of
from featstore.format.metadata import read_metadata
from featstore.format.provenance import USUAL_STYLE, Provenance
from featstore.opening import writer_of
from featstore.progress import Stages, no_stages
from featstore.reading.repair import beside
from featstore.workspace import Workspace
from heads.files.head_cards import HeadCard, read_card
from heads.methods.registry import MEAN_OF_FRAMES, method
from pipeline.prompts import trained_prompt_set
from pipeline.sampling import parse_sampling

if TYPE_CHECKING:
    from pipeline.clip_encoder import Encoder

log = logging.getLogger(__name__)

PUBLISHED_VIEWS: Final = (3, 1)  # clips and crops of DiST's published protocol


def prepare_views(
    workspace: Workspace,
    dataset: str,
    head_name: str | None,
    *,
    views: str | None = None,
    sampling: str | None = None,
    style: str | None = None,
    store: str | None = None,
    device: str = "auto",
    stages: Stages = no_stages,
) -> Path | None:
    """Make the store of views that a head which looks at pixels is evaluated on, unless it exists.

    `head_name` None means the newest head. `views` are clips x crops, "3x1" by default; `style` is
    one of `pipeline.float_frames.Style`, "short-side" by default. Returns the store's folder; None
    for a head that is evaluated on stored frame features, and if `store` names another store.
    Raises UserError for a head or data set that does not exist, for frames, crops and styles that
    the head cannot take, and what extraction raises.
    """
    if head_name is None:
        run_dir = next(iter(workspace.own_runs()), None)
    else:
        run_dir = None if head_name == MEAN_OF_FRAMES else workspace.choose_run(head_name)
    card = None if run_dir is None else read_card(run_dir)
    if run_dir is None or card is None or not method(card.config.kind).pixels:
        if style is not None:
            raise UserError(
                "--crop-style is for heads that look at pixels (DiST), and "
                f"{head_name or (run_dir.name if run_dir else 'no head')} takes stored features, "
                "whose crop is theirs: leave it out, or choose such a head with --head"
            )
        return None
    if store is not None:
        if style is not None:
            raise UserError("--store and --crop-style contradict each other: give one")
        return None
    if style is not None:
        from pipeline.float_frames import Style  # it loads torch

        if style not in get_args(Style):
            raise UserError(f"crop style {style!r} is unknown: {one_of(style, get_args(Style))}")
    clips, crops = map(int, views.split("x")) if views is not None else PUBLISHED_VIEWS
    config: Any = card.config
    how = parse_sampling(sampling or f"dist:{config.dense_frames}x{clips}")
    if how.kind != "dist":
        raise UserError(
            f"sampling {how.text} is not how the head {card.name} looks at videos: use "
            f"dist:{config.dense_frames}xV"
        )
    config.require_dense(how.frames, f"sampling {how.text}")
    if views is not None and how.clips != clips:
        raise UserError(f"--views {views} and sampling {how.text} contradict each other: give one")
    making = Extraction(dataset, card.origin.encoder, how.text, crops, head=card.name)
    making = replace(making, style=None if style == USUAL_STYLE else style)
    path = _place(workspace, making, card)
    if (writer := writer_of(path)) is not None and not [*writer.pending()]:
        return path
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "DiST first makes features of the videos, in one process: run the command without "
            "torchrun once"
        )
    from heads.arithmetic import resolve_device
    from heads.compatibility import check_encoder
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
    log.info("features of the videos of %s are made with head %s", dataset, card.name)
    cut: Any = style or USUAL_STYLE
    encoder = encoder_of_head(head, card.origin.encoder, "fp32", on, encoders, cut)
    check_encoder(card.origin, card.origin.encoder, encoder.fingerprint)
    with stages("extract", "videos") as progress:
        extract(request, encoder=encoder, progress=progress)
    return path


def encoder_of_store(
    made: Provenance, spec: str | None, precision: str, device: str, encoders_dir: Path | None
) -> Encoder:
    """Load the encoder that a store was made with, or the one that `spec` names.

    For a store of whole views, and for one whose encoder a head adapts, it is that of the head
    which made them, of the workspace with `encoders_dir`. Raises UserError if there is no such
    head, and as `load_encoder`.
    """
    from heads.files.head_file import load_head  # these load torch
    from heads.prediction.pixel_encoder import encoder_of_head

    chosen, on = spec or made.encoder, (precision, device, encoders_dir)
    if not made.of_views and not made.encoder.startswith(ADAPTED_BY):
        return encoder_of_head(None, chosen, *on)
    heads = [] if encoders_dir is None else Workspace(encoders_dir.parent).trained_runs()
    for run_dir in heads:
        card = read_card(run_dir)
        if card is not None and card.origin.encoder_fingerprint == made.encoder_fingerprint:
            style: Any = made.style or USUAL_STYLE
            return encoder_of_head(load_head(run_dir), chosen, *on, style)
    raise UserError(
        f"the head that made the store, with the encoder {made.encoder}, is not in this workspace: "
        "put it back, or name its workspace with --root"
    )


def _place(workspace: Workspace, making: Extraction, card: HeadCard) -> Path:
    """Return the folder of the store that `making` gives: one that is there, or else a new one."""
    for path in workspace.stores(making.dataset):
        try:
            made = read_metadata(path).provenance
        except (UserError, WorkError):
            continue
        if (
            made.encoder_fingerprint == card.origin.encoder_fingerprint
            and (made.sampling, made.crops) == (making.sampling, making.crops)
            and (made.style, made.quantised) == (making.style, "")
        ):
            return path
    usual = workspace.features_dir(making.dataset) / making.file_name
    return beside(usual) if usual.exists() else usual  # of an earlier head of that name
