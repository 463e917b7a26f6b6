"""A packed data set on disk: `dataset.json`, the tars it lists, and the videos that failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.commands import pack_command, packing_begun
from featstore.errors import UserError, WorkError, meant, one_line
from featstore.files.documents import LISTS_LIMIT, read_object
from featstore.files.durable import write_bytes, write_json
from featstore.files.tables import csv_bytes
from featstore.format.spans import Span, spans_from_json
from featstore.remote.urls import is_url
from featstore.workspace import DATASET_FILE as DATASET_FILE

FAILURES_FILE = "failures.csv"
TARS_FOLDER = "shards"
INDEX_FOLDER = "index"
# 1 has no tars that were taken where they lie, and always classes; 2 has one class a video.
FORMAT_VERSION = 3
NO_LABEL = -1
"""The label of a video without a class."""

FAILURE_COLUMNS = ("key", "path", "class_name", "splits", "reason")


@dataclass(frozen=True, slots=True)
class FailedVideo:
    """A listed video that cannot be used, and why.

    `class_name` is in natural words; without a class it is "" and `label` is `NO_LABEL`. `spans`
    are the classes of a video that may show several.
    """

    key: str
    label: int
    class_name: str
    splits: tuple[str, ...]
    reason: str
    spans: tuple[Span, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, without spans where there are none."""
        value = asdict(self) | {"spans": [span.to_json() for span in self.spans]}
        return value if self.spans else {name: v for name, v in value.items() if name != "spans"}


