"""`mote-cli protocols`: show what each named protocol measures, from the objects `eval` uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.output import report, table

if TYPE_CHECKING:
    from heads.evaluation.comparing.published import Published
    from heads.evaluation.protocols.protocol import Protocol


app = typer.Typer(
    rich_markup_mode="markdown",
    help=(
        "Describe the named evaluation protocols: what each trains on, tests, counts and reports, "
        "and how mote differs from the papers.\n\n"
        "Example: `mote-cli protocols show ucf101-zeroshot-3splits`"
    ),
)


@app.command("list")
def list_protocols(json: options.Json = False) -> None:
    """List the protocols that `mote-cli eval --protocol` takes.

    Example: `mote-cli protocols list`
    """
    from heads.evaluation.protocols.choose import PROTOCOLS

    protocols = list(PROTOCOLS.values())
    rows = [[p.name, p.title, _counts(p), ", ".join(p.views) or "any", p.fusion] for p in protocols]
    report(
        json,
        {"protocols": [protocol.to_json() for protocol in protocols]},
        [table("", ["protocol", "tests", "videos", "views", "fusion"], rows)],
    )


@app.command("show")
def show_protocol(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a protocol.")],
    json: options.Json = False,
) -> None:
    """Show what any two results of a protocol must share, and how mote differs from the papers.

    Example: `mote-cli protocols show ucf101-zeroshot-3splits`
    """
    from heads.evaluation.comparing.published import published_of
    from heads.evaluation.protocols.choose import protocol_named

    protocol = protocol_named(name)
    published = published_of(name)
    facts = {
        protocol.name: protocol.title,
        "data set": protocol.dataset or "any",
        "trained on": protocol.trained_on,
        "test list": protocol.test_list,
        "classes": protocol.n_classes or "those of the data set",
        "views": ", ".join(protocol.views) or "any",
        "prompts": protocol.prompts,
        "fusion": protocol.fusion,
        "metric": protocol.metric,
        "spread": protocol.spread,
        "source": protocol.source,
    }
    counts = [f"{_named(e.counts)}: {e.source}" for e in protocol.expected]
    lists = {
        "published counts of videos": counts,
        "differences from the papers": protocol.differences,
        "published figures, in per cent": [_figure(figure) for figure in published],
    }
    report(
        json,
        {**protocol.to_json(), "published": [figure.to_json() for figure in published]},
        [
            facts,
            *(
                line
                for name, lines in lists.items()
                if lines
                for line in (name, *(f"  - {line}" for line in lines))
            ),
        ],
    )


def _figure(figure: Published) -> str:
    """Describe a published figure in one line, with all that is known about it."""
    value = f"{figure.value:g}" + ("" if figure.std is None else f" +- {figure.std:g}")
    measure = "" if figure.measure == "top1" else f"{figure.measure} "
    told = {
        "shots": figure.shots,
        "views": figure.views,
        "frames": figure.frames,
        "prompts": figure.prompts,
        "fusion": figure.fusion,
        "videos": figure.videos,
    }
    known = ", ".join(f"{name} {value}" for name, value in told.items() if value)
    said = f" ({known})" if known else ""
    return (
        f"{figure.method} {figure.backbone}: {measure}{value}{said}; {figure.source} "
        f"({figure.sure}){f'; {figure.note}' if figure.note else ''}"
    )


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _counts(protocol: Protocol) -> str:
    """Write the first published counts, for the table."""
    if not protocol.expected:
        return "-"
    shown = " / ".join(f"{count:,}" for count in protocol.expected[0].counts.values())
    return shown + (" or others" if len(protocol.expected) > 1 else "")
