"""What an extraction will do, worked out without loading an encoder.

A finished store is recognised here, so that running the same command again takes a moment.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from featstore import Store, StoreSchema
from featstore.errors import UserError, WorkError
from featstore.files.disk import free_bytes, has_room, in_bytes
from featstore.files.scratch import ScratchFolder, cache_folder
from featstore.format.schema import STATUS_FAILED
from featstore.format.tiers import Tier
from featstore.opening import AnyWriter, StorePlace, open_rows, writer_of
from pipeline.decoding.contract import Strictness
from pipeline.encoders.specs import remembered_fingerprint, signature
from pipeline.prompts import PROMPT_SETS, PromptSet, prompt_sets_of
from pipeline.sampling import Sampling
from pipeline.tars.dataset import Dataset, Shard, load_dataset
from pipeline.tars.sources import RemoteTars, remote_dataset
from pipeline.tars.tar_source import LocalTars, TarSource

PER_FRAME_EMBEDDING: Final = Tier()
# Keys, reasons and numbers of a row beside its features and frame times, generously.
ROW_EXTRA_BYTES: Final = 256
FAILURES_SHOWN: Final = 10
# Tars that are being filled at the same time, as a rule: a few long videos keep theirs open.
OPEN_TARS: Final = 4


@dataclass(frozen=True)
class Share:
    """Every `count`-th tar, beginning with number `index`: the part of one of `count` processes."""

    index: int
    count: int
    origin: str = ""  # what said so, for the log

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"a share of {self.count} parts is none: --partition K/N needs N >= 1")

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Share | None:
        """The share that `--partition` means: "K/N", "all" (None), or "auto", the environment's.

        K counts from 0 or from 1: only its remainder by N matters, so either way N processes
        cover every tar once. "auto" takes RANK and WORLD_SIZE (torchrun), SLURM_PROCID and
        SLURM_NTASKS (srun; a batch script has them too, but no SLURM_STEP_ID, and does all tars),
        or SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT (job arrays).
        Raises UserError for anything else.
        """
        if text == "all":
            return None
        if text == "auto":
            return cls._of_environment(environment)
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None:
            raise UserError(f"--partition {text!r} is not K/N, such as 0/4: give K/N, all or auto")
        index, count = int(match[1]), int(match[2])
        if index > count:
            raise UserError(f"--partition {text}: there is no part {index} of {count}")
        return cls(index % max(count, 1), count)

    @classmethod
    def _of_environment(cls, environment: Mapping[str, str]) -> Share | None:
        for index_name, count_name, first_name in (
            ("RANK", "WORLD_SIZE", ""),
            ("SLURM_PROCID", "SLURM_NTASKS", ""),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ):
            index, count = environment.get(index_name, ""), environment.get(count_name, "")
            first = environment.get(first_name, "0")
            if not (index.isdecimal() and count.isdecimal() and first.isdecimal()):
                continue
            batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
            if index_name == "SLURM_PROCID" and batch_script:
                continue
            if int(count) > 1:
                return cls(
                    (int(index) - int(first)) % int(count),
                    int(count),
                    f"{index_name}={index} and {count_name}={count} of the environment",
                )
        return None

    @property
    def text(self) -> str:
        """The share as `--partition` takes it."""
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class ExtractionRequest:
    """What to extract, how, and where to: everything `mote-cli extract` asks for.

    `dataset_dir` and `store_path` are folders, or as str URLs (s3://...).
    """

    dataset_dir: Path | str
    store_path: StorePlace
    encoder: str
    sampling: Sampling
    encoders_dir: Path | None = None
    split: str | None = None  # only for sets whose splits are disjoint: the tars of one split
    crops: int = 1
    precision: str = "auto"
    device: str = "cpu"
    decoder: str = "auto"
    strict: Strictness = "auto"
    prompt_sets: tuple[str | PromptSet, ...] = ("mote28",)  # names, template files, or sets
    workers: int | None = None  # None: one per core this process may use
    max_failures: float = 0.05
    share: Share | None = None  # None: all tars
    retry_failed: bool = False  # do partitions with failed videos once more
    tier: Tier = PER_FRAME_EMBEDDING  # what is kept of every frame

    @property
    def views(self) -> int:
        """Views of every video: one clip in one crop each."""
        return self.sampling.clips * self.crops


@dataclass
class ExtractionSummary:
    """What an extraction did; counts of rows are those of the whole store."""

    dataset: str
    store: str
    encoder_fingerprint: str
    precision: str
    decoder: str
    rows_ok: int
    rows_failed: int
    partitions_done: int
    partitions_skipped: int  # were done before
    partitions_missing: int  # of other shares, not done yet
    partition: str  # the share of this process, "K/N"; empty when it had all tars
    videos_short: int  # had fewer frames than asked for: frames repeat
    rows_damaged: int  # ok, and damaged packets were passed over
    rows_miscounted: int  # ok, and the container speaks of another number of frames
    videos_per_second: float
    frames_per_second: float
    seconds: float
    too_many_failures: bool
    failures: list[dict[str, str]] = field(default_factory=list)  # the first ten: key, reason

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON-ready values."""
        return asdict(self)


class ExtractionPlan:
    """The tars of a request and which of them are still to be done."""

    def __init__(self, request: ExtractionRequest) -> None:
        """Read what is on disk; raises UserError and `WorkError` for what cannot be done."""
        self.writer: AnyWriter | None = writer_of(request.store_path)
        # An unknown or wrong one is told before the work begins.
        self.prompt_sets = prompt_sets_of([self._meant(p) for p in request.prompt_sets])
        self.request = request
        self._scratch: ScratchFolder | None = None
        if isinstance(request.dataset_dir, str):
            self._scratch = ScratchFolder()
            self.dataset = remote_dataset(request.dataset_dir, self._scratch.path)
        else:
            self.dataset = load_dataset(request.dataset_dir)
        for prompts in self.prompt_sets:
            prompts.require_classes(self.dataset.class_names)
        self.shards = shards_of(self.dataset, request.split)

    def tar_source(self) -> TarSource:
        """A new source of the data set's tars."""
        if self._scratch is None:
            return LocalTars(self.dataset)
        return RemoteTars(str(self.request.dataset_dir), self._scratch.path)

    @property
    def mine(self) -> list[int]:
        """Numbers of the tars of this process's share."""
        share = self.request.share
        if share is None:
            return list(range(len(self.shards)))
        return list(range(share.index, len(self.shards), share.count))

    def pending(self) -> list[int]:
        """Tars of this share that are to be done, with those to be done once more."""
        if self.writer is None:
            return self.mine
        retried = self._with_failures() if self.request.retry_failed else set()
        lacking = set(self.writer.pending())  # one listing of a remote store
        return [tar for tar in self.mine if tar in retried or tar in lacking]

    def schema(self, dim: int, item: tuple[int, ...] = ()) -> StoreSchema:
        """Sizes of the store for an encoder of width `dim` and items of this shape."""
        return StoreSchema.create(
            tars=len(self.shards),
            capacity=max(shard.rows for shard in self.shards),
            views=self.request.views,
            frames=self.request.sampling.frames,
            dim=dim,
            tier=self.request.tier.text,
            item=item,
        )

    def bytes_needed(self, tars: list[int], schema: StoreSchema) -> int:
        """Bytes that these partitions will take."""
        frame_times = schema.views * schema.frames * 12
        per_tar = schema.capacity * (frame_times + ROW_EXTRA_BYTES)
        return sum(schema.shard_bytes(self.shards[tar].rows) + per_tar for tar in tars)

    def require_room(self, tars: list[int], schema: StoreSchema) -> None:
        """Raise `WorkError` when the disk cannot take these partitions."""
        needed = self.disk_needed(tars, schema)
        if not has_room(self.disk, needed):
            raise WorkError(
                f"the store will take {needed / 1e9:.2f} GB and {self.disk} has "
                f"{free_bytes(self.disk) / 1e9:.2f} GB free: make room, or put the "
                "workspace (--root) on a larger disk"
            )

    def room(self, tars: list[int], schema: StoreSchema) -> str:
        """What these partitions take and what is free, in words."""
        rows = sum(self.shards[tar].rows for tar in tars)
        return (
            f"{rows} rows of {in_bytes(schema.row_bytes)} each ({schema.tier}), "
            f"{in_bytes(self.bytes_needed(tars, schema))} in all, "
            f"{in_bytes(free_bytes(self.disk))} free"
        )

    @property
    def disk(self) -> Path:
        """A folder, perhaps not made yet, on the disk that takes what is written."""
        place = self.request.store_path
        return cache_folder() if isinstance(place, str) else place.parent

    def disk_needed(self, tars: list[int], schema: StoreSchema) -> int:
        """Bytes of it that these partitions take: a remote store's pass through there.

        Embeddings one partition at a time, other tiers with all tars that are open.
        """
        if isinstance(self.request.store_path, str):
            sizes = sorted((self.bytes_needed([tar], schema) for tar in tars), reverse=True)
            return sum(sizes[: 1 if schema.pooled else OPEN_TARS])
        return self.bytes_needed(tars, schema)

    @property
    def recorded_split(self) -> str:
        """The split as the store records it, "" for all tars.

        Also "" in a store of the split's tars that does not say so, as earlier ones did not.
        """
        if self.writer is not None and not self.writer.provenance.split:
            held = [tar.file for tar in self.writer.metadata.tars]
            if held == [shard.file for shard in self.shards]:
                return ""
        return self.request.split or ""

    def known_complete(self) -> bool:
        """Whether nothing is left to do and the store is surely the one asked for.

        Sure without loading the encoder: its files are those whose fingerprint was noted.
        """
        if self.writer is None or self.pending():
            return False
        made = self.writer.provenance
        request = self.request
        files = signature(request.encoder, request.encoders_dir)
        return (
            remembered_fingerprint(fingerprint_note(request.store_path), files)
            == made.encoder_fingerprint
            and request.precision in ("auto", made.precision)
            and request.decoder in ("auto", made.decoder)
            and request.strict == made.strict_decode
            and request.sampling.text == made.sampling
            and request.crops == made.crops
            and request.tier.text == made.tier
            and self.recorded_split == made.split
            and self.dataset.name == made.dataset
            and self.dataset.fingerprint == made.dataset_fingerprint
            and not {prompts.name for prompts in self.prompt_sets} - set(self.writer.prompt_sets)
            and self.require_same_sentences()
        )

    def _meant(self, prompts: str | PromptSet) -> str | PromptSet:
        """`prompts`, or a set of the store by its name: its sentences are not needed again."""
        if isinstance(prompts, str) and prompts not in PROMPT_SETS and self.writer is not None:
            return PromptSet(prompts) if prompts in self.writer.prompt_sets else prompts
        return prompts

    def require_same_sentences(self) -> bool:
        """Raise UserError when the store has a prompt set of that name with other sentences."""
        assert self.writer is not None
        held = set(self.writer.prompt_sets)
        for prompts in self.prompt_sets:
            # Those that come with the program do not change.
            if prompts.source and prompts.name in held:
                prompts.require_held(open_rows(self.request.store_path))
        return True

    def _with_failures(self) -> set[int]:
        """Done tars with a video that failed in extraction (not one that was never packed)."""
        store = open_rows(self.request.store_path)
        failed = store.rows[store.status == STATUS_FAILED]
        tars, positions = np.divmod(failed, store.schema.capacity)
        packed = np.array([shard.samples for shard in self.shards])
        return set(tars[positions < packed[tars]].tolist())


def summary_of(
    plan: ExtractionPlan,
    store: Store,
    *,
    done: int = 0,
    videos: int = 0,
    frames: int = 0,
    videos_short: int = 0,
    seconds: float = 0.0,
) -> ExtractionSummary:
    """The summary of a store as it is now and of what was done to it in `seconds`."""
    request, made = plan.request, store.provenance
    failed = np.flatnonzero(store.status == STATUS_FAILED)
    missing = store.schema.tars - len(list(store.partitions()))
    rate = 1 / seconds if seconds > 0 else 0.0
    keys, reasons = (store.keys, store.reasons) if len(failed) else ([], [])
    known = store.container_frames > 0
    return ExtractionSummary(
        dataset=plan.dataset.name,
        store=str(request.store_path),
        encoder_fingerprint=made.encoder_fingerprint,
        precision=made.precision,
        decoder=made.decoder,
        rows_ok=len(store) - len(failed),
        rows_failed=len(failed),
        partitions_done=done,
        partitions_skipped=len(plan.mine) - done,
        partitions_missing=missing,
        partition=request.share.text if request.share else "",
        videos_short=videos_short,
        rows_damaged=int((store.damaged_packets > 0).sum()),
        rows_miscounted=int((store.container_frames[known] != store.num_frames[known]).sum()),
        videos_per_second=videos * rate,
        frames_per_second=frames * rate,
        seconds=seconds,
        too_many_failures=len(failed) > request.max_failures * len(store),
        failures=[{"key": keys[i], "reason": reasons[i]} for i in failed[:FAILURES_SHOWN]],
    )


def fingerprint_note(store_path: StorePlace) -> Path:
    """Where the encoder's files and fingerprint are noted: beside a store, or in the cache."""
    if isinstance(store_path, str):
        digest = hashlib.sha256(store_path.encode()).hexdigest()[:16]
        return cache_folder() / "stores" / f"{digest}.encoder.json"
    return store_path.with_name(f"{store_path.name}.encoder.json")


def shards_of(dataset: Dataset, split: str | None) -> list[Shard]:
    """The tars of a split, all when None.

    Raises UserError for an unknown split, one without videos, and where splits share tars.
    """
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
