"""The request for an extraction, the share of one process, and the summary of what was done."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from featstore.errors import UserError
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.format.tiers import Tier
from featstore.opening import StorePlace
from featstore.progress import Outcome
from pipeline.decoding.contract import Strictness
from pipeline.prompts import PromptSet
from pipeline.sampling import Sampling

PER_FRAME_EMBEDDING: Final = Tier()


@dataclass(frozen=True)
class Share:
    """The tars that one of `count` processes does: every `count`-th, starting at `index`."""

    index: int
    count: int
    origin: str = ""  # where the share was read from, for the log

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"tars cannot be shared by {self.count} processes: --partition K/N needs N >= 1"
            )

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Share | None:
        """Return the share that `--partition` names: "K/N", "all" (gives None), or "auto".

        K may count from 0 or from 1: only its remainder modulo N matters, so either way N processes
        cover every tar once. "auto" reads the environment: RANK and WORLD_SIZE (torchrun),
        SLURM_PROCID and SLURM_NTASKS (srun; a batch script has them too, but no SLURM_STEP_ID, and
        does all tars), or SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT (job arrays).
        Raises UserError for any other text.
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
                    f"{index_name}={index} and {count_name}={count} in the environment",
                )
        return None

    @property
    def text(self) -> str:
        """The share in the form that `--partition` takes."""
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class ExtractionRequest:
    """What to extract, how, and where to: all that the options of `mote-cli extract` say.

    `dataset_dir` and `store_path` are folders (Path) or URLs (str, s3://...).
    """

    dataset_dir: Path | str
    store_path: StorePlace
    encoder: str
    sampling: Sampling
    encoders_dir: Path | None = None
    split: str | None = None  # only the tars of this split; the data set's splits must be disjoint
    crops: int = 1
    precision: str = "auto"
    device: str = "cpu"
    decoder: str = "auto"
    strict: Strictness = "auto"
    prompt_sets: tuple[str | PromptSet, ...] = (DEFAULT_PROMPTS,)  # names, template files, or sets
    workers: int | None = None  # None: one per core this process may use
    max_failures: float = 0.05
    share: Share | None = None  # None: all tars
    retry_failed: bool = False  # extract partitions with failed videos again
    tier: Tier = PER_FRAME_EMBEDDING  # what is kept of every frame

    def __post_init__(self) -> None:
        if self.tier.of_sequences:
            raise UserError(
                f"--tier {self.tier.text} is not made of videos: choose embeddings, frames or "
                "tokens:K"
            )

    @property
    def views(self) -> int:
        """How many views every video has; a view is one clip in one crop."""
        return self.sampling.clips * self.crops


@dataclass
class Totals:
    """What was done: counts of videos and frames, partitions written, tars that are unusable."""

    videos: int = 0
    frames: int = 0
    videos_short: int = 0  # videos with fewer frames than asked for, so that frames repeat
    videos_cut: int = 0  # videos that begin inside a group of pictures
    videos_resized: int = 0  # videos whose chosen frames differ in size
    done: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # one line per tar, naming it

    def add(self, other: Totals) -> None:
        """Add what another engine or worker has done."""
        self.videos += other.videos
        self.frames += other.frames
        self.videos_short += other.videos_short
        self.videos_cut += other.videos_cut
        self.videos_resized += other.videos_resized
        self.done += other.done
        self.damaged += other.damaged


@dataclass(frozen=True)
class ExtractionSummary(Outcome):
    """What an extraction did. The `rows_` fields count rows of the whole store."""

    dataset: str
    store: str
    encoder_fingerprint: str
    precision: str
    decoder: str
    rows_ok: int
    rows_failed: int
    partitions_done: int
    partitions_skipped: int  # were complete already
    partitions_missing: int  # of other shares, not done yet
    partition: str  # the share of this process, "K/N"; empty when it had all tars
    videos_short: int  # videos with fewer frames than asked for, so that frames repeat
    videos_cut: int  # videos that begin inside a group of pictures
    videos_resized: int  # videos whose chosen frames differ in size
    rows_damaged: int  # rows with status ok whose damaged packets were skipped
    rows_miscounted: int  # rows with status ok whose container states another number of frames
    videos_per_second: float
    frames_per_second: float
    seconds: float
    classes: int  # 0: the videos have no labels
    too_many_failures: bool
    failures: list[dict[str, str]] = field(default_factory=list)  # the first ten: key, reason
