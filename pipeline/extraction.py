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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from featstore import ClassText, Provenance, StoreSchema, StoreWriter, open_store
from featstore.errors import UserError, WorkError, one_line
from featstore.metadata import prompt_set_names
from featstore.progress import ProgressSink, no_progress
from featstore.schema import STATUS_FAILED
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.contract import DecodeError, Decoder, Source
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.encoder_sources import lasting_spec
from pipeline.machine import usable_cores
from pipeline.packed import Dataset, Shard, load_dataset
from pipeline.prompts import sentences
from pipeline.sampling import Sampling
from pipeline.tar_rows import EncodedVideo, TarRows
from pipeline.tars import DamagedTar, TarSample

logger = logging.getLogger(__name__)

# Larger batches are not faster on a core (measured 8 to 64 frames), only larger in memory.
ENCODE_BATCH = 16
# Videos handed out per worker before the oldest result is taken: keeps workers busy while a
# partition is written, and bounds memory by workers instead of by data.
LOOKAHEAD = 3


def encode_video(
    source: Source, decoder: Decoder, encoder: Encoder, sampling: Sampling, crops: int = 1
) -> EncodedVideo:
    """Decode the frames that `sampling` chooses, crop, and encode them.

    The one path from video to embeddings: extraction and prediction both use it. Views are ordered
    crop-major, then clip. Raises `DecodeError`.
    """
    try:
        info, frames, seconds = decoder.decode_with_info(
            source, lambda found: sampling.indices(found.num_frames).reshape(-1)
        )
    except DecodeError:
        raise
    except Exception as error:
        # One file must not stop hundreds of thousands; it is recorded, not passed over.
        logger.exception("unexpected error of the decoder: %s", one_line(error))
        raise DecodeError(one_line(f"{type(error).__name__}: {error}")) from error
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
    damaged (after the others are done), the encoder fails, or another process writes the store.
    """
    dataset = load_dataset(request.dataset_dir)
    shards = _shards_of(dataset, request.split)
    for prompt_set in request.prompt_sets:
        sentences(prompt_set, "anything")  # an unknown one is told before the work begins
    path = request.store_path
    precision = request.precision
    if precision == "auto" and path.exists():
        # The choice is made by timing; a store once begun stays with it.
        precision = StoreWriter.open(path).provenance.precision
    encoder = encoder or load_encoder(
        request.encoder, precision, request.device, encoders_dir=request.encoders_dir
    )
    encoder.preprocessing.require_crops(request.crops)
    job = _Job(request, dataset, shards, decoder or PyAVDecoder(), encoder)
    writer = job.open_or_init()
    with writer.lock():
        pending = writer.pending()
        if not pending:
            logger.info("%s is complete already: nothing to do", path)
        started = time.perf_counter()
        damaged = job.run(writer, pending, progress)
        seconds = time.perf_counter() - started
    if damaged:
        raise WorkError(
            f"{len(damaged)} of {len(shards)} tars cannot be used, the others are done: "
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
            encoder=lasting_spec(self.request.encoder),
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
                    for name in ("mote-video", "torch", "open_clip_torch", "av", "pillow")
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
            missing = set(self.request.prompt_sets) - set(prompt_set_names(path))
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
        """Do the pending partitions; returns one line per tar that cannot be used."""
        damaged: list[str] = []
        total = sum(self.shards[tar].samples for tar in pending)
        progress(0, total)
        workers = self.request.workers or usable_cores()
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        # Partitions fill in order; a tar is written as soon as its last video is in, while the
        # workers are already busy with the next.
        open_partitions: deque[TarRows] = deque()
        outstanding = 0

        def take_oldest() -> None:
            nonlocal outstanding
            self._take_oldest(open_partitions[0])
            outstanding -= 1
            self._write_finished(writer, open_partitions, damaged)
            progress(self.videos_done, total)

        try:
            for partition, sample in self._samples(pending, pool, open_partitions, damaged):
                while outstanding >= workers * LOOKAHEAD:
                    take_oldest()
                if sample is not None:
                    partition.futures.append(pool.submit(self._encode, partition, sample))
                    outstanding += 1
                self._write_finished(writer, open_partitions, damaged)
            while open_partitions:
                take_oldest()
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for partition in open_partitions:
                partition.close()
        return damaged

    def _samples(
        self,
        pending: list[int],
        pool: ThreadPoolExecutor,
        open_partitions: deque[TarRows],
        damaged: list[str],
    ) -> Iterator[tuple[TarRows, TarSample | None]]:
        """Every sample of every pending tar, then one None per tar."""
        for tar in pending:
            try:
                partition = TarRows(
                    tar,
                    self.shards[tar],
                    self.dataset,
                    views=self.views,
                    frames=self.request.sampling.frames,
                    dim=self.encoder.dim,
                )
            except DamagedTar as error:
                damaged.append(str(error))
                continue
            open_partitions.append(partition)
            # Read once more for its hash (under 1 % of what decoding it takes): a tar that was
            # changed or mixed up with another must not give rows.
            sha256 = self.shards[tar].sha256
            partition.intact = pool.submit(partition.archive.require, sha256)
            yield from ((partition, sample) for sample in partition.samples)
            partition.complete = True
            yield partition, None

    def _take_oldest(self, partition: TarRows) -> None:
        """Wait for the oldest result of a partition and keep it."""
        try:
            result = partition.futures.popleft().result()
        except DamagedTar as error:
            partition.damage = partition.damage or str(error)
            return
        partition.put(result)
        self.videos_done += 1
        if isinstance(result, EncodedVideo):
            self.frames_done += result.frame_index.size
            self.videos_short += result.info.num_frames < self.request.sampling.frames

    def _write_finished(
        self, writer: StoreWriter, open_partitions: deque[TarRows], damaged: list[str]
    ) -> None:
        """Write and close the oldest partitions whose last result is in."""
        while open_partitions and open_partitions[0].complete and not open_partitions[0].futures:
            partition = open_partitions[0]
            try:
                partition.intact.result()
            except DamagedTar as error:
                partition.damage = str(error)
            if partition.damage:
                damaged.append(partition.damage)
            else:
                writer.write_partition(partition.tar, partition.finish())
            partition.close()
            open_partitions.popleft()

    def _encode(self, partition: TarRows, sample: TarSample) -> EncodedVideo | str:
        """The encoded video, or the reason why there is none."""
        if self.stop.is_set() or partition.damage:
            return "not decoded: the work was stopped"  # and will not be written
        data = partition.archive.read(sample)
        try:
            video = encode_video(
                data, self.decoder, self.encoder, self.request.sampling, self.request.crops
            )
        except DecodeError as error:
            return error.reason
        except RuntimeError as error:
            # Torch's, such as out of memory: the videos are not at fault and must not be failed.
            raise WorkError(
                f"the encoder failed at {sample.key!r} ({one_line(error, 200)}): what is done is "
                "kept; run the same command again, perhaps with fewer --workers"
            ) from error
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
    shards = [shard for shard in dataset.shards if shard.split == split]
    if not shards:
        raise UserError(f"split {split} of {dataset.name} lists no videos: choose another")
    return shards