@dataclass(frozen=True, slots=True)
class Tar:
    """One tar: `samples` is the number of videos in it, `failed` lists the videos it lacks.

    A failed video still counts as a row. `split` is set where every split has its own tars.
    `bytes` and `sha256` describe the file. A tar that was taken where it lies has a `source`, its
    absolute path or URL, and an index in the data set's folder, whose hash is `index_sha256`;
    `file` is then its name in this data set.
    """

    file: str
    split: str | None
    samples: int
    failed: tuple[FailedVideo, ...]
    bytes: int
    sha256: str
    source: str = ""
    index_sha256: str = ""

    @property
    def rows(self) -> int:
        """The number of listed videos of this tar, failed ones included."""
        return self.samples + len(self.failed)

    @property
    def remote(self) -> bool:
        """Whether the tar was taken from a URL and lies only there."""
        return is_url(self.source)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; those of tars taken where they lie only where they are set.

        So the data sets of earlier versions keep their fingerprint.
        """
        value = asdict(self) | {"failed": [video.to_json() for video in self.failed]}
        return {
            name: value
            for name, value in value.items()
            if value or name not in ("source", "index_sha256")
        }


@dataclass(frozen=True)
class Dataset:
    """The content of `dataset.json`. Labels are indices into `class_names` and `raw_class_names`.

    `keys_by_split` holds the keys of every split, failed videos included. `splits_disjoint` is
    true where every split has its own tars. `fingerprint` changes with any byte of any tar and
    with labels, splits and failures. `label_map` means the same as in `Listing`. A data set without
    classes has no labels: all of them are `NO_LABEL`. `left_out` are samples of tars taken where
    they lie that cannot have a row: without a class, or with a key that was there before. With
    `multi_label` a video may show several classes, which its sidecar holds in place of a label.
    """

    folder: Path
    name: str
    class_names: tuple[str, ...]
    raw_class_names: tuple[str, ...]
    split_names: tuple[str, ...]
    splits_disjoint: bool
    tars: tuple[Tar, ...]
    keys_by_split: Mapping[str, Sequence[str]]
    fingerprint: str = ""
    label_map: str = ""
    left_out: tuple[FailedVideo, ...] = ()
    multi_label: bool = False
    _splits_by_key: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_key: dict[str, tuple[str, ...]] = {}
        for split in self.split_names:
            for key in self.keys_by_split[split]:
                by_key[key] = (*by_key.get(key, ()), split)
        object.__setattr__(self, "_splits_by_key", by_key)
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self._content()))

    def splits_of(self, key: str) -> tuple[str, ...]:
        """The splits that a video belongs to; empty for a video outside all splits."""
        return self._splits_by_key.get(key, ())

    def tar_path(self, tar: Tar) -> Path:
        """The path of the tar's file on this machine. Not for a tar that lies only at a URL."""
        return Path(tar.source) if tar.source else self.folder / TARS_FOLDER / tar.file

    def location(self, tar: Tar) -> str:
        """The path or the URL of the tar, for messages."""
        return tar.source or str(self.tar_path(tar))

    def index_path(self, tar: Tar) -> Path:
        """The path of the index of a tar that was taken where it lies."""
        return self.folder / INDEX_FOLDER / f"{tar.file}.json"

    def has_label(self, label: int) -> bool:
        """Whether a video of this data set can have this label."""
        without = self.multi_label or not self.class_names
        return label == NO_LABEL if without else 0 <= label < len(self.class_names)

    @property
    def listed(self) -> int:
        """The number of listed videos, failed ones included."""
        return sum(tar.rows for tar in self.tars) + len(self.left_out)

    @property
    def packed(self) -> int:
        """The number of videos in tars."""
        return sum(tar.samples for tar in self.tars)

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts: counts, classes, splits, and the reasons why videos failed."""
        return {
            "name": self.name,
            "videos_listed": self.listed,
            "videos_packed": self.packed,
            "videos_failed": self.listed - self.packed,
            "classes": len(self.class_names),
            "class_names": list(self.class_names),
            **({"multi_label": True} if self.multi_label else {}),
            "splits": {name: len(self.keys_by_split[name]) for name in self.split_names},
            "tars": len(self.tars),
            "bytes": sum(tar.bytes for tar in self.tars),
            "fingerprint": self.fingerprint,
            "failures": [
                {"key": f.key, "reason": f.reason}
                for videos in (*(tar.failed for tar in self.tars), self.left_out)
                for f in videos
            ],
        }

    def write(self) -> None:
        """Write `dataset.json`, complete or not at all."""
        write_json(
            self.folder / DATASET_FILE,
            {
                # Earlier programs go on reading what they can read.
                "format_version": FORMAT_VERSION if self.multi_label else 1 + self._is_new,
                "fingerprint": self.fingerprint,
                "videos": {
                    "listed": self.listed,
                    "packed": self.packed,
                    "failed": self.listed - self.packed,
                },
                **self._content(),
            },
        )

    @property
    def _is_new(self) -> bool:
        return not self.class_names or bool(self.left_out) or any(t.source for t in self.tars)

    def _content(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class_names": list(self.class_names),
            "raw_class_names": list(self.raw_class_names),
            "split_names": list(self.split_names),
            "splits_disjoint": self.splits_disjoint,
            "shards": [tar.to_json() for tar in self.tars],
            "splits": {split: list(self.keys_by_split[split]) for split in self.split_names},
            # Written only where it is set, so that other data sets keep their fingerprint.
            **({"label_map": self.label_map} if self.label_map else {}),
            **({"left_out": [v.to_json() for v in self.left_out]} if self.left_out else {}),
            **({"multi_label": True} if self.multi_label else {}),
        }


def class_words(class_names: Sequence[str], label: int, spans: Sequence[Span] = ()) -> str:
    """Return the name of a video's class, or of each that it shows, by label; "" for none."""
    labels = {label} if label != NO_LABEL else {span.label for span in spans}
    return "; ".join(class_names[at] for at in sorted(labels))


def write_failures(dataset_dir: Path, failures: Sequence[Mapping[str, Any]]) -> None:
    """Write `failures.csv`, complete or not at all; if no video failed, it has only a header."""
    lines = ({**video, "splits": ";".join(video["splits"])} for video in failures)
    rows = ([line[column] for column in FAILURE_COLUMNS] for line in lines)
    write_bytes(dataset_dir / FAILURES_FILE, csv_bytes(FAILURE_COLUMNS, rows))


