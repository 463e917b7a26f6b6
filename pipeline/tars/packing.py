"""Video files to numbered WebDataset tars: original bytes, a JSON sidecar each, nothing lost.

A tar is written under a temporary name and renamed, then its record is written beside it in
`.packing/`; a later run keeps every tar that has a record. `failures.csv` and `dataset.json` are
made from the records alone, so an interrupted and continued packing ends as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from webdataset import TarWriter

from featstore.errors import UserError, WorkError, one_line
from featstore.files.durable import durable_file, sweep_partials
from featstore.files.machine import usable_cores
from featstore.progress import ProgressSink, no_progress
from featstore.workspace import NAME_PATTERN
from pipeline.annotations.class_names import USUAL_NAMING, Naming
from pipeline.annotations.known_sets import read_listing
from pipeline.annotations.video_folder import extension
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.tars.dataset import (
    DATASET_FILE,
    FAILURES_FILE,
    TARS_FOLDER,
    Dataset,
    FailedSample,
    FailedVideo,
    Tar,
    load_dataset,
    write_failures,
)
from pipeline.tars.finished import (
    RECORDS_FOLDER,
    HashingStream,
    TarRecord,
    VideoOutcome,
    packing_lock,
    read_record,
    write_record,
)
from pipeline.tars.plan import (
    PlannedTar,
    PlannedVideo,
    TarPlan,
    continued,
    differences,
    make_plan,
    read_plan,
)

__all__ = [
    "Dataset",
    "FailedSample",
    "FailedVideo",
    "PackSummary",
    "Tar",
    "load_dataset",
    "pack",
]

logger = logging.getLogger(__name__)

_PLAN_FILE = "plan.json"
_SHOWN_FAILURES = 5

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What one run of `pack` did, and what the data set holds now.

    `videos_*`, `shards` and `bytes` (of all tars) are the data set's; `shards_written`,
    `shards_skipped` and `seconds` are this run's. `failures` are the first few.
    """

    dataset: str
    folder: str
    videos_listed: int
    videos_packed: int
    videos_failed: int
    shards: int
    shards_written: int
    shards_skipped: int
    classes: int
    bytes: int
    seconds: float
    too_many_failures: bool
    failures: tuple[FailedVideo, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The summary as strict JSON values."""
        value = asdict(self)
        value["failures"] = [
            {**asdict(failed), "splits": list(failed.splits)} for failed in self.failures
        ]
        value["notes"] = list(self.notes)
        return value


def pack(
    videos_dir: Path,
    name: str,
    dataset_dir: Path,
    *,
    annotations: Path | None = None,
    class_names_file: Path | None = None,
    samples_per_shard: int = 256,
    seed: int = 0,
    workers: int | None = None,
    max_failures: float = 0.05,
    append: bool = False,
    naming: Naming = USUAL_NAMING,
    progress: ProgressSink = no_progress,
) -> PackSummary:
    """Pack the videos of a data set into `dataset_dir`, or continue, or find it finished.

    Files that are missing, unreadable or undecodable are listed in `failures.csv` and in
    `dataset.json` and are in no tar; a share above `max_failures` sets `too_many_failures`.
    `append` takes videos, classes and splits that the data set did not have when it was packed
    into new tars, and leaves the earlier ones as they are. `naming` is about class names.
    The same input gives the same bytes, whatever the number of `workers` (threads). Memory holds
    the bytes of `workers` + 1 videos at a time.
    Raises UserError for wrong input and for input that changed since packing began, WorkError
    when another process packs the same data set and when tars cannot be written.
    """
    began = time.monotonic()
    _check_arguments(name, samples_per_shard, workers, max_failures)
    listing = read_listing(
        *(name, videos_dir, annotations, class_names_file), leave_out=dataset_dir, naming=naming
    )
    plan = make_plan(
        *(listing, videos_dir),
        name=name,
        samples_per_shard=samples_per_shard,
        seed=seed,
        naming=naming,
    )
    notes = list(listing.notes)
    del listing  # as large as the plan
    try:
        with packing_lock(dataset_dir):
            packing = _Packing(plan, videos_dir, dataset_dir)
            packing.settle_plan(append)
            plan = packing.plan
            pending = [tar for tar in plan.tars if tar.file not in packing.records]
            packing.write_tars(pending, workers or usable_cores(), progress)
            dataset, failures, written = packing.finish()
    except OSError as error:
        where = error.filename or dataset_dir
        raise WorkError(
            f"cannot write {str(where)!r}: {error.strerror or error}; mend it and run the same "
            "command again, finished tars are kept"
        ) from error
    skipped = len(plan.tars) - len(pending)
    if not pending and not written:
        notes.append(f"data set {name!r} is packed already: nothing to do")
        logger.info("%s", notes[-1])
    elif skipped:
        notes.append(f"{skipped} of {len(plan.tars)} tars were finished before and are kept")
        logger.info("%s", notes[-1])
    return PackSummary(
        dataset=name,
        folder=str(dataset_dir),
        videos_listed=dataset.listed,
        videos_packed=dataset.packed,
        videos_failed=len(failures),
        shards=len(plan.tars),
        shards_written=len(pending),
        shards_skipped=skipped,
        classes=len(dataset.class_names),
        bytes=sum(tar.bytes for tar in dataset.tars),
        seconds=time.monotonic() - began,
        too_many_failures=len(failures) > max_failures * dataset.listed,
        failures=tuple(failures[:_SHOWN_FAILURES]),
        notes=tuple(notes),
    )


class _Packing:
    """One run of packing inside the lock: the plan, the records of finished tars, the work."""

    def __init__(self, plan: TarPlan, videos_dir: Path, dataset_dir: Path) -> None:
        self.plan = plan
        self._videos_dir = videos_dir
        self._dataset_dir = dataset_dir
        self._records_dir = dataset_dir / RECORDS_FOLDER
        # Damage inside a file is for extraction to judge (--strict-decode): packing counts frames
        # and leaves out what gives none.
        self._decoder = PyAVDecoder("never")
        sweep_partials(dataset_dir)
        self.records: dict[str, TarRecord] = {}

    def settle_plan(self, append: bool = False) -> None:
        """Keep a new plan, or check that an earlier one is equal, and load finished tars' records.

        With `append` the earlier one may be equal but for videos that are new.

        Raises UserError when the input changed, and when the folder holds something else.
        """
        path = self._records_dir / _PLAN_FILE
        if not path.exists():
            if (self._dataset_dir / DATASET_FILE).exists() or self._tars():
                raise UserError(
                    f"{str(self._dataset_dir)!r} holds a data set without the records of its "
                    f"packing: {self._remedy()}"
                )
            self.plan.write(path)
            return
        earlier = read_plan(path)
        if append or earlier.last_batch:
            self.plan = continued(earlier, self.plan)
        for tar in earlier.tars:
            record = read_record(self._record_path(tar), tar)
            if record is not None:
                self.records[tar.file] = record
        changes = differences(earlier, self.plan, self._changed_content(), may_grow=append)
        if changes:
            grown = len(changes) == 1 and " added (" in changes[0]
            remedy = "take new videos into new tars with --append, or " if grown else ""
            raise UserError(
                f"the input of data set {self.plan.name!r} is not what it was packed from: "
                f"{'; '.join(changes)}; {remedy}{self._remedy()}"
            )
        if earlier.tars != self.plan.tars:
            self.plan.write(path)  # copied files: same content, other times
        for tar in self.plan.tars:
            record = self.records.get(tar.file)
            if record is not None and not _has_size(self._tar_path(tar), record.bytes):
                logger.warning("%s is not as it was written and is packed again", tar.file)
                del self.records[tar.file]

    def write_tars(
        self, pending: Sequence[PlannedTar], workers: int, progress: ProgressSink
    ) -> None:
        """Write the tars that have no record yet, in order, and each one's record after it."""
        if not pending:
            return
        # dataset.json says that everything is there, so it goes before anything changes.
        (self._dataset_dir / DATASET_FILE).unlink(missing_ok=True)
        total = sum(len(tar.videos) for tar in self.plan.tars)
        done = total - sum(len(tar.videos) for tar in pending)
        failed = 0
        pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
        try:
            videos = (video for tar in pending for video in tar.videos)
            outcomes = _in_order(pool, self._read_video, videos, window=workers + 1)
            for tar in pending:
                finished: list[VideoOutcome] = []
                with durable_file(self._tar_path(tar)) as file:
                    stream = HashingStream(file)
                    with TarWriter(stream, mtime=0, encoder=False) as archive:
                        for outcome in islice(outcomes, len(tar.videos)):
                            if outcome.sample is not None:
                                archive.write(outcome.sample)
                            failed += outcome.sample is None
                            finished.append(replace(outcome, sample=None))
                            done += 1
                            progress(done, total, failed=failed, shard=tar.file)
                record = TarRecord(stream.bytes, stream.sha256(), tuple(finished))
                write_record(self._record_path(tar), record)
                self.records[tar.file] = record
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def finish(self) -> tuple[Dataset, list[FailedVideo], bool]:
        """Write `failures.csv`, then `dataset.json`, unless they are there; whether it wrote."""
        tars, failures = [], []
        keys: dict[str, list[str]] = {split: [] for split in self.plan.split_names}
        for planned in self.plan.tars:
            record = self.records[planned.file]
            failed = []
            for video, outcome in zip(planned.videos, record.outcomes, strict=True):
                for split in video.splits:
                    keys[split].append(video.key)
                if outcome.reason:
                    words = self.plan.words[video.label]
                    failed.append(
                        FailedSample(video.key, video.label, words, video.splits, outcome.reason)
                    )
                    failures.append(
                        FailedVideo(video.key, video.path, words, video.splits, outcome.reason)
                    )
            tars.append(
                Tar(
                    file=planned.file,
                    split=planned.split,
                    samples=len(planned.videos) - len(failed),
                    failed=tuple(failed),
                    bytes=record.bytes,
                    sha256=record.sha256,
                )
            )
        dataset = Dataset(
            folder=self._dataset_dir,
            name=self.plan.name,
            class_names=self.plan.words,
            raw_class_names=self.plan.class_names,
            split_names=self.plan.split_names,
            splits_disjoint=self.plan.splits_disjoint,
            tars=tuple(tars),
            keys_by_split={split: tuple(sorted(group)) for split, group in keys.items()},
            label_map=self.plan.label_map,
        )
        failures.sort(key=lambda video: video.key)
        if self._is_written(dataset):
            return dataset, failures, False
        write_failures(self._dataset_dir, failures)
        dataset.write()
        return dataset, failures, True

    def _is_written(self, dataset: Dataset) -> bool:
        if not (self._dataset_dir / FAILURES_FILE).is_file():
            return False
        try:
            return load_dataset(self._dataset_dir).fingerprint == dataset.fingerprint
        except (UserError, WorkError):
            return False

    def _read_video(self, video: PlannedVideo) -> VideoOutcome:
        """Read and probe one video; every way to fail becomes a reason."""
        if video.reason:
            return VideoOutcome(video.key, None, video.reason)
        try:
            with open(self._videos_dir / video.path, "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except OSError as error:
            return VideoOutcome(video.key, None, f"the file cannot be read: {error.strerror}")
        if (status.st_size, status.st_mtime_ns) != (video.size, video.mtime_ns):
            raise UserError(
                f"{video.path!r} changed while it was being packed: wait until the videos are "
                f"complete; {self._remedy()}"
            )
        digest = hashlib.sha256(data).hexdigest()
        if not data:
            return VideoOutcome(video.key, digest, "the file is empty (zero bytes)")
        try:
            info = self._decoder.probe(data)
            sidecar = {
                "key": video.key,
                "class_name": self.plan.words[video.label],
                "raw_class_name": self.plan.class_names[video.label],
                "label": video.label,
                "num_frames": info.num_frames,
                "fps": info.fps,
                "width": info.width,
                "height": info.height,
                "duration_s": info.duration_s,
                "codec": info.codec,
                "source_path": video.path,
                "sha256": digest,
                "splits": list(video.splits),
            }
            text = json.dumps(sidecar, ensure_ascii=False, allow_nan=False)
        except DecodeError as error:
            return VideoOutcome(video.key, digest, one_line(error.reason))
        except Exception as error:
            # One file must not stop hundreds of thousands; it is recorded, not passed over.
            logger.exception("unexpected error in %s", video.path)
            return VideoOutcome(video.key, digest, one_line(f"{type(error).__name__}: {error}"))
        if info.num_frames < 1:
            return VideoOutcome(video.key, digest, "the video has no frames")
        sample: dict[str, str | bytes] = {
            "__key__": video.key,
            extension(video.path) or "video": data,
            "json": text.encode(),
        }
        return VideoOutcome(video.key, digest, "", sample)

    def _changed_content(self) -> Callable[[str], bool]:
        """Whether a video's content differs from what is in its finished tar.

        Videos that are in no finished tar have nothing they could differ from.
        """
        hashes = {
            outcome.key: outcome.sha256
            for record in self.records.values()
            for outcome in record.outcomes
            if outcome.sha256 is not None
        }
        paths = {video.key: video.path for video in self.plan.videos()}

        def changed(key: str) -> bool:
            if key not in hashes:
                return False
            try:
                with open(self._videos_dir / paths[key], "rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest() != hashes[key]
            except OSError:
                return True

        return changed

    def _remedy(self) -> str:
        return f"use another --dataset name or delete {str(self._dataset_dir)!r}"

    def _tars(self) -> list[Path]:
        return list((self._dataset_dir / TARS_FOLDER).glob("*.tar"))

    def _tar_path(self, tar: PlannedTar) -> Path:
        return self._dataset_dir / TARS_FOLDER / tar.file

    def _record_path(self, tar: PlannedTar) -> Path:
        return self._records_dir / f"{tar.file.removesuffix('.tar')}.json"


def _in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    window: int,
) -> Iterator[_Result]:
    """Results in the order of `items`, with at most `window` of them begun and not yet taken."""
    begun: deque[Future[_Result]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= window:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_arguments(
    name: str, samples_per_shard: int, workers: int | None, max_failures: float
) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"data set name {name!r}: use letters, digits and . _ + - only, not beginning "
            "with . + or -, at most 128"
        )
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: it must be at least 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: it must be at least 1")
    if not 0 <= max_failures <= 1:
        raise UserError(f"--max-failures {max_failures}: it is a fraction between 0 and 1")
