"""Collects the rows of one tar, in any order, until they go into a store as a partition.

Letters: V views (one clip in one crop each, crop-major then clip), F frames of a view, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore import Partition, StoreSchema
from featstore.errors import one_line
from featstore.format.array_checks import not_finite
from featstore.format.schema import STATUS_FAILED, STATUS_OK
from featstore.writing.shard_rows import FeatureRows
from pipeline.extraction.cpu_pool import EncodedVideo
from pipeline.tars.dataset import Dataset, Tar
from pipeline.tars.reading import DamagedTar, OpenTar, open_packed


class TarRows:
    """The rows of one tar while its videos are being encoded, in any order."""

    def __init__(
        self,
        number: int,
        tar: Tar,
        dataset: Dataset,
        path: Path,
        schema: StoreSchema,
        on_disk: Callable[[int], FeatureRows],
    ) -> None:
        """Open the tar at `path` and prepare its rows in the shapes of `schema`.

        Embeddings wait in memory until the tar is done; rows of other tiers, which are hundreds of
        times as large, go to the files that `on_disk` gives for the tar's number.
        Raises `DamagedTar` if it is not the tar that was packed, OSError if the disk is full.
        """
        self.number = number
        self.tar = tar
        self.waiting = 0  # results that are still to come
        self.handed_out = False  # whether every sample was given to the pool
        self.damage = ""  # what is wrong with the tar; if anything, no partition is written
        self._resources = ExitStack()
        opened = open_packed(dataset, tar, path)
        self.archive: OpenTar = self._resources.enter_context(opened)
        self.samples = self.archive.samples
        n = tar.rows
        bit = {name: 1 << i for i, name in enumerate(dataset.split_names)}
        listed = [(s.key, s.sidecar["label"], s.sidecar["splits"]) for s in self.samples]
        listed += [(f.key, f.label, f.splits) for f in tar.failed]
        spans = [sample.spans(len(dataset.class_names)) for sample in self.samples]
        spans += [failed.spans for failed in tar.failed]
        shape = (n, schema.views, schema.frames)
        # The fields of a Partition. Every row starts as failed; a result turns it into one that is
        # ok.
        self._fields: dict[str, Any] = {
            "key": [key for key, _, _ in listed],
            "label": np.array([label for _, label, _ in listed], np.int32),
            "splits": np.array([sum(bit[x] for x in splits) for *_, splits in listed], np.uint32),
            "reason": [""] * tar.samples + [one_line(f.reason) for f in tar.failed],
            "status": np.full(n, STATUS_FAILED, np.uint8),
            "num_frames": np.zeros(n, np.int32),
            "fps": np.full(n, np.nan, np.float32),
            "container_frames": np.zeros(n, np.int32),
            "damaged_packets": np.zeros(n, np.int32),
            "frame_index": np.full(shape, -1, np.int32),
            "pts": np.full(shape, np.nan),
            "spans": spans if schema.multi_label else None,
        }
        self._dtype = schema.dtype
        self._features: npt.NDArray[Any] | FeatureRows
        if schema.pooled:
            self._features = np.full((n, *schema.row_shape), schema.missing, schema.dtype)
        else:
            self._features = self._resources.enter_context(on_disk(number))

    def read(self, position: int) -> bytes:
        """Return the video file of a sample. Raises `DamagedTar`. Threads may call this."""
        if self.damage:
            raise DamagedTar(self.damage)  # nothing of this tar will be written
        return self.archive.read(self.samples[position])

    def put(self, position: int, result: EncodedVideo | str) -> bool:
        """Store the result of the sample at `position`. Returns False if its row failed."""
        fields = self._fields
        if isinstance(result, str):
            fields["reason"][position] = one_line(result)
            return False
        info = result.info
        packed = self.samples[position].sidecar["num_frames"]
        if info.num_frames != packed:
            fields["reason"][position] = f"{info.num_frames} frames are found, {packed} were packed"
            return False
        with np.errstate(over="ignore"):
            features = result.features.astype(self._dtype, copy=False)
        if not_finite(features[None]).any():
            fields["reason"][position] = "the encoder gave values that are not finite in float16"
            return False
        fields["status"][position] = STATUS_OK
        fields["reason"][position] = one_line(info.remarks())
        for name in ("num_frames", "fps", "container_frames", "damaged_packets"):
            fields[name][position] = getattr(info, name)
        fields["frame_index"][position] = result.frame_index
        fields["pts"][position] = result.pts
        if isinstance(self._features, FeatureRows):
            self._features.put(position, features)
        else:
            self._features[position] = features
        return True

    def finish(self) -> Partition:
        """Return the partition, which is checked when it is made."""
        return Partition(**self._fields, features=self._features)

    def close(self) -> None:
        """Close the tar, and remove rows on the disk that did not become a partition."""
        self._resources.close()
