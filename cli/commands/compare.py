"""`mote-cli compare`: in what two results differ, then by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import print_json, print_table, results
from featstore.errors import UserError

if TYPE_CHECKING:
    from heads.evaluation.comparing.compare import Comparison
    from heads.evaluation.outcomes import Paired

PAIRED_LINES = 3  # more test sets than that are told in one line
_GAINS = "{only_b} videos only B has right, {only_a} only A: p = {p:.3g} (exact McNemar test)"


def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A result file, a run's folder, or the name of a run: its newest."
        ),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B]",
            help="The other; of a run its newest on A's data set. Not needed with --published.",
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option("--published", help="Also published figures whose protocol is that of A."),
    ] = False,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH",
            help="Architecture of A's image tower, such as ViT-B/16; default: as its name or its "
            "folder says.",
        ),
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Say in which fields two results differ, which of them make the numbers incomparable, and
    only then compare the numbers.

    Results are the JSON files under `heads/RUN/eval/`. A field that an older file lacks is called
    unknown.

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
    if json:
        print_json(
            {"a": str(first.path)}
            | ({} if comparison is None else comparison.to_json())
            | ({} if found is None else found)
        )
        return
    if comparison is not None:
        _print(comparison)
    if found is not None:
        print_published(found)


def print_published(found: Mapping[str, Any]) -> None:
    """Print what `published_beside` found."""
    if found["published"]:
        print_table(
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
        for note in dict.fromkeys(f"{f['method']}: {f['note']}" for f in found["published"]):
            results.print(note)
        return
    if not found["nearest"]:
        results.print("no published figure is of this data set")
        return
    results.print("no published figure has this protocol; nearest differ in:")
    for near in found["nearest"]:
        results.print(
            f"  {near['method']} {near['backbone']} {near['value']:g} ({near['source']}): "
            f"{'; '.join(near['differs'])}"
        )


def _print(comparison: Comparison) -> None:
    from heads.evaluation.results import GROUPS

    results.print(f"A  {comparison.a}")
    results.print(f"B  {comparison.b}")
    known = [d for d in comparison.differences if not d.unknown]
    for group in GROUPS:
        rows = [
            [d.name, d.of_a, d.of_b, "makes them incomparable" if d.decisive else ""]
            for d in known
            if d.group == group
        ]
        if rows:
            print_table(f"Different: {group}", ["field", "A", "B", ""], rows)
    unknown = [d for d in comparison.differences if d.unknown]
    for of_a, of_b, who in ((True, False, "A"), (False, True, "B"), (True, True, "A and B")):
        names = [
            d.name for d in unknown if (d.of_a == "unknown", d.of_b == "unknown") == (of_a, of_b)
        ]
        if names:
            verb = "do" if of_a and of_b else "does"
            results.print(f"unknown: {who} {verb} not say {', '.join(names)}")
    results.print(_verdict(comparison))
    if comparison.numbers:
        print_table(
            "Accuracy in per cent, difference in points",
            ["test set", "measure", "A", "B", "B - A"],
            [
                [n.split, n.measure, f"{n.a:.2f}", f"{n.b:.2f}", f"{n.difference:+.2f}"]
                for n in comparison.numbers
            ],
        )
    for who, only in (("A", comparison.only_a), ("B", comparison.only_b)):
        if only:
            results.print(f"only {who} has {', '.join(only)}")
    if len(comparison.paired) > PAIRED_LINES:
        results.print(_many(comparison.paired))
        return
    for pair in comparison.paired:
        line = _GAINS.format(only_a=pair.only_a, only_b=pair.only_b, p=pair.p)
        results.print(f"{pair.split}, {pair.n} videos: {line}")


def _many(pairs: Sequence[Paired]) -> str:
    """One line for the draws of half-class and the like."""

    def span(values: Sequence[float]) -> str:
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        return low if low == high else f"{low} to {high}"

    return (
        f"{len(pairs)} test sets of {span([pair.n for pair in pairs])} videos: "
        f"{span([pair.only_b for pair in pairs])} videos only B has right, "
        f"{span([pair.only_a for pair in pairs])} only A: p = {span([pair.p for pair in pairs])} "
        "(exact McNemar tests, one each; --json has them all)"
    )


def _verdict(comparison: Comparison) -> str:
    if comparison.incomparable:
        return (
            f"not comparable: {', '.join(comparison.incomparable)} differ, so the numbers do not "
            "measure the same thing"
        )
    if comparison.unsure:
        return f"cannot be told whether comparable: {', '.join(comparison.unsure)} unknown"
    return "comparable: the same videos, names and views, in the same way"
