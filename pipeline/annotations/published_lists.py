"""Finds lists in a clone of a published repository and matches them with packed videos.

Repositories name and order such files in their own ways (X-CLIP, ViFi-CLIP and MSTA write
`file.avi 0` without class folders, others `class/file.mp4 0`). A list is found by the words of
its path and a video by its name; the class of a video is always that of the data set.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import UserError
from featstore.spelling import comparable, same_letters
from pipeline.annotations.class_names import LabelMap, comparable_words
from pipeline.annotations.formats.kinetics import ClipIndex, id_and_start
from pipeline.annotations.formats.path_label_lists import LIST_SUFFIXES, read_list
from pipeline.annotations.known_sets import KNOWN_DATASETS
from pipeline.annotations.label_names import agreed_changes, is_name_file, read_names
from pipeline.annotations.listing import name_from_key, split_from_folder
from pipeline.annotations.text_files import is_number, read_lines
from pipeline.annotations.video_folder import normal_path, path_stem

log = logging.getLogger(__name__)

_SHOWN = 5
_BASE_OR_NOVEL = re.compile(r"(?<![a-z])(?:base|novel|b2n)")


@dataclass(frozen=True)
class PublishedList:
    """A list matched with a data set: the keys found and their labels, in the list's order.

    The labels are those of the list. Listed videos that were not packed are left out, and so are
    repeated entries.
    """

    path: Path
    keys: tuple[str, ...]
    labels: tuple[str, ...]


class KeyIndex:
    """Finds the keys of a data set by the names that lists use.

    Entries are compared by the file's name without extension, in any case of letters (UCF101's
    HandstandPushups has files named HandStandPushups), then by its `comparable` form. Kinetics
    names are compared by id and start, or by id alone where one side has no start. Folders decide
    only between files of one name.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = set(keys)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_form: dict[str, list[str]] = defaultdict(list)
        stems = [(posixpath.basename(name_from_key(key)), key) for key in sorted(self._keys)]
        self._by_clip = ClipIndex(stems)
        for stem, key in stems:
            self._by_stem[same_letters(stem)].append(key)
            self._by_form[comparable(stem)].append(key)

    def find_listed(self, listed: str) -> tuple[str | None, str]:
        """Return the key that a list's entry means, or (None, the reason why there is none)."""
        if listed in self._keys:
            return listed, ""
        whole = normal_path(listed, Path())
        path = path_stem(whole)
        stem = posixpath.basename(path)
        found = self._by_stem.get(same_letters(stem), [])
        # The keys of earlier versions have extensions that count as such only now.
        found = found or self._by_stem.get(same_letters(posixpath.basename(whole)), [])
        found = found or self._by_clip.find(*id_and_start(stem))
        found = found or self._by_form.get(comparable(stem), [])
        if len(found) > 1:
            found = _in_folder(found, path) or found
        if len(found) == 1:
            return found[0], ""
        if found:
            return None, f"several videos have this name: {found[0]} and {found[1]}"
        return None, "no such video in the data set"


