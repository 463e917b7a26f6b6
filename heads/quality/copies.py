"""Copies among the videos of stores, what shows that they are copies, and the files about them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, counted, counted_of, one_line, safe_text
from featstore.files.documents import LISTS_LIMIT, read_document
from featstore.files.durable import write_bytes, write_json
from featstore.files.key_lists import EXCLUDE, KEY, YES
from featstore.files.tables import csv_bytes, csv_rows
from heads.quality.part import Part
from heads.quality.pictures import Sheet, VideoFiles, draw_sheets
from pipeline.tars.identical import content_hashes

log = logging.getLogger(__name__)

IDENTICAL: Final = "identical bytes"
SAME: Final = "same frames"
ALIKE: Final = "nearly the same frames"
REENCODED: Final = "re-encoded"
TRIMMED: Final = "trimmed"
DRAWN_GROUPS: Final = 12
DRAWN_VIDEOS: Final = 4  # of a group
LINES: Final = 4  # videos of a group that are printed
DATASET: Final = "dataset"
LISTS: Final = ("duplicates", "leaks")
COLUMNS: Final = (
    *("group", KEY, DATASET, "store", "class_name", "splits", "seconds"),
    *("copy_of", "similarity", "kind", "detail", EXCLUDE),
)


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a part."""

    part: int
    row: int
    key: str
    class_name: str
    splits: tuple[str, ...]
    seconds: float

    @property
    def words(self) -> str:
        """Key, class and splits in a line."""
        inside = ", ".join(filter(None, (self.class_name, *self.splits)))
        return safe_text(f"{self.key} ({inside or '-'}, {self.seconds:.1f} s)")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two videos of a group that are copies, and what shows it."""

    first: Video
    second: Video
    similarity: float
    kind: str
    detail: str

    @property
    def evidence(self) -> str:
        """Kind, and what shows it, in a line."""
        alike = f"embeddings {self.similarity:.3f} alike"
        return f"{self.kind}, {self.detail or alike}"


@dataclass(frozen=True, slots=True)
class CopyGroup:
    """Videos that are copies of each other; `pairs` connect all of them, the most alike first."""

    videos: tuple[Video, ...]
    pairs: tuple[Pair, ...]

    @property
    def across_classes(self) -> bool:
        """Whether they are in different classes."""
        return len({video.class_name for video in self.videos}) > 1

    @property
    def across_splits(self) -> bool:
        """Whether they are in different splits or parts."""
        return len({(video.part, video.splits) for video in self.videos}) > 1

    @property
    def words(self) -> str:
        """One line: how many videos, and what is wrong with that."""
        first = self.pairs[0]
        alike = {v for p in self.pairs if p.kind == first.kind for v in (p.first, p.second)}
        some = len(alike) < len(self.videos)  # the others are copies of another kind
        said = f"{len(self.videos)} videos, " + f"{len(alike)} of them " * some + first.evidence
        said += ", DIFFERENT CLASSES" * self.across_classes
        return said + ", different splits" * self.across_splits

    @property
    def lines(self) -> list[str]:
        """A line for each of the first videos."""
        more = len(self.videos) - LINES
        return [v.words for v in self.videos[:LINES]] + ([f"and {more} more"] if more > 0 else [])

    def evidence_of(self, video: Video) -> Pair:
        """Return the pair of the video that is most alike."""
        return next(pair for pair in self.pairs if video in (pair.first, pair.second))


@dataclass(frozen=True)
class Copies:
    """What a search for copies found; `parts` are one set of videos, or training and test."""

    parts: tuple[Part, ...]
    groups: tuple[CopyGroup, ...]
    limits: Mapping[str, float]
    """`embeddings`, `pictures`: the largest ratio of a pair's distance to the usual one near it
    (`heads.quality.null`); `looked_at`: videos whose pictures were compared."""
    exclude: frozenset[tuple[int, str]]
    """Part and key of the videos that are proposed to be left out."""

    @property
    def between(self) -> bool:
        """Whether two parts were compared with each other."""
        return len(self.parts) > 1

    @property
    def words(self) -> str:
        """What was compared."""
        said = " and ".join(f"{len(part.rows)} of {part.name}" for part in self.parts)
        failed = sum(part.n_failed for part in self.parts)
        return said + (f", {failed} without features not compared" if failed else "")

    @property
    def counts(self) -> str:
        """What was found."""
        found = self._counted()
        if self.between:
            return (
                f"{counted_of(found['leaked'], len(self.parts[1].rows), 'test video')} copied from "
                f"{counted(self.excluded, 'training video')}"
            )
        return (
            f"{counted(found['videos'], 'video')} in {counted(found['groups'], 'group')}, "
            f"{found['across_classes']} "
            f"across classes, {found['across_splits']} across splits"
        )

    @property
    def excluded(self) -> int:
        """How many videos are proposed to be left out."""
        return len(self.exclude)

    def _counted(self) -> dict[str, int]:
        videos = [video for group in self.groups for video in group.videos]
        return {
            "groups": len(self.groups),
            "videos": len(videos),
            "across_classes": sum(group.across_classes for group in self.groups),
            "across_splits": sum(group.across_splits for group in self.groups),
            **({"leaked": sum(video.part == 1 for video in videos)} if self.between else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """Counts, threshold and all groups with their evidence, JSON-ready."""
        return {
            "stores": [part.name for part in self.parts],
            "compared": [len(part.rows) for part in self.parts],
            "failed": [part.n_failed for part in self.parts],
            "limits": {name: round(value, 4) for name, value in self.limits.items()},
            **self._counted(),
            "excluded": self.excluded,
            "found": [
                {
                    "across_classes": group.across_classes,
                    "across_splits": group.across_splits,
                    "videos": [
                        {
                            "key": v.key,
                            "store": self.parts[v.part].name,
                            "class_name": v.class_name,
                            "splits": list(v.splits),
                            "seconds": round(v.seconds, 3),
                            "exclude": (v.part, v.key) in self.exclude,
                        }
                        for v in group.videos
                    ],
                    "pairs": [
                        {
                            "first": pair.first.key,
                            "second": pair.second.key,
                            "similarity": round(pair.similarity, 4),
                            "kind": pair.kind,
                            "detail": pair.detail,
                        }
                        for pair in group.pairs
                    ],
                }
                for group in self.groups
            ],
        }

    def save(self, folder: Path, picture: bool = True) -> dict[str, Path]:
        """Write the list (CSV), all facts (JSON) and the picture; return the files by kind.

        There is no picture without `picture`, without groups, and if no video file is at hand.
        """
        name = LISTS[self.between]
        files = {"list": folder / f"{name}.csv", "json": folder / f"{name}.json"}
        write_bytes(files["list"], csv_bytes(COLUMNS, self._rows()))
        write_json(files["json"], self.to_json())
        drawn = folder / f"{name}.png"
        if picture and self._draw(drawn):
            files["picture"] = drawn
        else:
            drawn.unlink(missing_ok=True)  # of an earlier search
        return files

    def _rows(self) -> Iterator[Sequence[object]]:
        for number, group in enumerate(self.groups, start=1):
            for v in group.videos:
                pair = group.evidence_of(v)
                other = pair.second if pair.first == v else pair.first
                part = self.parts[v.part]
                yield (
                    *(number, v.key, part.store.provenance.dataset, part.name),
                    *(v.class_name, ";".join(v.splits)),
                    *(f"{v.seconds:.2f}", other.key, f"{pair.similarity:.4f}", pair.kind),
                    *(pair.detail, YES if (v.part, v.key) in self.exclude else "no"),
                )

    def _draw(self, path: Path) -> int:
        files = [VideoFiles(part) for part in self.parts]
        sheets = [
            Sheet(
                f"{number}. {group.words}",
                [(v.words, files[v.part].frames(v.row)) for v in group.videos[:DRAWN_VIDEOS]],
            )
            for number, group in enumerate(self.groups[:DRAWN_GROUPS], start=1)
        ]
        return draw_sheets(sheets, path)


def content_marks(quality: Path, dataset_dir: Path) -> dict[str, list[str]]:
    """Return what tells the content of the videos of a data set: marks by key.

    They are the sha256 of its bytes, as far as packing kept it, and the groups of copies in the
    lists below `quality`, as people corrected them: a group of which nothing is to be left out is
    none. Videos that have a mark in common are copies. A list that cannot be read is said.
    """
    marks = {key: [digest] for key, digest in content_hashes(dataset_dir).items()}
    for file in sorted(file for name in LISTS for file in quality.rglob(f"{name}.csv")):
        try:
            cells = _listed_copies(file, quality)
        except (UserError, ValueError) as error:
            log.warning("the copies listed in %s do not count: %s", file, one_line(error, 120))
            continue
        copies = {group for group, *_, said in cells if said.strip().lower() == YES}
        for group, key, dataset, _ in cells:
            if dataset == dataset_dir.name and group in copies:
                marks.setdefault(key, []).append(f"{file}, group {group}")
    return marks


def _listed_copies(file: Path, quality: Path) -> list[list[str]]:
    """Return group, key, data set and answer of each video of a list below `quality`.

    Lists once had no data set for each video; the folder of `duplicates` names it. Raises UserError
    or ValueError for a list that does not say which videos it means.
    """
    header, *rows = csv_rows(read_document(file, "make it again", limit=LISTS_LIMIT), KEY)
    wanted = ("group", KEY, DATASET, EXCLUDE)
    inside = file.relative_to(quality).parts
    if DATASET not in header and file.stem == LISTS[False] and len(inside) > 2:
        header, rows = [*header, DATASET], [[*row, inside[0]] for row in rows if row]
    if lacking := [name for name in wanted if name not in header]:
        raise ValueError(f"it has no column {', '.join(lacking)}; make it again")
    at = [header.index(name) for name in wanted]
    if short := [number for number, row in enumerate(rows, 2) if row and len(row) < len(header)]:
        raise ValueError(f"row {short[0]} has fewer columns than the first; make it again")
    return [[row[place] for place in at] for row in rows if row]
