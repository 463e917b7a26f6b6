"""The class texts of a prompt set, and how a store holds them.

Dimension letters: C classes, D dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from featstore.commands import command, workspace_of
from featstore.errors import UserError, WorkError
from featstore.format.array_spec import CRC_BYTES
from featstore.format.checksums import crc32c, read_checked
from featstore.format.metadata import (
    ARRAY_METADATA_LIMIT,
    check_array,
    check_text_name,
    inside,
    is_texts,
    json_checksum,
    read_node,
)
from featstore.format.provenance import Provenance
from featstore.format.schema import CLASS_TEXT_GROUP, FloatArray, class_text_spec

DEFAULT_PROMPTS: Final = "mote28"
"""The prompt set that is made and used if none is named."""
PROMPT_SET_NAMES: Final = (DEFAULT_PROMPTS, "name", "video", "viclip16", "taco")
"""The prompt sets whose sentences come with the program (`pipeline.prompts`)."""

_CHECKED_ATTRIBUTES: Final = (
    *("class_names", "sentences_hash", "templates", "encoder_fingerprint", "embeddings_checksum"),
    "rephrased",
)


# How far the length of a row may differ from 1 after rounding to float32.
_UNIT_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, eq=False)
class ClassText:
    """The text embeddings of the classes under one prompt set.

    `embeddings` is float32 [C, D], with rows of length 1 in the order of `names`. `sentences_hash`
    identifies the sentences that they were computed from. `templates` are the sentences with "{}"
    for the class name, empty if every class has its own sentences or they were not recorded.
    `rephrased` says that the sentences were made of rephrased class names.
    `encoder_fingerprint` belongs to the encoder whose text tower made them, "" if it was not
    recorded. Raises ValueError if the shapes or lengths are wrong.
    """

    names: tuple[str, ...]
    embeddings: FloatArray
    sentences_hash: str
    templates: tuple[str, ...] = ()
    encoder_fingerprint: str = ""
    rephrased: bool = False

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

    def attributes(self) -> dict[str, Any]:
        """The attributes of `class_text/<name>`, as its `zarr.json` holds them."""
        attributes: dict[str, Any] = {
            "class_names": list(self.names),
            "sentences_hash": self.sentences_hash,
        }
        if self.templates:
            attributes["templates"] = list(self.templates)
        if self.encoder_fingerprint:
            attributes["encoder_fingerprint"] = self.encoder_fingerprint
        if self.rephrased:
            attributes["rephrased"] = True
        numbers = np.ascontiguousarray(self.embeddings, "<f4")
        attributes["embeddings_checksum"] = crc32c(numbers)
        return attributes | {"checksum": class_text_checksum(attributes)}


def read_class_text(
    store: Path, prompt_set: str, provenance: Provenance, class_names: Sequence[str]
) -> ClassText:
    """Read the class texts of one prompt set; they must fit the store's classes and its encoder.

    Raises UserError for metadata that does not fit the format and for texts of another encoder,
    WorkError for a damaged chunk and for other class names.
    """
    key = f"{CLASS_TEXT_GROUP}/{check_text_name(prompt_set)}"
    attributes = read_node(store, f"{key}/zarr.json", ARRAY_METADATA_LIMIT).get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    names, digest = attributes.get("class_names"), attributes.get("sentences_hash")
    if not is_texts(names) or not names or not isinstance(digest, str):
        raise UserError(f"{key} of {store} lacks its class names: the store is damaged")
    # Stores written before these two were recorded lack them.
    templates, encoder = attributes.get("templates", []), attributes.get("encoder_fingerprint", "")
    if not is_texts(templates) or not isinstance(encoder, str):
        raise UserError(f"{key} of {store} does not say how it was made: the store is damaged")
    recorded, of_attributes = (attributes.get(n) for n in ("embeddings_checksum", "checksum"))
    # Earlier stores have neither of the two.
    if (recorded, of_attributes) != (None, None) and (
        type(recorded) is not int or of_attributes != class_text_checksum(attributes)
    ):
        raise UserError(
            f"the attributes of {key} of {store} fail their checksum: put a copy of its zarr.json "
            "back, or " + _remake(store, prompt_set)
        )
    spec = class_text_spec(len(names), provenance.dim)
    check_array(store, key, spec)
    if encoder not in ("", provenance.encoder_fingerprint):
        raise UserError(
            f"class texts {prompt_set!r} of {store} were made with the text tower of another "
            f"encoder (weights {encoder[:16]}) than its features "
            f"({provenance.encoder}, weights {provenance.encoder_fingerprint[:16]}): "
            + _remake(store, prompt_set)
        )
    if tuple(names) != tuple(class_names):
        raise WorkError(
            f"class texts {prompt_set!r} of {store}: their class names are not those of the store; "
            + _remake(store, prompt_set)
        )
    try:
        body, crc = read_checked(inside(store, f"{key}/{spec.chunk_key(0)}"), spec.file_bytes)
        if len(body) + CRC_BYTES != spec.file_bytes:
            raise ValueError(f"has {len(body) + CRC_BYTES} bytes, not {spec.file_bytes}")
        if recorded not in (None, crc):
            raise ValueError("is not the one that was written, but of other texts")
        embeddings = np.frombuffer(body, spec.numpy_dtype).astype(np.float32).reshape(spec.shape)
        rephrased = attributes.get("rephrased") is True
        return ClassText(tuple(names), embeddings, digest, tuple(templates), encoder, rephrased)
    except ValueError as error:
        raise WorkError(
            f"class texts {prompt_set!r} of {store}: chunk {error}; " + _remake(store, prompt_set)
        ) from error


def guiding_name(kind: str, sentences_hash: str, *, normalise_first: bool = True) -> str:
    """Return the name under which a store keeps the texts of spatial or temporal descriptions.

    It is no prompt set's name: such texts are kept so that they need not be encoded again, no
    command compares videos with them, and a store that is rewritten leaves them out.
    """
    return f"_{kind}{'' if normalise_first else '-sum'}-{sentences_hash[:16]}"


def texts_command(store: Path, prompt_set: str) -> str:
    """Return the command that adds class texts; sentences of one's own come from a FILE."""
    sentences = {"prompts": prompt_set}
    if prompt_set not in PROMPT_SET_NAMES:
        sentences = {"prompts": "FILE.txt", "prompt_set_name": prompt_set}
    return command("store", "add-texts", store, root=workspace_of(store), **sentences)


def class_text_checksum(attributes: Mapping[str, Any]) -> int:
    """Return the crc32c of the attributes that class texts have, as `attributes_checksum` does."""
    return json_checksum(
        {name: attributes[name] for name in _CHECKED_ATTRIBUTES if name in attributes}
    )


def _remake(store: Path, prompt_set: str) -> str:
    """Return the end of a message: how to make damaged class texts again."""
    return (
        f"remove {store / CLASS_TEXT_GROUP / prompt_set} and make them again with "
        f"`{texts_command(store, prompt_set)}`"
    )
