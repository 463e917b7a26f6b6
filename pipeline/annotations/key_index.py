"""How the name in somebody's list finds the key of a packed video, without the video files."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from pipeline.annotations.class_names import comparable
from pipeline.annotations.formats.kinetics import id_and_start
from pipeline.annotations.listing import name_from_key, split_from_folder
from pipeline.annotations.video_folder import normal_path, path_stem


class KeyIndex:
    """The keys of a data set by what lists call them.

    A list's entry is compared by the file's name without extension, whatever the case of letters
    (UCF101's HandstandPushups has files named HandStandPushups); Kinetics names by id and start,
    or by id alone where either side has no more. Folders decide only between files of one name.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = set(keys)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_clip: dict[tuple[str, int | None], list[str]] = defaultdict(list)
        self._by_id: dict[str, list[str]] = defaultdict(list)
        for key in sorted(self._keys):
            stem = posixpath.basename(name_from_key(key))
            self._by_stem[stem.lower()].append(key)
            clip = id_and_start(stem)
            self._by_clip[clip].append(key)
            self._by_id[clip[0]].append(key)

    def find_listed(self, listed: str, split: str | None = None) -> tuple[str | None, str]:
        """The key that a list's entry means, or (None, why not); `split` is not looked at."""
        if listed in self._keys:
            return listed, ""
        path = path_stem(normal_path(listed, Path()))
        stem = posixpath.basename(path)
        found = self._by_stem.get(stem.lower(), [])
        if not found:
            youtube_id, start = id_and_start(stem)
            found = self._by_clip.get((youtube_id, start), []) if start is not None else []
            found = found or self._by_clip.get((youtube_id, None), [])
            found = found or (self._by_id.get(youtube_id, []) if start is None else [])
        if len(found) > 1:
            found = _in_folder(found, path) or found
        if len(found) == 1:
            return found[0], ""
        if found:
            return None, f"several videos have this name: {found[0]} and {found[1]}"
        return None, "no such video in the data set"


def _in_folder(keys: list[str], path: str) -> list[str]:
    """Those of the keys whose folders, as far as both sides have any, are those of the list."""
    wanted = [comparable(part) for part in path.split("/")[:-1] if part]
    if not wanted:
        return []

    def agrees(key: str) -> bool:
        folders = [comparable(part) for part in name_from_key(key).split("/")[:-1]]
        if folders and wanted and split_from_folder(wanted[-1]):
            return split_from_folder(folders[0]) == split_from_folder(wanted[-1])
        return folders[-len(wanted) :] == wanted[-len(folders) :] if folders else False

    return [key for key in keys if agrees(key)]
