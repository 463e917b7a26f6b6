"""Rewrites a store with its features compressed, or no longer compressed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from featstore.errors import UserError, one_of
from featstore.files.exchange import new_folder
from featstore.format.schema import CODECS
from featstore.progress import Outcome, ProgressSink, no_progress
from featstore.reading.coded_shards import read_scale
from featstore.rewriting.source import claimed_source


@dataclass(frozen=True)
class Converted(Outcome):
    """What `convert` made: bytes of all features files before and after."""

    store: str
    codec: str
    tars: int
    rows: int
    bytes_before: int
    bytes_after: int


def convert(
    path: Path, out: Path, codec: str, *, progress: ProgressSink = no_progress
) -> Converted:
    """Make a store with the same content, equal to the bit, whose features have another codec.

    The new store appears at `out` when it is complete. It also lacks the tars that are not
    extracted yet, and `extract` can fill it (a tier other than embeddings must be complete to be
    compressed). Raises UserError if the codec is unknown or `out` exists, WorkError for damage and
    while a process writes to the store.
    """
    if codec not in CODECS:
        raise UserError(f"codec {codec!r} is unknown: {one_of(codec, CODECS)}")
    with claimed_source(path) as source, new_folder(out) as folder:
        made = source.metadata
        if codec != "none" and not made.schema.pooled:
            # Extraction puts their rows into plain shards only.
            source.require_complete("compress")
        schema = replace(made.schema, codec=codec)
        scale = read_scale(source.files)
        sizes = source.rewrite(folder, schema, made.provenance, scale, progress)
        tars, rows = len(list(source.store.partitions())), len(source.store)
        return Converted(str(out), codec, tars, rows, *sizes)
