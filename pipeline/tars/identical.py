"""Names the videos of a data set that are the same file, byte for byte.

They are kept: which of them is wanted, and which class is right, only a person can say. The list
proposes what to leave out, in the form that `pack --exclude` takes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from featstore.errors import UserError, WorkError, counted, safe_text
from featstore.files.documents import LISTS_LIMIT, parse_json, read_document
from featstore.files.durable import write_bytes
from featstore.files.key_lists import EXCLUDE, KEY, YES, superfluous
from featstore.files.tables import csv_bytes
from pipeline.tars.dataset import load_dataset
from pipeline.tars.finished import RECORDS_FOLDER, read_outcomes

IDENTICAL_FILE: Final = "identical.csv"
"""Beside dataset.json: the videos that are in the data set more than once."""

SHOWN: Final = 3  # groups that are printed
COLUMNS: Final = ("group", KEY, "path", "class_name", "splits", "sha256", EXCLUDE)


class HashedVideo(NamedTuple):
    """A packed video and the hash of its bytes; `class_name` is "" without a class."""

    key: str
    path: str
    class_name: str
    splits: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class IdenticalGroup:
    """Two or more videos of the same bytes, sorted by key."""

    videos: tuple[HashedVideo, ...]

    @property
    def across_classes(self) -> bool:
        """Whether they are in different classes, so that at most one class is right."""
        return len({video.class_name for video in self.videos}) > 1

    @property
    def across_splits(self) -> bool:
        """Whether they are in different splits, so that a test may be on a training video."""
        return len({frozenset(video.splits) for video in self.videos}) > 1

    @property
    def excluded(self) -> frozenset[str]:
        """The keys proposed to be left out: see `superfluous`."""
        found = [(v.key, v.splits, v.class_name) for v in self.videos]
        return frozenset(superfluous(found))

    @property
    def words(self) -> str:
        """The group in one line: every video with its class and its splits."""
        return " = ".join(
            f"{safe_text(v.key)} ({', '.join(filter(None, (v.class_name, *v.splits))) or '-'})"
            for v in self.videos
        )


@dataclass(frozen=True, slots=True)
class Identical:
    """All groups of a data set, those across classes and splits first."""

    groups: tuple[IdenticalGroup, ...]

    @property
    def words(self) -> str:
        """The counts in words."""
        kinds = (
            (sum(group.across_classes for group in self.groups), "across classes"),
            (sum(group.across_splits for group in self.groups), "across splits"),
        )
        said = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
        videos = sum(len(group.videos) for group in self.groups)
        return (
            f"{counted(videos, 'video')} in {counted(len(self.groups), 'group')}"
            + f", {said}" * bool(said)
        )

    def write(self, folder: Path) -> Path:
        """Write `identical.csv` unless it is there as it should be; without groups, a header."""
        path = folder / IDENTICAL_FILE
        content = csv_bytes(COLUMNS, self._rows())
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)
        return path

    def _rows(self) -> Iterator[Sequence[object]]:
        for number, group in enumerate(self.groups, start=1):
            out = group.excluded
            for v in group.videos:
                said = YES if v.key in out else "no"
                yield (
                    *(number, v.key, v.path, v.class_name, ";".join(v.splits)),
                    *(v.sha256, said),
                )

    def to_json(self, file: Path) -> dict[str, Any]:
        """Counts and all groups, JSON-ready; `file` is the list."""
        return {
            "file": str(file),
            "groups": len(self.groups),
            "videos": sum(len(group.videos) for group in self.groups),
            "across_classes": sum(group.across_classes for group in self.groups),
            "across_splits": sum(group.across_splits for group in self.groups),
            "found": [
                {
                    "sha256": group.videos[0].sha256,
                    "across_classes": group.across_classes,
                    "across_splits": group.across_splits,
                    "videos": [
                        {"key": v.key, "class_name": v.class_name, "splits": list(v.splits)}
                        for v in group.videos
                    ],
                }
                for group in self.groups
            ],
        }


def identical_videos(videos: Iterable[HashedVideo]) -> Identical:
    """Group the videos whose bytes are the same."""
    by_hash: dict[str, list[HashedVideo]] = {}
    for video in videos:
        by_hash.setdefault(video.sha256, []).append(video)
    groups = [IdenticalGroup(tuple(sorted(same))) for same in by_hash.values() if len(same) > 1]
    groups.sort(key=lambda g: (not g.across_classes, not g.across_splits, g.videos[0].key))
    return Identical(tuple(groups))


def content_hashes(dataset_dir: Path) -> dict[str, str]:
    """Return the sha256 of the bytes of each packed video by key, as far as packing kept them.

    They come from the records of packing, or from the indexes of tars that were taken where they
    lie; {} for a data set that is not packed here. What cannot be read is left out.
    """
    try:
        dataset = load_dataset(dataset_dir)
    except (UserError, WorkError):
        return {}
    found: dict[str, str] = {}
    for tar in dataset.tars:
        with suppress(UserError, WorkError, LookupError, TypeError, ValueError):
            if tar.source:
                raw = read_document(dataset.index_path(tar), "", limit=LISTS_LIMIT)
                pairs: Iterable[tuple[str, str | None, str]] = [
                    (entry["key"], entry["sha256"], "") for entry in parse_json(raw)
                ]
            else:
                pairs = read_outcomes(dataset_dir / RECORDS_FOLDER, tar.file)
            found.update((key, sha256) for key, sha256, reason in pairs if sha256 and not reason)
    return found
