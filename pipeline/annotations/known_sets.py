"""Knows data sets by name, and chooses the reader for a folder or an annotation file."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from featstore.errors import UserError, counted, counted_of
from featstore.remote.urls import is_url
from pipeline.annotations.class_names import USUAL_NAMING, Naming
from pipeline.annotations.formats.charades import is_charades, read_charades
from pipeline.annotations.formats.class_folders import (
    has_class_folders,
    read_class_folders,
    read_unlabelled,
)
from pipeline.annotations.formats.hmdb51 import is_hmdb51, read_hmdb51
from pipeline.annotations.formats.kinetics import is_kinetics, read_kinetics
from pipeline.annotations.formats.multi_label import check_cells, read_multi_label
from pipeline.annotations.formats.multithumos import is_multithumos, read_multithumos
from pipeline.annotations.formats.path_label_lists import LIST_SUFFIXES, read_lists
from pipeline.annotations.formats.ssv2 import is_ssv2, read_ssv2
from pipeline.annotations.formats.ucf101 import is_ucf101, read_ucf101
from pipeline.annotations.label_names import is_name_file
from pipeline.annotations.listing import Listing
from pipeline.annotations.tables import TABLES
from pipeline.annotations.text_files import list_files
from pipeline.annotations.video_folder import VideoFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Format:
    """An official annotation format: how to recognise and read its files, and where they lie."""

    recognises: Callable[[Path], bool]
    read: Callable[[Sequence[Path], VideoFolder], Listing]
    title: str
    folders: list[str]


_READERS = {
    "hmdb51": (is_hmdb51, read_hmdb51),
    "ucf101": (is_ucf101, read_ucf101),
    "kinetics": (is_kinetics, read_kinetics),
    "ssv2": (is_ssv2, read_ssv2),
    "charades": (is_charades, read_charades),
    "multithumos": (is_multithumos, read_multithumos),
}
_FORMATS = {name: _Format(*_READERS[name], **table) for name, table in TABLES["formats"].items()}


@dataclass(frozen=True, slots=True)
class KnownDataset:
    """A data set with official annotations, as `tables.toml` describes it."""

    title: str
    classes: int
    files: str
    format: str
    called: list[str]
    paths: list[str] = field(default_factory=list)


KNOWN_DATASETS: Final = {name: KnownDataset(**table) for name, table in TABLES["sets"].items()}


def known_dataset(name: str) -> str:
    """The usual short name of a data set: "HMDB" -> "hmdb51"; unknown names come back as given."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((known for known, facts in KNOWN_DATASETS.items() if plain in facts.called), name)


