"""HMDB51: the 51 x 3 files of `testTrainMulti_7030_splits`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from featstore.errors import UserError, quoted
from pipeline.annotations.listing import Listing, ListingBuilder
from pipeline.annotations.text_files import read_lines
from pipeline.annotations.video_folder import VideoFolder, path_stem

_SPLIT_FILE = re.compile(r"(.+)_test_split(\d+)\.txt")
# Flags of the official files; 0 means that the split does not use the video.
_KINDS = {"0": "", "1": "train", "2": "test"}


def is_hmdb51(path: Path) -> bool:
    """Whether the file is one of the official split files, by its name."""
    return _SPLIT_FILE.fullmatch(path.name) is not None


def read_hmdb51(files: Sequence[Path], folder: VideoFolder) -> Listing:
    """List all videos. Splits "train1", "test1", "train2", ... overlap; flag 0 gives no split.

    The split file's name has the class; videos may lie in class folders or in one flat folder.
    Raises UserError for a line that is not `<file> <0|1|2>`.
    """
    builder = ListingBuilder()
    classes: set[str] = set()
    for path in files:
        match = _SPLIT_FILE.fullmatch(path.name)
        if match is None:
            continue
        class_name, number = match[1], match[2]
        classes.add(class_name)
        for line, text in read_lines(path):
            # File names hold spaces and brackets; only the last word is the flag.
            name, _, flag = text.rpartition(" ")
            if flag not in _KINDS or not name.strip():
                raise UserError(
                    f"{str(path)!r} line {line}: {quoted(text)} is not `<file> <0|1|2>`: fetch "
                    "the official split files again"
                )
            name = name.strip()
            builder.add(
                path_stem(name),
                source=name,
                class_name=class_name,
                split=f"{_KINDS[flag]}{number}" if flag != "0" else "",
                path=folder.find_in_class(name, class_name),
            )
    return builder.build(sorted(classes), overlapping_splits=True)
