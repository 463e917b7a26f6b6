"""Finds a protocol by its name or for a data set, and builds the test sets of a protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from featstore.errors import UserError, one_of
from featstore.format.schema import RowArray
from featstore.reading.store import Store
from heads.evaluation.protocols.catalogue import PROTOCOLS as PROTOCOLS
from heads.evaluation.protocols.protocol import Kind
from heads.evaluation.protocols.protocol import Protocol as Protocol
from heads.evaluation.protocols.protocol import TestSet as TestSet
from pipeline.annotations.known_sets import known_dataset

_NUMBERED_TEST = re.compile(r"test[1-9]\d?")


def protocol_named(name: str) -> Protocol:
    """Return the protocol of that name; a UserError lists the names if there is none."""
    if name not in PROTOCOLS:
        raise UserError(
            f"protocol {name!r} is unknown: {one_of(name, PROTOCOLS)} "
            "(`mote-cli protocols list` says what they measure)"
        )
    return PROTOCOLS[name]


def views_of(store: Store) -> str:
    """Return the store's views as text, clips x crops, for example "4x3"."""
    crops = store.provenance.crops
    return f"{store.schema.views // crops}x{crops}"


def count_views(text: str) -> int:
    """Return the number of views in "CLIPSxCROPS" text: "4x3" is 12. UserError for other text."""
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if match is None:
        raise UserError(f"views {text!r} are not understood: write CLIPSxCROPS, for example 4x3")
    return int(match[1]) * int(match[2])


def usual_protocol(
    kind: Kind,
    dataset: str,
    *,
    split: str | None = None,
    views: str | None = None,
    split_names: Sequence[str] | None = None,
) -> Protocol:
    """Return the protocol that `--closeset NAME`, `--zeroshot NAME` and so on mean for a data set.

    It is the general one, for any data set, if a `split` is named (because published protocols are
    defined by their lists) or if the store's `split_names` lack the published lists. `views`
    ("4x3") decides between protocols that differ in their views.
    """
    known = known_dataset(dataset)
    if split is not None:
        return PROTOCOLS[kind]
    found = [p for p in PROTOCOLS.values() if p.kind == kind and p.dataset == known]
    if kind == "closeset":
        found = [p for p in found if views in p.views]
    if split_names is not None:
        found = [p for p in found if p.lists != "tests" or len(_numbered(split_names)) > 1]
    return found[0] if found else PROTOCOLS[kind]


def listed_rows(protocol: Protocol, store: Store, split: str | None = None) -> dict[str, RowArray]:
    """Return the array rows of each list that a protocol tests, by the list's name.

    Rows whose extraction failed are included. `split` names another list to test; a protocol that
    is defined by its own list refuses that. UserError when the store lacks the splits.
    """
    rule = protocol.lists
    if split is not None:
        if protocol.dataset is not None or rule not in ("val", "usual"):
            raise UserError(
                f"protocol {protocol.name} is defined by its list ({protocol.test_list}): leave "
                "--split out, or use --split with --closeset NAME or --zeroshot NAME"
            )
        return {split: store.split(split)}
    if rule == "val":
        return _evaluation_split(store)
    numbered = _numbered(store.split_names)
    if rule == "tests" and len(numbered) < 2:
        raise UserError(
            f"{protocol.name} tests the official lists test1, test2, ..., but {store.path.name} "
            f"has the splits {', '.join(store.split_names) or 'none'}: pack the data set with its "
            "official annotations"
        )
    if rule == "tests" or (rule == "usual" and len(numbered) > 1):
        return {name: store.split(name) for name in numbered}
    if rule == "test1":
        return {"test1": store.split("test1")}
    if rule in ("all", "usual"):
        return {"all": store.rows}
    raise ValueError(f"{protocol.name} has no lists of its own: its test sets are made elsewhere")


def build_test_sets(
    protocol: Protocol, store: Store, split: str | None = None
) -> tuple[TestSet, ...]:
    """Build a protocol's test sets (close-set, zero-shot, half-class); errors as `listed_rows`."""
    lists = listed_rows(protocol, store, split)
    if protocol.kind != "halfclass":
        return tuple(TestSet(name, rows) for name, rows in lists.items())
    store.require_one_label(f"protocol {protocol.name}")
    from heads.evaluation.protocols.half_class import half_class_draws  # loads torch

    ((listed, rows),) = lists.items()
    draws = half_class_draws(store.labels[store.positions(rows)], len(store.class_names))
    return tuple(
        TestSet(f"draw{seed}", rows[kept], candidates, "all", (listed, len(rows)))
        for seed, (kept, candidates) in enumerate(draws)
    )


def count_notes(protocol: Protocol, listed: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Compare the numbers of videos in `listed` with the published ones.

    Returns the sources that publish the same counts, and a line for each list with other counts.
    """
    if not protocol.expected:
        return [], []
    agreeing = [e.source for e in protocol.expected if dict(e.counts) == dict(listed)]
    if agreeing:
        return agreeing, []
    notes = []
    for name, count in listed.items():
        published = {e.source: e.counts[name] for e in protocol.expected if name in e.counts}
        if count in published.values():
            continue
        known = "; ".join(f"{n:,} ({source})" for source, n in published.items())
        if known:
            notes.append(f"{name} lists {count:,} videos, published lists have {known}")
    if not notes:
        notes.append("the lists have counts of different publications")
    return [], notes


def _evaluation_split(store: Store) -> dict[str, RowArray]:
    for name in ("val", "test"):
        if name in store.split_names:
            return {name: store.split(name)}
    if not store.split_names:
        raise UserError(
            f"{store.path.name} has no splits, so no videos are kept for a test: sort them into "
            "train/ and val/ and pack them under a new name, or name other videos with --zeroshot"
        )
    raise UserError(
        f"{store.path.name} has neither a val nor a test split (it has "
        f"{', '.join(store.split_names)}): name one with --split"
    )


def _numbered(names: Sequence[str]) -> list[str]:
    return sorted((n for n in names if _NUMBERED_TEST.fullmatch(n)), key=lambda n: int(n[4:]))
