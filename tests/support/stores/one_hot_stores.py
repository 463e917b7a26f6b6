"""Stores of packed data sets whose features are made by hand.

Every video points at the class it is to be taken for, so the accuracy of CLIP's mean of frames is
known beforehand.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featstore import ClassText, Partition, Store, StoreSchema, StoreWriter, open_store
from featstore.format.metadata import StoreMetadata, TarEntry
from featstore.workspace import Workspace
from pipeline.tars.dataset import load_dataset
from tests.support.stores.sample_stores import make_provenance
from tests.support.worlds.official_trees import Tree

DIM = 32
FRAMES = 4
PROMPTS = "mote28"

FeatureArray = npt.NDArray[np.float64]


def one_hot_store(
    root: Path,
    tree: Tree,
    taken_for: Mapping[str, str] | None = None,
    *,
    split: str | None = None,
    failed: frozenset[str] = frozenset(),
    clips: int = 1,
    crops: int = 1,
    by_hand: Mapping[str, FeatureArray] | None = None,
) -> Store:
    """A store of a packed tree under `root`: text c is direction c, a video that of one class.

    `taken_for` names the class, in words, that a video points at (default: its own). `split`
    leaves the others' rows out, as `extract --split` does. Rows come tar by tar; names in `failed`
    failed in extraction, and so did what packing could not read. Of more than one view the sampling
    says so; `by_hand` gives views of videos [views, DIM] that point elsewhere than the others.
    """
    views = clips * crops
    sampling = f"uniform:{FRAMES}" if clips == 1 else f"clips:{FRAMES}x{clips}"
    taken_for = taken_for or {}
    workspace = Workspace(root)
    dataset = load_dataset(workspace.dataset_dir(tree.name))
    names = dataset.class_names
    keys, labels, stems = [], [], []
    bad = []
    for tar in dataset.tars:
        if split not in (None, tar.split):
            continue
        with tarfile.open(dataset.tar_path(tar)) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    file = archive.extractfile(member)
                    assert file is not None
                    sidecar = json.loads(file.read())
                    keys.append(sidecar["key"])
                    labels.append(sidecar["label"])
                    stems.append(Path(sidecar["source_path"]).stem)
        for sample in tar.failed:
            bad.append(len(keys))
            keys.append(sample.key)
            labels.append(sample.label)
            stems.append("")
    bad += [place for place, stem in enumerate(stems) if stem in failed]
    n = len(keys)
    features = np.zeros((n, views, FRAMES, DIM))
    for place, (stem, label) in enumerate(zip(stems, labels, strict=True)):
        features[place, ..., names.index(taken_for.get(stem, names[label]))] = 4
        if by_hand is not None and stem in by_hand:
            features[place] = by_hand[stem][:, None]
    indices, times, status = np.zeros((n, views, FRAMES), np.int32), np.zeros((n, views, FRAMES)), 1
    statuses = np.full(n, status, np.uint8)
    features[bad], indices[bad], times[bad], statuses[bad] = np.nan, -1, np.nan, 2
    path = workspace.store_path(
        tree.name, encoder="onehot", sampling=sampling, crops=crops, split=split
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter.init(
        path,
        StoreMetadata(
            StoreSchema.create(1, n, views, FRAMES, DIM),
            make_provenance(
                DIM,
                encoder="onehot",
                sampling=sampling,
                crops=crops,
                dataset=tree.name,
                dataset_fingerprint=dataset.fingerprint,
                label_map=dataset.label_map,
            ),
            (TarEntry("rows.tar", n, 1, "0" * 64),),
            *(names, dataset.raw_class_names, dataset.split_names),
        ),
        {PROMPTS: ClassText(names, np.eye(len(names), DIM, dtype=np.float32), "beef")},
    )
    bits = [
        sum(1 << dataset.split_names.index(name) for name in dataset.splits_of(key)) for key in keys
    ]
    with writer.claim():
        writer.write_partition(
            0,
            Partition(
                key=keys,
                label=np.array(labels, np.int32),
                num_frames=np.full(n, 6, np.int32),
                fps=np.full(n, 25, np.float32),
                status=statuses,
                splits=np.array(bits, np.uint32),
                container_frames=np.full(n, 6, np.int32),
                damaged_packets=np.zeros(n, np.int32),
                reason=["no frames" if place in bad else "" for place in range(n)],
                frame_index=indices,
                pts=times,
                features=features.astype(np.float16),
            ),
        )
    return open_store(path)
