"""Tars in, store partitions out: decode chosen frames, preprocess, encode, write, resume.

Each worker thread decodes, preprocesses and encodes its own videos with one torch thread. Measured
on two cores this reaches 0.95 to 1.0 of what decoding and encoding allow when they share the cores;
one multi-threaded encoder fed by a decoding thread reached half of that.

Letters: V views (one clip in one crop each, crop-major then clip), F frames of a view, D embedding.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featstore import ClassText, Partition, Provenance, StoreSchema, StoreWriter, open_store
from featstore.errors import UserError, WorkError, one_line
from featstore.progress import ProgressSink, no_progress
from featstore.schema import STATUS_FAILED, STATUS_OK
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.contract import DecodeError, Decoder, Source, VideoInfo
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.machine import usable_cores
from pipeline.packed import Dataset, Shard, load_dataset
from pipeline.prompts import sentences
from pipeline.sampling import Sampling
from pipeline.tars import OpenTar, TarSample, open_tar

logger = logging.getLogger(__name__)

# Larger batches are not faster on a core (measured 8 to 64 frames), only larger in memory.
ENCODE_BATCH = 16
# Videos handed out per worker before the oldest result is taken: keeps workers busy while a
# partition is written, and bounds memory by workers instead of by data.
LOOKAHEAD = 3


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


def encode_video(
    source: Source, decoder: Decoder, encoder: Encoder, sampling: Sampling, crops: int = 1
) -> EncodedVideo:
    """Decode the frames that `sampling` chooses, crop, and encode them.

    The one path from video to embeddings: extraction and prediction both use it. Views are ordered
    crop-major, then clip. Raises `DecodeError`.
    """
    info, frames, seconds = decoder.decode_with_info(
        source, lambda found: sampling.indices(found.num_frames).reshape(-1)
    )
    indices = sampling.indices(info.num_frames)
    clips, per_clip = indices.shape
    batches = [
        encoder.encode_pixels(encoder.preprocessing.crops(part, crops).flatten(0, 1)).reshape(
            crops, len(part), -1
        )
        for part in np.split(frames, range(ENCODE_BATCH, len(frames), ENCODE_BATCH))
    ]
    features = torch.cat(batches, dim=1).reshape(crops * clips, per_clip, -1)
    return EncodedVideo(
        info,
        features.float().cpu().numpy(),
        np.tile(indices, (crops, 1)),
        np.tile(seconds.reshape(clips, per_clip), (crops, 1)),
    )


def encoder_label(spec: str) -> str:
    """Short name of an encoder for a store's file name: its folder's or file's name, or `spec`."""
    path = Path(spec).expanduser()
    return path.resolve().name.removesuffix(".pt") if path.exists() else spec


@dataclass(frozen=True)
class ExtractionRequest:
    """What to extract, how, and where to: everything `mote-cli extract` asks for."""

    dataset_dir: Path
    store_path: Path
    encoder: str
    sampling: Sampling
    encoders_dir: Path | None = None
    split: str | None = None  # only for sets whose splits are disjoint: the tars of one split
    crops: int = 1
    precision: str = "auto"
    device: str = "cpu"
    prompt_sets: tuple[str, ...] = ("mote28",)
    workers: int | None = None  # None: one per core this process may use
    max_failures: float = 0.05


