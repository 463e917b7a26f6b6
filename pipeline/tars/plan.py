"""The plan of packing, made before anything is written: which video goes into which tar.

The plan is kept beside the tars. A later run makes its own plan from the same input and compares
the two: if they are equal, packing continues; if not, it is refused with the differences.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from featstore.errors import UserError, WorkError, one_line
from featstore.files.documents import LISTS_LIMIT, read_object
from featstore.files.durable import write_json
from featstore.format.spans import Span, spans_from_json
from featstore.remote.urls import is_url
from pipeline.annotations.class_names import NamesAs, Naming
from pipeline.annotations.listing import Listing, VideoRecord, key_from_name
from pipeline.tars.dataset import NO_LABEL

PLAN_VERSION = 1
PLAN_FILE = "plan.json"


class PlannedVideo(NamedTuple):
    """One listed video. `reason` is set if it fails before it is read.

    `path` is relative to the videos folder, a URL, or the name as listed where there is no file;
    `size` in bytes and `mtime_ns` are -1 where there is no file, and 0 for a URL. `batch` is 0 for
    videos that were packed first, 1 for those that were appended next, and so on. `spans` are the
    classes of a video that may show several.
    """

    key: str
    path: str
    label: int
    splits: tuple[str, ...]
    size: int
    mtime_ns: int
    reason: str
    batch: int = 0
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedTar:
    """The videos of one tar, in the order in which the tar holds them."""

    file: str
    split: str | None
    videos: tuple[PlannedVideo, ...]


@dataclass(frozen=True)
class TarPlan:
    """The videos of a data set, in any order, and the options that shape its tars."""

    name: str
    samples_per_shard: int
    seed: int
    class_names: tuple[str, ...]
    split_names: tuple[str, ...]
    splits_disjoint: bool
    videos: tuple[PlannedVideo, ...] = field(repr=False)
    label_map: str = ""
    names_as: NamesAs = "words"
    multi_label: bool = False

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The class names that sentences are made from."""
        return Naming(names_as=self.names_as).names(self.class_names)

    @property
    def last_batch(self) -> int:
        """The number of times that videos were appended."""
        return max((video.batch for video in self.videos), default=0)

    @cached_property
    def tars(self) -> tuple[PlannedTar, ...]:
        """The tars: videos in the order of a hash of seed and key, cut per split if disjoint.

        The order depends only on keys and seed, so annotations may list videos in any order. It
        also mixes the classes within every tar. Appended videos get tars of their own, so that
        earlier tars stay as they are.
        """
        groups: dict[str | None, list[PlannedVideo]] = {}
        if self.splits_disjoint:
            groups.update((split, []) for split in self.split_names)
        groups[None] = []
        for video in self.videos:
            groups[video.splits[0] if self.splits_disjoint and video.splits else None].append(video)
        tars = []
        for split, members in groups.items():
            members.sort(key=lambda video: (video.batch, *_shuffled_place(self.seed, video.key)))
            stem = self.name if split is None else f"{self.name}-{key_from_name(split)}"
            number = 0
            for _, appended in groupby(members, key=lambda video: video.batch):
                together = tuple(appended)
                for start in range(0, len(together), self.samples_per_shard):
                    chosen = together[start : start + self.samples_per_shard]
                    tars.append(PlannedTar(f"{stem}-{number:06d}.tar", split, chosen))
                    number += 1
        return tuple(tars)

    def write(self, path: Path) -> None:
        """Write the plan's input, from which the same plan can be made again."""
        # What is not used is left out, so that earlier versions go on reading the plan.
        videos = [video if video.spans else video[:-1] for tar in self.tars for video in tar.videos]
        options = {name: getattr(self, name) for name in _OPTIONS}
        if not self.multi_label:
            del options["multi_label"]
        write_json(path, {"version": PLAN_VERSION, **options, "videos": videos}, indent=None)


_OPTIONS = [option.name for option in fields(TarPlan) if option.name != "videos"]