class ListRepository:
    """The lists of one data set under a folder. Raises UserError if folder or lists are missing."""

    def __init__(self, folder: Path, dataset: str) -> None:
        if not folder.is_dir():
            raise UserError(f"{str(folder)!r} is not a folder: name a clone of the lists")
        self.folder = folder
        self.dataset = dataset
        files = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and path.suffix.lower() in LIST_SUFFIXES | {".json"}
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
        named = {path: _datasets_of(self._place(path)) for path in files}
        own = [path for path in files if dataset in named[path]]
        self._files = own or [path for path in files if not named[path]]
        self._lists = [path for path in self._files if not is_name_file(path)]
        if not self._lists:
            raise UserError(
                f"{str(folder)!r} holds no lists of {dataset}: name the folder of its lists"
            )

    def shots(self, shots: int) -> Path:
        """The training list of a few-shot protocol with `shots` videos per class."""
        number = re.compile(
            rf"shots?[-_ ]?0*{shots}(?!\d)|(?<!\d)0*{shots}[-_ ]?shots?"
            rf"|(?<![a-z0-9])k[-_=]?{shots}(?!\d)"
        )
        return self._only(
            f"the {shots} shots of {self.dataset}",
            lambda place: bool(number.search(place)) and not _BASE_OR_NOVEL.search(place),
        )

    def seed(self, seed: int) -> Path:
        """The training list of base classes for one seed of a base-to-novel protocol."""
        number = re.compile(rf"(?<![a-z0-9])(?:s|seed)[-_]?0*{seed}(?![0-9a-z])")
        return self._only(
            f"the base classes of {self.dataset}, seed {seed}",
            lambda place: (
                bool(number.search(place))
                and not re.search(r"novel|val|test", place.rpartition("/")[2])
            ),
        )

    def names(self, half: str = "") -> Path | None:
        """The file of class names (`id,name`) for "base", "novel" or all classes, if it is clear.

        None if no file or several files fit.
        """
        files = [path for path in self._files if is_name_file(path)]
        found = [path for path in files if _half_of(path.stem) == half]
        if len(found) > 1:
            found = [path for path in found if "label" in self._place(path)] or found
        return found[0] if len(found) == 1 else None

    def _only(self, what: str, fits: Callable[[str], bool]) -> Path:
        found = [path for path in self._lists if fits(self._place(path))]
        training = [path for path in found if "train" in path.stem.lower()] or found
        if len(training) != 1:
            shown = ", ".join(self._place(path) for path in (training or self._lists)[:_SHOWN])
            problem = f"{len(training)} lists" if training else "no list"
            raise UserError(
                f"{str(self.folder)!r} has {problem} for {what} "
                f"({'found' if training else 'it holds'} {shown}): name the folder of that one "
                "list, called for example train_few_shot_2.txt or train_base_s1.txt"
            )
        return training[0]

    def _place(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix().lower()


def read_published_list(path: Path, index: KeyIndex) -> PublishedList:
    """Return the packed videos of a list. Raises UserError when it holds none of them.

    A warning counts and names videos that are not packed. A video with two labels is an error.
    """
    return _matched(
        path, [((row.path,), row.label) for row in read_list(path, index.find_listed)], index
    )


def read_keys(path: Path, index: KeyIndex) -> PublishedList:
    """Read a list of keys, file names or YouTube ids, one per line; text after them is ignored."""
    if not path.is_file():
        raise UserError(f"list {str(path)!r} does not exist: name a file")
    lines = [text for _, text in read_lines(path)]
    names = [(t, re.split(r"[,\t]", t)[0].strip(), t.rsplit(None, 1)[0]) for t in lines]
    return _matched(path, [(several, "") for several in names], index)


def _matched(
    path: Path, rows: Sequence[tuple[Sequence[str], str]], index: KeyIndex
) -> PublishedList:
    """Match rows with packed videos; a row has possible names (the first as written), a label."""
    labels: dict[str, str] = {}
    missing: dict[str, str] = {}
    for names, label in rows:
        found = [index.find_listed(name) for name in dict.fromkeys(names) if name]
        key = next((key for key, _ in found if key is not None), None)
        if key is None:
            missing.setdefault(names[0], found[0][1])
        elif labels.setdefault(key, label) != label:
            raise UserError(
                f"{str(path)!r} gives video {names[0]!r} the labels {labels[key]!r} and "
                f"{label!r}: a video has one class; correct the list"
            )
    _tell_missing(path, missing, len(labels))
    return PublishedList(path, tuple(labels), tuple(labels.values()))


def _tell_missing(path: Path, missing: Mapping[str, str], found: int) -> None:
    listed = found + len(missing)
    names = ", ".join(repr(name) for name in list(missing)[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    if not found:
        reason = next(iter(missing.values()), "it is empty")
        raise UserError(
            f"none of the {listed} videos of {str(path)!r} is in the data set ({names}{more}: "
            f"{reason}): name a list of its videos"
        )
    if missing:
        log.warning(
            "%d of %d videos of %s are not in the data set and are left out: %s%s",
            *(len(missing), listed, path.name, names, more),
        )


def label_exchange(
    lists: Sequence[PublishedList],
    names_file: Path | None,
    label_of: Mapping[str, int],
    class_names: Sequence[str],
    label_map: LabelMap,
) -> tuple[dict[int, int], str]:
    """Find classes that the lists' file of names calls by the name of another class.

    `names_file` (`id,name`) numbers the labels of the `lists`; `label_of` is the data set's label
    by key; `class_names` are its names by label. Returns {label: the other class's label} and
    what was done, `label_map` or "". With "corrected" the exchange is only logged, because the
    data set's own names are used. Raises UserError when a name of the file is no class of the data
    set, when a label has no name, and when "as-published" names are not an exchange of classes.
    """
    if names_file is None:
        if label_map == "as-published":
            raise UserError(
                f"no file of class names (id,name) beside {str(lists[0].path)!r}: "
                "--label-map as-published needs one"
            )
        return {}, ""
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    known = {comparable_words(name): label for label, name in enumerate(class_names)}
    names = read_names(names_file)
    for listed in lists:
        for key, text in zip(listed.keys, listed.labels, strict=True):
            name = names.get(int(text)) if is_number(text) else text
            if name is None or comparable_words(name) not in known:
                what = f"label {text} has no name" if name is None else f"{name!r} is no class"
                raise UserError(
                    f"{str(names_file)!r} does not fit {str(listed.path)!r} and the data set: "
                    f"{what}; name the lists of this data set"
                )
            votes[label_of[key]][known[comparable_words(name)]] += 1
    exchange = agreed_changes(votes)
    if not exchange:
        if label_map == "as-published":
            log.warning("--label-map as-published changes nothing: the lists' names are right")
        return {}, ""
    videos = sum(votes[label].total() for label in exchange)
    total = sum(counter.total() for counter in votes.values())
    names_of = ", ".join(repr(class_names[label]) for label in sorted(exchange))
    log.warning(
        "the lists' file of class names exchanges %s, which concerns %d of their %d videos: %s",
        *(names_of, videos, total),
        "the data set's own names are used"
        if label_map == "corrected"
        else "kept as published, so these classes carry a wrong name",
    )
    if label_map == "corrected":
        return {}, "corrected"
    if set(exchange) != set(exchange.values()):
        raise UserError(
            f"the lists call {names_of} by names that do not exchange these classes with each "
            "other: --label-map as-published cannot be applied, leave it out"
        )
    return exchange, "as-published"


def _datasets_of(place: str) -> set[str]:
    """The data sets that a path names; "kinetics" does not count beside "kinetics600"."""
    found = {
        (word, name)
        for name, known in KNOWN_DATASETS.items()
        for word in (*known.called, *known.paths)
        if word in place
    }
    return {name for word, name in found if not any(word in other != word for other, _ in found)}


def _in_folder(keys: list[str], path: str) -> list[str]:
    """Return the keys whose folders agree with those of `path`, as far as both have folders."""
    wanted = [comparable(part) for part in path.split("/")[:-1] if part]
    if not wanted:
        return []

    def agrees(key: str) -> bool:
        folders = [comparable(part) for part in name_from_key(key).split("/")[:-1]]
        if folders and wanted and split_from_folder(wanted[-1]):
            return split_from_folder(folders[0]) == split_from_folder(wanted[-1])
        return folders[-len(wanted) :] == wanted[-len(folders) :] if folders else False

    return [key for key in keys if agrees(key)]


def _half_of(stem: str) -> str:
    return next((half for half in ("base", "novel") if half in stem.lower()), "")
