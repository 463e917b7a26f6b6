"""The rows of one tar on their way into a store: opened, filled in the tar's order, handed over.

Letters: V views (one clip in one crop each, crop-major then clip), F frames of a view, D embedding.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featstore import Partition
from featstore.errors import one_line
from featstore.schema import STATUS_FAILED, STATUS_OK
from pipeline.decoding.contract import VideoInfo
from pipeline.packed import Dataset, Shard
from pipeline.tars import DamagedTar, OpenTar, open_tar


@dataclass(frozen=True)
class EncodedVideo:
    """One video after the encoder.

    `features` float32 [V, F, D], raw projected embeddings; `frame_index` int64 [V, F] counted
    from zero; `pts` float64 [V, F] seconds.
    """

    info: VideoInfo
    features: npt.NDArray[np.float32]
    frame_index: npt.NDArray[np.int64]
    pts: npt.NDArray[np.float64]


class TarRows:
    """The rows of one tar while its videos are being encoded."""

    def __init__(
        self, tar: int, shard: Shard, dataset: Dataset, *, views: int, frames: int, dim: int
    ) -> None:
        """Open the tar and list its rows; raises `DamagedTar` when it is not the one packed."""
        self.tar = tar
        self.futures: deque[Future[EncodedVideo | str]] = deque()
        self.complete = False  # every sample has been handed out
        self.intact: Future[None]  # raises `DamagedTar` when the tar is not the one packed
        self.damage = ""  # of the tar: the partition is not written
        self._resources = ExitStack()
        path = dataset.shard_path(shard)
        self.archive: OpenTar = self._resources.enter_context(open_tar(path, shard.bytes))
        self.samples = self.archive.samples
        try:
            _require_packed(self.archive, dataset, shard)
        except DamagedTar:
            self.close()
            raise
        n = shard.rows
        bit = {name: 1 << i for i, name in enumerate(dataset.split_names)}
        listed = [(s.key, s.sidecar["label"], s.sidecar["splits"]) for s in self.samples]
        listed += [(f.key, f.label, f.splits) for f in shard.failed]
        # Every row starts as failed; a result turns it into one that is ok.
        self._keys = [key for key, _, _ in listed]
        self._labels = np.array([label for _, label, _ in listed], np.int32)
        self._splits = np.array([sum(bit[x] for x in splits) for *_, splits in listed], np.uint32)
        self._reasons = [""] * shard.samples + [one_line(f.reason) for f in shard.failed]
        self._status = np.full(n, STATUS_FAILED, np.uint8)
        self._num_frames = np.zeros(n, np.int32)
        self._fps = np.full(n, np.nan, np.float32)
        self._frame_index = np.full((n, views, frames), -1, np.int32)
        self._pts = np.full((n, views, frames), np.nan)
        self._features = np.full((n, views, frames, dim), np.nan, np.float16)
        self._next = 0

    def put(self, result: EncodedVideo | str) -> None:
        """Take the result of the next sample in the tar's order."""
        position = self._next
        self._next += 1
        if isinstance(result, str):
            self._reasons[position] = one_line(result)
            return
        self._status[position] = STATUS_OK
        self._num_frames[position] = result.info.num_frames
        self._fps[position] = result.info.fps
        self._frame_index[position] = result.frame_index
        self._pts[position] = result.pts
        self._features[position] = result.features

    def finish(self) -> Partition:
        """The partition, checked."""
        return Partition(
            key=self._keys,
            label=self._labels,
            num_frames=self._num_frames,
            fps=self._fps,
            status=self._status,
            splits=self._splits,
            reason=self._reasons,
            frame_index=self._frame_index,
            pts=self._pts,
            features=self._features,
        )

    def close(self) -> None:
        """Close the tar."""
        self._resources.close()


def _require_packed(archive: OpenTar, dataset: Dataset, shard: Shard) -> None:
    """Raise `DamagedTar` unless the tar's samples are those that `dataset.json` speaks of."""
    found = len(archive.samples)
    if found != shard.samples:
        raise DamagedTar.of(archive.path, f"holds {found} samples, {shard.samples} were packed")
    for sample in archive.samples:
        label, splits = sample.sidecar["label"], set(sample.sidecar["splits"])
        known = 0 <= label < len(dataset.class_names)
        if not known or splits != set(dataset.splits_of(sample.key)):
            raise DamagedTar.of(
                archive.path,
                f"and dataset.json do not agree on the class or splits of {sample.key!r}",
            )
