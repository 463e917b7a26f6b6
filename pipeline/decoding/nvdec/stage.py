"""What NVDEC is asked to decode, and what becomes of videos that it fails at.

Extraction on a GPU and training decode with it in batches; both ask the same rule, retry in the
same way, and hand to PyAV what is left.

U frames of a video without repeats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from featstore.errors import one_line
from featstore.segments import IntArray
from pipeline.decoding.contract import DecodeError, VideoInfo
from pipeline.decoding.nvdec.buckets import Buckets
from pipeline.decoding.nvdec.graphs import Clip
from pipeline.decoding.nvdec.rule import (
    DecoderSizes,
    NvdecCapabilities,
    NvdecSurvey,
    nvdec_refusal,
    survey_video,
)

logger = logging.getLogger(__name__)

# None of these has been tuned on a GPU yet (benchmarks/gpu_extract.py is there for it).
BATCH_VIDEOS = 16
BATCH_BYTES = 1 << 30  # decoded frames and pixels of one batch, on the GPU
OPEN_SIZES = 24  # picture sizes that wait for a full batch; DALI keeps 100 decoders
# So many batches in a row of which nothing came out, and everything goes to PyAV.
GIVE_UP_AFTER = 3

PROCESS_SIZES = DecoderSizes()  # DALI's decoders live as long as the process

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class NvdecPlan:
    """One video for NVDEC. `seconds` of the `indices`; `places` [indices.size] among the U frames
    of `clip`. `cost` in bytes on the GPU."""

    info: VideoInfo
    indices: IntArray
    seconds: npt.NDArray[np.float64]
    places: IntArray
    clip: Clip
    cost: int


class NvdecStage:
    """The rule and the retries of one pool or decoder; `given_up` says why NVDEC is left alone.

    `pixels_per_frame` are bytes on the GPU beside those of a decoded frame.
    """

    def __init__(
        self,
        capabilities: NvdecCapabilities,
        *,
        pixels_per_frame: int = 0,
        survey: Callable[[bytes], NvdecSurvey] = survey_video,
        sizes: DecoderSizes = PROCESS_SIZES,
    ) -> None:
        self.given_up: str | None = None
        self._capabilities = capabilities
        self._pixels_per_frame = pixels_per_frame
        self._batch_bytes = BATCH_BYTES
        self._survey = survey
        self._sizes = sizes
        self._fruitless = 0
        self._lock = Lock()

    def buckets(self, batch_videos: int) -> Buckets[Item]:
        """Where what is planned waits for the rest of its batch, one of these for each stage."""
        return Buckets(items=batch_videos, cost=self._batch_bytes, open_keys=OPEN_SIZES)

    def plan(self, data: bytes, choose: Callable[[VideoInfo], IntArray]) -> NvdecPlan | str:
        """Frames for NVDEC, or why PyAV must decode the video. Raises what `choose` raises."""
        if self.given_up is not None:
            return self.given_up
        try:
            survey = self._survey(data)
        except DecodeError:
            return "cannot be surveyed"  # PyAV has the last word, and the reason
        except Exception as error:
            logger.exception("unexpected error of the survey: %s", one_line(error))
            return "cannot be surveyed"
        facts = survey.facts
        refusal = nvdec_refusal(facts, self._capabilities)
        if refusal is not None:
            return refusal
        assert survey.info is not None
        assert survey.seconds is not None
        indices = choose(survey.info)
        # Repeated frames are decoded once: for NVDEC each repeat is a jump back.
        frames, places = np.unique(indices, return_inverse=True)
        clip = Clip(np.frombuffer(data, np.uint8), frames, facts.height, facts.width, facts.codec)
        cost = len(frames) * (3 * clip.height * clip.width + self._pixels_per_frame)
        if cost > self._batch_bytes:
            return "too many or too large frames for the GPU's memory"
        with self._lock:
            refusal = self._sizes.refusal(facts)
        if refusal is not None:
            return refusal
        seconds = survey.seconds[indices]
        return NvdecPlan(survey.info, indices, seconds, places.reshape(-1), clip, cost)

    def attempt(
        self, batch: Sequence[Item], decode: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Results of a batch, else of its items one by one: of those at which `decode` succeeds."""
        results: list[Result] = []
        try:
            if self.given_up is None:
                results = decode(batch)
        except Exception as error:
            logger.debug("a batch of %d failed: %s", len(batch), one_line(error))
            for item in batch if len(batch) > 1 else []:
                try:
                    results += decode([item])
                except Exception as cause:
                    logger.info("NVDEC failed at a video (%s): PyAV decodes it", one_line(cause))
        with self._lock:
            self._fruitless = 0 if results else self._fruitless + 1
            if self._fruitless >= GIVE_UP_AFTER and self.given_up is None:
                self.given_up = "NVDEC failed again and again"
                logger.warning(
                    "the GPU's decoder failed at %d batches in a row: PyAV decodes the rest",
                    GIVE_UP_AFTER,
                )
        return results
