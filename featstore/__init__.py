"""The feature store: frame embeddings of videos in a Zarr v3 group, written and read safely.

`open_store(path)` reads one, `StoreWriter` makes and fills one, `Workspace` knows where they lie.
Training batches are in `featstore.batches.loader`, which needs torch; the rest does not import it
until features are read. Each name is loaded when it is first asked for, so that importing a small
module such as `featstore.errors` loads neither numpy nor zarr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from featstore.checking.verify import Report as Report
    from featstore.checking.verify import verify as verify
    from featstore.errors import UserError as UserError
    from featstore.errors import WorkError as WorkError
    from featstore.format.class_texts import ClassText as ClassText
    from featstore.format.provenance import Provenance as Provenance
    from featstore.format.schema import STATUS_EMPTY as STATUS_EMPTY
    from featstore.format.schema import STATUS_FAILED as STATUS_FAILED
    from featstore.format.schema import STATUS_OK as STATUS_OK
    from featstore.format.schema import StoreSchema as StoreSchema
    from featstore.opening import open_store as open_store
    from featstore.reading.store import Store as Store
    from featstore.workspace import Workspace as Workspace
    from featstore.writing.partition import Partition as Partition
    from featstore.writing.writer import StoreWriter as StoreWriter

_HOMES: Final = {
    "open_store": "featstore.opening",
    "Store": "featstore.reading.store",
    "StoreWriter": "featstore.writing.writer",
    "StoreSchema": "featstore.format.schema",
    "Provenance": "featstore.format.provenance",
    "ClassText": "featstore.format.class_texts",
    "Partition": "featstore.writing.partition",
    "Workspace": "featstore.workspace",
    "verify": "featstore.checking.verify",
    "Report": "featstore.checking.verify",
    "STATUS_EMPTY": "featstore.format.schema",
    "STATUS_OK": "featstore.format.schema",
    "STATUS_FAILED": "featstore.format.schema",
    "UserError": "featstore.errors",
    "WorkError": "featstore.errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Load the module that a name of this package lives in (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
