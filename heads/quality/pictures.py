"""Draws videos below each other, as far as their files are at hand, so that a person can judge."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from featstore.errors import UserError, WorkError, safe_text
from featstore.files.durable import write_bytes
from featstore.files.machine import usable_cores
from heads.quality.part import Part
from pipeline.decoding.contract import ChooseFrames, DecodeError, VideoInfo
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.tars.dataset import DATASET_FILE, Dataset, Tar, load_dataset
from pipeline.tars.probing import in_order
from pipeline.tars.reading import TarSample, open_packed, read_video

log = logging.getLogger(__name__)

SIDE: Final = 96  # of a square that a drawn frame fits into, in pixels
COLUMNS: Final = 8  # frames of a video that are drawn, evenly chosen
LINE: Final = 16  # height of a line of text
LETTERS: Final = 110  # of a line; longer ones are cut
_GAP: Final = 4


@dataclass(frozen=True)
class Sheet:
    """Videos that are drawn together, below a `title`."""

    title: str
    videos: Sequence[tuple[str, Sequence[Image.Image] | None]]
    """Caption and frames of each; None without a file."""


class VideoFiles:
    """Small pictures of a part's videos, decoded again from the tars that are at hand."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._decoder = PyAVDecoder()
        self._samples: dict[str, dict[str, TarSample]] = {}
        # By the hash of the tar: a merged or grown store has tars of several data sets.
        self._tars: dict[str, tuple[Dataset, Tar]] = {}
        for path in sorted(part.dataset_dir.parent.glob(f"*/{DATASET_FILE}")):
            with suppress(UserError, WorkError):
                dataset = load_dataset(path.parent)
                self._tars |= {tar.sha256: (dataset, tar) for tar in dataset.tars}

    def at_hand(self) -> list[int]:
        """Return the places in the part of the videos whose tars are on this machine."""
        store = self._part.store
        there = [
            (held := self._tars.get(tar.sha256)) is not None and not held[1].remote
            for tar in store.tars
        ]
        numbers = (self._part.rows // store.schema.capacity).tolist()
        return [at for at, number in enumerate(numbers) if there[number]]

    def squares(
        self, rows: Sequence[int], frames: int, side: int
    ) -> Iterator[npt.NDArray[np.uint8] | None]:
        """Yield `frames` evenly spaced frames of each of `rows`, squeezed into squares.

        uint8 [frames,side,side,3]; None for a video that is not at hand or cannot be decoded.
        """
        with ThreadPoolExecutor(usable_cores()) as pool:
            yield from in_order(
                pool, lambda row: self._square(row, frames, side), rows, window=usable_cores() + 1
            )

    def _square(self, row: int, frames: int, side: int) -> npt.NDArray[np.uint8] | None:
        def evenly(info: VideoInfo) -> npt.NDArray[np.int64]:
            return np.linspace(0, info.num_frames - 1, frames).round().astype(np.int64)

        found = self._decoded(row, evenly)
        if found is None:
            return None
        size = (side, side)
        small = [
            np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
            for frame in found
        ]
        return np.stack(small)

    def frames(self, row: int) -> list[Image.Image] | None:
        """Return up to `COLUMNS` of the encoded frames in order of time, none above `SIDE` pixels.

        None if the video's file is not at hand or cannot be decoded.
        """
        wanted = np.unique(self._part.store.frame_index([row])[0])
        wanted = wanted[wanted >= 0]
        if not len(wanted):
            return None
        chosen = wanted[np.linspace(0, len(wanted) - 1, COLUMNS).round().astype(np.int64)]
        frames = self._decoded(row, lambda _: np.unique(chosen))
        return None if frames is None else [_small(frame) for frame in frames]

    def _decoded(self, row: int, choose: ChooseFrames) -> npt.NDArray[np.uint8] | None:
        """Decode frames of a video; None, logged, if they cannot be had."""
        store = self._part.store
        key = store.keys[int(store.positions([row])[0])]
        held = self._tars.get(store.tars[row // store.schema.capacity].sha256)
        if held is None or held[1].remote:
            return None
        dataset, tar = held
        # A merge may have put the data set's name before the key.
        samples = self._of_tar(dataset, tar)
        sample = samples.get(key) or samples.get(key.rpartition("/")[2])
        if sample is None:
            return None
        try:
            data = read_video(dataset, tar, sample.key, sample.offset, sample.size)
            return self._decoder.decode_with_info(data, choose)[1]
        except (DecodeError, WorkError) as error:
            log.warning("no pictures of %s: %s", safe_text(key), error)
            return None

    def _of_tar(self, dataset: Dataset, tar: Tar) -> Mapping[str, TarSample]:
        if tar.sha256 not in self._samples:
            found: dict[str, TarSample] = {}
            try:
                with open_packed(dataset, tar) as archive:
                    found = {sample.key: sample for sample in archive.samples}
            except WorkError as error:
                log.warning("no pictures of %s: %s", tar.file, error)
            self._samples[tar.sha256] = found
        return self._samples[tar.sha256]


def _small(frame: npt.NDArray[np.uint8]) -> Image.Image:
    height, width = frame.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)


def draw_sheets(sheets: Sequence[Sheet], path: Path) -> int:
    """Draw sheets below each other as the PNG file `path`; return how many videos have frames.

    Nothing is written if none has. A video without frames is named all the same.
    """
    found = sum(frames is not None for sheet in sheets for _, frames in sheet.videos)
    if not found:
        return 0
    high = sum(LINE + _GAP + sum(_height(f) for _, f in sheet.videos) for sheet in sheets)
    drawn = Image.new("RGB", (COLUMNS * (SIDE + _GAP) + _GAP, high + _GAP), "white")
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default()
    top = _GAP
    for sheet in sheets:
        pen.text((_GAP, top), _cut(sheet.title), fill="black", font=font)
        top += LINE
        for words, frames in sheet.videos:
            caption = words if frames is not None else f"{words} (no file)"
            pen.text((_GAP, top), _cut(caption), fill=(90, 90, 90), font=font)
            for column, frame in enumerate(frames or ()):
                drawn.paste(frame, (_GAP + column * (SIDE + _GAP), top + LINE))
            top += _height(frames)
        top += _GAP
    data = io.BytesIO()
    drawn.save(data, format="PNG")
    write_bytes(path, data.getvalue())
    return found


def _height(frames: Sequence[Image.Image] | None) -> int:
    if not frames:
        return LINE
    return LINE + _GAP + max(frame.height for frame in frames)


def _cut(text: str) -> str:
    """Return a line as the picture's font can write it."""
    plain = safe_text(text).encode("latin-1", "replace").decode("latin-1")
    return plain if len(plain) <= LETTERS else plain[: LETTERS - 3] + "..."
