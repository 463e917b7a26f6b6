"""All protocols by name, read from protocols.toml; that file explains its keys."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any, Final

from heads.evaluation.protocols.protocol import Expected, Protocol


def _read() -> dict[str, Protocol]:
    """Read the protocols, in the order of the file."""
    text = files(__package__).joinpath("protocols.toml").read_text(encoding="utf-8")
    for short, paper in tomllib.loads(text)["papers"].items():
        text = text.replace(f"{{{short}}}", paper)
    tables = tomllib.loads(text)
    del tables["papers"]
    sentences = tables.pop("sentences")

    def keys(name: str) -> dict[str, Any]:
        own: dict[str, Any] = tables[name]
        return (keys(own["like"]) if "like" in own else {}) | own

    protocols = {}
    for name in tables:
        found = {"dataset": None, "expected": (), "views": ()} | keys(name)
        general, own = tables[found["kind"]]["differences"], found["differences"]
        found.pop("like", None)
        protocols[name] = Protocol(
            **found
            | {
                "name": name,
                "expected": tuple(Expected(**counts) for counts in found["expected"]),
                "views": tuple(found["views"]),
                "differences": tuple(
                    sentences.get(said, said)
                    for said in (own if own is general else [*general, *own])
                ),
            }
        )
    return protocols


PROTOCOLS: Final = _read()
"""Every protocol by its name; the first protocol of each kind is for any data set."""
