"""Tars as other programs write them: WebDataset's own writer, video2dataset, Hugging Face."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from pipeline.tars.dataset import Dataset, load_dataset
from pipeline.tars.foreign.classes import ClassChoice
from pipeline.tars.foreign.taking import pack_tars
from pipeline.tars.reading import open_packed
from pipeline.tars.summary import PackSummary
from tests.support.worlds.media import make_video

CLASSES = ("class 10", "class 2", "wave_hand")


@cache
def clip(number: int, container: str = "mp4") -> bytes:
    """Clip `number`: its length and its pictures are its own."""
    codec = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4"}[container]
    return make_video(
        frames=8 + number % 4,
        first=97 * number,
        width=72,
        height=48,
        gop=4,
        container=container,
        codec=codec,
    )


def webdataset_tar(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    """A tar written with webdataset's writer; samples have `__key__` and members by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def labelled_tars(folder: Path, tars: int = 2, per_tar: int = 6, first: int = 0) -> list[Path]:
    """Tars `clips-000000.tar`, ... with mp4 and cls, the class as text."""
    return [
        webdataset_tar(
            folder / f"clips-{tar:06d}.tar",
            [
                {"__key__": f"{n:05d}", "mp4": clip(n), "cls": CLASSES[n % 3].encode()}
                for n in range(first + tar * per_tar, first + (tar + 1) * per_tar)
            ],
        )
        for tar in range(tars)
    ]


def raw_tar(
    path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT
) -> Path:
    """A tar of these members in this format, with whatever names they have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def take(
    out: Path, *patterns: str | Path, append: bool = False, **choice: Any
) -> tuple[PackSummary, Dataset]:
    """Make the data set "own" of tars in the folder `out`; `choice` as in ClassChoice."""
    summary = pack_tars(
        [str(p) for p in patterns],
        "own",
        out,
        classes=ClassChoice(**choice),
        workers=2,
        append=append,
    )
    return summary, load_dataset(out)


def entries(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The sidecars of all samples by key."""
    found = {}
    for tar in dataset.tars:
        with open_packed(dataset, tar) as archive:
            for sample in archive.samples:
                found[sample.key] = sample.sidecar | {"bytes": archive.read(sample)}
    return found


def failures(out: Path) -> dict[str, str]:
    """Reasons by key."""
    with open(out / "failures.csv", newline="", encoding="utf-8") as file:
        return {line["key"]: line["reason"] for line in csv.DictReader(file)}
