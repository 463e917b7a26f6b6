"""Reads folders of videos: class folders, also under train, val and test, or no classes at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from featstore.errors import UserError, counted
from pipeline.annotations.class_names import (
    comparable_words,
    natural_class_name,
    one_spelling,
)
from pipeline.annotations.listing import (
    Listing,
    ListingBuilder,
    first_of,
    refused_name,
    split_from_folder,
)
from pipeline.annotations.video_folder import VideoFolder, path_stem

# Folders that lie beside videos and are no classes, unless they hold videos.
_NOT_CLASSES = frozenset({"annotations", "annotation", "splits", "labels", "lists"})


def has_class_folders(folder: VideoFolder) -> bool:
    """Whether any video lies in a class folder."""
    splits = _split_folders(folder)
    return any(_class_of(path, splits) is not None for path in folder.files)


def read_class_folders(folder: VideoFolder, kept: Collection[str] = ()) -> Listing:
    """List every video in a class folder. The folder's name is the class, also if it is empty.

    Folders whose names are `comparable` are one class, with a note; `kept` as in `one_spelling`.

    Those of train, val (validation, ...) and test that hold class folders are the splits.
    Videos outside class folders have no class; they are left out and noted. Where no video is in
    a class folder, all are listed without a class.
    Raises UserError when there is no video, when there are split folders and videos
    in other folders as well, and when two folders give one class name in other ways (TaiChi and
    tai_chi).
    """
    splits = _split_folders(folder)
    if not has_class_folders(folder):
        return read_unlabelled(folder)
    builder = ListingBuilder()
    inside = {path: _class_of(path, splits) for path in folder.files}
    counts = Counter(name for name in inside.values() if name is not None)
    for path in folder.folders:
        parts = path.split("/")
        # A folder of lists that holds videos is counted above.
        own = len(parts) == (2 if splits else 1) and (not splits or parts[0] in splits)
        if own and parts[-1].lower() not in _NOT_CLASSES:
            counts[parts[-1]] += 0
    _refuse_undecodable(counts)
    spelling = one_spelling(counts, builder.note, kept)
    outside = []
    deep = 0
    for path, class_name in inside.items():
        parts = path.split("/")
        if class_name is None:
            if splits and len(parts) > 1 and split_from_folder(parts[0]) is None:
                raise UserError(
                    f"{str(folder.root)!r} holds split folders ({', '.join(sorted(splits))}) and "
                    f"videos in {parts[0]!r} as well: move one of them away"
                )
            outside.append(path)
            continue
        deep += len(parts) > (3 if splits else 2)
        builder.add(
            path_stem(path),
            source=path,
            class_name=spelling[class_name],
            split=splits[parts[0]] if splits else "",
            path=path,
        )
    if outside:
        builder.note(
            f"left out: {counted(len(outside), 'video')} outside class folders (first: "
            f"{outside[0]})"
        )
        folder.left_out.unclassed = len(outside)
    if deep:
        builder.note(
            f"{counted(deep, 'video lies', 'videos lie')} in folders inside class folders; the "
            "outer one is the class"
        )
    classes = sorted(set(spelling.values()))
    _refuse_unclear_names(classes, kept)
    return builder.build(classes)


def read_unlabelled(folder: VideoFolder) -> Listing:
    """List every video of a folder without a class; train, val and test are splits as elsewhere.

    Raises UserError when there is no video.
    """
    if not folder.files:
        raise UserError(_nothing_found(folder))
    builder = ListingBuilder()
    splits = _split_folders(folder)
    for path in folder.files:
        split = splits.get(path.split("/")[0], "") if "/" in path else ""
        builder.add(path_stem(path), source=path, class_name="", split=split, path=path)
    note_unlabelled(builder, len(folder.files))
    return builder.build()


def note_unlabelled(builder: ListingBuilder, videos: int) -> None:
    """Say that videos have no labels."""
    builder.note(f"no classes: {counted(videos, 'video')} without labels")


def _split_folders(folder: VideoFolder) -> dict[str, str]:
    """Map the top folders that are splits, because they hold folders of videos, to split names.

    A class may be called "train" as well; its videos lie directly in it, beside other classes.
    """
    tops = {path.split("/")[0] for path in folder.files if "/" in path}
    splits = {top: split for top in tops if (split := split_from_folder(top)) is not None}
    deep = {path.split("/")[0] for path in folder.files if path.count("/") > 1}
    with_classes = {top: split for top, split in splits.items() if top in deep}
    return with_classes or (splits if len(splits) == len(tops) else {})


def _class_of(path: str, splits: dict[str, str]) -> str | None:
    parts = path.split("/")
    if not splits:
        return parts[0] if len(parts) > 1 else None
    return parts[1] if len(parts) > 2 and parts[0] in splits else None


def _refuse_undecodable(classes: Iterable[str]) -> None:
    unclear = [f"{name!a}" for name in sorted(classes) if refused_name(name, limit=None)]
    if unclear:
        raise UserError(f"class folder {first_of(unclear)} is not valid UTF-8: rename it")


def _refuse_unclear_names(classes: Sequence[str], kept: Collection[str]) -> None:
    by_words: dict[str, str] = {}
    same = []
    for name in classes:
        other = by_words.setdefault(comparable_words(name), name)
        if other != name and not (other in kept and name in kept):
            same.append(
                f"class folders {other!r} and {name!r} read the same ({natural_class_name(name)!r})"
            )
    if same:
        raise UserError(f"{first_of(same)}: give both one name")


def _nothing_found(folder: VideoFolder) -> str:
    return (
        f"no videos under {str(folder.root)!r}: it needs a folder of videos for each class, "
        "or files that --annotations lists"
    )
