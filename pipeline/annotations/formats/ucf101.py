"""UCF101: `classInd.txt` (1-based) and the train and test lists of the action recognition task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from featstore.errors import UserError, quoted
from pipeline.annotations.listing import Listing, ListingBuilder
from pipeline.annotations.text_files import is_number, read_lines
from pipeline.annotations.video_folder import VideoFolder, path_stem

CLASS_FILE = "classind.txt"
_LIST_FILE = re.compile(r"(train|test)list0*(\d+)\.txt", re.IGNORECASE)


def is_ucf101(path: Path) -> bool:
    """Whether the file is one of the official lists, by its name."""
    return path.name.lower() == CLASS_FILE or _LIST_FILE.fullmatch(path.name) is not None


def read_ucf101(files: Sequence[Path], folder: VideoFolder) -> Listing:
    """List all videos. The splits "train1", "test1", "train2", ... overlap.

    The class is the folder in the list; classes are in the order of classInd.txt. The case of
    letters does not matter: the class HandstandPushups has files named v_HandStandPushups.
    Raises UserError for a class that classInd.txt lacks or to which it gives another number.
    """
    builder = ListingBuilder()
    lists = [path for path in files if _LIST_FILE.fullmatch(path.name)]
    if not lists:
        raise UserError(
            f"{str(files[0].parent)!r} has no trainlist01.txt or testlist01.txt: name the folder "
            "ucfTrainTestlist with --annotations"
        )
    places = (*files, *lists[0].parent.iterdir())
    class_file = next((path for path in places if path.name.lower() == CLASS_FILE), None)
    numbered = _read_class_file(class_file) if class_file is not None else {}
    official = {name.lower(): (number, name) for number, name in numbered.items()}
    # The first spelling of a file's name counts, so that its key does not depend on the case.
    names: dict[str, str] = {}
    for path in lists:
        match = _LIST_FILE.fullmatch(path.name)
        assert match is not None
        split = match[1].lower() + match[2]
        for line, text in read_lines(path):
            listed, number = _listed_and_number(text)
            class_name, _, name = listed.rpartition("/")
            class_name = class_name.rpartition("/")[2]
            where = f"{str(path)!r} line {line}"
            if not class_name:
                raise UserError(
                    f"{where}: {quoted(text)} is not `Class/file.avi`: correct the line"
                )
            if official:
                if class_name.lower() not in official:
                    raise UserError(
                        f"{where}: class {class_name!r} is not in classInd.txt: correct one of them"
                    )
                expected, class_name = official[class_name.lower()]
                if number is not None and number != expected:
                    raise UserError(
                        f"{where}: class {class_name!r} has number {number}, but in classInd.txt "
                        f"{expected}: correct one of them"
                    )
            found = folder.find_in_class(name, class_name)
            stem = path_stem(found or name).rpartition("/")[2]
            builder.add(
                names.setdefault(stem.lower(), stem),
                source=listed,
                class_name=class_name,
                split=split,
                path=found,
            )
    order = [numbered[number] for number in sorted(numbered)] or None
    return builder.build(order, overlapping_splits=True)


def _listed_and_number(text: str) -> tuple[str, int | None]:
    listed, _, number = text.rpartition(" ")
    if listed and is_number(number):
        return listed.strip(), int(number)
    return text, None


def _read_class_file(path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for line, text in read_lines(path):
        number, _, name = text.partition(" ")
        if not is_number(number) or not name.strip() or int(number) in names:
            raise UserError(
                f"{str(path)!r} line {line}: {quoted(text)} is not `<number> <Class>` with a new "
                "number: fetch the official file again"
            )
        names[int(number)] = name.strip()
    return names
