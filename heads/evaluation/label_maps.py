"""Gives a store the class names of a published label file that exchanges some names by mistake.

With HMDB51's file (`pipeline.annotations.label_names`), 120 of the 1,530 test clips are scored
against the wrong names. It is here only for comparison with numbers that were measured so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from featstore.errors import UserError, one_of
from featstore.format.class_texts import ClassText
from featstore.format.provenance import Provenance
from featstore.reading.store import Store
from pipeline.annotations.label_names import PUBLISHED_EXCHANGES

CORRECTED: Final = "corrected"
AS_PUBLISHED: Final = "as-published"


def known_exchange(dataset: str, class_names: Sequence[str]) -> dict[int, int]:
    """Return the labels that the published file of `dataset` misnames.

    Each label comes with the label whose name it has in that file. UserError when no exchange is
    known for the data set, or when none of the exchanged classes is in `class_names`.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    pairs = [
        (labels[a], labels[b])
        for a, b in PUBLISHED_EXCHANGES.get(dataset, ())
        if a in labels and b in labels
    ]
    if not pairs:
        raise UserError(
            f"no published label file that exchanges names of {dataset} is known: use --label-map "
            f"{AS_PUBLISHED} only with {', '.join(PUBLISHED_EXCHANGES)}, or with a file of names "
            "that is packed or given by --lists-from"
        )
    return {**dict(pairs), **{b: a for a, b in pairs}}


def check_label_map(label_map: str) -> None:
    """Raise UserError unless `label_map` is "corrected" or "as-published"."""
    if label_map not in (CORRECTED, AS_PUBLISHED):
        raise UserError(
            f"--label-map {label_map!r} is unknown: {one_of(label_map, (CORRECTED, AS_PUBLISHED))}"
        )


def named_as(store: Store, dataset: str, label_map: str) -> Store:
    """Return `store` with the class names of `label_map`, "corrected" or "as-published".

    A store that was packed with the published names already has them and is returned as it is.
    UserError for another label map; otherwise the errors of `known_exchange`.
    """
    check_label_map(label_map)
    if label_map == CORRECTED or store.provenance.label_map == AS_PUBLISHED:
        return store
    return with_exchanged_names(store, known_exchange(dataset, store.class_names))


def with_exchanged_names(store: Store, exchange: Mapping[int, int]) -> Store:
    """Return `store` with the name and texts of label `exchange[x]` for label x, and equal rows."""
    return _Renamed(store, exchange) if exchange else store


class _Renamed(Store):
    """A store with exchanged class names; the label map in its provenance is "as-published"."""

    def __init__(self, store: Store, exchange: Mapping[int, int]) -> None:
        # This shares the state of the opened store, so that nothing is opened or read again.
        vars(self).update(vars(store))
        labels = list(range(len(store.class_names)))
        before: list[int] = vars(store).get("_order", labels)
        self._order = [before[exchange.get(label, label)] for label in labels]
        self._made_of = store, exchange

    def __reduce__(self) -> Any:
        return _Renamed, self._made_of

    @property
    def provenance(self) -> Provenance:
        return replace(super().provenance, label_map=AS_PUBLISHED)

    @property
    def class_names(self) -> list[str]:
        names = super().class_names
        return [names[label] for label in self._order]

    @property
    def raw_class_names(self) -> list[str]:
        names = super().raw_class_names
        return [names[label] for label in self._order]

    def class_text(self, prompt_set: str) -> ClassText:
        text = super().class_text(prompt_set)
        return replace(
            text,
            names=tuple(text.names[label] for label in self._order),
            embeddings=text.embeddings[self._order],
        )
