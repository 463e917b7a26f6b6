"""What is passed over before anything is listed: files that are no videos, hidden ones, links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from featstore.errors import one_line, quoted

_NAMED: Final = 8  # the most extensions that a sentence names


@dataclass
class LeftOut:
    """What a scan passed over, and the links that it followed.

    `files` counts files that are no videos by their extension in lower case, "" for none.
    `hidden` counts files and folders whose names begin with a dot, `links` those that were
    followed. `loops` are links back to a folder around them, `empty` folders without any file, both
    as relative paths. `unclassed` counts videos outside class folders, `unlisted` those that the
    annotations do not name.
    """

    files: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    links: int = 0
    loops: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unclassed: int = 0
    unlisted: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON values; folders are counted, like everything else."""
        counts = {"loops": len(self.loops), "empty": len(self.empty)}
        return {**vars(self), **counts, "files": dict(self.files.most_common())}

    @property
    def line(self) -> str:
        """Everything in one line of words; "" if nothing was passed over and no link followed."""
        ends = self.files.most_common(_NAMED)
        more = self.files.total() - sum(count for _, count in ends)
        kinds = [f"{count} {_shown(end)}" for end, count in ends] + [f"{more} others"] * bool(more)
        counted = {
            f"files that are no videos: {', '.join(kinds)}": self.files.total(),
            f"hidden: {self.hidden}": self.hidden,
            f"videos outside class folders: {self.unclassed}": self.unclassed,
            f"videos that no list names: {self.unlisted}": self.unlisted,
            f"empty folders: {len(self.empty)}{_first(self.empty)}": len(self.empty),
            f"links back to a folder around them: {len(self.loops)}{_first(self.loops)}": len(
                self.loops
            ),
            f"links that were followed: {self.links}": self.links,
        }
        return "; ".join(words for words, count in counted.items() if count)


def _shown(extension: str) -> str:
    return f".{one_line(extension, 20)}" if extension else "without extension"


def _first(paths: Sequence[str]) -> str:
    return f" (first: {quoted(paths[0], 80)})" if paths else ""
