"""What packing made, and what people should know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from featstore.files.key_lists import Excluded
from pipeline.annotations.left_out import LeftOut
from pipeline.tars.dataset import Dataset
from pipeline.tars.identical import IDENTICAL_FILE, Identical

SHOWN_FAILURES = 5


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What one run of `pack` did, and what the data set holds now.

    `videos_*`, `shards` and `bytes` (of all tars) describe the data set; `shards_written`,
    `shards_skipped` and `seconds` describe this run. `failures` are the first lines of
    `failures.csv`, `identical` the videos of the same bytes, `excluded` what a list left out, and
    `left_out` what was passed over before anything was listed.
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
    failures: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    identical: Identical
    excluded: Excluded | None
    left_out: LeftOut

    @classmethod
    def of(
        cls, dataset: Dataset, failures: Sequence[dict[str, Any]], max_failures: float, **run: Any
    ) -> PackSummary:
        """The summary of a data set; `run` has the other fields, most of which describe this run.

        Beside dataset.json it writes which videos are identical.
        """
        run["identical"].write(dataset.folder)
        return cls(
            dataset=dataset.name,
            folder=str(dataset.folder),
            videos_listed=dataset.listed,
            videos_packed=dataset.packed,
            videos_failed=len(failures),
            shards=len(dataset.tars),
            classes=len(dataset.class_names),
            bytes=sum(tar.bytes for tar in dataset.tars),
            too_many_failures=len(failures) > max_failures * dataset.listed,
            failures=tuple(failures[:SHOWN_FAILURES]),
            **run,
        )

    def to_json(self) -> dict[str, Any]:
        """The summary as strict JSON values."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "identical": self.identical.to_json(Path(self.folder) / IDENTICAL_FILE),
            "excluded": None if self.excluded is None else self.excluded.to_json(),
            "left_out": self.left_out.to_json(),
        }
