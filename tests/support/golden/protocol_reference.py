"""The reference part of docs/protocols.md, made from the protocols' objects.

`python -m tests.support.golden.protocol_reference` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from heads.evaluation.protocols.choose import PROTOCOLS, Protocol

PAGE = Path(__file__).parents[3] / "docs" / "protocols.md"
BEGIN = "<!-- made by tests/support/golden/protocol_reference.py -->"

KINDS = {
    "closeset": "Close-set",
    "zeroshot": "Zero-shot",
    "halfclass": "Half-class",
    "fewshot": "Few-shot",
    "base-to-novel": "Base-to-novel",
}


def reference() -> str:
    """All kinds, their protocols and how they differ from the papers."""
    return "\n".join(line for kind in KINDS for line in _kind(kind)) + "\n"


def _kind(kind: str) -> Iterator[str]:
    protocols = [protocol for protocol in PROTOCOLS.values() if protocol.kind == kind]
    general = PROTOCOLS[kind]
    yield f"\n### {KINDS[kind]}\n"
    yield f"Trained on {general.trained_on}; tested: {general.test_list}."
    yield f"Reported: {general.metric}; spread: {general.spread}. Fusion `{general.fusion}`."
    yield f"Source: {general.source}.\n"
    yield "| protocol | data set | tested | classes | published counts of videos | views | source |"
    yield "|---|---|---|---|---|---|---|"
    yield from (_row(protocol) for protocol in protocols)
    yield "\nDifferences from the papers:\n"
    yield from (f"- {difference}" for difference in general.differences)
    own: dict[str, list[str]] = {}
    for protocol in protocols:
        for difference in protocol.differences[len(general.differences) :]:
            own.setdefault(difference, []).append(f"`{protocol.name}`")
    yield from (f"- {', '.join(names)}: {difference}" for difference, names in own.items())


def _row(protocol: Protocol) -> str:
    counts = "; ".join(
        f"{' / '.join(f'{n:,}' for n in expected.counts.values())} ({expected.source})"
        for expected in protocol.expected
    )
    cells = (
        f"`{protocol.name}`",
        protocol.dataset or "any",
        protocol.test_list,
        str(protocol.n_classes or "its own"),
        counts or "-",
        ", ".join(protocol.views) or "any",
        protocol.source,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.partition(BEGIN)[0] + BEGIN + "\n" + reference())