def tars_of(dataset: Dataset, split: str | None) -> list[Tar]:
    """Return the tars of a split, or all tars if `split` is None.

    Raises UserError for an unknown split, for one without videos, and where splits share tars.
    """
    if split is None:
        return list(dataset.tars)
    if split not in dataset.split_names:
        names = meant(split, dataset.split_names) + "its splits are "
        names += ", ".join(dataset.split_names) or "none"
        raise UserError(f"{dataset.name} has no split {split!r}: {names}")
    if not dataset.splits_disjoint:
        raise UserError(
            f"the splits of {dataset.name} overlap, so they share tars and one extraction: "
            "leave --split out, and name the split when training or evaluating"
        )
    tars = [tar for tar in dataset.tars if tar.split == split]
    if not tars:
        raise UserError(f"split {split} of {dataset.name} lists no videos: choose another")
    return tars


def load_dataset(dataset_dir: Path) -> Dataset:
    """Read `dataset.json` of a packed data set.

    Raises UserError when the file is missing (not packed, or packing was interrupted) or has a
    newer version, WorkError when it is damaged.
    """
    path = dataset_dir / DATASET_FILE
    if not path.is_file():
        begun = packing_begun(dataset_dir)
        state = "packing is not finished" if begun else "not packed"
        root = dataset_dir.parent.parent if dataset_dir.parent.name == "datasets" else None
        pack, _ = pack_command(dataset_dir, root)
        others = dataset_dir.parent.glob(f"*/{DATASET_FILE}")
        near = "" if begun else meant(dataset_dir.name, (p.parent.name for p in others)).strip()
        remedy = near or f"run `{pack}`"
        raise UserError(f"no {DATASET_FILE} in {str(dataset_dir)!r} ({state}): {remedy}")
    remedy = f"delete {str(dataset_dir)!r} and pack again"
    try:
        value = read_object(path, remedy, limit=LISTS_LIMIT, error=WorkError)
        version = int(value["format_version"])
        if version > FORMAT_VERSION:
            raise UserError(
                f"{str(path)!r} has format version {version}, but this program reads only up to "
                f"{FORMAT_VERSION}: install a newer one"
            )
        dataset = _dataset(dataset_dir, value)
        if dataset.fingerprint != _fingerprint(dataset._content()):
            raise WorkError(
                f"{str(path)!r} is damaged or was edited by hand (wrong fingerprint): {remedy}"
            )
        return dataset
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkError(f"{str(path)!r} is damaged ({one_line(error)}): {remedy}") from error


def _dataset(folder: Path, value: dict[str, Any]) -> Dataset:
    tars, classes = [], len(value["class_names"])
    for entry in value["shards"]:
        file = entry["file"]
        if PurePosixPath(file).name != file or file in (".", "..") or "\\" in file:
            raise ValueError(f"tar {file!r} is not a plain file name")
        tars.append(Tar(**{**entry, "failed": _failed(entry["failed"], classes)}))
    return Dataset(
        folder=folder,
        name=str(value["name"]),
        class_names=tuple(map(str, value["class_names"])),
        raw_class_names=tuple(map(str, value["raw_class_names"])),
        split_names=tuple(map(str, value["split_names"])),
        splits_disjoint=bool(value["splits_disjoint"]),
        tars=tuple(tars),
        keys_by_split={split: tuple(map(str, keys)) for split, keys in value["splits"].items()},
        fingerprint=str(value["fingerprint"]),
        label_map=str(value.get("label_map", "")),
        left_out=_failed(value.get("left_out", ()), classes),
        multi_label=bool(value.get("multi_label", False)),
    )


def _failed(videos: Iterable[Mapping[str, Any]], classes: int) -> tuple[FailedVideo, ...]:
    return tuple(
        FailedVideo(
            **{
                **video,
                "splits": tuple(video["splits"]),
                "spans": spans_from_json(video.get("spans", []), classes),
            }
        )
        for video in videos
    )


def _fingerprint(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