def read_listing(
    name: str,
    videos_dir: Path | None,
    annotations: Path | None = None,
    class_names_file: Path | None = None,
    *,
    leave_out: Path | None = None,
    naming: Naming = USUAL_NAMING,
    unlabelled: bool = False,
    kept: Collection[str] = (),
    multi_label: str = "",
) -> Listing:
    """Return the listing of a data set, read from annotations or from class folders.

    The annotation files themselves show their format, so any name can have any format. For a
    known name without `annotations`, the official files are searched in and beside the videos
    folder; where there are none, class folders are used as they are and a note says so.
    Without `videos_dir` the list in `annotations` names URLs, or paths from its own folder.
    `leave_out` is a folder inside `videos_dir` that does not belong to it. The notes, the first
    rows and the share of files found are logged. `naming` says what to do with a file of class
    names that contradicts the videos. With `unlabelled`, folders and lists give no classes. `kept`
    are the raw class names that the data set has already, which keep their spelling. `multi_label`
    says that videos of a list may show several classes, and how they are listed
    (`formats.multi_label.CELLS`).
    Raises UserError when there is nothing to read and when the input contradicts itself.
    """
    known = KNOWN_DATASETS.get(name.lower())
    if annotations is None and videos_dir is None:
        raise UserError("no videos: give --videos DIR, --annotations LIST or --tars")
    if multi_label:
        check_cells(multi_label)
        if annotations is None or unlabelled:
            raise UserError(
                "--multi-label says how a list names the classes of a video: give the list with "
                "--annotations, and no --unlabelled"
            )
    scan = videos_dir is not None
    videos_dir = videos_folder(videos_dir, annotations)
    folder = VideoFolder(videos_dir, leave_out=leave_out, scan=scan)
    if class_names_file is not None and not class_names_file.is_file():
        raise UserError(f"file of class names {str(class_names_file)!r} does not exist")
    official = _FORMATS[known.format] if known else None
    found = _official_files(official, videos_dir) if official and annotations is None else []
    if annotations is not None:
        listing = _read_annotations(
            *(annotations, folder, class_names_file, naming, unlabelled),
            kept=kept,
            multi_label=multi_label,
        )
    elif unlabelled:
        _refuse_class_names(class_names_file, "a data set without labels")
        listing = read_unlabelled(folder)
    elif known and official and found:
        _refuse_class_names(class_names_file, known.title)
        logger.info("annotations found in %s", found[0].parent)
        listing = _without_absent_splits(official.read(found, folder))
    elif known and not has_class_folders(folder):
        raise UserError(
            f"no {known.title} annotations in or beside {str(videos_dir)!r}, and no class "
            f"folders: name {known.files} with --annotations"
        )
    else:
        _refuse_class_names(class_names_file, "a folder of class folders")
        listing = read_class_folders(folder, kept)
        if known:
            listing.notes.append(
                f"no {known.title} annotations in or beside {str(videos_dir)!r}: its class folders "
                f"are packed as they are; name {known.files} with --annotations for the official "
                "splits"
            )
    if naming.label_map == "as-published" and not listing.label_map:
        listing.notes.append(
            "--label-map as-published changes nothing here: no file of class names contradicts "
            "the videos"
        )
    if not listing.records:
        example = listing.missing[0]
        raise UserError(
            f"none of the {len(listing.missing)} listed videos can be packed from "
            f"{str(videos_dir)!r} ({example.source!r}: {example.reason}): check --videos and "
            "--annotations"
        )
    _add_notes(listing, folder, known, annotated=annotations is not None or bool(found))
    listing = replace(listing, left_out=folder.left_out)
    _log(listing)
    return listing


def videos_folder(videos_dir: Path | None, annotations: Path | None) -> Path:
    """Return the folder that listed paths begin from: the list's own if there is no other."""
    if videos_dir is not None or annotations is None:
        return videos_dir or Path()
    return annotations if annotations.is_dir() else annotations.parent


def _read_annotations(
    path: Path,
    folder: VideoFolder,
    class_names_file: Path | None,
    naming: Naming,
    unlabelled: bool,
    kept: Collection[str],
    multi_label: str,
) -> Listing:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = list_files(path)
        # An unpacked archive may keep its files one or two folders further down.
        deeper = (below for below in sorted(path.rglob("*")) if below.is_dir())
        while not _recognised(files) and (below := next(deeper, None)) is not None:
            files = list_files(below)
        if not _recognised(files):
            raise UserError(
                f"no annotation files of a known format in {str(path)!r}: it needs CSV, TSV, text "
                "or JSON files"
            )
    else:
        raise UserError(f"annotations {str(path)!r} do not exist: name a file or a folder")
    for official in () if unlabelled else _FORMATS.values():
        own = [file for file in files if official.recognises(file)]
        if own:
            _refuse_class_names(class_names_file, official.title)
            if multi_label:
                raise UserError(
                    f"--multi-label is for a list of your own: {str(own[0])!r} has the format of "
                    f"{official.title}, so leave the option out"
                )
            return official.read(own, folder)
    if path.is_dir():
        files = [file for file in files if _may_be_list(file)]
    if multi_label:
        return read_multi_label(files, folder, multi_label, class_names_file, naming.label_map)
    return read_lists(
        *(files, folder, class_names_file, naming.label_map), unlabelled=unlabelled, kept=kept
    )


