"""Tars through a pool of workers into the partitions of a store, in one process."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Final, Protocol

from featstore import Partition, StoreSchema
from featstore.errors import WorkError, one_line
from featstore.progress import ProgressSink, no_progress
from featstore.writing.shard_rows import FeatureRows
from pipeline.extraction.cpu_pool import VideoPool
from pipeline.extraction.rows import EncodedVideo, TarRows
from pipeline.tars.dataset import Dataset, Shard
from pipeline.tars.reading import DamagedTar
from pipeline.tars.tar_source import TarSource

# A long video must not keep the other workers waiting: the tars after its own go on, this many or
# as many as there may be videos in the pool. Each holds its rows (embeddings in memory, other tiers
# on the disk) and open files.
MIN_OPEN_TARS: Final = 4


class PartitionWriter(Protocol):
    """The part of a store's writer that an engine needs."""

    @property
    def schema(self) -> StoreSchema:
        """Sizes of the store."""
        ...

    def feature_rows(self, tar: int) -> FeatureRows:
        """Where large rows of one tar wait on the disk."""
        ...

    def write_partition(self, tar: int, partition: Partition) -> None:
        """Write the partition of one tar."""
        ...


@dataclass
class Totals:
    """What an engine did: videos and frames, partitions written, tars that cannot be used."""

    videos: int = 0
    frames: int = 0
    videos_short: int = 0  # had fewer frames than asked for: frames repeat
    done: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # one line per tar, naming it

    def add(self, other: Totals) -> None:
        """Add what another engine did."""
        self.videos += other.videos
        self.frames += other.frames
        self.videos_short += other.videos_short
        self.done += other.done
        self.damaged += other.damaged


def run_partitions(
    dataset: Dataset,
    shards: list[Shard],
    tars: Iterable[int],
    writer: PartitionWriter,
    pool: VideoPool,
    source: TarSource,
    progress: ProgressSink = no_progress,
    videos: int = 0,
) -> Totals:
    """Do the partitions `tars` (indices into `shards`); a damaged tar does not stop the others.

    `tars` is asked for the next one when there is room for it; `videos` is how many they hold, as
    far as the progress is to tell. Results go to their rows in any order, and a partition is
    written when its last row is in: what is in memory is bounded by the pool's window, not by the
    data.

    Raises `WorkError` when the encoder fails (its videos are not at fault), OSError when the disk
    is full. The pool is closed then; else it can be used again.
    """
    return _Run(dataset, shards, writer, pool, source, progress, videos).over(tars)


class _Run:
    def __init__(
        self,
        dataset: Dataset,
        shards: list[Shard],
        writer: PartitionWriter,
        pool: VideoPool,
        source: TarSource,
        progress: ProgressSink,
        videos: int,
    ) -> None:
        self.dataset = dataset
        self.shards = shards
        self.writer = writer
        self.pool = pool
        self.source = source
        self.progress = progress
        self.videos = videos
        self.totals = Totals()
        self.open: dict[int, TarRows] = {}
        self.in_pool = 0
        # (rows, position of the sample or None for the tar's hash, result)
        self.completed: SimpleQueue[
            tuple[TarRows, int | None, Future[EncodedVideo | str] | Future[None]]
        ] = SimpleQueue()

    def over(self, tars: Iterable[int]) -> Totals:
        self.progress(0, self.videos)
        # One thread reads tars ahead for their hash (under 1 % of what decoding takes): a tar that
        # was changed or mixed up with another must not give rows.
        hasher = ThreadPoolExecutor(1, "hash")
        try:
            for tar in tars:
                self._do(tar, hasher)
            while self.open:
                self._take()
        except BaseException:
            self.pool.close()  # before the tars it reads from
            raise
        finally:
            hasher.shutdown(wait=True, cancel_futures=True)
            for rows in self.open.values():
                rows.close()
                self.source.release(rows.shard)
        return self.totals

    def _do(self, tar: int, hasher: ThreadPoolExecutor) -> None:
        """Open a tar and hand out its samples, taking results as they come."""
        while len(self.open) >= max(MIN_OPEN_TARS, self.pool.window):
            self._take()
        shard = self.shards[tar]
        try:
            path = self.source.path(shard)
            schema, on_disk = self.writer.schema, self.writer.feature_rows
            rows = TarRows(tar, shard, self.dataset, path, schema, on_disk)
        except DamagedTar as error:
            self.totals.damaged.append(str(error))
            self.source.release(shard)
            return
        self.open[tar] = rows
        self._expect(rows, None, hasher.submit(rows.archive.require, shard.sha256))
        for position in range(len(rows.samples)):
            while self.in_pool >= self.pool.window:
                self._take()
            if rows.damage:
                break
            self._expect(rows, position, self.pool.submit(partial(rows.read, position)))
            self.in_pool += 1
        rows.handed_out = True
        if rows.finished:
            self._finish(rows)

    def _expect(
        self,
        rows: TarRows,
        position: int | None,
        future: Future[EncodedVideo | str] | Future[None],
    ) -> None:
        rows.waiting += 1
        future.add_done_callback(lambda done: self.completed.put((rows, position, done)))

    def _take(self) -> None:
        """Wait for the next result, keep it, and write the partition that it completes."""
        rows, position, future = self.completed.get()
        rows.waiting -= 1
        self.in_pool -= position is not None
        try:
            result = future.result()
        except DamagedTar as error:
            rows.damage = rows.damage or str(error)
        except (WorkError, RuntimeError) as error:
            # Torch's, such as out of memory: the videos are not at fault and must not be failed.
            raise WorkError(
                f"the encoder failed at {rows.samples[position or 0].key!r} "
                f"({one_line(error, 200)}): what is done is kept; run the same command again, "
                "perhaps with fewer --workers"
            ) from error
        else:
            if position is not None and result is not None:
                self._keep(rows, position, result)
        if rows.finished:
            self._finish(rows)

    def _keep(self, rows: TarRows, position: int, result: EncodedVideo | str) -> None:
        if rows.put(position, result) and isinstance(result, EncodedVideo):
            self.totals.frames += result.frame_index.size
            self.totals.videos_short += result.info.num_frames < result.frame_index.shape[1]
        self.totals.videos += 1
        self.progress(self.totals.videos, self.videos)

    def _finish(self, rows: TarRows) -> None:
        if rows.damage:
            self.totals.damaged.append(rows.damage)
        else:
            self.writer.write_partition(rows.tar, rows.finish())
            self.totals.done.append(rows.tar)
        rows.close()
        self.source.release(rows.shard)
        del self.open[rows.tar]
