"""Something-Something V2: JSON lists with templates, and the label file that numbers them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featstore.errors import UserError, counted
from pipeline.annotations.listing import Listing, ListingBuilder, split_from_file_name
from pipeline.annotations.text_files import opening, read_json, read_lines
from pipeline.annotations.video_folder import VideoFolder

_LABELS = re.compile(r"(?:.*[-_])?labels\.json", re.IGNORECASE)
_ANSWERS = re.compile(r"(?:.*[-_])?test[-_]answers\.csv", re.IGNORECASE)


def is_ssv2(path: Path) -> bool:
    """Whether the file is one of the official JSON lists, by its content."""
    if path.suffix.lower() != ".json":
        return False
    start = opening(path, 4096).lstrip()
    return start.startswith("[") and '"id"' in start


def read_ssv2(files: Sequence[Path], folder: VideoFolder) -> Listing:
    """List all videos that have a template; classes are in the order of the label file.

    A template's square brackets are stripped to find its label. Test videos have labels only
    where `test-answers.csv` gives them; the other test videos are left out and noted.
    Raises UserError for an unknown template or a file that differs in form from the official ones.
    """
    builder = ListingBuilder()
    # The user may name a single list; the labels and answers beside it belong to it too.
    beside = sorted(files[0].parent.iterdir())
    label_file = next((path for path in beside if _LABELS.fullmatch(path.name)), None)
    answer_file = next((path for path in beside if _ANSWERS.fullmatch(path.name)), None)
    order = _read_labels(label_file) if label_file is not None else None
    known = {_without_brackets(name): name for name in order} if order is not None else None
    answers = _read_answers(answer_file) if answer_file is not None else {}
    unlabelled = 0
    for path in files:
        split = split_from_file_name(path.stem)
        for video, template in _read_videos(path):
            template = template or answers.get(video, "")
            if not template:
                unlabelled += 1
                continue
            class_name = _without_brackets(template)
            if known is not None:
                if class_name not in known:
                    raise UserError(
                        f"{str(path)!r}: the template {template!r} of video {video!r} is not in "
                        f"{str(label_file)!r}: take both files from the same release"
                    )
                class_name = known[class_name]
            candidates = folder.with_stem(video)
            builder.add(
                video,
                source=f"{video}.webm",
                class_name=class_name,
                split=split,
                path=min(candidates, key=lambda p: (p.count("/"), p)) if candidates else None,
            )
    if unlabelled:
        none = counted(unlabelled, "video has", "videos have")
        builder.note(f"left out: {none} no published label (test set)")
    if order is None:
        builder.note(
            "no labels.json beside the lists: classes are sorted by name, not in official order"
        )
    return builder.build(order)


def _without_brackets(template: str) -> str:
    return " ".join(template.replace("[", "").replace("]", "").split())


def _read_labels(path: Path) -> list[str]:
    value = read_json(path)
    try:
        numbered = {int(number): str(name) for name, number in value.items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{str(path)!r} does not map templates to numbers: fetch the official file again"
        ) from error
    if len(numbered) != len(value):
        raise UserError(f"{str(path)!r} gives one number to two templates: fetch it again")
    return [numbered[number] for number in sorted(numbered)]


def _read_videos(path: Path) -> list[tuple[str, str]]:
    value: Any = read_json(path)
    try:
        return [(str(entry["id"]), str(entry.get("template") or "")) for entry in value]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is not a list of videos with an id: fetch the official file again"
        ) from error


def _read_answers(path: Path) -> dict[str, str]:
    answers = {}
    for _, text in read_lines(path):
        video, separator, label = text.partition(";")
        if not separator:
            video, _, label = text.partition(",")
        answers[video.strip()] = label.strip().strip('"')
    return answers
