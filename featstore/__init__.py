"""The feature store: frame embeddings of videos in a Zarr v3 group, written and read safely.

`open_store(path)` reads one, `StoreWriter` makes and fills one, `Workspace` knows where they lie.
Training batches are in `featstore.batches.loader`, which needs torch; the rest does not import it
until features are read.
"""

from __future__ import annotations

from featstore.checking.verify import Report, verify
from featstore.errors import UserError, WorkError
from featstore.format.class_texts import ClassText
from featstore.format.provenance import Provenance
from featstore.format.schema import STATUS_EMPTY, STATUS_FAILED, STATUS_OK, StoreSchema
from featstore.opening import open_store
from featstore.reading.store import Store
from featstore.workspace import Workspace
from featstore.writing.partition import Partition
from featstore.writing.writer import StoreWriter

__all__ = [
    "open_store",
    "Store",
    "StoreWriter",
    "StoreSchema",
    "Provenance",
    "ClassText",
    "Partition",
    "Workspace",
    "verify",
    "Report",
    "STATUS_EMPTY",
    "STATUS_OK",
    "STATUS_FAILED",
    "UserError",
    "WorkError",
]
