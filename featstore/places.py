"""A store in a folder (a Path) or at a URL (a str, s3://...): the same calls for both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from featstore.reader import Store
from featstore.remote_store import RemoteStoreWriter, open_remote
from featstore.writer import StoreWriter

StorePlace: TypeAlias = Path | str
AnyWriter: TypeAlias = StoreWriter | RemoteStoreWriter


def writer_of(place: StorePlace) -> AnyWriter | None:
    """The writer of the store that is there, None when there is none; errors as its `open`."""
    if isinstance(place, str):
        return RemoteStoreWriter.open(place) if RemoteStoreWriter.exists(place) else None
    return StoreWriter.open(place) if place.exists() else None


def writer_maker(place: StorePlace) -> Callable[..., AnyWriter]:
    """`init` of the place's kind of writer, to be called with all its arguments but the first."""
    if isinstance(place, str):
        return partial(RemoteStoreWriter.init, place)
    return partial(StoreWriter.init, place)


def open_rows(place: StorePlace) -> Store:
    """The store there, to count and list its rows; of a remote one no features are fetched."""
    return open_remote(place, features=False) if isinstance(place, str) else Store(place)
