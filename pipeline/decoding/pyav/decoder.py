"""The reference decoder: FFmpeg through PyAV, one thread, exactly the chosen frames.

The packets are read once. Where every packet of a container stands for one shown frame, sorting
them by presentation time gives the frame index, and only the groups of pictures that hold a wanted
frame are decoded. Everywhere else the file is decoded from the start. Both give the same pixels as
decoding the whole file in order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import get_args

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.decoding.contract import (
    ChooseFrames,
    DecodeError,
    Frames,
    Source,
    Strictness,
    VideoInfo,
)
from pipeline.decoding.pyav import frame_stack
from pipeline.decoding.pyav.frame_stack import FrameStack
from pipeline.decoding.pyav.gop_plan import PacketRun
from pipeline.decoding.pyav.packet_survey import Survey, read_survey
from pipeline.decoding.pyav.video_file import VideoFile, plain_cause

logger = logging.getLogger(__name__)

# Decoders that can leave out frames that no other frame depends on without changing the rest.
# (libdav1d raises an error instead; with VP9 nothing is gained.)
SKIPPING_CODECS = {"h264", "hevc"}


class PyAVDecoder:
    """CPU decoder for every format FFmpeg knows (see `pipeline.decoding.contract.Decoder`).

    `strict` says how damage inside a file is treated (`pipeline.decoding.contract.Strictness`,
    docs/decoding.md). A truncated video always fails. Holds no state: threads may share one.
    """

    name = "pyav"

    def __init__(self, strict: Strictness = "auto") -> None:
        if strict not in get_args(Strictness):
            raise ValueError(f"strict must be one of {get_args(Strictness)}, not {strict!r}")
        self.strict: Strictness = strict

    def probe(self, source: Source) -> VideoInfo:
        """Count the frames of a video and check that the last one comes out.

        `source` is the file as bytes, a path, or a seekable binary file; the latter two are read
        as a stream, so that memory does not grow with the file. Raises `DecodeError`.
        """
        with VideoFile(source, self.strict) as media:
            survey = read_survey(media)
            if _must_decode_all(media, survey):
                return _decode_all(media, survey, None)[0]
            last = _OneFrame([survey.likely_frames - 1])
            damaged = _decode_chosen(media, survey, last)
            return replace(survey.info(media, last.frame), damaged_packets=damaged)

    def decode(self, source: Source, frame_indices: npt.ArrayLike) -> Frames:
        """Decode the frames `frame_indices` [n] to RGB uint8 [n, height, width, 3] in that order.

        Any order and repeats are allowed. Raises `DecodeError` as `decode_with_info`.
        """
        return self.decode_with_info(source, lambda _: frame_indices)[1]

    def decode_with_info(
        self, source: Source, choose: ChooseFrames
    ) -> tuple[VideoInfo, Frames, npt.NDArray[np.float64]]:
        """See `Decoder.decode_with_info`."""
        with VideoFile(source, self.strict) as media:
            survey = read_survey(media)
            if _must_decode_all(media, survey):
                info, stack = _decode_all(media, survey, choose)
                assert stack is not None
            else:
                first = _OneFrame([0])  # it has the rotation, which PyAV does not read elsewhere
                _decode_chosen(media, survey, first)
                info = survey.info(media, first.frame)
                stack = FrameStack(choose(info))
                stack.require_within(info.num_frames)
                info = replace(info, damaged_packets=_decode_chosen(media, survey, stack))
            stack.require_size(info.width, info.height)
            seconds = stack.seconds if survey.timed else stack.indices / info.fps
            return info, stack.frames, seconds


class _OneFrame(FrameStack):
    """Keeps one frame for its size and rotation only: the pixels are never converted."""

    frame: VideoFrame

    def put(self, index: int, frame: VideoFrame, seconds: float) -> None:
        self.frame = frame
        self.missing.discard(index)


def _must_decode_all(media: VideoFile, survey: Survey) -> bool:
    """Whether every frame must be decoded: to be counted, or to be looked at for damage."""
    return not survey.reliable or media.strict == "always"


def _decode_all(
    media: VideoFile, survey: Survey, choose: ChooseFrames | None
) -> tuple[VideoInfo, FrameStack | None]:
    """Decode every frame: count them, and keep the chosen ones.

    Frames are chosen from the likely count during decoding, so that most files are decoded once.
    """
    info: VideoInfo | None = None
    stack: FrameStack | None = None
    frames = _FramesInOrder(media, survey)
    for index, frame in frames:
        if info is None:
            info = survey.info(media, frame)
            if choose is not None:
                with suppress(DecodeError, ValueError):  # raised again if the count was right
                    stack = FrameStack(choose(info))
        if stack is not None and index in stack.missing:
            try:
                stack.put(index, frame, survey.seconds_of(frame))
            except DecodeError:
                stack = None  # the error is raised again if the count was right
    if info is None:
        # FFmpeg gives the same error for damage and for a frame above the size limit.
        raise DecodeError(
            f"no frame can be decoded{frames.first_cause}; the limit is {frame_stack.MAX_PIXELS} "
            "pixels a frame"
        )
    if survey.reliable and frames.shown != survey.likely_frames:
        raise DecodeError(f"damaged: {frames.shown} of {survey.likely_frames} frames come out")
    if frames.shown != survey.likely_frames:
        info, stack = survey.with_count(info, frames.shown), None
    info = replace(info, damaged_packets=frames.damaged)
    if choose is not None and (stack is None or stack.missing):
        stack = FrameStack(choose(info))
        stack.require_within(info.num_frames)
        _decode_chosen(media, survey, stack)
    return info, stack


def _decode_chosen(media: VideoFile, survey: Survey, stack: FrameStack) -> int:
    """Fill `stack` from the needed packets only, or from all in order if that is not possible.

    Returns the number of damaged packets skipped.
    """
    if survey.reliable:
        runs = survey.table.runs(survey.packet_of[sorted(stack.missing)].tolist())
        try:
            intact = all(
                _decode_run(media, survey, run, packets, stack)
                for run, packets in _packets_of(media, survey, runs)
            )
            if intact and not stack.missing:
                return survey.damaged_when_read
            logger.debug("planned decoding met a doubtful frame: decoding in order")
        except av.FFmpegError as error:
            logger.debug("planned decoding failed (%s): decoding in order", plain_cause(error))
        stack.start_again()
    frames = _FramesInOrder(media, survey)
    for index, frame in frames:
        if index in stack.missing:
            stack.put(index, frame, survey.seconds_of(frame))
            if not stack.missing:
                return frames.damaged
    if not survey.reliable:
        stack.require_within(frames.shown)
    raise DecodeError(f"frame {min(stack.missing)} cannot be decoded")


def _packets_of(
    media: VideoFile, survey: Survey, runs: Iterable[PacketRun]
) -> Iterator[tuple[PacketRun, Iterable[Packet[VideoStream]]]]:
    """Yield each run with its packets, which must be used up before the next run is taken."""
    if survey.packets is not None:
        for run in runs:
            yield run, survey.packets[run.first : run.last + 1]
        return
    media.restart()
    source, position = media.packets(), 0
    for run in runs:
        yield run, islice(source, run.first - position, run.last + 1 - position)
        position = run.last + 1


def _decode_run(
    media: VideoFile,
    survey: Survey,
    run: PacketRun,
    packets: Iterable[Packet[VideoStream]],
    stack: FrameStack,
) -> bool:
    """Decode one run of packets into `stack`. Returns False if a frame may be wrong.

    A frame may be wrong if the decoder marks one as damaged, or if the first keyframe does not come
    out: decoding cannot begin at everything that a container marks as a keyframe (intra refresh).
    """
    context = media.stream.codec_context
    if context.is_open:
        context.flush_buffers()
    may_skip = media.codec in SKIPPING_CODECS
    pts = survey.table.pts
    start = int(pts[run.first])
    wanted = {int(pts[number]) for number in run.wanted}
    begun = bool(survey.table.discard[run.first])  # a discarded keyframe never comes out
    for number, packet in enumerate(chain(packets, [None]), start=run.first):
        if packet is not None:
            # A leading picture of the run's first keyframe depends on packets before it. It is not
            # wanted, otherwise the run would begin earlier.
            if pts[number] < start:
                continue
            if may_skip:
                context.skip_frame = "DEFAULT" if number in run.wanted else "NONREF"
        for frame in context.decode(packet):
            if frame.is_corrupt:
                return False
            begun |= frame.pts == start
            if frame.pts in wanted:
                stack.put(survey.index_of(frame.pts), frame, survey.seconds_of(frame))
    context.skip_frame = "DEFAULT"
    return begun


class _FramesInOrder:
    """Iterates over every frame from the start with its index (-1 if no packet has its time).

    `shown` counts the frames so far, `damaged` the skipped packets; `first_cause` is why the first
    packet was skipped, in brackets. Raises `DecodeError` at damage if the strictness demands it.
    """

    def __init__(self, media: VideoFile, survey: Survey) -> None:
        self._media, self._survey = media, survey
        self.shown = 0
        self.first_cause = ""
        self.damaged = survey.damaged_when_read

    def __iter__(self) -> Iterator[tuple[int, VideoFrame]]:
        if self.damaged and self._media.strict == "always":
            raise DecodeError(f"damaged: packets that cannot be read whole: {self.damaged}")
        packets: Iterable[Packet[VideoStream]] | None = self._survey.packets
        if packets is None or self._media.stream.codec_context.is_open:
            # A decoder that was flushed does not behave exactly like a new one.
            self._media.restart()
            packets = self._media.packets()
        context = self._media.stream.codec_context
        for packet in chain(packets, [None]):
            if packet is not None and not packet.size:
                continue  # an empty packet would end the stream for the decoder
            frames: list[VideoFrame] = []
            try:
                frames = context.decode(packet)
            except av.FFmpegError as error:
                self._pass_over(plain_cause(error))
            for frame in frames:
                if frame.is_corrupt:
                    self._pass_over("the decoder marks a frame as damaged")
                index = self._survey.index_of(frame.pts) if self._survey.reliable else self.shown
                self.shown += 1
                yield index, frame

    def _pass_over(self, cause: str) -> None:
        if self._media.fails_on_damage:
            raise DecodeError(f"damaged after {self.shown} frames ({cause})")
        self.first_cause = self.first_cause or f" ({cause})"
        self.damaged += 1
