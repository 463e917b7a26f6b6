"""Kinetics-400, -600, -700 and -700-2020: official CSV and DeepMind JSON files.

The copies that people have hold traps: ids that begin with "-" or contain "_", files named by id
alone, flat folders, replacements of corrupted files, labels with quoted commas, times written as
floats, "validate" for "val", test files without labels.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from featstore.errors import UserError, counted
from pipeline.annotations.class_names import one_spelling
from pipeline.annotations.listing import (
    Listing,
    ListingBuilder,
    split_from_file_name,
    split_from_word,
)
from pipeline.annotations.text_files import header, opening, read_json, read_table
from pipeline.annotations.video_folder import VideoFolder, first_split, may_be_preview, path_stem

ID_LENGTH = 11  # of a YouTube id

_TIMES = r"_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)"
_ID_AND_TIMES = re.compile(rf"(.{{{ID_LENGTH}}}){_TIMES}")
_ANYTHING_AND_TIMES = re.compile(r"(.+)_(\d{6})_(\d{6})")
_OFFICIAL_NAME = re.compile(rf"([A-Za-z0-9_-]{{{ID_LENGTH}}}_\d{{6}})_\d{{6}}")


@dataclass(frozen=True, slots=True)
class _Clip:
    """One annotated clip; `start` and `end` in whole seconds, None where the file has none."""

    youtube_id: str
    start: int | None
    end: int | None
    label: str
    split: str

    @property
    def name(self) -> str:
        """The official file name without extension."""
        if self.start is None or self.end is None:
            return self.youtube_id
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"


def is_kinetics(path: Path) -> bool:
    """Whether the file is a Kinetics CSV or JSON."""
    if path.suffix.lower() == ".csv":
        return "youtube_id" in header(path)
    if path.suffix.lower() == ".json":
        start = opening(path)
        return start.lstrip().startswith("{") and ('"subset"' in start or '"annotations"' in start)
    return False


def read_kinetics(files: Sequence[Path], folder: VideoFolder) -> Listing:
    """Match the clips of all files with videos by (id, start), or by id where names hold no time.

    Classes are spelled as in the files, never as in folders; spellings that read the
    same (`comparable`) are one class. A JSON file is ignored if a CSV has the same name.
    Rows without a label are left out and noted. Raises UserError for a row that cannot be read
    and when no row has a label.
    """
    tables = {path.stem.lower() for path in files if path.suffix.lower() == ".csv"}
    builder = ListingBuilder()
    clips: list[_Clip] = []
    for path in files:
        if path.suffix.lower() == ".json" and path.stem.lower() in tables:
            continue
        rows = _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path)
        of_file = split_from_file_name(path.stem)
        read = [_clip(path, *row, of_file) for row in rows]
        labelled = [clip for clip in read if clip.label]
        clips.extend(labelled)
        if len(labelled) < len(read):
            builder.note(
                f"{path.name}: {counted(len(read) - len(labelled), 'video has', 'videos have')} no "
                "label there, which leaves them out"
            )
    if not clips:
        names = ", ".join(path.name for path in files)
        raise UserError(f"no row of {names} has a label: name the annotation files of train or val")

    spelling = one_spelling(Counter(clip.label for clip in clips), builder.note)
    index = ClipIndex((_stem(path), path) for path in folder.files)
    replaced, several, example = 0, 0, ""
    for clip in clips:
        copies = index.find(clip.youtube_id, clip.start)
        path_found = min(copies, key=partial(_rank, clip.split), default=None)
        if len(copies) > 1:
            several += 1
            example = example or " and ".join(sorted(copies)[:2])
        replaced += path_found is not None and _is_replacement(path_found)
        builder.add(
            _stem(path_found) if path_found is not None else clip.name,
            source=clip.name + ".mp4",
            class_name=spelling[clip.label],
            split=clip.split,
            path=path_found,
        )
    if replaced:
        builder.note(
            f"{counted(replaced, 'video is', 'videos are')} taken from the folder of replacements"
        )
    if several:
        builder.note(
            f"{counted(several, 'video is', 'videos are')} in the folder more than once; one copy "
            "of each is taken "
            f"(for example of {example})"
        )
    return builder.build(sorted(set(spelling.values())))


# The id, start and end in seconds, label and split of one row; empty where the file has none.
_Row = tuple[str, str, str, str, str]


def _csv_rows(path: Path) -> Iterator[_Row]:
    rows = read_table(path)
    columns = [name.lower() for name in rows[0]]
    for row in rows[1:]:
        cells = defaultdict(str, zip(columns, row, strict=False))
        youtube_id, start, end = cells["youtube_id"], cells["time_start"], cells["time_end"]
        yield youtube_id, start, end, cells["label"], cells["split"]


def _json_rows(path: Path) -> Iterator[_Row]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} is not a Kinetics file: its JSON maps no ids to clips")
    for youtube_id, entry in value.items():
        entry = entry if isinstance(entry, dict) else {}
        annotations = entry.get("annotations")
        annotations = annotations if isinstance(annotations, dict) else {}
        segment, label = annotations.get("segment"), annotations.get("label")
        start, end = segment if isinstance(segment, list) and len(segment) == 2 else ("", "")
        label = label if isinstance(label, str) else ""
        yield youtube_id, str(start), str(end), label, str(entry.get("subset") or "")


def _clip(
    path: Path, youtube_id: str, start: str, end: str, label: str, split: str, of_file: str
) -> _Clip:
    if not youtube_id:
        raise UserError(f"a row of {str(path)!r} has no youtube_id: correct or remove it")
    try:
        first = int(float(start)) if start else None
        last = int(float(end)) if end else None
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{str(path)!r}: the times {start!r}, {end!r} of {youtube_id!r} are not seconds: "
            "correct the row"
        ) from error
    split = split_from_word(split or of_file)
    return _Clip(youtube_id, first, last, label.strip().strip('"'), split)


class ClipIndex:
    """Finds videos by the id and the start in their names.

    `names` are pairs: a name without extension, and the text that `find` returns for the video.
    """

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        self._by_clip: dict[tuple[str, int | None], list[str]] = defaultdict(list)
        self._by_id: dict[str, list[str]] = defaultdict(list)
        for stem, video in names:
            clip = id_and_start(stem)
            self._by_clip[clip].append(video)
            self._by_id[clip[0]].append(video)

    def find(self, youtube_id: str, start: int | None) -> list[str]:
        """Return the videos of this clip, or all with its id where either side has no start."""
        found = self._by_clip.get((youtube_id, start)) or self._by_clip.get((youtube_id, None))
        return found or (self._by_id.get(youtube_id, []) if start is None else [])


def _rank(split: str, path: str) -> tuple[bool, bool, bool, int, str]:
    """Sort key for copies of a video: replacements first, then those in the folder of its split."""
    folders = path.split("/")[:-1]
    elsewhere = first_split(folders) != split
    return not _is_replacement(path), may_be_preview(path), elsewhere, len(folders), path


def _is_replacement(path: str) -> bool:
    return any(part.lower().startswith("replacement") for part in path.split("/")[:-1])


def _stem(path: str) -> str:
    return path_stem(path).rpartition("/")[2]


def official_clip(stem: str) -> str | None:
    """The id and start "ID_SSSSSS" in an official name, the same in every Kinetics; else None."""
    match = _OFFICIAL_NAME.fullmatch(stem)
    return None if match is None else match[1]


def id_and_start(stem: str) -> tuple[str, int | None]:
    """The id and the start in seconds that a file's name holds.

    The first 11 characters are the id, whatever they look like; shorter or longer ids need the
    official six digits of the times.
    """
    match = _ID_AND_TIMES.fullmatch(stem)
    if match is None and len(stem) != ID_LENGTH:
        match = _ANYTHING_AND_TIMES.fullmatch(stem)
    if match is None:
        return stem, None
    return match[1], int(float(match[2]))
