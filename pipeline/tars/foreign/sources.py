"""Which tars `pack --tars` names: paths, globs, braces and URLs, each with the split it is for."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from featstore.errors import UserError, counted_of, one_line
from featstore.remote.urls import is_url, parsed_file
from pipeline.annotations.class_names import natural_order
from pipeline.annotations.listing import split_from_word

# Kinetics-700 is 2,500 tars of the usual size.
MAX_TARS: Final = 100_000

_SPLIT = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,31})=(.+)", re.DOTALL)
_NUMBERS = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")
_GLOB = re.compile(r"[*?\[]")


class NamedTar(NamedTuple):
    """One tar: its absolute path or URL, and the split that all its videos belong to ("" none)."""

    source: str
    split: str


def named_tars(patterns: Sequence[str]) -> list[NamedTar]:
    """Return the tars that the patterns name, each pattern's in natural order.

    A pattern is `[SPLIT=]PATH|GLOB|URL`, with braces as in a shell (`{000..099}`, `{a,b}`). Of a
    glob of s3:// the bucket is listed; a web server has no listing. Raises UserError for a pattern
    that names nothing, for files that do not exist (it counts them), for a tar that is named for
    two splits, and for too many.
    """
    found: dict[str, NamedTar] = {}
    for pattern in patterns:
        split, text = _split_of(pattern)
        sources = [source for one in _expanded(text) for source in _sources(one, pattern)]
        for source in sources:
            tar = found.setdefault(source, NamedTar(source, split))
            if tar.split != split:
                raise UserError(
                    f"{source} is named for split {tar.split or 'none'!r} and for split "
                    f"{split or 'none'!r}: a tar belongs to one split; where a tar holds videos of "
                    "several, name them in a CSV key,class,split with --annotations"
                )
    if len(found) > MAX_TARS:
        raise UserError(f"--tars names {len(found)} tars: at most {MAX_TARS} fit in a data set")
    missing = [tar.source for tar in found.values() if not is_url(tar.source)]
    missing = [source for source in missing if not Path(source).is_file()]
    if missing:
        raise UserError(
            f"{counted_of(len(missing), len(found), 'tar', 'does', 'do')} not exist (first: "
            f"{missing[0]!r}): check the braces or the path of --tars"
        )
    return list(found.values())


def absolute_pattern(pattern: str) -> str:
    """Return a pattern of `named_tars` that means the same in any folder."""
    split, text = _split_of(pattern)
    return pattern if is_url(text) else f"{split}{'=' * bool(split)}{Path(text).absolute()}"


def _split_of(pattern: str) -> tuple[str, str]:
    """Split off `SPLIT=`; a path that exists under its whole name has no split."""
    match = _SPLIT.fullmatch(pattern)
    if match is None or Path(pattern).exists():
        return "", pattern
    return split_from_word(match[1]), match[2]


def _expanded(text: str) -> Iterator[str]:
    from webdataset import shardlists  # loads torch

    if not is_url(text) and Path(text).exists():
        yield text  # braces may belong to a name
        return
    for first, last in _NUMBERS.findall(text):
        # The library makes a list of every range before the first name comes out of it.
        if len(first) > 12 or len(last) > 12 or abs(int(first) - int(last)) > MAX_TARS:
            raise UserError(
                f"--tars {one_line(repr(text), 120)}: a range of more than {MAX_TARS} names; "
                "shorten it"
            )
    try:
        # shardlists.expand_urls would also put environment variables into names.
        names = shardlists.braceexpand.braceexpand(text, escape=False)
        expanded = list(islice(names, MAX_TARS + 1))
    except ValueError as error:
        raise UserError(
            f"--tars {one_line(repr(text), 120)}: {one_line(error, 80)}; close every brace, and "
            "put the whole pattern into quotes"
        ) from error
    if len(expanded) > MAX_TARS:
        raise UserError(
            f"--tars {one_line(repr(text), 120)} names more than {MAX_TARS} tars: shorten it"
        )
    yield from expanded


def _sources(text: str, pattern: str) -> Iterable[str]:
    if text.startswith("pipe:"):
        raise UserError("--tars takes no pipe: commands, which would be run: name files or URLs")
    if is_url(text):
        scheme = text.partition("://")[0]
        if scheme != "s3" or not _GLOB.search(text):
            parsed_file(text.replace("*", "x").replace("[", "x"))  # refuses what holds a credential
        if not _GLOB.search(text):
            return [text]
        if scheme != "s3":
            raise UserError(
                f"{one_line(repr(text), 120)}: there are no patterns over {scheme}, because a web "
                "server has no listing; write the numbers as {000..099}"
            )
        return _listed_on_s3(text)
    if Path(text).is_dir():
        raise UserError(
            f"--tars {text!r} is a folder: name the tars in it, such as '{text.rstrip('/')}/*.tar'"
        )
    if Path(text).exists() or not _GLOB.search(text):
        return [str(Path(text).absolute())]
    matching = [str(Path(p).absolute()) for p in glob.glob(text, recursive=True)]
    files = sorted((p for p in matching if Path(p).is_file()), key=natural_order)
    if not files:
        raise UserError(f"no file matches --tars {pattern!r}: check the path")
    return files


def _listed_on_s3(text: str) -> list[str]:
    from featstore.remote.objects import ObjectFolder

    at = _GLOB.search(text)
    assert at is not None
    above = text[: at.start()].rpartition("/")[0]
    if above in ("s3:", "s3:/"):
        raise UserError(f"{text!r} has a pattern in the bucket's name: name one bucket")
    wanted = text[len(above) + 1 :].split("/")
    names = [
        name
        for name in ObjectFolder(above).list()
        if name.count("/") == len(wanted) - 1
        and all(map(fnmatch.fnmatchcase, name.split("/"), wanted))
    ]
    if not names:
        raise UserError(f"no object matches --tars {text!r}: check bucket and prefix")
    return [f"{above}/{name}" for name in sorted(names, key=natural_order)]
