"""Works out what an extraction will do, without loading an encoder.

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

# A generous estimate for a row's key, reason and numbers, besides its features and frame times.
ROW_EXTRA_BYTES: Final = 256
# How many tars are usually filled at the same time: a few long videos keep their tars open.
OPEN_TARS: Final = 4


def no_room(needed: int, disk: Path | str, free: int) -> WorkError:
    """Return the error for a store of `needed` bytes on a `disk` with only `free` free bytes."""
    return WorkError(
        f"the store will take {in_bytes(needed)}, {in_bytes(SPARE_BYTES)} must stay free, and "
        f"{disk} has {in_bytes(free)}: make room, or put the workspace (--root) on a larger disk"
    )


class ExtractionPlan:
    """The tars of a request, the store they go to, and which of them are still to be done.

    The data set and the store are opened once, here, for everything that follows.
    """

    def __init__(self, request: ExtractionRequest) -> None:
        """Read data set and store. Raises UserError or `WorkError` if the work cannot be done."""
        self.request = request
        self._scratch: ScratchFolder | None = None
        if isinstance(request.dataset_dir, str):
            self._scratch = ScratchFolder()
            self.dataset = remote_dataset(request.dataset_dir, self._scratch.path)
        else:
            self.dataset = load_dataset(request.dataset_dir)
        self.tars = tars_of(self.dataset, request.split)
        self.writer: AnyWriter | None = writer_of(request.store_path)  # None before it is made
        # An unknown or wrong prompt set is refused before the work begins. If the store has a set
        # already, its name is enough: its sentences are not needed again.
        held = {*self.writer.prompt_sets} - PROMPT_SETS.keys() if self.writer else set()
        asked = [
            PromptSet(p) if isinstance(p, str) and p in held else p for p in request.prompt_sets
        ]
        # Without classes there are no sentences, so that any prompt set has them all.
        classes = self.dataset.class_names
        self.prompt_sets = prompt_sets_of(asked, classes) if classes else ()

    def tar_source(self) -> TarSource:
        """Return a new source of the data set's tars."""
        url = self.request.dataset_dir if isinstance(self.request.dataset_dir, str) else None
        if url is None and not any(tar.remote for tar in self.tars):
            return TarSource(self.dataset)
        self._scratch = self._scratch or ScratchFolder()
        return RemoteTars(url, self.dataset, self._scratch.path)

    @property
    def mine(self) -> list[int]:
        """Numbers of the tars of this process's share."""
        share = self.request.share or Share(0, 1)
        return list(range(share.index, len(self.tars), share.count))

    @cached_property
    def pending(self) -> list[int]:
        """Numbers of this share's tars that are still to be done, or to be done again.

        The store is looked through once, on first use (a remote store in one listing); the list
        does not change afterwards.
        """
        if self.writer is None:
            return self.mine
        retried = self._with_failures() if self.request.retry_failed else set()
        lacking = set(self.writer.pending())
        return [number for number in self.mine if number in retried or number in lacking]

    def schema(self, dim: int, item: tuple[int, ...] = (), clip_frames: int = 1) -> StoreSchema:
        """Return the sizes of the store for an encoder of width `dim` and items of this shape.

        An item is of `clip_frames` frames.
        """
        return StoreSchema.create(
            tars=len(self.tars),
            capacity=max(tar.rows for tar in self.tars),
            views=self.request.views,
            frames=self.request.sampling.frames // clip_frames,
            dim=dim,
            tier=self.request.tier.text,
            item=item,
            multi_label=self.dataset.multi_label,
        )

    def bytes_needed(self, numbers: list[int], schema: StoreSchema) -> int:
        """Return how many bytes these partitions will take."""
        frame_times = schema.views * schema.frames * 12
        per_tar = schema.capacity * (frame_times + ROW_EXTRA_BYTES)
        return sum(schema.shard_bytes(self.tars[number].rows) + per_tar for number in numbers)

    def require_room(self, numbers: list[int], schema: StoreSchema) -> None:
        """Raise `WorkError` when the disk cannot take these partitions."""
        needed = self.disk_needed(numbers, schema)
        if not has_room(self.disk, needed):
            raise no_room(needed, self.disk, free_bytes(self.disk))

    def room(self, numbers: list[int], schema: StoreSchema) -> str:
        """Say in words how much these partitions take and how much is free."""
        rows = sum(self.tars[number].rows for number in numbers)
        return (
            f"{rows} rows of {in_bytes(schema.row_bytes)} each ({schema.tier}), "
            f"{in_bytes(self.bytes_needed(numbers, schema))} in all, "
            f"{in_bytes(free_bytes(self.disk))} free"
        )

    @property
    def disk(self) -> Path:
        """A folder on the disk that is written to; it may not exist yet."""
        place = self.request.store_path
        return cache_folder() if isinstance(place, str) else place.parent

    def disk_needed(self, numbers: list[int], schema: StoreSchema) -> int:
        """Return how many bytes of `disk` these partitions take.

        Partitions of a remote store only pass through that disk: embeddings one partition at a
        time, other tiers with all tars that are open.
        """
        if isinstance(self.request.store_path, str):
            sizes = sorted(
                (self.bytes_needed([number], schema) for number in numbers), reverse=True
            )
            return sum(sizes[: 1 if schema.pooled else OPEN_TARS])
        return self.bytes_needed(numbers, schema)

    @property
    def recorded_split(self) -> str:
        """The split as the store records it; "" means all tars.

        It is also "" for a store that holds the split's tars without recording the split, as
        stores of earlier versions do.
        """
        if self.writer is not None and not self.writer.provenance.split:
            held = [made.file for made in self.writer.metadata.tars]
            if held == [tar.file for tar in self.tars]:
                return ""
        return self.request.split or ""

    def known_complete(self) -> bool:
        """Return whether nothing is left to do and the store is certainly the one asked for.

        This does not load the encoder, but compares the fingerprint that was noted for its files.
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
        """Raise UserError if the store has a prompt set of the same name with other sentences."""
        held = set(writer.prompt_sets)
        for prompts in self.prompt_sets:
            # The prompt sets that come with the program do not change.
            if prompts.source and prompts.name in held:
                prompts.require_held(open_rows(self.request.store_path))
        return True

    def _with_failures(self) -> set[int]:
        """Return the complete tars in which a video failed in extraction, not just in packing."""
        store = open_rows(self.request.store_path)
        failed = store.rows[store.status == STATUS_FAILED]
        numbers, positions = np.divmod(failed, store.schema.capacity)
        packed = np.array([tar.samples for tar in self.tars])
        return set(numbers[positions < packed[numbers]].tolist())
