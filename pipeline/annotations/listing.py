"""Records of listed videos, their keys, and how several mentions of a video become one record."""

from __future__ import annotations

import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from featstore.errors import UserError, counted
from pipeline.annotations.left_out import LeftOut
from pipeline.annotations.tables import TABLES

MAX_NAME_LENGTH = 200
MAX_SPLITS = 32  # a row of the store holds its splits as the bits of one uint32

_SPLIT_WORDS: dict[str, str] = {
    word: split for split, words in TABLES["splits"].items() for word in words
}
_SPLIT_ORDER = ("train", "val", "test")
_WORDS = "|".join(sorted(_SPLIT_WORDS, key=len, reverse=True))
# "train", "videos_val" (mmaction2), "train_256" and "val_320p" (compressed copies)
_SPLIT_FOLDER = re.compile(rf"(?:videos?[_-])?({_WORDS})(?:[_-]\d+(?:p|px)?)?")
_SPLIT_IN_FILE_NAME = re.compile(rf"(?<![a-z])({_WORDS})(?:list)?(?![a-z])")
_NUMBER_IN_FILE_NAME = re.compile(
    rf"(?:split|{_WORDS})(?:list)?[_-]?0*(\d{{1,2}})(?![0-9a-z])",
)


class ClassSpan(NamedTuple):
    """A class that a video shows, from `start` to `end` in seconds; None: the list has no times."""

    class_name: str
    start: float | None = None
    end: float | None = None


