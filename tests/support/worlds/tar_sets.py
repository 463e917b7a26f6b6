"""Packed data sets written byte by byte: whatever may lie in a tar, whoever packed it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.tars.dataset import TARS_FOLDER, Dataset, Tar


def write_dataset(
    folder: Path,
    tars: Sequence[Mapping[str, bytes]],
    frames: Mapping[str, int] | int = 12,
    classes: int = 3,
) -> Dataset:
    """A data set of one split "train" whose tars hold these files by key; labels go round.

    `frames` is what the sidecars say, for all videos or by key.
    """
    (folder / TARS_FOLDER).mkdir(parents=True)
    shards, keys = [], [key for tar in tars for key in tar]
    for number, videos in enumerate(tars):
        path = folder / TARS_FOLDER / f"made-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, data in videos.items():
                sidecar = {
                    "key": key,
                    "label": keys.index(key) % classes,
                    "num_frames": frames if isinstance(frames, int) else frames[key],
                    "splits": ["train"],
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
                for extension, content in (("json", json.dumps(sidecar).encode()), ("mp4", data)):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Tar(path.name, "train", len(videos), (), len(data), digest))
    names = tuple(f"class {n}" for n in range(classes))
    dataset = Dataset(
        folder, "made", names, names, ("train",), True, tuple(shards), {"train": sorted(keys)}
    )
    dataset.write()
    return dataset
