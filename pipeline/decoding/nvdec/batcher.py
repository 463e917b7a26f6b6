"""Collects videos into batches for NVDEC, retries failures, and leaves the rest to PyAV.

Extraction on a GPU uses it to get pixels, training to get frames.

U frames of a video without repeats.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Condition
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from featstore.errors import counted, one_line
from featstore.segments import IntArray
from pipeline.decoding.contract import DecodeError, VideoInfo
from pipeline.decoding.nvdec.graphs import Clip
from pipeline.decoding.nvdec.rule import survey_video

logger = logging.getLogger(__name__)

# None of these has been tuned on a GPU yet (benchmarks/gpu_extract.py is there for it).
BATCH_VIDEOS = 16
BATCH_BYTES = 1 << 30  # decoded frames and pixels of one batch, on the GPU
OPEN_SIZES = 24  # picture sizes that wait for a full batch; DALI keeps 100 decoders
# After this many batches in a row without any result, all videos go to PyAV.
GIVE_UP_AFTER = 3

# Which picture size each coded size (codec, width, height) stands for in this process. DALI keeps
# decoders by size as long as the process lives, and can give one made for 640x368 to a video of
# 640x360: both are coded as 640x368, but the crop is the decoder's, and the colours come from the
# wrong rows. So NVDEC gets the first picture size of a coded size, and PyAV gets the others.
SHOWN_SIZES: dict[tuple[str, int, int], tuple[int, int]] = {}
_BLOCK = 16  # sizes are coded in blocks of at most this many pixels

Item = TypeVar("Item")  # identifies a video for the caller
Output = TypeVar("Output")  # the decoded video: frames or pixels


@dataclass(frozen=True)
class NvdecPlan:
    """How NVDEC decodes a video. `seconds` are the times of `indices`, `places` [indices.size] are
    their numbers among the U frames of `clip`, and `cost` is the bytes needed on the GPU."""

    info: VideoInfo
    indices: IntArray
    seconds: npt.NDArray[np.float64]
    places: IntArray
    clip: Clip
    cost: int


class Buckets(Generic[Item]):
    """Collects items by key into batches of at most `items` items and a total cost of `cost`.

    No clock is involved: a batch is complete when it is full, when more than `open_keys` keys wait,
    or when no further item is coming.
    """

    def __init__(self, *, items: int, cost: int, open_keys: int) -> None:
        self._items, self._cost, self._open_keys = items, cost, open_keys
        self._open: dict[Hashable, list[Item]] = {}
        self._costs: dict[Hashable, int] = {}
        self._full: deque[list[Item]] = deque()

    def add(self, key: Hashable, item: Item, cost: int) -> None:
        """Add `item` to the batch of its key; an item above the allowed cost gets its own batch."""
        if key in self._open and self._costs[key] + cost > self._cost:
            self._complete(key)
        self._open.setdefault(key, []).append(item)
        self._costs[key] = self._costs.get(key, 0) + cost
        if len(self._open[key]) == self._items or self._costs[key] >= self._cost:
            self._complete(key)

    def take(self, *, more_coming: bool) -> list[Item] | None:
        """The next complete batch, None if there is none. `more_coming`: items will follow."""
        if not self._full and self._open:
            # The oldest batch if several are equally full.
            fullest = max(self._open, key=lambda key: len(self._open[key]))
            if not more_coming or len(self._open) > self._open_keys:
                self._complete(fullest)
        return self._full.popleft() if self._full else None

    def _complete(self, key: Hashable) -> None:
        self._full.append(self._open.pop(key))
        del self._costs[key]


class NvdecBatcher(Generic[Item, Output]):
    """Collects planned videos into batches of one picture size, and decodes them.

    `given_up` says why NVDEC is no longer used, "" while it is. `changed` guards the waiting videos
    and the counts; it may be the condition of the caller's own state.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[Clip]], list[Output]],
        check: Callable[[Clip, Output], None],
        codecs: frozenset[str],
        *,
        pixels_per_frame: int = 0,
        batch_videos: int = BATCH_VIDEOS,
        changed: Condition | None = None,
    ) -> None:
        """`decode` gives the output of every clip of a batch, and raises if any of them fails.

        `check` raises RuntimeError for an output of the wrong shape or type. `pixels_per_frame` are
        the bytes that a frame needs on the GPU besides those of its decoded picture.
        """
        self.given_up = ""
        self.changed = changed or Condition()
        self._decode = decode
        self._check = check
        self._codecs = codecs
        self._pixels_per_frame = pixels_per_frame
        self._fruitless = 0
        self._counts: Counter[str] = Counter()
        self._buckets: Buckets[tuple[Item, NvdecPlan]] = Buckets(
            items=batch_videos, cost=BATCH_BYTES, open_keys=OPEN_SIZES
        )

    @property
    def refusal(self) -> str:
        """Why a video that NVDEC did not decode goes to PyAV."""
        return self.given_up or "NVDEC failed"

    def count(self, by: str) -> None:
        """Count a video as decoded by `by`."""
        with self.changed:
            self._counts[by] += 1

    def report(self) -> list[str]:
        """The number of videos for each decoder and reason, one line each."""
        with self.changed:
            return [
                f"{counted(count, 'video')} decoded by {by}"
                for by, count in self._counts.most_common()
            ]

    def plan(self, data: bytes, choose: Callable[[VideoInfo], IntArray]) -> NvdecPlan | str:
        """The plan for NVDEC, or why PyAV must decode the video. Raises what `choose` raises."""
        if self.given_up:
            return self.given_up
        try:
            survey = survey_video(data, self._codecs)
        except DecodeError:
            return "cannot be surveyed"  # PyAV decides, and gives the reason
        except Exception as error:
            logger.exception("unexpected error of the survey: %s", one_line(error))
            return "cannot be surveyed"
        if isinstance(survey, str):
            return survey
        indices = choose(survey.info)
        # Repeated frames are decoded once: for NVDEC each repeat is a jump back.
        frames, places = np.unique(indices, return_inverse=True)
        codec, width, height = survey.codec, survey.width, survey.height
        clip = Clip(np.frombuffer(data, np.uint8), frames, height, width, codec)
        cost = len(frames) * (3 * height * width + self._pixels_per_frame)
        if cost > BATCH_BYTES:
            return "too many or too large frames for the GPU's memory"
        coded = codec, -(-width // _BLOCK) * _BLOCK, -(-height // _BLOCK) * _BLOCK
        if SHOWN_SIZES.setdefault(coded, (width, height)) != (width, height):
            return "another picture size shares its coded size"
        seconds = survey.seconds[indices]
        return NvdecPlan(survey.info, indices, seconds, places.reshape(-1), clip, cost)

    def add(self, item: Item, plan: NvdecPlan) -> None:
        """Add a planned video to the others of its picture size."""
        key = plan.clip.codec, plan.clip.width, plan.clip.height  # DALI makes a decoder for each
        with self.changed:
            self._buckets.add(key, (item, plan), plan.cost)
            self.changed.notify_all()

    def take(self, *, more_coming: bool) -> list[tuple[Item, NvdecPlan]] | None:
        """A batch to decode, None if there is none. `more_coming`: videos will follow."""
        with self.changed:
            return self._buckets.take(more_coming=more_coming)

    def decode(
        self, batch: Sequence[tuple[Item, NvdecPlan]]
    ) -> list[tuple[Item, NvdecPlan, Output]]:
        """Decode a batch, or if that fails its videos one by one; leave out those that fail."""
        decoded: list[tuple[Item, NvdecPlan, Output]] = []
        try:
            if not self.given_up:
                decoded = self._checked(batch)
        except Exception as error:
            logger.debug("a batch of %d failed: %s", len(batch), one_line(error))
            for planned in batch if len(batch) > 1 else []:
                try:
                    decoded += self._checked([planned])
                except Exception as cause:
                    logger.info("NVDEC failed on a video (%s): PyAV decodes it", one_line(cause))
        with self.changed:
            if decoded:
                self._counts["NVDEC"] += len(decoded)
            self._fruitless = 0 if decoded else self._fruitless + 1
            if self._fruitless >= GIVE_UP_AFTER and not self.given_up:
                self.given_up = "NVDEC failed again and again"
                logger.warning(
                    "the GPU's decoder failed on %d batches in a row: PyAV decodes the rest",
                    GIVE_UP_AFTER,
                )
        return decoded

    def _checked(
        self, batch: Sequence[tuple[Item, NvdecPlan]]
    ) -> list[tuple[Item, NvdecPlan, Output]]:
        """Decode a batch. Raises RuntimeError if outputs have a wrong number, shape or type."""
        outputs = self._decode([plan.clip for _, plan in batch])
        if len(outputs) != len(batch):
            raise RuntimeError(f"{len(outputs)} videos came out of {len(batch)}")
        for (_, plan), output in zip(batch, outputs, strict=True):
            self._check(plan.clip, output)
        return [(*planned, output) for planned, output in zip(batch, outputs, strict=True)]