@dataclass(slots=True)
class VideoRecord:
    """One listed video.

    `path` is relative to the videos folder, with slashes, and empty where there is no file;
    `source` is the name as it was listed; `class_name` is the raw name, "" without a class;
    `splits` are those the video belongs to (none, one or several). `reason` says why it cannot be
    packed: no such file, or a name that is refused. `spans` are the classes of a video that may
    show several, by their raw names; it then has no `class_name`.
    """

    key: str
    path: str
    source: str
    class_name: str
    splits: tuple[str, ...]
    reason: str = ""
    spans: tuple[ClassSpan, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The videos, classes and splits that annotations and a videos folder give together.

    `records` are the videos that can be packed, `missing` those that cannot, both sorted by key.
    `class_names` are raw names in label order, none for videos without labels; `split_names` in
    their usual order. With
    `overlapping_splits` the format's splits share videos by design (HMDB51, UCF101). `notes` are
    sentences the user should read. `label_map` says what was done if the file of class names
    exchanges names of classes: "corrected" or "as-published", or "" if it does not. With
    `multi_label` a video may show several classes: its `spans`. `left_out` is what was passed over
    before anything was listed.
    """

    records: list[VideoRecord]
    class_names: list[str]
    split_names: list[str]
    missing: list[VideoRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overlapping_splits: bool = False
    label_map: str = ""
    left_out: LeftOut = field(default_factory=LeftOut)
    multi_label: bool = False

    @property
    def videos(self) -> int:
        """How many videos are listed, found or not."""
        return len(self.records) + len(self.missing)


def key_from_name(name: str) -> str:
    """A key safe in tars and file systems, without dots or slashes; `name_from_key` undoes it.

    WebDataset splits names at the first dot, so dots are percent-encoded like the rest.
    """
    quoted = urllib.parse.quote(name.encode("utf-8", "surrogateescape"), safe="")
    return quoted.replace(".", "%2E")


def name_from_key(key: str) -> str:
    """Return the name that `key_from_name` turned into `key`."""
    return urllib.parse.unquote_to_bytes(key).decode("utf-8", "surrogateescape")


def split_from_word(word: str) -> str:
    """The split that a word of a table stands for: "validate" -> "val"; other words stay."""
    plain = word.strip().lower()
    return _SPLIT_WORDS.get(plain, plain)


def split_from_folder(folder: str) -> str | None:
    """The split that a folder's name stands for ("validation", "videos_train", "val_256")."""
    match = _SPLIT_FOLDER.fullmatch(folder.lower())
    return _SPLIT_WORDS[match[1]] if match else None


def split_from_file_name(stem: str) -> str:
    """The split in an annotation file's name: "hmdb51_test_split_2" -> "test2"; "" for none."""
    kind = _SPLIT_IN_FILE_NAME.search(stem.lower())
    if kind is None:
        return ""
    number = _NUMBER_IN_FILE_NAME.search(stem.lower())
    return _SPLIT_WORDS[kind[1]] + (number[1] if number else "")


def ordered_splits(names: Iterable[str]) -> list[str]:
    """Split names in reading order: train, val, test; then train1, test1, train2, ...; then others.

    Raises UserError when there are more splits than a row of the store can hold.
    """

    def place(name: str) -> tuple[int, int, str]:
        match = re.fullmatch(r"(train|val|test)(\d{0,9})", name)
        if match is None:
            return (1_000_000, 0, name)
        return (int(match[2] or 0), _SPLIT_ORDER.index(match[1]), name)

    ordered = sorted(set(names), key=place)
    if len(ordered) > MAX_SPLITS:
        raise UserError(
            f"{len(ordered)} splits are listed: at most {MAX_SPLITS} fit in one dataset; "
            "pack with fewer annotation files"
        )
    return ordered


class ListingBuilder:
    """Collects mentions of videos; a second mention of a file adds its splits to the first.

    Files that have a name in common but for the extension, such as `test.avi` and `test.mp4`, are
    different videos: each gets a key from its whole path, extension included. With `multi_label`
    a second mention adds its classes, too.
    """

    def __init__(self, multi_label: bool = False) -> None:
        self._multi_label = multi_label
        self._by_key: dict[str, VideoRecord] = {}
        self._of_same_key: dict[str, list[VideoRecord]] = {}  # all but the first of a key
        self._key_of_path: dict[str, str] = {}
        self._two_classes: list[str] = []
        self._repeated = 0
        self._notes: list[str] = []
        self.label_map = ""
        """See `Listing.label_map`."""

    def note(self, sentence: str) -> None:
        """Keep a sentence that the user should read."""
        self._notes.append(sentence)

    def add(
        self,
        name: str,
        *,
        source: str,
        class_name: str,
        split: str = "",
        path: str | None,
        reason: str = "no such file in the videos folder",
        spans: Sequence[ClassSpan] = (),
    ) -> None:
        """Add one mention of a video. `name` becomes its key unless `build` finds another file
        with this key; if `path` is None, `reason` says why.
        """
        key, source, splits = key_from_name(name), printable(source), (split,) if split else ()
        if path is not None:
            key = self._key_of_path.setdefault(path, key)
        first = self._by_key.get(key)
        if first is not None and path is not None:
            same = (first, *self._of_same_key.get(key, ()))
            first = next((video for video in same if _may_be(video, path, source)), None)
        if first is None:
            refusal = refused_name(name) or refused_name(path or "", limit=None)
            problem = refusal or ("" if path is not None else reason)
            video = VideoRecord(
                *(key, path or "", source, class_name, splits, problem),
                tuple(dict.fromkeys(spans)),
            )
            if self._by_key.setdefault(key, video) is not video:
                self._of_same_key.setdefault(key, []).append(video)
            return
        if not first.path and path is not None:
            first.path, first.reason = path, refused_name(name)
        if first.class_name != class_name:
            self._two_classes.append(
                f"{source!r} is listed with two classes, {first.class_name!r} and "
                f"{class_name!r} (first as {first.source!r})"
            )
        self._repeated += not self._multi_label
        first.spans = tuple(dict.fromkeys((*first.spans, *spans)))
        first.splits = tuple(dict.fromkeys((*first.splits, *splits)))

    def build(
        self, class_names: Sequence[str] | None = None, *, overlapping_splits: bool = False
    ) -> Listing:
        """Return the listing, sorted by key. Without `class_names`, classes are sorted by name.

        Raises UserError, which names them, for videos with two classes.
        """
        if self._two_classes:
            raise UserError(
                f"{first_of(self._two_classes)}: a video has one class; correct the annotations or "
                "move one file away; if videos may show several, pack the list with --multi-label "
                "rows"
            )
        if self._repeated:
            self._notes.append(
                f"{self._repeated} repeated mentions of a video were merged with the first"
            )
        videos = sorted(self._with_own_keys(), key=lambda video: video.key)
        split_names = ordered_splits(split for video in videos for split in video.splits)
        place = {name: index for index, name in enumerate(split_names)}
        for video in videos:
            video.splits = tuple(sorted(video.splits, key=place.__getitem__))
        used = {video.class_name for video in videos} - {""}
        used |= {span.class_name for video in videos for span in video.spans}
        if self._multi_label:
            bare = sum(not video.spans for video in videos)
            none = counted(bare, "video shows", "videos show")
            self._notes += [f"{none} none of the classes"] if bare else []
        return Listing(
            records=[video for video in videos if not video.reason],
            class_names=list(class_names or sorted(used)),
            split_names=split_names,
            missing=[video for video in videos if video.reason],
            notes=self._notes,
            overlapping_splits=overlapping_splits,
            label_map=self.label_map,
            multi_label=self._multi_label,
        )

    def _with_own_keys(self) -> list[VideoRecord]:
        """Return all videos, with a key from the whole path where several have one key."""
        videos = [*self._by_key.values(), *chain.from_iterable(self._of_same_key.values())]
        clashing, renamed = set(self._of_same_key), 0
        while clashing:
            before = renamed
            for video in videos:
                name = video.path or video.source
                if video.key in clashing and video.key != (key := key_from_name(name)):
                    video.key, video.reason = key, video.reason or refused_name(name)
                    renamed += 1
            # The whole path may be the key of yet another file: a.mp4, a.avi, a.mp4.avi.
            counts = Counter(video.key for video in videos)
            clashing = {key for key, count in counts.items() if count > 1}
            if clashing and renamed == before:
                names = [repr(name_from_key(key)) for key in sorted(clashing)]
                raise UserError(f"{first_of(names)} is listed for two files: list each by its path")
        if renamed:
            example = next(iter(self._of_same_key.values()))[0]
            self._notes.append(
                f"{counted(renamed, 'video has', 'videos have')} a name in common with another "
                "file: all are kept, with path and extension as their keys (e.g. "
                f"{example.path or example.source!r})"
            )
        return videos


def first_of(phrases: Sequence[str], most: int = 5) -> str:
    """Join the first phrases for an error, and count the others."""
    rest = f"; and {len(phrases) - most} more" if len(phrases) > most else ""
    return "; ".join(phrases[:most]) + rest


def _may_be(video: VideoRecord, path: str, source: str) -> bool:
    """Whether a mention with the file `path` can mean `video`, which has the same key."""
    return video.path == path or (not video.path and video.source == source)


def printable(text: str) -> str:
    """Return `text` with escapes for the bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def refused_name(name: str, limit: int | None = MAX_NAME_LENGTH) -> str:
    """Return why no sample can have this name, or an empty string if it can."""
    if limit is not None and len(name) > limit:
        return f"its name has {len(name)} characters, more than {limit}: shorten it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8: rename the file"
    return ""
