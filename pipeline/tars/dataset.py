"""A packed data set on disk: `dataset.json`, the tars it lists, and the videos that failed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.errors import UserError, WorkError, one_line
from featstore.files.durable import write_bytes, write_json
from featstore.workspace import DATASET_FILE as DATASET_FILE

FAILURES_FILE = "failures.csv"
TARS_FOLDER = "shards"
FORMAT_VERSION = 1


FAILURE_COLUMNS = ("key", "path", "class_name", "splits", "reason")


@dataclass(frozen=True, slots=True)
class FailedVideo:
    """A listed video that is in no tar, and why. `class_name` is in natural words."""

    key: str
    label: int
    class_name: str
    splits: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Tar:
    """One tar: `samples` videos are in it, `failed` ones keep their place beside it.

    `split` is set where tars are made per split. `bytes` and `sha256` are those of the file.
    """

    file: str
    split: str | None
    samples: int
    failed: tuple[FailedVideo, ...]
    bytes: int
    sha256: str

    @property
    def rows(self) -> int:
        """Listed videos of this tar, failed ones included."""
        return self.samples + len(self.failed)


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says. Labels are indices into `class_names` and `raw_class_names`.

    `keys_by_split` holds the keys of every split, failed videos included. `splits_disjoint` says
    that tars are made per split. `fingerprint` changes with any byte of any tar, with labels,
    splits and failures. `label_map` as `Listing.label_map`.
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
        """The splits a video belongs to; none for a video outside all splits."""
        return self._splits_by_key.get(key, ())

    def tar_path(self, tar: Tar) -> Path:
        """Where the tar lies."""
        return self.folder / TARS_FOLDER / tar.file

    @property
    def listed(self) -> int:
        """Listed videos, failed ones included."""
        return sum(tar.rows for tar in self.tars)

    @property
    def packed(self) -> int:
        """Videos in tars."""
        return sum(tar.samples for tar in self.tars)

    def facts(self) -> dict[str, Any]:
        """What the data set holds, JSON-ready: counts, classes, splits and why videos failed."""
        return {
            "name": self.name,
            "videos_listed": self.listed,
            "videos_packed": self.packed,
            "videos_failed": self.listed - self.packed,
            "classes": len(self.class_names),
            "class_names": list(self.class_names),
            "splits": {name: len(self.keys_by_split[name]) for name in self.split_names},
            "tars": len(self.tars),
            "bytes": sum(tar.bytes for tar in self.tars),
            "fingerprint": self.fingerprint,
            "failures": [{"key": f.key, "reason": f.reason} for t in self.tars for f in t.failed],
        }

    def write(self) -> None:
        """Write `dataset.json`, complete or not at all."""
        write_json(
            self.folder / DATASET_FILE,
            {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "videos": {
                    "listed": self.listed,
                    "packed": self.packed,
                    "failed": self.listed - self.packed,
                },
                **self._content(),
            },
        )

    def _content(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class_names": list(self.class_names),
            "raw_class_names": list(self.raw_class_names),
            "split_names": list(self.split_names),
            "splits_disjoint": self.splits_disjoint,
            "shards": [asdict(tar) for tar in self.tars],
            "splits": {split: list(self.keys_by_split[split]) for split in self.split_names},
            # Only where there is something to say, so that other data sets keep their fingerprint.
            **({"label_map": self.label_map} if self.label_map else {}),
        }


def write_failures(dataset_dir: Path, failures: Sequence[Mapping[str, Any]]) -> None:
    """Write `failures.csv`, complete or not at all; one with a header only when none failed."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, FAILURE_COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({**video, "splits": ";".join(video["splits"])} for video in failures)
    write_bytes(dataset_dir / FAILURES_FILE, text.getvalue().encode())


def tars_of(dataset: Dataset, split: str | None) -> list[Tar]:
    """The tars of a split, all when None.

    Raises UserError for an unknown split, one without videos, and where splits share tars.
    """
    if split is None:
        return list(dataset.tars)
    if split not in dataset.split_names:
        names = ", ".join(dataset.split_names) or "none"
        raise UserError(f"{dataset.name} has no split {split!r}: its splits are {names}")
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

    Raises UserError when there is none (not packed, or packing was interrupted) or when it is of
    a newer version, WorkError when it is damaged.
    """
    path = dataset_dir / DATASET_FILE
    if not path.is_file():
        state = "packing is not finished" if (dataset_dir / ".packing").is_dir() else "not packed"
        raise UserError(
            f"no {DATASET_FILE} in {str(dataset_dir)!r} ({state}): run "
            f"`mote-cli pack --dataset {dataset_dir.name} --videos DIR`"
        )
    remedy = f"delete {str(dataset_dir)!r} and pack again"
    try:
        value = json.loads(path.read_bytes())
        version = int(value["format_version"])
        if version > FORMAT_VERSION:
            raise UserError(
                f"{str(path)!r} has format version {version}, this program knows up to "
                f"{FORMAT_VERSION}: install a newer one"
            )
        dataset = _dataset(dataset_dir, value)
        if dataset.fingerprint != _fingerprint(dataset._content()):
            raise WorkError(
                f"{str(path)!r} is damaged or was edited by hand (fingerprint): {remedy}"
            )
        return dataset
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkError(f"{str(path)!r} is damaged ({one_line(error)}): {remedy}") from error


def _dataset(folder: Path, value: dict[str, Any]) -> Dataset:
    tars = []
    for entry in value["shards"]:
        file = entry["file"]
        if PurePosixPath(file).name != file or file in (".", "..") or "\\" in file:
            raise ValueError(f"tar {file!r} is not a plain file name")
        failed = (FailedVideo(**{**v, "splits": tuple(v["splits"])}) for v in entry["failed"])
        tars.append(Tar(**{**entry, "failed": tuple(failed)}))
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
    )


def _fingerprint(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
