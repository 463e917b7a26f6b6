"""Class descriptions -> embeddings by the frozen text tower, which a store keeps.

C classes, N sentences of a class, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from featstore import ClassText, open_store
from featstore.errors import UserError, WorkError, one_line
from featstore.format.class_texts import guiding_name, read_class_text
from featstore.format.schema import CLASS_TEXT_GROUP
from featstore.reading.store import Store
from featstore.rewriting.grow import add_class_text
from pipeline.descriptions.class_descriptions import KINDS, ClassDescriptions, Kind, as_spelt
from pipeline.prompts import PromptSet

if TYPE_CHECKING:
    from pipeline.clip_encoder import Encoder

log = logging.getLogger(__name__)


def descriptions_embeddings(
    encoder: Encoder,
    descriptions: ClassDescriptions,
    class_names: Sequence[str],
    *,
    store: Path | None = None,
    normalise_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the spatial and the temporal embeddings of classes, unit float32 [C,D] each.

    The encoder's text tower embeds each sentence; the embeddings of a class are normalised,
    averaged and normalised, or, without `normalise_first`, averaged and normalised. Both lie on
    the encoder's device. They are read from `store` if it holds those of the same sentences, and
    kept there otherwise, if it is a store of this encoder on a disk and of classes that all have
    descriptions. Raises UserError for a class without descriptions and for a sentence that the
    tower does not take.
    """
    opened = None if store is None else _opened(store, encoder, descriptions, class_names)
    held = descriptions.of(class_names if opened is None else opened.class_names)
    spelt = as_spelt(class_names, held.class_names)
    rows = [held.class_names.index(spelt[name]) for name in class_names]
    spatial, temporal = (
        torch.from_numpy(_embeddings(encoder, held, kind, opened, normalise_first)[rows])
        for kind in KINDS
    )
    return spatial.to(encoder.device), temporal.to(encoder.device)


def _opened(
    path: Path, encoder: Encoder, descriptions: ClassDescriptions, class_names: Sequence[str]
) -> Store | None:
    """Return the store if it can keep the texts, else None."""
    opened = open_store(path)
    if opened.provenance.encoder_fingerprint != encoder.fingerprint:
        log.info("%s has another encoder: it does not keep the texts of descriptions", path)
        return None
    held = opened.class_names
    described = len(as_spelt(held, descriptions.class_names)) == len(held) > 0
    return opened if described and len(as_spelt(class_names, held)) == len(class_names) else None


def _embeddings(
    encoder: Encoder,
    descriptions: ClassDescriptions,
    kind: Kind,
    store: Store | None,
    normalise_first: bool,
) -> npt.NDArray[np.float32]:
    """Return the embeddings of all classes of `descriptions`, from the store or into it."""
    names, prompts = descriptions.class_names, descriptions.prompt_set(kind, "descriptions")
    digest = prompts.hash(names)
    if store is None:
        return _encoded(encoder, names, prompts, normalise_first)
    kept = guiding_name(kind, digest, normalise_first=normalise_first)
    made = _kept(store, kept, digest)
    if made is None:
        made = _encoded(encoder, names, prompts, normalise_first)
        _keep(store, kept, ClassText(names, made, digest, (), encoder.fingerprint))
    return made


def _encoded(
    encoder: Encoder, names: Sequence[str], prompts: PromptSet, normalise_first: bool
) -> npt.NDArray[np.float32]:
    if normalise_first:
        return encoder.class_embeddings(names, prompts, scored=False).float().cpu().numpy()
    lines = [prompts.sentences(name) for name in names]
    embeddings = encoder.encode_text([line for some in lines for line in some]).float()
    means = embeddings.reshape(len(names), len(lines[0]), -1).mean(1)
    return torch.nn.functional.normalize(means, dim=-1).cpu().numpy()


def _kept(store: Store, name: str, digest: str) -> npt.NDArray[np.float32] | None:
    """Return the embeddings that a store keeps under a name; None if none can be read."""
    if not (store.path / CLASS_TEXT_GROUP / name).is_dir():
        return None
    try:
        text = read_class_text(store.path, name, store.provenance, store.class_names)
    except (UserError, WorkError) as error:
        log.warning("texts of descriptions are encoded again: %s", one_line(error))
        return None
    return text.embeddings if text.sentences_hash == digest else None


def _keep(store: Store, name: str, text: ClassText) -> None:
    """Write the texts into the store; a store that cannot be written to is told and left."""
    if (store.path / CLASS_TEXT_GROUP / name).is_dir():
        return
    try:
        add_class_text(store.path, name, text)
    except (UserError, WorkError, OSError) as error:
        log.warning("the texts of descriptions are not kept: %s", one_line(error))
