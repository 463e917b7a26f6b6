"""Find which objects belong to a store, and which partitions are done according to a listing."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Final

from featstore.commands import command
from featstore.errors import UserError
from featstore.format.array_spec import CRC_BYTES
from featstore.format.metadata import ARRAY_METADATA_LIMIT, GROUP_METADATA_LIMIT, StoreMetadata
from featstore.format.schema import (
    CLASS_TEXT_GROUP,
    FEATURE_SCALE,
    PARTITION_ARRAYS,
    SOME_HAVE,
    StoreSchema,
)
from featstore.remote.objects import ObjectFolder, RemoteObject

log = logging.getLogger(__name__)

GROUP: Final = "zarr.json"
ARRAY_NODES: Final = tuple(f"{name}/{GROUP}" for name in PARTITION_ARRAYS)
# Only with int8 features, where a video may show several classes, and of sequences.
OPTIONAL: Final = (
    *(f"{FEATURE_SCALE}/{GROUP}", f"{FEATURE_SCALE}/c/0"),
    *(f"{name}/{GROUP}" for name in SOME_HAVE),
)
CLASS_TEXT = re.compile(CLASS_TEXT_GROUP + r"/(zarr\.json|[A-Za-z0-9][\w.-]*/(zarr\.json|c/0/0))")
CHUNK = re.compile(rf"({'|'.join((*PARTITION_ARRAYS, *SOME_HAVE))})/c/[0-9/]+")


class NoStore(UserError):
    """There is no store at a URL, or only part of a store that was never finished."""


def metadata_names(
    objects: ObjectFolder, listing: Mapping[str, RemoteObject]
) -> list[tuple[str, int]]:
    """Return names and size limits of all objects except partitions, `zarr.json` first.

    Raises NoStore if the objects are no store, UserError if they are not safe to fetch.
    """
    if GROUP not in listing:
        state = "it has no zarr.json" if listing else "there are no objects"
        make = command("extract", dataset="NAME", store=objects.url)
        raise NoStore(f"{objects.url} is not a feature store: {state}; make one with `{make}`")
    for name in ARRAY_NODES:
        if name not in listing:
            raise UserError(f"{objects.at(name)} is missing: not a complete feature store")
    texts = [name for name in sorted(listing) if CLASS_TEXT.fullmatch(name)]
    texts += [name for name in OPTIONAL if name in listing]
    names = [
        (GROUP, GROUP_METADATA_LIMIT),
        *((name, ARRAY_METADATA_LIMIT) for name in ARRAY_NODES),
        # 100,000 classes of 1,024 numbers take 0.4 GB.
        *((n, ARRAY_METADATA_LIMIT if n.endswith(GROUP) else 2**30) for n in texts),
    ]
    for name, limit in names:
        if listing[name].size > limit:
            raise UserError(
                f"{objects.at(name)} is larger than {limit} bytes: no store of this format needs "
                "that; do not open a store from a source you do not trust"
            )
    return names


def partition_names(schema: StoreSchema, tar: int) -> dict[str, str]:
    """Return the object names of one partition by array, in the order in which they are put."""
    specs = schema.arrays()
    return {array: f"{array}/{specs[array].chunk_key(tar)}" for array in schema.partition_arrays}


def is_done(metadata: StoreMetadata, listing: Mapping[str, RemoteObject], tar: int) -> bool:
    """Return whether all objects of a partition are listed with the sizes that they must have."""
    schema = metadata.schema
    specs = schema.arrays()
    for array, name in partition_names(schema, tar).items():
        found, spec = listing.get(name), specs[array]
        if found is None:
            return False
        if (shape := schema.sharded.get(array)) is not None and schema.sequences:
            fits = shape.index_bytes <= found.size <= shape.shard_bytes(shape.lines)
        elif shape is not None:
            fits = shape.shard_can_have(found.size, metadata.tars[tar].rows)
        elif spec.dtype == "string":  # compressed
            fits = found.size > CRC_BYTES
        else:
            fits = found.size == spec.file_bytes
        if not fits:
            log.warning("%s has %d bytes: partition %d is not done", name, found.size, tar)
            return False
    return True
