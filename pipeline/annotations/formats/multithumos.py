"""MultiTHUMOS, and THUMOS14 in the same form: a file a class, with a line for every time it shows.

A line is `video_validation_0000266 72.80 76.40`. The videos called validation are those that models
are trained on: THUMOS14's training videos are trimmed clips of UCF101.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from featstore.errors import UserError, quoted
from pipeline.annotations.formats.multi_label import note_reversed
from pipeline.annotations.listing import ClassSpan, Listing, ListingBuilder
from pipeline.annotations.text_files import list_files, opening, read_lines
from pipeline.annotations.video_folder import VideoFolder

_LINE = re.compile(r"(video_(validation|test)_\d{7})\s+(\d+(?:\.\d+)?)\s+(\d+(?:\.\d+)?)")
_SPLITS = {"validation": "train", "test": "test"}
_OF_SPLIT = re.compile(r"_(?:val|test)$")  # THUMOS14 has BaseballPitch_val.txt
_AMBIGUOUS = "Ambiguous"  # THUMOS14's file of times that nobody could decide on


def is_multithumos(path: Path) -> bool:
    """Whether the file lists the times of a class."""
    first = opening(path, 200).lstrip().partition("\n")[0]
    return path.suffix.lower() == ".txt" and _LINE.fullmatch(first.strip()) is not None


def read_multithumos(files: Sequence[Path], folder: VideoFolder) -> Listing:
    """List all videos with the times of their classes; "validation" videos are split train.

    Classes are in the order of class_list.txt if that lies there, else of their names. Raises
    UserError for a line that is no video with two times.
    """
    builder = ListingBuilder(multi_label=True)
    spans: dict[str, list[ClassSpan]] = defaultdict(list)
    classes: set[str] = set()
    reversed_spans = []
    for path in files:
        name = _OF_SPLIT.sub("", path.stem)
        if name == _AMBIGUOUS:
            builder.note(f"{path.name}: its times belong to no class and are left out")
            continue
        classes.add(name)
        for line, text in read_lines(path):
            match = _LINE.fullmatch(text)
            if match is None:
                raise UserError(
                    f"{str(path)!r} line {line}: {quoted(text)} is not `video_test_0000004 1.2 "
                    "3.4`: fetch the official file again"
                )
            start, end = float(match[3]), float(match[4])
            if end < start:
                reversed_spans.append(match[1])
            spans[match[1]].append(ClassSpan(name) if end < start else ClassSpan(name, start, end))
    note_reversed(builder.note, reversed_spans)
    for video in sorted(spans):
        kind = video.split("_")[1]
        found, reason = folder.find_listed(video, _SPLITS[kind])
        if found is None:  # the folder of the videos may be called validation
            found, reason = folder.find_listed(video)
        builder.add(
            video,
            source=video,
            class_name="",
            split=_SPLITS[kind],
            path=found,
            reason=reason,
            spans=spans[video],
        )
    builder.note("the videos called validation are the training videos of this set: split train")
    return builder.build(_listed_order(files, classes))


def _listed_order(files: Sequence[Path], classes: set[str]) -> list[str]:
    """Return the classes as class_list.txt orders them, if it has just these, else by name."""
    for folder in (files[0].parent, files[0].parent.parent):
        for path in list_files(folder):
            if path.name.lower() == "class_list.txt":
                order = [text.split()[-1] for _, text in read_lines(path)]
                if set(order) == classes and len(order) == len(classes):
                    return order
    return sorted(classes)
