"""The class texts of a prompt set, and what a store says of them.

Dimension letters: C classes, D dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from featstore.errors import UserError
from featstore.format.metadata import (
    ARRAY_METADATA_LIMIT,
    check_array,
    check_prompt_set,
    is_texts,
    json_checksum,
    read_node,
)
from featstore.format.schema import CLASS_TEXT_GROUP, ArraySpec, FloatArray, class_text_spec

DEFAULT_PROMPTS: Final = "mote28"
"""The prompt set that is made, and used, where none is named."""

_CLASS_TEXT_ATTRIBUTES: Final = (
    *("class_names", "sentences_hash", "templates", "encoder_fingerprint", "embeddings_checksum"),
)


# Unit rows after rounding to float32.
_UNIT_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, eq=False)
class ClassText:
    """Text embeddings of the classes under one prompt set.

    `embeddings` float32 [C, D], rows of length 1 in the order of `names`; `sentences_hash` names
    the sentences they were computed from. `templates` are the sentences with "{}" for the class
    name, empty where every class has sentences of its own or it was not recorded;
    `encoder_fingerprint` that of the encoder whose text tower made them, "" where it was not
    recorded. ValueError when the shapes or lengths are wrong.
    """

    names: tuple[str, ...]
    embeddings: FloatArray
    sentences_hash: str
    templates: tuple[str, ...] = ()
    encoder_fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or self.embeddings.dtype != np.float32:
            raise ValueError(
                f"class embeddings are {self.embeddings.dtype} {list(self.embeddings.shape)}: "
                "they must be float32 [classes, dim]"
            )
        if len(self.names) != len(self.embeddings) or not self.names:
            raise ValueError(f"{len(self.names)} names for {len(self.embeddings)} embeddings")
        lengths = np.linalg.norm(self.embeddings, axis=1)
        if not np.all(np.abs(lengths - 1) < _UNIT_TOLERANCE):
            raise ValueError("class embeddings must have length 1: normalise them first")


@dataclass(frozen=True)
class ClassTextNode:
    """The metadata of `class_text/<name>`; the fields are those of `ClassText`."""

    spec: ArraySpec
    names: tuple[str, ...]
    sentences_hash: str
    templates: tuple[str, ...]
    encoder_fingerprint: str
    embeddings_checksum: int | None


def class_text_attributes(
    names: Sequence[str],
    sentences_hash: str,
    templates: Sequence[str],
    encoder_fingerprint: str,
    embeddings_checksum: int,
) -> dict[str, Any]:
    """The attributes of `class_text/<name>`; `embeddings_checksum` is the crc32c of its numbers."""
    attributes: dict[str, Any] = {"class_names": list(names), "sentences_hash": sentences_hash}
    if templates:
        attributes["templates"] = list(templates)
    if encoder_fingerprint:
        attributes["encoder_fingerprint"] = encoder_fingerprint
    attributes["embeddings_checksum"] = embeddings_checksum
    return attributes | {"checksum": class_text_checksum(attributes)}


def class_text_checksum(attributes: Mapping[str, Any]) -> int:
    """As `metadata.attributes_checksum`, of those attributes of class texts that are there."""
    return json_checksum(
        {name: attributes[name] for name in _CLASS_TEXT_ATTRIBUTES if name in attributes}
    )


def class_text_node(store: Path, name: str, dim: int) -> ClassTextNode:
    """Read and check the metadata of `class_text/<name>`; UserError where it does not fit."""
    key = f"{CLASS_TEXT_GROUP}/{check_prompt_set(name)}"
    node = read_node(store, f"{key}/zarr.json", ARRAY_METADATA_LIMIT)
    attributes = node.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    names, digest = attributes.get("class_names"), attributes.get("sentences_hash")
    if not is_texts(names) or not names or not isinstance(digest, str):
        raise UserError(f"{key} of {store} lacks its class names: the store is damaged")
    # Stores written before these two were recorded lack them.
    templates, encoder = attributes.get("templates", []), attributes.get("encoder_fingerprint", "")
    if not is_texts(templates) or not isinstance(encoder, str):
        raise UserError(f"{key} of {store} does not say how it was made: the store is damaged")
    of_embeddings, of_attributes = (attributes.get(n) for n in ("embeddings_checksum", "checksum"))
    # Earlier stores have neither of the two.
    if (of_embeddings, of_attributes) != (None, None) and (
        type(of_embeddings) is not int or of_attributes != class_text_checksum(attributes)
    ):
        raise UserError(
            f"the attributes of {key} of {store} fail their checksum: put a copy of its zarr.json "
            "back, or " + remake_class_text(store, name)
        )
    spec = class_text_spec(len(names), dim)
    check_array(store, key, spec)
    return ClassTextNode(spec, tuple(names), digest, tuple(templates), encoder, of_embeddings)


def remake_class_text(store: Path, name: str) -> str:
    """How class texts that are damaged are made again, as the end of a message."""
    return (
        f"remove {store / CLASS_TEXT_GROUP / name} and make them again with "
        "`mote-cli store add-texts`"
    )