def make_plan(
    listing: Listing,
    videos_dir: Path,
    *,
    name: str,
    samples_per_shard: int,
    seed: int,
    names_as: NamesAs,
) -> TarPlan:
    """Make the plan for the videos of a listing; a video without a readable file gets a reason."""
    labels = {class_name: label for label, class_name in enumerate(listing.class_names)}
    videos = [_planned(videos_dir, video, labels) for video in (*listing.records, *listing.missing)]
    return TarPlan(
        name=name,
        samples_per_shard=samples_per_shard,
        seed=seed,
        class_names=tuple(listing.class_names),
        split_names=tuple(listing.split_names),
        splits_disjoint=not listing.overlapping_splits
        and bool(listing.split_names)
        and all(len(video.splits) <= 1 for video in videos),
        videos=tuple(videos),
        label_map=listing.label_map,
        names_as=names_as,
        multi_label=listing.multi_label,
    )


def read_plan(path: Path) -> TarPlan:
    """Read the plan of an earlier run. Raises WorkError when it is damaged.

    Raises UserError when another version of the program wrote it.
    """
    folder, names = str(path.parent.parent), ("class_names", "split_names")
    remedy = f"delete {folder!r} and pack again"
    try:
        value = read_object(path, remedy, limit=LISTS_LIMIT, error=WorkError)
        if value.pop("version") != PLAN_VERSION:
            raise UserError(
                f"{folder!r} was begun by another version of this program: delete it and pack again"
            )
        videos = [
            _read_video(*video, classes=len(value["class_names"])) for video in value.pop("videos")
        ]
        value.update({name: tuple(value[name]) for name in names}, videos=tuple(videos))
        plan = TarPlan(**value)
        _ = plan.tars  # cutting the videos into tars shows whether splits and options fit
        return plan
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise WorkError(f"{str(path)!r} is damaged ({one_line(error)}): {remedy}") from error


def packed_classes(path: Path) -> tuple[str, ...]:
    """Return the raw class names of an earlier plan; none if there is no plan that can be read."""
    with suppress(UserError, WorkError):
        return read_plan(path).class_names if path.exists() else ()
    return ()


