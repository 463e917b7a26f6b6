"""The store that a head is probably meant to work on, and the extraction that makes it.

No torch is loaded, because messages of finished work are written without it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.commands import Extraction
from featstore.format.class_texts import DEFAULT_PROMPTS, PROMPT_SET_NAMES
from featstore.workspace import Workspace
from heads.evaluation.protocols.protocol import Protocol
from heads.evaluation.protocols.serving import sampling_for
from heads.files.head_cards import newest_card, read_card
from heads.methods.registry import method
from heads.methods.settings import HeadOrigin

if TYPE_CHECKING:
    from featstore.reading.store import Store

USUAL_FRAMES = 8
"""Frames of a view if no head says how many: as published for ViT-B/16."""


def extraction_for(
    dataset: str,
    origin: HeadOrigin | None,
    *,
    protocol: Protocol | None = None,
    views: str | None = None,
    sampling: str | None = None,
) -> Extraction:
    """Return the extraction that gives a head of this origin what it is evaluated on.

    The views are `views` ("4x3"), else the first ones of `protocol`, else those of the head's own
    store. `sampling` replaces the one that follows from them.
    """
    asked = views or (protocol.views[0] if protocol is not None and protocol.views else None)
    frames = USUAL_FRAMES if origin is None else origin.frames
    if origin is not None and origin.adapted_encoder:  # one embedding of so many frames
        frames = int(re.sub(r"\D.*", "", origin.sampling.partition(":")[2]) or USUAL_FRAMES)
    chosen, crops = f"uniform:{frames}", 1
    if origin is not None and origin.sampling:
        chosen, crops = origin.sampling, origin.crops
    if asked not in (None, "1x1" if chosen.startswith("uniform:") and crops == 1 else None):
        chosen, crops = sampling_for(str(asked), frames)
    return Extraction(
        dataset,
        None if origin is None else origin.encoder,
        sampling or chosen,
        crops,
        prompts=None if origin is None else _prompts(origin),
    )


def choose_training_store(
    workspace: Workspace,
    dataset: str | None,
    *,
    split: str | None = None,
    sampling: str | None = None,
    name: str | None = None,
    initial: Path | None = None,
) -> tuple[str, Store, str | None]:
    """Return the data set to train on, its store and the split, each named or the usual one.

    If several data sets or stores would do, it is the one like the newest head's, which is logged.
    `initial` is the run folder of a head that training starts from: only stores of its encoder do.
    Errors as `Workspace.choose_dataset` and `OpenedStores.choose`.
    """
    newest = newest_card(workspace)
    begun = None if initial is None else read_card(initial)
    if begun is not None:
        chosen = method(begun.config.kind)
        remedy = "begin with a run of another method"
        chosen.require("trained from a store", chosen.from_store, remedy)
    dataset = workspace.choose_dataset(dataset, "" if newest is None else newest.origin.dataset)
    stores = workspace.opened(dataset)
    split = split or stores.default_split(("train",))
    if split is None and "train" in (workspace.packed_splits(dataset) or ()):
        split = "train"  # so that the error names its extraction
    card = begun or newest
    making = Extraction(dataset) if card is None else extraction_for(dataset, card.origin)
    store = stores.choose(
        split=split,
        sampling=sampling,
        name=name,
        encoder_fingerprint=None if begun is None else begun.origin.encoder_fingerprint,
        making=replace(making, sampling=sampling or making.sampling),
        likely=() if newest is None else newest.likely_stores(),
    )
    store.require_embeddings()
    return dataset, store, split


def _prompts(origin: HeadOrigin) -> str | None:
    """Return the head's prompt set, if `extract` knows it by this name and needs to be told."""
    own = origin.prompt_set
    return own if own in PROMPT_SET_NAMES and own != DEFAULT_PROMPTS else None
