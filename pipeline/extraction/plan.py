"""What an extraction will do, worked out without loading an encoder.

A finished store is recognised here, so that running the same command again takes a moment.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from featstore import StoreSchema
from featstore.errors import WorkError
from featstore.files.disk import SPARE_BYTES, free_bytes, has_room, in_bytes
from featstore.files.scratch import ScratchFolder, cache_folder
from featstore.format.schema import STATUS_FAILED
from featstore.opening import AnyWriter, open_rows, writer_of
from pipeline.encoders.specs import remembered_fingerprint
from pipeline.extraction.request import ExtractionRequest, Share
from pipeline.prompts import PROMPT_SETS, PromptSet, prompt_sets_of
from pipeline.tars.dataset import load_dataset, tars_of
from pipeline.tars.sources import RemoteTars, TarSource, remote_dataset

# Keys, reasons and numbers of a row beside its features and frame times, generously.
ROW_EXTRA_BYTES: Final = 256
# Tars that are being filled at the same time, as a rule: a few long videos keep theirs open.
OPEN_TARS: Final = 4


def no_room(needed: int, disk: Path | str, free: int) -> WorkError:
    """The error of a store of `needed` bytes for which `disk` has too few, `free` ones."""
    return WorkError(
        f"the store will take {in_bytes(needed)}, {in_bytes(SPARE_BYTES)} are to stay free, and "
        f"{disk} has {in_bytes(free)}: make room, or put the workspace (--root) on a larger disk"
    )


class ExtractionPlan:
    """The tars of a request, the store they go to, and which of them are still to be done.

    The data set and the store are opened once, here, for everything that follows.
    """

    def __init__(self, request: ExtractionRequest) -> None:
        """Read what is on disk; raises UserError and `WorkError` for what cannot be done."""
        self.request = request
        self._scratch: ScratchFolder | None = None
        if isinstance(request.dataset_dir, str):
            self._scratch = ScratchFolder()
            self.dataset = remote_dataset(request.dataset_dir, self._scratch.path)
        else:
            self.dataset = load_dataset(request.dataset_dir)
        self.tars = tars_of(self.dataset, request.split)
        self.writer: AnyWriter | None = writer_of(request.store_path)  # None before it is made
        # An unknown or wrong set of prompts is refused before the work begins. The sentences of a
        # set that the store has are not needed again: its name is enough.
        held = {*self.writer.prompt_sets} - PROMPT_SETS.keys() if self.writer else set()
        asked = [
            PromptSet(p) if isinstance(p, str) and p in held else p for p in request.prompt_sets
        ]
        self.prompt_sets = prompt_sets_of(asked, self.dataset.class_names)

    def tar_source(self) -> TarSource:
        """A new source of the data set's tars."""
        if self._scratch is None:
            return TarSource(self.dataset)
        return RemoteTars(str(self.request.dataset_dir), self._scratch.path)

    @property
    def mine(self) -> list[int]:
        """Numbers of the tars of this process's share."""
        share = self.request.share or Share(0, 1)
        return list(range(share.index, len(self.tars), share.count))

    @cached_property
    def pending(self) -> list[int]:
        """Tars of this share that were to be done when this was first asked, or done again.

        The partitions of the store are looked through once, a remote store's in one listing.
        """
        if self.writer is None:
            return self.mine
        retried = self._with_failures() if self.request.retry_failed else set()
        lacking = set(self.writer.pending())
        return [number for number in self.mine if number in retried or number in lacking]

    def schema(self, dim: int, item: tuple[int, ...] = ()) -> StoreSchema:
        """Sizes of the store for an encoder of width `dim` and items of this shape."""
        return StoreSchema.create(
            tars=len(self.tars),
            capacity=max(tar.rows for tar in self.tars),
            views=self.request.views,
            frames=self.request.sampling.frames,
            dim=dim,
            tier=self.request.tier.text,
            item=item,
        )

    def bytes_needed(self, numbers: list[int], schema: StoreSchema) -> int:
        """Bytes that these partitions will take."""
        frame_times = schema.views * schema.frames * 12
        per_tar = schema.capacity * (frame_times + ROW_EXTRA_BYTES)
        return sum(schema.shard_bytes(self.tars[number].rows) + per_tar for number in numbers)

    def require_room(self, numbers: list[int], schema: StoreSchema) -> None:
        """Raise `WorkError` when the disk cannot take these partitions."""
        needed = self.disk_needed(numbers, schema)
        if not has_room(self.disk, needed):
            raise no_room(needed, self.disk, free_bytes(self.disk))

    def room(self, numbers: list[int], schema: StoreSchema) -> str:
        """What these partitions take and what is free, in words."""
        rows = sum(self.tars[number].rows for number in numbers)
        return (
            f"{rows} rows of {in_bytes(schema.row_bytes)} each ({schema.tier}), "
            f"{in_bytes(self.bytes_needed(numbers, schema))} in all, "
            f"{in_bytes(free_bytes(self.disk))} free"
        )

    @property
    def disk(self) -> Path:
        """A folder, perhaps not made yet, on the disk that takes what is written."""
        place = self.request.store_path
        return cache_folder() if isinstance(place, str) else place.parent

    def disk_needed(self, numbers: list[int], schema: StoreSchema) -> int:
        """Bytes of it that these partitions take: a remote store's pass through there.

        Embeddings one partition at a time, other tiers with all tars that are open.
        """
        if isinstance(self.request.store_path, str):
            sizes = sorted(
                (self.bytes_needed([number], schema) for number in numbers), reverse=True
            )
            return sum(sizes[: 1 if schema.pooled else OPEN_TARS])
        return self.bytes_needed(numbers, schema)

    @property
    def recorded_split(self) -> str:
        """The split as the store records it, "" for all tars.

        Also "" in a store of the split's tars that does not say so, as earlier ones did not.
        """
        if self.writer is not None and not self.writer.provenance.split:
            held = [made.file for made in self.writer.metadata.tars]
            if held == [tar.file for tar in self.tars]:
                return ""
        return self.request.split or ""

    def known_complete(self) -> bool:
        """Whether nothing is left to do and the store is surely the one asked for.

        Sure without loading the encoder: its files are those whose fingerprint was noted.
        """
        if self.writer is None or self.pending:
            return False
        made = self.writer.provenance
        request = self.request
        return (
            request.precision in ("auto", made.precision)
            and request.decoder in ("auto", made.decoder)
            and request.strict == made.strict_decode
            and request.sampling.text == made.sampling
            and request.crops == made.crops
            and request.tier.text == made.tier
            and self.recorded_split == made.split
            and self.dataset.name == made.dataset
            and self.dataset.fingerprint == made.dataset_fingerprint
            and not {prompts.name for prompts in self.prompt_sets} - set(self.writer.prompt_sets)
            and self.require_same_sentences(self.writer)
            and made.encoder_fingerprint
            == remembered_fingerprint(request.store_path, request.encoder, request.encoders_dir)
        )

    def require_same_sentences(self, writer: AnyWriter) -> bool:
        """Raise UserError when the store has a prompt set of that name with other sentences."""
        held = set(writer.prompt_sets)
        for prompts in self.prompt_sets:
            # Those that come with the program do not change.
            if prompts.source and prompts.name in held:
                prompts.require_held(open_rows(self.request.store_path))
        return True

    def _with_failures(self) -> set[int]:
        """Done tars with a video that failed in extraction (not one that was never packed)."""
        store = open_rows(self.request.store_path)
        failed = store.rows[store.status == STATUS_FAILED]
        numbers, positions = np.divmod(failed, store.schema.capacity)
        packed = np.array([tar.samples for tar in self.tars])
        return set(numbers[positions < packed[numbers]].tolist())
