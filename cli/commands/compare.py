"""`mote-cli compare`: show which settings of two results differ, then by how much they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import Shown, report, table
from featstore.errors import UserError

if TYPE_CHECKING:
    from heads.evaluation.comparing.compare import Comparison
    from heads.evaluation.outcomes import Paired

PAIRED_LINES = 3  # more test sets than this are summed up in one line
_GAINS = "{only_b} videos only B gets right, {only_a} only A: p = {p:.3g} (exact McNemar test)"


def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A result file, or a run's name or folder, for its newest result."
        ),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B]",
            help="The other result; a run stands for its newest result on A's data set. Not needed "
            "with --published.",
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option("--published", help="Also show published figures with A's protocol."),
    ] = False,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH",
            help="Architecture of A's image tower, such as ViT-B/16; default: found by the tower's "
            "name or folder.",
        ),
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Say in which fields two results differ, which of them make the numbers incomparable, and
    only then compare the numbers.

    Results are the JSON files under `heads/RUN/eval/`. Fields that an older file lacks are shown
    as unknown.

    Example: `mote-cli compare first second`
    """
    from heads.evaluation.comparing.compare import choose_result
    from heads.evaluation.comparing.compare import compare as run
    from heads.evaluation.comparing.published import published_beside

    if b is None and not published:
        raise UserError("compare takes two results, or one with --published")
    workspace = options.workspace(root)
    first = choose_result(workspace, a)
    comparison = None if b is None else run(first, choose_result(workspace, b, first))
    found = None
    if published:
        found = published_beside(
            first.values, backbone or options.architecture(workspace, first.values)
        )
    value = {"a": str(first.path)} | ({} if comparison is None else comparison.to_json())
    report(json, value | (found or {}), _shown(comparison, found))


def _shown(comparison: Comparison | None, found: Mapping[str, Any] | None) -> Iterator[Shown]:
    if comparison is not None:
        yield from _compared(comparison)
    if found is not None:
        yield from published_shown(found)
        if not found["published"] and not found["nearest"]:
            yield "no figure is published for this data set"


def published_shown(found: Mapping[str, Any]) -> Iterator[Shown]:
    """Yield what to print of the figures that `published_beside` found; nothing without any."""
    if found["published"]:
        yield table(
            "Published with the same protocol",
            ["method", "value %", "std", "top-5 %", "videos", "source"],
            [
                [
                    f"{figure['method']} {figure['backbone']}",
                    f"{figure['value']:g}",
                    "-" if figure["std"] is None else f"{figure['std']:g}",
                    "-" if figure["top5"] is None else f"{figure['top5']:g}",
                    figure["count_note"],
                    f"{figure['source']} ({figure['sure']})",
                ]
                for figure in found["published"]
            ],
        )
        yield from dict.fromkeys(f"{f['method']}: {f['note']}" for f in found["published"])
    elif found["nearest"]:
        yield "no published figure has this protocol; the nearest ones differ in:"
        for near in found["nearest"]:
            yield (
                f"  {near['method']} {near['backbone']} {near['value']:g} ({near['source']}): "
                f"{'; '.join(near['differs'])}"
            )


def _compared(comparison: Comparison) -> Iterator[Shown]:
    from heads.evaluation.results import GROUPS

    yield f"A  {comparison.a}"
    yield f"B  {comparison.b}"
    known = [d for d in comparison.differences if not d.unknown]
    for group in GROUPS:
        rows = [
            [d.name, d.of_a, d.of_b, "makes them incomparable" if d.decisive else ""]
            for d in known
            if d.group == group
        ]
        if rows:
            yield table(f"Different: {group}", ["field", "A", "B", ""], rows)
    unknown = [d for d in comparison.differences if d.unknown]
    for of_a, of_b, who in ((True, False, "A"), (False, True, "B"), (True, True, "A and B")):
        names = [
            d.name for d in unknown if (d.of_a == "unknown", d.of_b == "unknown") == (of_a, of_b)
        ]
        if names:
            verb = "do" if of_a and of_b else "does"
            yield f"unknown: {who} {verb} not say {', '.join(names)}"
    if comparison.incomparable:
        yield (
            f"not comparable: {', '.join(comparison.incomparable)} differ, so the numbers do not "
            "measure the same thing"
        )
    elif comparison.unsure:
        yield f"perhaps not comparable: {', '.join(comparison.unsure)} unknown"
    else:
        yield "comparable: both measure the same videos, names and views in the same way"
    if comparison.numbers:
        yield table(
            "Accuracy in per cent, difference in points",
            ["test set", "measure", "A", "B", "B - A"],
            [
                [n.split, n.measure, f"{n.a:.2f}", f"{n.b:.2f}", f"{n.difference:+.2f}"]
                for n in comparison.numbers
            ],
        )
    for who, only in (("A", comparison.only_a), ("B", comparison.only_b)):
        if only:
            yield f"only {who} has {', '.join(only)}"
    if len(comparison.paired) > PAIRED_LINES:
        yield _many(comparison.paired)
        return
    for pair in comparison.paired:
        line = _GAINS.format_map(vars(pair))
        yield f"{pair.split}, {pair.n} videos: {line}"


def _many(pairs: Sequence[Paired]) -> str:
    """Sum up many test sets, such as the draws of half-class, in one line."""

    def span(values: Sequence[float]) -> str:
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        return low if low == high else f"{low} to {high}"

    return (
        f"{len(pairs)} test sets of {span([pair.n for pair in pairs])} videos: "
        f"{span([pair.only_b for pair in pairs])} videos only B gets right, "
        f"{span([pair.only_a for pair in pairs])} only A: p = {span([pair.p for pair in pairs])} "
        "(exact McNemar tests, one each; --json has them all)"
    )