def packed_splits(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the splits of the videos of an earlier plan by key, as `packed_classes` reads it."""
    with suppress(UserError, WorkError):
        videos = read_plan(path).videos if path.exists() else ()
        return {video.key: video.splits for video in videos}
    return {}


def _read_video(
    key: str, path: str, label: int, splits: list[str], *rest: Any, classes: int
) -> PlannedVideo:
    video = PlannedVideo(key, path, label, tuple(splits), *rest)
    return video._replace(spans=_spans(video.spans, classes))


def _spans(value: Any, classes: int) -> tuple[Span, ...]:
    """Return spans that were written as NamedTuples."""
    return spans_from_json([[s[0]] if s[1] is None else s for s in value], classes)


def with_earlier_keys(old: TarPlan, new: TarPlan) -> TarPlan:
    """Return `new` in which every file has the key it has in `old`.

    A file added beside one of the same name would otherwise change the key of both.
    """
    known = {video.path: video.key for video in old.videos if video.size >= 0}
    taken = {video.key for video in new.videos}
    videos = []
    for video in new.videos:
        key = known.get(video.path, video.key)
        videos.append(video if key in taken else video._replace(key=key))
    return replace(new, videos=tuple(videos))


def continued(old: TarPlan, new: TarPlan) -> TarPlan:
    """Return `new` with the videos of `old` in their earlier tars and all other videos appended.

    The classes and splits of `old` keep their numbers; new ones come after them.
    """
    classes = tuple(dict.fromkeys((*old.class_names, *new.class_names)))
    labels = {name: label for label, name in enumerate(classes)}
    batches = {video.key: video.batch for video in old.videos}
    next_batch = old.last_batch + 1
    videos = tuple(
        video._replace(
            label=NO_LABEL if video.label == NO_LABEL else labels[new.class_names[video.label]],
            spans=tuple(
                span._replace(label=labels[new.class_names[span.label]]) for span in video.spans
            ),
            batch=batches.get(video.key, next_batch),
        )
        for video in new.videos
    )
    splits = tuple(dict.fromkeys((*old.split_names, *new.split_names)))
    return replace(new, class_names=classes, split_names=splits, videos=videos)


def differences(
    old: TarPlan, new: TarPlan, changed_content: Callable[[str], bool], *, may_grow: bool = False
) -> list[str]:
    """One phrase for each way in which the input differs, with a count and an example.

    With `may_grow`, new videos, and new classes after the earlier ones, are not a difference.

    `changed_content(key)` says whether a video's content changed. It is called where the size is
    the same but the time of change differs, because a copied file has a new time and old content.
    """
    phrases = [
        f"{option} was {_shown(getattr(old, option))}, is {_shown(getattr(new, option))}"
        for option in ("name", "samples_per_shard", "seed", "label_map", "names_as", "multi_label")
        if getattr(old, option) != getattr(new, option)
    ]
    if may_grow and old.splits_disjoint != new.splits_disjoint:
        phrases.append("splits overlapped before" if new.splits_disjoint else "splits overlap now")
    known = new.class_names[: len(old.class_names)] if may_grow else new.class_names
    if old.class_names != known or bool(old.class_names) != bool(new.class_names):
        phrases.append(class_difference(old.class_names, new.class_names))
    before = {video.key: video for video in old.videos}
    after = {video.key: video for video in new.videos}
    added = [after[key].path for key in sorted(after.keys() - before.keys()) if not may_grow]
    removed = [before[key].path for key in sorted(before.keys() - after.keys())]
    by_kind: dict[str, list[str]] = {"added": added, "removed": removed}
    for key in sorted(before.keys() & after.keys()):
        was, now = before[key], after[key]
        same_class = _class_of(old, was) == _class_of(new, now)
        if was == now and same_class:
            continue
        kinds = {
            "found that were missing": was.size < 0 <= now.size,
            "removed from the folder": now.size < 0 <= was.size,
            "with another state": was.reason != now.reason,
            "moved": was.path != now.path,
            "with another class": not same_class,
            "with other splits": was.splits != now.splits,
            "of another size": was.size != now.size,
        }
        kind = next((kind for kind, changed in kinds.items() if changed), "")
        if not kind and was.mtime_ns != now.mtime_ns and changed_content(key):
            kind = "with other content"
        if kind:
            by_kind.setdefault(kind, []).append(now.path)
    phrases += [
        f"{len(paths)} {'video' if len(paths) == 1 else 'videos'} {kind} (e.g. {paths[0]!r})"
        for kind, paths in by_kind.items()
        if paths
    ]
    return phrases


def _class_of(plan: TarPlan, video: PlannedVideo) -> object:
    if video.spans:
        return [(plan.class_names[span.label], *span[1:]) for span in video.spans]
    return "" if video.label == NO_LABEL else plan.class_names[video.label]


def _shown(value: object) -> object:
    return "none" if value == "" else value


def class_difference(old: Sequence[str], new: Sequence[str]) -> str:
    """Say how two lists of classes differ."""
    gone, come = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    if not gone and not come:
        return "the order of classes changed"
    examples = [f"{name!r} is new" for name in come[:1]] + [
        f"{name!r} is gone" for name in gone[:1]
    ]
    return f"there were {len(old)} classes and are {len(new)} now ({', '.join(examples)})"


def _planned(videos_dir: Path, video: VideoRecord, labels: Mapping[str, int]) -> PlannedVideo:
    label = labels.get(video.class_name, NO_LABEL)
    spans = tuple(Span(labels[name], start, end) for name, start, end in video.spans)
    size, mtime_ns, path, reason = -1, -1, video.path, video.reason
    if reason:
        path = video.source
    elif is_url(path):
        size = mtime_ns = 0  # known when it is fetched
    else:
        try:
            status = (videos_dir / path).stat()
            size, mtime_ns = status.st_size, status.st_mtime_ns
            # Opening a pipe or a device would wait for ever.
            reason = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
        except OSError as error:
            reason = f"the file cannot be read: {error.strerror}"
    return PlannedVideo(video.key, path, label, video.splits, size, mtime_ns, reason, 0, spans)


def _shuffled_place(seed: int, key: str) -> tuple[bytes, str]:
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest(), key