def _refuse_class_names(class_names_file: Path | None, where: str) -> None:
    if class_names_file is not None:
        raise UserError(
            f"class names {str(class_names_file)!r} are only for a list of integer labels, and "
            f"{where} brings its own: leave the option out"
        )


def _may_be_list(path: Path) -> bool:
    prose = path.stem.lower().startswith(("readme", "license", "changelog"))
    return (path.suffix.lower() in LIST_SUFFIXES and not prose) or is_name_file(path)


def _recognised(files: Sequence[Path]) -> bool:
    known = (_may_be_list, *(official.recognises for official in _FORMATS.values()))
    return any(recognises(file) for file in files for recognises in known)


def _official_files(official: _Format, videos_dir: Path) -> list[Path]:
    """Find official annotation files in the usual places in, beside and above the videos folder."""
    here = videos_dir.absolute()
    for base in dict.fromkeys((here, here.parent, here.parent.parent)):
        for folder in (*(base / name for name in official.folders), base):
            files = list_files(folder) if folder.is_dir() else []
            if own := [path for path in files if official.recognises(path)]:
                return own
    return []


def _without_absent_splits(listing: Listing) -> Listing:
    """Leave out splits that have no video file; only for lists that were not given as an option.

    Official annotations cover all splits; a user may have only the validation videos.
    """
    if listing.overlapping_splits or not listing.records:
        return listing
    present = {split for record in listing.records for split in record.splits}
    absent = [split for split in listing.split_names if split not in present]
    if not absent:
        return listing
    missing = [
        video for video in listing.missing if not video.splits or present & set(video.splits)
    ]
    note = (
        f"split {' and '.join(absent)}: none of its {len(listing.missing) - len(missing)} videos "
        "is in the folder, so it is left out; name its file with --annotations to count them"
    )
    return replace(
        listing,
        missing=missing,
        split_names=[split for split in listing.split_names if split in present],
        notes=[*listing.notes, note],
    )


def _add_notes(
    listing: Listing, folder: VideoFolder, known: KnownDataset | None, *, annotated: bool
) -> None:
    videos = (*listing.records, *listing.missing)
    used = {video.class_name for video in videos}
    used |= {span.class_name for video in videos for span in video.spans}
    empty = [name for name in listing.class_names if name not in used]
    if empty:
        names = ", ".join(repr(name) for name in empty[:5]) + (", ..." if len(empty) > 5 else "")
        none = counted(
            len(empty), "class has no videos and stays", "classes have no videos and stay"
        )
        listing.notes.append(f"{none} in the list: {names}")
    unlisted = len(folder.files) - sum(not is_url(video.path) for video in listing.records)
    if annotated and unlisted > 0:
        folder.left_out.unlisted = unlisted
        here = "in the folder"
        files = counted(unlisted, f"video file {here} is", f"video files {here} are")
        listing.notes.append(f"{files} not listed and not used")
    if known and len(listing.class_names) != known.classes:
        listing.notes.append(
            f"{counted(len(listing.class_names), 'class is', 'classes are')} listed; the whole of "
            f"{known.title} has "
            f"{known.classes}"
        )


def _log(listing: Listing) -> None:
    for record in listing.records[:3]:
        logger.info(
            "read: %s -> class %r, splits %s",
            record.path,
            record.class_name or "; ".join(dict.fromkeys(s.class_name for s in record.spans)),
            ", ".join(record.splits) or "none",
        )
    logger.info(
        "%s found (%.1f %%), %s, splits: %s",
        counted_of(len(listing.records), listing.videos, "listed video", "was", "were"),
        100 * len(listing.records) / listing.videos,
        counted(len(listing.class_names), "class", "classes"),
        ", ".join(listing.split_names) or "none",
    )
    for note in listing.notes:
        logger.warning("%s", note)
