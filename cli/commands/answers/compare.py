"""`mote-cli compare`: show in which settings results differ, then by how much they differ."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import Shown, report, table
from featstore.commands import ADAPTED_BY
from featstore.errors import UserError

if TYPE_CHECKING:
    from featstore.workspace import Workspace
    from heads.evaluation.comparing.compare import Comparison
    from heads.evaluation.comparing.several import Comparisons
    from heads.evaluation.outcomes import Paired

PAIRED_LINES = 3  # more test sets than this are summed up in one line
LETTERS = string.ascii_uppercase


def compare(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="A [B]...",
            help="Result files, or names or folders of runs. A run stands for its newest result; "
            "after A, for its newest on A's data set. One is enough with --published.",
        ),
    ],
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
    """Say in what the training and the fields of results differ, which of it makes the numbers
    incomparable, and only then compare the numbers.

    Results are the JSON files under `heads/RUN/eval/`; the first one is compared with each of the
    others. Fields that an older file lacks are shown as unknown.

    Example: `mote-cli compare first second third`
    """
    from heads.evaluation.comparing.compare import choose_result
    from heads.evaluation.comparing.published import published_beside
    from heads.evaluation.comparing.several import compare_all

    if len(results) == 1 and not published:
        raise UserError("compare takes at least two results, or one with --published")
    if len(results) > len(LETTERS):
        raise UserError(
            f"compare was given {len(results)} results: name at most {len(LETTERS)}, or see all "
            "heads with `mote-cli tradeoff`"
        )
    workspace = options.workspace(root)
    first = choose_result(workspace, results[0])
    others = [choose_result(workspace, text, first) for text in results[1:]]
    comparisons = compare_all([first, *others]) if others else None
    found = None
    if published:
        found = published_beside(first.values, backbone or backbone_of(workspace, first.values))
    value = {"a": str(first.path)} | ({} if comparisons is None else comparisons.to_json())
    report(json, value | (found or {}), _shown(comparisons, found))


def _shown(comparisons: Comparisons | None, found: Mapping[str, Any] | None) -> Iterator[Shown]:
    if comparisons is not None:
        yield from _compared(comparisons)
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


def _compared(comparisons: Comparisons) -> Iterator[Shown]:
    from heads.evaluation.results import GROUPS

    letters = LETTERS[: len(comparisons.results)]
    for letter, result in zip(letters, comparisons.results, strict=True):
        yield f"{letter}  {result.path}"
    if comparisons.training:
        rows = [[d.name, *d.texts] for d in comparisons.training]
        yield table("Different: training and its data", ["setting", *letters], rows)
    else:
        yield "training and its data: no known difference"
    fields = comparisons.fields()
    for group in GROUPS:
        rows = [
            [row.name, *row.values, "makes them incomparable" if row.decisive else ""]
            for row in fields
            if row.group == group and not row.unknown
        ]
        if rows:
            yield table(f"Different: {group}", ["field", *letters, ""], rows)
    lacking: dict[str, list[str]] = {}
    for row in fields:
        if row.unknown:
            who = [of for of, text in zip(letters, row.values, strict=True) if text == "unknown"]
            verb = "does" if len(who) == 1 else "do"
            named = " and ".join(", ".join(who).rsplit(", ", 1))
            lacking.setdefault(f"{named} {verb} not say", []).append(row.name)
    yield from (f"unknown: {who} {', '.join(names)}" for who, names in lacking.items())
    two = len(comparisons.pairs) == 1
    for letter, pair in zip(letters[1:], comparisons.pairs, strict=True):
        yield ("" if two else f"A and {letter}: ") + _verdict(pair)
    if two and comparisons.pairs[0].numbers:
        yield table(
            "Accuracy in per cent, difference in points",
            ["test set", "measure", "A", "B", "B - A"],
            [
                [n.split, n.measure, f"{n.a:.2f}", f"{n.b:.2f}", f"{n.difference:+.2f}"]
                for n in comparisons.pairs[0].numbers
            ],
        )
    elif numbers := comparisons.numbers():
        yield table(
            "Accuracy in per cent (difference to A in points)",
            ["test set", "measure", *letters],
            [[row.group, row.name, *row.values] for row in numbers],
        )
    for letter, pair in zip(letters[1:], comparisons.pairs, strict=True):
        beside = "" if two else f", beside {letter}"
        for whose, only in (("A", pair.only_a), (letter, pair.only_b)):
            if only:
                yield f"only {whose} has {', '.join(only)}{beside}"
        yield from _gains(pair.paired, letter)


def _verdict(pair: Comparison) -> str:
    if pair.incomparable:
        return (
            f"not comparable: {', '.join(pair.incomparable)} differ, so the numbers do not "
            "measure the same thing"
        )
    if pair.unsure:
        return f"perhaps not comparable: {', '.join(pair.unsure)} unknown"
    return "comparable: both measure the same videos, names and views in the same way"


def _gains(pairs: Sequence[Paired], letter: str) -> Iterator[str]:
    """Yield a line per test set of the videos that only A or only the other one gets right."""
    if len(pairs) > PAIRED_LINES:
        yield _many(pairs, letter)
        return
    for pair in pairs:
        yield (
            f"{pair.split}, {pair.n} videos: {pair.only_b} videos only {letter} gets right, "
            f"{pair.only_a} only A: p = {pair.p:.3g} (exact McNemar test)"
        )


def _many(pairs: Sequence[Paired], letter: str) -> str:
    """Sum up many test sets, such as the draws of half-class, in one line."""

    def span(values: Sequence[float]) -> str:
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        return low if low == high else f"{low} to {high}"

    return (
        f"{len(pairs)} test sets of {span([pair.n for pair in pairs])} videos: "
        f"{span([pair.only_b for pair in pairs])} videos only {letter} gets right, "
        f"{span([pair.only_a for pair in pairs])} only A: p = {span([pair.p for pair in pairs])} "
        "(exact McNemar tests, one each; --json has them all)"
    )


def backbone_of(workspace: Workspace, result: Mapping[str, Any]) -> str | None:
    """Return the architecture of a result's image tower, found by the tower's name or folder.

    Where adapters of a run changed the tower, it is that of the tower they are in.
    """
    from heads.evaluation.comparing.published import architecture
    from heads.files.head_cards import read_card
    from pipeline.encoders.specs import local_architecture

    spec = str(result.get("encoder", ""))
    if spec.startswith(ADAPTED_BY):
        card = read_card(workspace.run_dir(spec.removeprefix(ADAPTED_BY)))
        spec = card.origin.adapted_encoder if card is not None else ""
    return local_architecture(spec, workspace.root / "encoders") or architecture(spec)
