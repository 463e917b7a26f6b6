"""The store of tokens from which adapters are trained: what lies below them, computed once."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from featstore.commands import Extraction
from featstore.errors import UserError, WorkError
from featstore.format.metadata import read_metadata
from featstore.format.tiers import TOKENS
from featstore.reading.store import Store
from featstore.workspace import Workspace
from heads.end_to_end.config import FinetuneConfig
from heads.methods.msta.config import MstaConfig
from pipeline.clip_encoder import Encoder
from pipeline.tars.dataset import Dataset

log = logging.getLogger(__name__)

_ALONE: Final = "train from the videos, without --tokens"


def kept_tokens(
    workspace: Workspace,
    dataset: Dataset,
    spec: str,
    encoder: Encoder,
    adapters: MstaConfig,
    config: FinetuneConfig,
    split: str | None,
) -> Store:
    """Return the store with what the block below the first of `adapters` makes of every clip.

    It must be of these tars, this encoder, which `spec` names, and `config.frames` frames, and have
    all videos of `split` (None: of the data set). Raises UserError if nothing lies below the
    adapters, if clips are to be augmented, and, with the extraction that makes it, if there is no
    such store.
    """
    if encoder.clip_frames > 1:
        raise UserError(
            f"--tokens: {encoder.name} looks at all frames of a clip together, and stores keep the "
            f"tokens of towers of single frames: {_ALONE}"
        )
    if adapters.first == 1:
        raise UserError(
            "--tokens: the adapters begin in block 1, below which there are only pixels: set a "
            f"later first block in [head] of a recipe, or {_ALONE}"
        )
    if config.augment:
        raise UserError(
            "--tokens: stored tokens are of certain frames and one crop, which cannot be augmented "
            "any more: add --no-augment"
        )
    tier = f"{TOKENS}:{adapters.first - 2}"  # tiers count blocks from 0
    sampling = f"uniform:{config.frames}"
    found, others = [], []
    for path in workspace.stores(dataset.name):
        try:
            made = read_metadata(path).provenance
        except (UserError, WorkError):
            continue
        same_tower = made.encoder_fingerprint == encoder.fingerprint
        fits = same_tower and (made.tier, made.sampling, made.crops) == (tier, sampling, 1)
        fits = fits and made.preprocessing == encoder.preprocessing.to_json()
        if fits and made.split in ("", split or ""):
            found.append(Store(path))
        elif made.tier.startswith(TOKENS) and same_tower:
            others.append(f"{path.name} has {made.tier} of {made.sampling}")
    whole = [
        store
        for store in found
        if store.complete and store.provenance.dataset_fingerprint == dataset.fingerprint
    ]
    if whole:
        if len(whole) > 1:
            log.info("several stores hold these tokens: %s is read", whole[0].path.name)
        return whole[0]
    making = Extraction(dataset.name, spec, sampling, tier=tier)
    if found:
        making = replace(making, split=found[0].provenance.split or None)
        others = [f"{found[0].path.name} lacks videos of the data set"]
    counted_as = f"block {adapters.first - 1} of the image tower, which --tier counts from 0"
    said = f" ({'; '.join(others[:2])})" if others else ""
    raise UserError(
        f"--tokens: no store of {dataset.name} has what is read here, {tier} of {sampling} "
        f"({counted_as}){said}: make it with `{making.command(workspace.root)}`"
    )