@dataclass
class ExtractionSummary:
    """What an extraction did; counts of rows are those of the whole store."""

    dataset: str
    store: str
    encoder_fingerprint: str
    precision: str
    rows_ok: int
    rows_failed: int
    partitions_done: int
    partitions_skipped: int
    videos_short: int  # had fewer frames than asked for: frames repeat
    videos_per_second: float
    frames_per_second: float
    seconds: float
    too_many_failures: bool
    failures: list[dict[str, str]] = field(default_factory=list)  # the first ten: key, reason

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON-ready values."""
        return asdict(self)


def extract(
    request: ExtractionRequest,
    *,
    decoder: Decoder | None = None,
    encoder: Encoder | None = None,
    progress: ProgressSink = no_progress,
) -> ExtractionSummary:
    """Fill the store that `request` names; partitions that are done are not done again.

    An interruption at any moment loses at most the tar in flight. Videos that cannot be decoded
    keep their row, with status failed and the reason.

    Raises `UserError` when the store was made in another way, `WorkError` when tars are missing or
    damaged (after the others are done) or another process is writing the store.
    """
    dataset = load_dataset(request.dataset_dir)
    shards = _shards_of(dataset, request.split)
    path = request.store_path
    precision = request.precision
    if precision == "auto" and path.is_dir():
        # The choice is made by timing; a store once begun stays with it.
        precision = open_store(path).provenance.precision
    encoder = encoder or load_encoder(
        request.encoder, precision, request.device, encoders_dir=request.encoders_dir
    )
    job = _Job(request, dataset, shards, decoder or PyAVDecoder(), encoder)
    writer = job.open_or_init()
    with writer.lock():
        pending = writer.pending()
        started = time.perf_counter()
        damaged = job.run(writer, pending, progress)
        seconds = time.perf_counter() - started
    if damaged:
        raise WorkError(
            f"{len(damaged)} of {len(shards)} tars could not be read, the others are done: "
            f"{damaged[0]}"
        )
    writer.finalise()
    return job.summary(path, pending, seconds)


class _Job:
    def __init__(
        self,
        request: ExtractionRequest,
        dataset: Dataset,
        shards: list[Shard],
        decoder: Decoder,
        encoder: Encoder,
    ) -> None:
        self.request = request
        self.dataset = dataset
        self.shards = shards
        self.decoder = decoder
        self.encoder = encoder
        self.videos_done = 0
        self.frames_done = 0
        self.videos_short = 0
        self.stop = Event()

    @property
    def views(self) -> int:
        return self.request.sampling.clips * self.request.crops

    def provenance(self) -> Provenance:
        return Provenance(
            encoder=self.request.encoder,
            encoder_fingerprint=self.encoder.fingerprint,
            dim=self.encoder.dim,
            logit_scale=self.encoder.logit_scale,
            precision=self.encoder.precision,
            sampling=self.request.sampling.text,
            crops=self.request.crops,
            preprocessing=self.encoder.preprocessing.to_json(),
            decoder=self.decoder.name,
            versions={
                "python": platform.python_version(),
                **{
                    name: version(name)
                    for name in ("mote-video", "torch", "torchvision", "open_clip_torch", "av")
                },
            },
            dataset=self.dataset.name,
            dataset_fingerprint=self.dataset.fingerprint,
        )

    def open_or_init(self) -> StoreWriter:
        path = self.request.store_path
        provenance = self.provenance()
        if path.exists():
            writer = StoreWriter.open(path)
            differences = writer.provenance.differences(provenance)
            missing = set(self.request.prompt_sets) - set(open_store(path).prompt_sets)
            if missing:
                differences.append(f"prompt sets: store lacks {', '.join(sorted(missing))}")
            if differences:
                raise UserError(
                    f"{path} was made in another way and is never mixed ({'; '.join(differences)})"
                    ": ask for what it holds, or remove it to extract anew"
                )
            return writer
        return StoreWriter.init(
            path,
            StoreSchema.create(
                tars=len(self.shards),
                capacity=max(shard.rows for shard in self.shards),
                views=self.views,
                frames=self.request.sampling.frames,
                dim=self.encoder.dim,
            ),
            provenance,
            tars=[
                {
                    "file": shard.file,
                    "rows": shard.rows,
                    "bytes": shard.bytes,
                    "sha256": shard.sha256,
                }
                for shard in self.shards
            ],
            class_names=self.dataset.class_names,
            raw_class_names=self.dataset.raw_class_names,
            split_names=self.dataset.split_names,
            class_texts={name: self.class_text(name) for name in self.request.prompt_sets},
        )

    def class_text(self, prompt_set: str) -> ClassText:
        names = self.dataset.class_names
        text = "\n".join(line for name in names for line in sentences(prompt_set, name))
        return ClassText(
            tuple(names),
            self.encoder.class_embeddings(names, prompt_set).cpu().numpy(),
            hashlib.sha256(text.encode()).hexdigest(),
        )

    def run(self, writer: StoreWriter, pending: list[int], progress: ProgressSink) -> list[str]:
        """Do the pending partitions; returns one line per tar that could not be read."""
        damaged: list[str] = []
        total = sum(self.shards[tar].samples for tar in pending)
        progress(0, total)
        started = time.perf_counter()
        workers = self.request.workers or usable_cores()
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        # Partitions fill in order; a tar is written as soon as its last video is in, while the
        # workers are already busy with the next.
        open_partitions: deque[_OpenPartition] = deque()
        outstanding = 0
        try:
            for partition, sample in self._samples(pending, open_partitions, damaged):
                while outstanding >= workers * LOOKAHEAD:
                    outstanding -= self._take_oldest(writer, open_partitions)
                    rate = self.videos_done / (time.perf_counter() - started)
                    progress(self.videos_done, total, videos_per_s=round(rate, 2))
                if sample is not None:
                    partition.futures.append(pool.submit(self._encode, partition, sample))
                    outstanding += 1
            while open_partitions:
                outstanding -= self._take_oldest(writer, open_partitions)
                rate = self.videos_done / (time.perf_counter() - started)
                progress(self.videos_done, total, videos_per_s=round(rate, 2))
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for partition in open_partitions:
                partition.close()
        return damaged

    def _samples(
        self, pending: list[int], open_partitions: deque[_OpenPartition], damaged: list[str]
    ) -> Iterator[tuple[_OpenPartition, TarSample | None]]:
        """Every sample of every pending tar; a tar without videos gives one None."""
        for tar in pending:
            try:
                partition = _OpenPartition(tar, self)
            except WorkError as error:
                damaged.append(str(error))
                continue
            open_partitions.append(partition)
            yield from ((partition, sample) for sample in partition.samples)
            partition.complete = True
            yield partition, None

    def _take_oldest(self, writer: StoreWriter, open_partitions: deque[_OpenPartition]) -> int:
        """Store the oldest result; write and close the partition when it was the last."""
        partition = open_partitions[0]
        taken = 0
        if partition.futures:
            result = partition.futures.popleft().result()
            partition.put(result)
            self.videos_done += 1
            if isinstance(result, EncodedVideo):
                self.frames_done += result.frame_index.size
                self.videos_short += result.info.num_frames < self.request.sampling.frames
            taken = 1
        if partition.complete and not partition.futures:
            writer.write_partition(partition.tar, partition.finish())
            partition.close()
            open_partitions.popleft()
        return taken

    def _encode(self, partition: _OpenPartition, sample: TarSample) -> EncodedVideo | str:
        """The encoded video, or the reason why there is none."""
        if self.stop.is_set():
            return "stopped"
        try:
            data = partition.archive.read(sample)
            video = encode_video(
                data, self.decoder, self.encoder, self.request.sampling, self.request.crops
            )
        except DecodeError as error:
            return error.reason
        if video.info.num_frames != (packed := sample.sidecar["num_frames"]):
            return f"{video.info.num_frames} frames are found, {packed} were packed"
        with np.errstate(over="ignore"):
            if not np.isfinite(video.features.astype(np.float16)).all():
                return "the encoder gave values that are not finite in float16"
        return video

    def summary(self, path: Path, pending: list[int], seconds: float) -> ExtractionSummary:
        store = open_store(path)
        failed = np.flatnonzero(store.status == STATUS_FAILED)
        keys, reasons = store.keys, store.reasons
        rate = 1 / seconds if seconds > 0 else 0.0
        if self.videos_short:
            logger.info(
                "%d videos have fewer than %d frames: frames repeat in their rows",
                self.videos_short,
                self.request.sampling.frames,
            )
        return ExtractionSummary(
            dataset=self.dataset.name,
            store=str(path),
            encoder_fingerprint=self.encoder.fingerprint,
            precision=self.encoder.precision,
            rows_ok=len(store) - len(failed),
            rows_failed=len(failed),
            partitions_done=len(pending),
            partitions_skipped=len(self.shards) - len(pending),
            videos_short=self.videos_short,
            videos_per_second=self.videos_done * rate,
            frames_per_second=self.frames_done * rate,
            seconds=seconds,
            too_many_failures=len(failed) > self.request.max_failures * len(store),
            failures=[{"key": keys[i], "reason": reasons[i]} for i in failed[:10]],
        )


class _OpenPartition:
    """The rows of one tar while its videos are being encoded."""

    def __init__(self, tar: int, job: _Job) -> None:
        shard = job.shards[tar]
        self.tar = tar
        self.futures: deque[Future[EncodedVideo | str]] = deque()
        self.complete = False  # every sample has been handed out
        self._resources = ExitStack()
        path = job.dataset.shard_path(shard)
        self.archive: OpenTar = self._resources.enter_context(open_tar(path))
        self.samples = self.archive.samples
        if len(self.samples) != shard.samples:
            self.close()
            raise WorkError(
                f"{path} holds {len(self.samples)} samples, dataset.json says {shard.samples}: "
                "pack the data set again"
            )
        n = shard.rows
        views, frames, dim = job.views, job.request.sampling.frames, job.encoder.dim
        bit = {name: 1 << i for i, name in enumerate(job.dataset.split_names)}
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
        self._resources.close()


def _shards_of(dataset: Dataset, split: str | None) -> list[Shard]:
    if split is None:
        return list(dataset.shards)
    if split not in dataset.split_names:
        names = ", ".join(dataset.split_names) or "none"
        raise UserError(f"{dataset.name} has no split {split!r}: its splits are {names}")
    if not dataset.splits_disjoint:
        raise UserError(
            f"the splits of {dataset.name} overlap, so they share tars and one extraction: "
            "leave --split out, and name the split when training or evaluating"
        )
    return [shard for shard in dataset.shards if shard.split == split]
