"""Runs tars through a pool of workers into the partitions of a store, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Final

from featstore.errors import WorkError, one_line
from featstore.opening import AnyWriter
from featstore.progress import ProgressSink
from pipeline.extraction.cpu_pool import EncodedVideo, VideoPool
from pipeline.extraction.request import Totals
from pipeline.extraction.rows import TarRows
from pipeline.tars.dataset import Dataset, Tar
from pipeline.tars.reading import DamagedTar
from pipeline.tars.sources import TarSource

# A long video must not keep the other workers waiting, so later tars are opened meanwhile: this
# many, or as many as the pool may hold videos. Each open tar holds its rows (embeddings in memory,
# other tiers on the disk) and open files.
MIN_OPEN_TARS: Final = 4


@dataclass(eq=False)
class Engine:
    """Does partitions with a pool of workers; a damaged tar does not stop the others.

    Results go to their rows in any order, and a partition is written when its last row is in. So
    the memory needed is bounded by the pool's window, not by the data.
    """

    dataset: Dataset
    tars: Sequence[Tar]  # of the store, in the order of its partitions
    writer: AnyWriter
    pool: VideoPool
    source: TarSource
    progress: ProgressSink
    videos: int = field(default=0, init=False)  # how many are to be done
    totals: Totals = field(default_factory=Totals, init=False)
    open: dict[int, TarRows] = field(default_factory=dict, init=False)
    in_pool: int = field(default=0, init=False)
    # (rows, position of the sample or None for the tar's hash, result)
    completed: SimpleQueue[
        tuple[TarRows, int | None, Future[EncodedVideo | str] | Future[None]]
    ] = field(default_factory=SimpleQueue, init=False)

    def run(self, numbers: Sequence[int]) -> Totals:
        """Do the partitions `numbers`. Call this only once for each engine.

        Raises `WorkError` if the encoder fails (the videos are not at fault), OSError if the disk
        is full. The pool is closed after an error; otherwise it can be used again.
        """
        self.source.open_order([self.tars[number] for number in numbers])
        self.videos = sum(self.tars[number].samples for number in numbers)
        self.progress(0, self.videos)
        # One thread reads tars ahead for their hash (under 1 % of what decoding takes): a tar that
        # was changed or mixed up with another must not give rows.
        hasher = ThreadPoolExecutor(1, "hash")
        try:
            for number in numbers:
                self._do(number, hasher)
            while self.open:
                self._take()
        except BaseException:
            self.pool.close()  # before the tars it reads from
            raise
        finally:
            hasher.shutdown(wait=True, cancel_futures=True)
            for rows in self.open.values():
                rows.close()
                self.source.release(rows.tar)
        return self.totals

    def _do(self, number: int, hasher: ThreadPoolExecutor) -> None:
        """Open a tar and hand out its samples, taking results as they come."""
        while len(self.open) >= max(MIN_OPEN_TARS, self.pool.window):
            self._take()
        tar = self.tars[number]
        try:
            path = self.source.path(tar)
            schema, on_disk = self.writer.schema, self.writer.feature_rows
            rows = TarRows(number, tar, self.dataset, path, schema, on_disk)
        except DamagedTar as error:
            self.totals.damaged.append(str(error))
            self.source.release(tar)
            return
        self.open[number] = rows
        self._expect(rows, None, hasher.submit(rows.archive.require, tar.sha256))
        for position in range(len(rows.samples)):
            while self.in_pool >= self.pool.window:
                self._take()
            if rows.damage:
                break
            self._expect(rows, position, self.pool.submit(partial(rows.read, position)))
            self.in_pool += 1
        rows.handed_out = True
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
        """Wait for the next result and keep it."""
        rows, position, future = self.completed.get()
        rows.waiting -= 1
        self.in_pool -= position is not None
        try:
            result = future.result()
        except DamagedTar as error:
            rows.damage = rows.damage or str(error)
        except (WorkError, RuntimeError) as error:
            # Torch ran out of memory, for example: the video is not at fault and must not fail.
            raise WorkError(
                f"the encoder failed at {rows.samples[position or 0].key!r} "
                f"({one_line(error, 200)}): what is done is kept; run the same command again, "
                "perhaps with fewer --workers"
            ) from error
        else:
            if position is not None and result is not None:
                if rows.put(position, result) and isinstance(result, EncodedVideo):
                    self.totals.frames += result.frame_index.size
                    self.totals.videos_short += result.info.num_frames < result.frame_index.shape[1]
                    self.totals.videos_cut += result.info.leading_pictures > 0
                    self.totals.videos_resized += result.info.other_sizes > 0
                self.totals.videos += 1
                self.progress(self.totals.videos, self.videos)
        self._finish(rows)

    def _finish(self, rows: TarRows) -> None:
        """Write the partition when its last row is in."""
        if rows.waiting or not rows.handed_out:
            return
        if rows.damage:
            self.totals.damaged.append(rows.damage)
        else:
            self.writer.write_partition(rows.number, rows.finish())
            self.totals.done.append(rows.number)
        rows.close()
        self.source.release(rows.tar)
        del self.open[rows.number]
