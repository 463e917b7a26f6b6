"""Packs video files into numbered WebDataset tars: the original bytes and a JSON sidecar of each.

No listed video is lost. A tar is written under a temporary name and renamed; then its record is
written into `.packing/`. A later run keeps every tar that has a record. `failures.csv` and
`dataset.json` are made from the records alone, so an interruption does not change the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from featstore.commands import remember_packing
from featstore.errors import UserError, WorkError, counted_of
from featstore.files.durable import durable_file, sweep_partials
from featstore.files.key_lists import Excluded
from featstore.files.locks import exclusive
from featstore.files.machine import usable_cores
from featstore.progress import ProgressSink, no_progress
from featstore.remote.urls import is_url
from featstore.workspace import NAME_PATTERN
from pipeline.annotations.class_names import USUAL_NAMING, Naming
from pipeline.annotations.held_out import held_out
from pipeline.annotations.known_sets import read_listing, videos_folder
from pipeline.annotations.listing import Listing
from pipeline.annotations.video_folder import extension
from pipeline.tars.dataset import (
    DATASET_FILE,
    FAILURE_COLUMNS,
    FAILURES_FILE,
    NO_LABEL,
    TARS_FOLDER,
    Dataset,
    FailedVideo,
    Tar,
    class_words,
    load_dataset,
    write_failures,
)
from pipeline.tars.fetching import VideoFetcher
from pipeline.tars.finished import (
    RECORDS_FOLDER,
    HashingStream,
    TarRecord,
    VideoOutcome,
    excluded_before,
    read_record,
    remember_excluded,
)
from pipeline.tars.identical import HashedVideo, identical_videos
from pipeline.tars.plan import (
    PLAN_FILE,
    PlannedTar,
    PlannedVideo,
    TarPlan,
    continued,
    differences,
    make_plan,
    packed_classes,
    packed_splits,
    read_plan,
    with_earlier_keys,
)
from pipeline.tars.probing import in_order, probe
from pipeline.tars.summary import PackSummary

logger = logging.getLogger(__name__)
_Sample = dict[str, str | bytes]


def pack(
    videos_dir: Path | None,
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
    unlabelled: bool = False,
    exclude: Path | None = None,
    hold_out: float | None = None,
    asked: Sequence[str] = (),
    multi_label: str = "",
    progress: ProgressSink = no_progress,
) -> PackSummary:
    """Pack the videos of a data set into `dataset_dir`, or continue what an earlier run began.

    Files that are missing, unreadable or undecodable are listed in `failures.csv` and in
    `dataset.json` and are in no tar. If their share is above `max_failures`, the summary has
    `too_many_failures`. With `append`, videos, classes and splits that are new since the data set
    was packed go into new tars; earlier tars stay as they are. `naming` decides on class names;
    with `unlabelled` there are none; `multi_label` as `read_listing` takes it. The videos whose
    keys the list `exclude` names (`featstore.files.key_lists`) are left out; classes keep their
    numbers. `hold_out` is the share of videos without splits to test on
    (`pipeline.annotations.held_out`). Videos that a list names by URL are fetched; for a list of
    them `videos_dir` may be None. `asked` are the words of the command, for messages that name it.
    The same input gives the same bytes, whatever the number of `workers` (threads). Memory holds
    the bytes of `workers` + 1 videos at a time.
    Raises UserError for wrong input and for input that changed since packing began, WorkError
    when another process packs the same data set and when tars cannot be written.
    """
    began = time.monotonic()
    check_arguments(name, workers, max_failures, samples_per_shard)
    plan_file = dataset_dir / RECORDS_FOLDER / PLAN_FILE
    listing = read_listing(
        *(name, videos_dir, annotations, class_names_file),
        leave_out=dataset_dir,
        naming=naming,
        unlabelled=unlabelled,
        kept=packed_classes(plan_file),
        multi_label=multi_label,
    )
    videos_dir = videos_folder(videos_dir, annotations)
    excluded = None if exclude is None else leave_out(listing, exclude)
    if hold_out is not None:
        listing = held_out(listing, hold_out, packed_splits(plan_file))
    plan = make_plan(
        *(listing, videos_dir),
        name=name,
        samples_per_shard=samples_per_shard,
        seed=seed,
        names_as=naming.names_as,
    )
    notes, left_out = list(listing.notes), listing.left_out
    del listing  # as large as the plan
    try:
        lock, work = dataset_dir / RECORDS_FOLDER / "lock", f"packing into {dataset_dir}"
        with exclusive(lock, work, keep=plan_file.is_file):
            packing = _Packing(plan, videos_dir, dataset_dir)
            notes += packing.settle_plan(append)
            remember_packing(dataset_dir, asked)
            remember_excluded(dataset_dir / RECORDS_FOLDER, excluded)
            plan = packing.plan
            pending = [tar for tar in plan.tars if tar.file not in packing.records]
            packing.write_tars(pending, workers or usable_cores(), progress)
            dataset, failures, written = packing.finish()
            identical = identical_videos(packing.hashed_videos())
    except OSError as error:
        where = error.filename or dataset_dir
        raise WorkError(
            f"cannot write {str(where)!r}: {error.strerror or error}; fix it and run the same "
            "command again, finished tars are kept"
        ) from error
    skipped = len(plan.tars) - len(pending)
    if not pending and not written:
        notes.append(f"data set {name!r} is packed already: nothing to do")
        logger.info("%s", notes[-1])
    elif skipped:
        before = counted_of(skipped, len(plan.tars), "tar", "was", "were")
        notes.append(f"{before} finished before and kept")
        logger.info("%s", notes[-1])
    return PackSummary.of(
        dataset,
        failures,
        max_failures,
        shards_written=len(pending),
        shards_skipped=skipped,
        seconds=time.monotonic() - began,
        notes=tuple(notes),
        identical=identical,
        excluded=excluded,
        left_out=left_out,
    )


def leave_out(listing: Listing, exclude: Path) -> Excluded:
    """Take the videos that a list names out of a listing; return which ones.

    Raises UserError if the list cannot be read or names all videos.
    """
    listed = [video.key for video in (*listing.records, *listing.missing)]
    excluded = Excluded.of(exclude, listed)
    excluded.require_some_of(listed, "videos")
    gone = frozenset(excluded.keys)
    listing.records[:] = (video for video in listing.records if video.key not in gone)
    listing.missing[:] = (video for video in listing.missing if video.key not in gone)
    return excluded


class _Packing:
    """One run of packing, inside the lock: its plan, the records of finished tars, its work."""

    def __init__(self, plan: TarPlan, videos_dir: Path, dataset_dir: Path) -> None:
        self.plan = plan
        self._videos_dir = videos_dir
        self._dataset_dir = dataset_dir
        self._records_dir = dataset_dir / RECORDS_FOLDER
        sweep_partials(dataset_dir)
        self.records: dict[str, TarRecord] = {}
        self._fetcher = VideoFetcher()

    def settle_plan(self, append: bool = False) -> list[str]:
        """Write the plan, or compare it with an earlier one and load the records of finished tars.

        With `append`, the plan may have videos, classes and splits that the earlier one lacks.
        Returns notes.

        Raises UserError when the input changed, and when the folder holds something else.
        """
        path = self._records_dir / PLAN_FILE
        if not path.exists():
            packed = self._dataset_dir.glob(f"{TARS_FOLDER}/*.tar")
            if (self._dataset_dir / DATASET_FILE).exists() or any(packed):
                raise UserError(
                    f"{str(self._dataset_dir)!r} holds a data set without the records of its "
                    f"packing: {self._remedy()}"
                )
            self.plan.write(path)
            return []
        earlier = read_plan(path)
        self.plan = with_earlier_keys(earlier, self.plan)
        if append or earlier.last_batch:
            self.plan = continued(earlier, self.plan)
        for tar in earlier.tars:
            record = read_record(self._record_path(tar), tar)
            if record is not None:
                self.records[tar.file] = record
        changes = differences(earlier, self.plan, self._changed_content(), may_grow=append)
        added = {v.key for v in self.plan.videos} - {v.key for v in earlier.videos}
        back = excluded_before(self._records_dir, added)
        if changes:
            grown = len(changes) == 1 and " added (" in changes[0]
            remedy = "pack new videos into new tars with --append, or " if grown else ""
            if back:
                remedy = f"{back}: give the list again, or {remedy}"
            raise UserError(
                f"the input of data set {self.plan.name!r} has changed since it was packed: "
                f"{'; '.join(changes)}; {remedy}{self._remedy()}"
            )
        if earlier.tars != self.plan.tars:
            self.plan.write(path)  # files were copied: same content, new times
        for tar in self.plan.tars:
            record, path = self.records.get(tar.file), self._tar_path(tar)
            if record and not (path.is_file() and path.stat().st_size == record.bytes):
                logger.warning("%s has changed since it was written and is packed again", tar.file)
                del self.records[tar.file]
        return [f"{back}, which are packed now"] if back else []

    def write_tars(
        self, pending: Sequence[PlannedTar], workers: int, progress: ProgressSink
    ) -> None:
        """Write the tars that have no record yet, in order; the record of each follows it."""
        if not pending:
            return
        from webdataset import TarWriter  # loads torch: not before the input was found right

        # dataset.json means that packing is complete, so it is removed before anything changes.
        (self._dataset_dir / DATASET_FILE).unlink(missing_ok=True)
        total = sum(len(tar.videos) for tar in self.plan.tars)
        done = total - sum(len(tar.videos) for tar in pending)
        failed = 0
        pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
        try:
            videos = (video for tar in pending for video in tar.videos)
            outcomes = in_order(pool, self._read_video, videos, window=workers + 1)
            for tar in pending:
                finished: list[VideoOutcome] = []
                with durable_file(self._tar_path(tar)) as file:
                    stream = HashingStream(file)
                    with TarWriter(stream, mtime=0, encoder=False) as archive:
                        for outcome, sample in islice(outcomes, len(tar.videos)):
                            if sample is not None:
                                archive.write(sample)
                            failed += sample is None
                            finished.append(outcome)
                            done += 1
                            progress(done, total, failed=failed, shard=tar.file)
                    size = file.tell()
                record = TarRecord(size, stream.hash.hexdigest(), tuple(finished))
                record.write(self._record_path(tar))
                self.records[tar.file] = record
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def finish(self) -> tuple[Dataset, list[dict[str, Any]], bool]:
        """Write `failures.csv`, then `dataset.json`, unless both are there and up to date.

        Returns the data set, the lines of `failures.csv`, and whether they were written now.
        """
        tars, failures = [], []
        keys: dict[str, list[str]] = {split: [] for split in self.plan.split_names}
        for planned in self.plan.tars:
            record = self.records[planned.file]
            failed = []
            for video, (key, _, reason) in zip(planned.videos, record.videos, strict=True):
                for split in video.splits:
                    keys[split].append(key)
                if reason:
                    words = "" if video.label == NO_LABEL else self.plan.words[video.label]
                    splits, spans = video.splits, video.spans
                    failed.append(FailedVideo(key, video.label, words, splits, reason, spans))
                    said = class_words(self.plan.words, video.label, spans)
                    line = (key, video.path, said, splits, reason)
                    failures.append(dict(zip(FAILURE_COLUMNS, line, strict=True)))
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
            multi_label=self.plan.multi_label,
        )
        failures.sort(key=itemgetter("key"))
        if (self._dataset_dir / FAILURES_FILE).is_file():
            with suppress(UserError, WorkError):
                if load_dataset(self._dataset_dir).fingerprint == dataset.fingerprint:
                    return dataset, failures, False
        write_failures(self._dataset_dir, failures)
        dataset.write()
        return dataset, failures, True

    def hashed_videos(self) -> Iterator[HashedVideo]:
        """Yield every video that is in a tar, with the hash of its bytes."""
        for planned in self.plan.tars:
            outcomes = self.records[planned.file].videos
            for video, (key, sha256, reason) in zip(planned.videos, outcomes, strict=True):
                if sha256 and not reason:
                    words = class_words(self.plan.words, video.label, video.spans)
                    yield HashedVideo(key, video.path, words, video.splits, sha256)

    def _read_video(self, video: PlannedVideo) -> tuple[VideoOutcome, _Sample | None]:
        """Read and probe one video; a failure gives a reason and no sample.

        Raises UserError if the file has changed since the plan was made.
        """
        if video.reason:
            return VideoOutcome(video.key, None, video.reason), None
        if is_url(video.path):
            fetched = self._fetcher.fetch(video.path)
            if isinstance(fetched, str):
                return VideoOutcome(video.key, None, fetched), None
            return self._probed(video, fetched)
        try:
            with open(self._videos_dir / video.path, "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except OSError as error:
            reason = f"the file cannot be read: {error.strerror}"
            return VideoOutcome(video.key, None, reason), None
        if (status.st_size, status.st_mtime_ns) != (video.size, video.mtime_ns):
            raise UserError(
                f"{video.path!r} changed while it was being packed: wait until the videos are "
                f"complete; {self._remedy()}"
            )
        return self._probed(video, data)

    def _probed(self, video: PlannedVideo, data: bytes) -> tuple[VideoOutcome, _Sample | None]:
        digest = hashlib.sha256(data).hexdigest()
        facts, reason = probe(data, video.path)
        outcome = VideoOutcome(video.key, digest, reason)
        return outcome, None if reason else self._sample(video, data, digest, facts)

    def _sample(
        self, video: PlannedVideo, data: bytes, digest: str, facts: dict[str, Any]
    ) -> _Sample:
        """Return the video and its sidecar for the tar."""
        labelled = video.label != NO_LABEL
        sidecar = {
            "key": video.key,
            "class_name": self.plan.words[video.label] if labelled else "",
            "raw_class_name": self.plan.class_names[video.label] if labelled else "",
            "label": video.label,
            **({"spans": [s.to_json() for s in video.spans]} if self.plan.multi_label else {}),
            **facts,
            "source_path": video.path,
            "sha256": digest,
            "splits": video.splits,
        }
        text = json.dumps(sidecar, ensure_ascii=False, allow_nan=False)
        return {
            "__key__": video.key,
            extension(video.path) or "video": data,
            "json": text.encode(),
        }

    def _changed_content(self) -> Callable[[str], bool]:
        """Return a function that says whether a video differs from the copy in its finished tar.

        It returns False for a video that is in no finished tar.
        """
        hashes = {
            outcome.key: outcome.sha256
            for record in self.records.values()
            for outcome in record.videos
            if outcome.sha256 is not None
        }
        paths = {video.key: video.path for video in self.plan.videos}

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

    def _tar_path(self, tar: PlannedTar) -> Path:
        return self._dataset_dir / TARS_FOLDER / tar.file

    def _record_path(self, tar: PlannedTar) -> Path:
        return self._records_dir / f"{tar.file.removesuffix('.tar')}.json"


def check_arguments(
    name: str, workers: int | None, max_failures: float, samples_per_shard: int = 1
) -> None:
    """Raise UserError for an argument of packing that cannot be meant."""
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"data set name {name!r}: use letters, digits and . _ + - only, not beginning "
            "with . + or -, at most 128 characters"
        )
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: it must be at least 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: it must be at least 1")
    if not 0 <= max_failures <= 1:
        raise UserError(f"--max-failures {max_failures}: it is a fraction between 0 and 1")
