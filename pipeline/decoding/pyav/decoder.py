"""The reference decoder: FFmpeg through PyAV, one thread, exactly the chosen frames.

The packets are read once. Where every packet of a container stands for one shown frame, sorting
them by presentation time gives the frame index, and only the groups of pictures that hold a wanted
frame are decoded. Everywhere else the file is decoded from the start. Both give the same pixels as
decoding the whole file in order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice, zip_longest
from typing import Any, get_args
from zlib import crc32

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
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
from pipeline.decoding.pyav.account import Account, length_size, nobody_leans_on, temporal_layer
from pipeline.decoding.pyav.frame_stack import FrameStack
from pipeline.decoding.pyav.gop_plan import PacketRun
from pipeline.decoding.pyav.in_order import FramesInOrder
from pipeline.decoding.pyav.packet_survey import Survey, read_survey
from pipeline.decoding.pyav.reference_gaps import ReferenceGaps
from pipeline.decoding.pyav.video_file import VideoFile, plain_cause

logger = logging.getLogger(__name__)

# Many decoders leave parts of a damaged picture as they find them in memory, without an error or a
# mark, so that it depends on what was there before. These were measured not to (docs/decoding.md).
# The frames of all others are decoded twice, and must be the same.
STEADY_CODECS = {
    *("h264", "hevc", "vp9", "av1", "libdav1d", "gif", "png", "prores", "rawvideo"),
    *("mpeg1video", "mpeg2video", "mpeg4", "h263", "flv"),
    *("msmpeg4v2", "msmpeg4", "wmv1", "wmv2"),
}
HELD_FRAMES = 7  # kept the second time, so that the memory of earlier ones is used again


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
            seen = _decode_chosen(media, survey, last)
            return replace(survey.info(media, last.frame), **seen)

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
                info = replace(info, **_decode_chosen(media, survey, stack))
            info = replace(info, other_sizes=stack.other_sizes(info.width, info.height))
            if info.other_sizes and self.strict == "always":
                raise DecodeError(
                    f"the size changes within the video: the first frame is "
                    f"{info.width}x{info.height}, {info.other_sizes} of those asked for are not"
                )
            if media.codec not in STEADY_CODECS and self.strict != "never":
                _require_steady(media, survey, stack)
                if self.strict == "auto":  # the others were not decoded twice
                    info = replace(info, checked_packets=len(set(stack.indices.tolist())))
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
    frames = FramesInOrder(media, survey)
    for index, frame in frames:
        if info is None:
            info = survey.info(media, frame)
            if choose is not None:
                with suppress(DecodeError, ValueError):  # raised again if the count was right
                    stack = FrameStack(choose(info))
        if stack is not None and index in stack.missing:
            try:
                stack.put(index, frame, survey.seconds_of(frame))
                frames.keep(index)
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
    if stack is None:
        frames.keep_none()
    frames.require_whole()
    info = replace(info, **frames.seen())
    if choose is not None and (stack is None or stack.missing):
        stack = FrameStack(choose(info))
        stack.require_within(info.num_frames)
        _decode_in_order(media, survey, stack)
    return info, stack


def _decode_chosen(media: VideoFile, survey: Survey, stack: FrameStack) -> dict[str, Any]:
    """Fill `stack` from the needed packets only, or from all in order if that is not possible.

    Returns what `VideoInfo` says of the packets on the way.
    """
    runs = survey.table.runs(survey.packet_of[sorted(stack.missing)].tolist())
    checked = 0
    try:
        for run, packets in _packets_of(media, survey, runs):
            sent = _decode_run(media, survey, run, packets, stack)
            checked += sent
            if not sent:
                break
        if sent and not stack.missing:
            return {"damaged_packets": survey.damaged_when_read, "checked_packets": checked}
        logger.debug("planned decoding met a doubtful frame: decoding in order")
    except av.FFmpegError as error:
        logger.debug("planned decoding failed (%s): decoding in order", plain_cause(error))
    stack.start_again()
    return _decode_in_order(media, survey, stack)


def _require_steady(media: VideoFile, survey: Survey, stack: FrameStack) -> None:
    """Raise `DecodeError` if the frames of `stack` are others when they are decoded again.

    With strictness "always", every frame of the video is held against itself.
    """
    if media.strict == "always":
        one, two = (_prints(media, survey, apart=apart) for apart in (False, True))
        if one != two:
            other = next(at for at, (a, b) in enumerate(zip_longest(one, two)) if a != b)
            raise DecodeError(f"damaged: frame {other} is another one when it is decoded again")
        return
    again = FrameStack(stack.indices)
    _decode_in_order(media, survey, again, apart=True)
    for index, one, other in zip(stack.indices, stack.frames, again.frames, strict=True):
        if not np.array_equal(one, other):
            raise DecodeError(f"damaged: frame {index} is another one when it is decoded again")


def _prints(media: VideoFile, survey: Survey, *, apart: bool) -> list[int]:
    """Return a checksum of every frame; `apart` as in `_decode_in_order`."""
    held: deque[VideoFrame] = deque(maxlen=HELD_FRAMES if apart else 0)
    found, reformatter = [], VideoReformatter()
    for _, frame in FramesInOrder(media, survey, used_memory=apart):
        held.append(frame)
        rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        found.append(crc32(rgb.tobytes()))
    return found


def _decode_in_order(
    media: VideoFile, survey: Survey, stack: FrameStack, *, apart: bool = False
) -> dict[str, Any]:
    """Fill `stack` from all packets in order; what it says of a video is final.

    `apart` makes the decoder write into other memory than otherwise.
    """
    frames = FramesInOrder(media, survey, used_memory=apart)
    held: deque[VideoFrame] = deque(maxlen=HELD_FRAMES if apart else 0)
    for index, frame in frames:
        held.append(frame)
        if index in stack.missing:
            stack.put(index, frame, survey.seconds_of(frame))
            frames.keep(index)
            if not stack.missing:
                frames.require_whole()
                return frames.seen()
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
) -> int:
    """Decode one run of packets into `stack`.

    Returns how many packets were sent to the decoder, or 0 if any of them did not come out as a
    sound frame: then those that lean on it may be wrong. That is so, too, where decoding cannot
    begin at what a container marks as a keyframe (intra refresh).
    """
    context = media.stream.codec_context
    if context.is_open:
        context.flush_buffers()
    account = Account(media.codec, run.last + 1)
    units = length_size(media.codec, context.extradata)
    pts = survey.table.pts
    start = latest = int(pts[run.first])
    # After an error the decoder of HEVC gives no leading pictures: where one is wanted, damage in
    # what nobody leans on must be seen as well.
    may_leave_out = units > 0 and not (
        media.codec == "hevc" and survey.table.is_leading(run.wanted)
    )
    left_out, layers = {7}, {0}  # temporal layers; 7 is above them all
    gaps = ReferenceGaps(context.extradata, units) if media.codec == "h264" else None
    for number, packet in enumerate(chain(packets, [None]), start=run.first):
        if packet is not None:
            if gaps and gaps.before(memoryview(packet)):
                return 0
            # A leading picture of the run's first keyframe depends on packets before it. It is not
            # wanted, otherwise the run would begin earlier.
            if pts[number] < start:
                continue
            layer = temporal_layer(media.codec, packet, units) if units else 0
            # Damage may make any packet say that nobody leans on it. One that is shown after all
            # those before it is always decoded.
            if (
                may_leave_out
                and number not in run.wanted
                and pts[number] < latest
                and nobody_leans_on(media.codec, packet, units)
            ):
                left_out.add(layer)
                continue
            if gaps and gaps.refused(memoryview(packet)):
                return 0
            layers.add(layer)
            latest = max(latest, int(pts[number]))
            packet = account.send(number, packet)
        for frame in context.decode(packet):
            number_of = account.receive(frame)
            if number_of in run.wanted:
                index = survey.index_of(frame.pts)
                stack.put(index, frame, survey.seconds_of(frame))
    whole = account.broken(run.first, run.last) is None and max(layers) <= min(left_out)
    return account.sent if whole else 0
