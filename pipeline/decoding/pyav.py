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
from dataclasses import dataclass, field, replace
from itertools import chain

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
from pipeline.decoding.frame_stack import FrameStack, shown_rotation, shown_size
from pipeline.decoding.gop_plan import PacketTable
from pipeline.decoding.video_file import STRICT_CODECS, VideoFile, plain_cause

logger = logging.getLogger(__name__)

# Containers that give every frame a trustworthy time, and codecs with one shown frame per packet.
# AVI has no presentation times; VP8 hides alternate reference frames in packets of their own.
RELIABLE_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
RELIABLE_CODECS = {"h264", "hevc", "vp9", "av1", "libdav1d"}
KEPT_PACKET_BYTES = 64 << 20  # a stream larger than this is read again instead of being kept
# A container that ends this much before its declared duration has lost its tail. One second and
# five percent leave room for containers that count a longer sound track or a last still frame.
LOST_SECONDS = 1.0
LOST_FRACTION = 0.05


class PyAVDecoder:
    """CPU decoder for every format FFmpeg knows (see `pipeline.decoding.contract.Decoder`).

    With `strict`, damage that the H.264 and HEVC decoders notice fails the video instead of
    showing up as smeared frames. Holds no state: threads may share one.
    """

    name = "pyav"

    def __init__(self, strictness: Strictness = "auto") -> None:
        self.strict = strictness != "never"

    def probe(self, source: Source) -> VideoInfo:
        """Count the frames of a video and check that the last one comes out.

        `source` is the file as bytes, a path, or a seekable binary file; the latter two are read
        as a stream, so that memory does not grow with the file. Raises `DecodeError`.
        """
        with VideoFile(source, strict=self.strict) as media:
            survey = _survey(media)
            if not survey.reliable:
                return _counted_info(media, survey)
            last = _OneFrame(survey.num_frames - 1)
            _decode_chosen(media, survey, last)
            return survey.info(media, last.rotation, last.size)

    def decode(self, source: Source, frame_indices: npt.ArrayLike) -> Frames:
        """Decode the frames `frame_indices` [n]: RGB uint8 [n, height, width, 3].

        Raises `DecodeError` naming a frame that does not exist or cannot be produced.
        """
        with VideoFile(source, strict=self.strict) as media:
            survey = _survey(media)
            stack = FrameStack(frame_indices)
            if survey.reliable:
                stack.require_within(survey.num_frames)
            _decode_chosen(media, survey, stack)
            return stack.frames

    def decode_with_info(
        self, source: Source, choose: ChooseFrames
    ) -> tuple[VideoInfo, Frames, npt.NDArray[np.float64]]:
        """Count the frames, let `choose(info)` pick indices [n], decode those.

        Returns (info, RGB uint8 [n, height, width, 3], presentation seconds float64 [n]).
        Raises `DecodeError`.
        """
        with VideoFile(source, strict=self.strict) as media:
            survey = _survey(media)
            if survey.reliable:
                first = _OneFrame(0)  # tells the rotation, which the container keeps to itself
                _decode_chosen(media, survey, first)
                info = survey.info(media, first.rotation, first.size)
            else:
                info = _counted_info(media, survey)
            stack = FrameStack(choose(info))
            stack.require_within(info.num_frames)
            _decode_chosen(media, survey, stack)
            seconds = stack.seconds if survey.timed else stack.indices / info.fps
            return info, stack.frames, seconds


class _OneFrame(FrameStack):
    """Wants one frame for its size and rotation only: the pixels are never converted."""

    def __init__(self, index: int) -> None:
        super().__init__([index])
        self.rotation = 0
        self.size = (0, 0)

    def put(self, index: int, frame: VideoFrame, seconds: float) -> None:
        self.rotation, self.size = shown_rotation(frame), shown_size(frame)
        self.missing.discard(index)


@dataclass
class _Survey:
    """What reading all packets told."""

    table: PacketTable
    reliable: bool
    timed: bool
    seconds_per_tick: float
    declared_fps: float
    end_pts: int
    # None when the stream is too large to keep.
    packets: list[Packet[VideoStream]] | None
    num_frames: int = 0
    index_of_pts: dict[int, int] = field(default_factory=dict)

    def seconds_of(self, frame: VideoFrame) -> float:
        return frame.pts * self.seconds_per_tick if frame.pts is not None else float("nan")

    def info(self, media: VideoFile, rotation: int, size: tuple[int, int]) -> VideoInfo:
        shown = self.table.pts[~self.table.discard]
        duration = 0.0
        if self.timed and len(shown):
            duration = (self.end_pts - int(shown.min())) * self.seconds_per_tick
        fps = self.declared_fps
        if fps <= 0:
            fps = self.num_frames / duration if duration > 0 else 1.0
        return VideoInfo(
            num_frames=self.num_frames,
            fps=fps,
            width=size[0],
            height=size[1],
            codec=media.codec.removeprefix("lib").replace("dav1d", "av1"),
            duration_s=duration if duration > 0 else self.num_frames / fps,
            container_frames=media.stream.frames,
            rotation=rotation,
        )


def _survey(media: VideoFile) -> _Survey:
    """Read all packets: the packet table, and whether frames can be counted and found from it."""
    indexed_when_opened = len(media.stream.index_entries)
    pts: list[int] = []
    keyframe: list[bool] = []
    discard: list[bool] = []
    kept: list[Packet[VideoStream]] | None = []
    kept_bytes, end_pts, complete_pts, torn = 0, 0, True, 0
    for packet in media.packets():
        if packet.is_corrupt:
            torn += 1  # the container ends inside it
        pts.append(packet.pts if packet.pts is not None else 0)
        complete_pts &= packet.pts is not None
        keyframe.append(packet.is_keyframe)
        discard.append(packet.is_discard)
        if not packet.is_discard:
            end_pts = max(end_pts, pts[-1] + (packet.duration or 0))
        kept_bytes += packet.size
        if kept_bytes > KEPT_PACKET_BYTES:
            kept = None
        if kept is not None:
            kept.append(packet)
    _refuse_truncated(media, len(pts), torn, indexed_when_opened, end_pts)
    if not pts:
        raise DecodeError("no frames")
    table = PacketTable(
        np.array(pts, np.int64),
        np.array(keyframe, np.bool_),
        np.array(discard, np.bool_),
        complete_pts,
    )
    survey = _Survey(
        table=table,
        reliable=bool(media.formats & RELIABLE_CONTAINERS)
        and media.codec in RELIABLE_CODECS
        and table.is_reliable(),
        timed="avi" not in media.formats and complete_pts,
        seconds_per_tick=float(media.stream.time_base or 0),
        declared_fps=float(media.stream.average_rate or media.stream.guessed_rate or 0),
        end_pts=end_pts,
        packets=kept,
    )
    if survey.reliable:
        order = table.display_order()
        survey.num_frames = len(order)
        survey.index_of_pts = {int(table.pts[packet]): i for i, packet in enumerate(order)}
    return survey


def _refuse_truncated(
    media: VideoFile, packets: int, torn: int, indexed_when_opened: int, end_pts: int
) -> None:
    """Raise `DecodeError` when the container promises more than could be read."""
    readable = packets - torn
    formats = media.formats
    if "mov" in formats or "mp4" in formats:
        # Not `stream.frames`: an edit list takes frames away that it still counts.
        listed = len(media.stream.index_entries) or media.stream.frames
    elif "avi" in formats and indexed_when_opened == packets and not media.ends_early:
        listed = packets  # the index at the file's end was read: frames listed beyond are repeats
    else:
        listed = media.stream.frames
    if readable < listed or torn:
        total = listed if listed > readable else packets
        raise DecodeError(f"truncated: {readable} of {total} frames can be read")
    declared = _declared_seconds(media)
    read = end_pts * float(media.stream.time_base or 0)
    if declared - read > max(LOST_SECONDS, LOST_FRACTION * declared):
        raise DecodeError(f"truncated: {read:.1f} of {declared:.1f} seconds can be read")


def _declared_seconds(media: VideoFile) -> float:
    """How long the container says its video is, 0 where it lists frames or says nothing."""
    if media.stream.frames or not media.formats & RELIABLE_CONTAINERS:
        return 0.0
    tag = media.stream.metadata.get("DURATION", "")
    with suppress(ValueError):
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    only_stream = len(media.container.streams) == 1
    return (media.container.duration or 0) / av.time_base if only_stream else 0.0


def _decode_chosen(media: VideoFile, survey: _Survey, stack: FrameStack) -> None:
    """Fill `stack`: by the plan where the packet table allows, else (or failing that) in order."""
    if survey.reliable:
        try:
            _decode_by_plan(media, survey, stack)
        except av.FFmpegError as error:
            # A decoder told to be strict also stumbles over a sound open GOP after a jump.
            logger.debug("planned decoding failed (%s): decoding in order", plain_cause(error))
        if not stack.missing:
            return
    _decode_in_order(media, survey, stack)


def _decode_by_plan(media: VideoFile, survey: _Survey, stack: FrameStack) -> None:
    order = survey.table.display_order()
    runs = survey.table.runs(int(order[index]) for index in stack.missing)
    if survey.packets is None:
        media.restart()
    context = media.stream.codec_context
    source = iter(survey.packets if survey.packets is not None else media.packets())
    position = 0
    for run in runs:
        targets = {int(survey.table.pts[packet]) for packet in run.wanted}
        if context.is_open:
            context.flush_buffers()
        if survey.packets is not None:
            source, position = iter(survey.packets[run.first : run.last + 1]), run.first
        for packet in source:
            # A leading picture of the run's first keyframe leans on packets before it. It is not
            # wanted (else the run would begin earlier), and a strict decoder would stumble.
            leads = survey.table.pts[position] < survey.table.pts[run.first]
            if position >= run.first and not leads:
                if media.codec in STRICT_CODECS:
                    context.skip_frame = "DEFAULT" if position in run.wanted else "NONREF"
                _take(context.decode(packet), targets, survey, stack)
            position += 1
            if position > run.last:
                break
        _take(context.decode(None), targets, survey, stack)
    context.skip_frame = "DEFAULT"
    context.flush_buffers()


def _take(
    frames: Iterable[VideoFrame], targets: set[int], survey: _Survey, stack: FrameStack
) -> None:
    """Keep the frames whose time is wanted. A damaged one counts as missing."""
    for frame in frames:
        if frame.pts in targets and not frame.is_corrupt:
            stack.put(survey.index_of_pts[frame.pts], frame, survey.seconds_of(frame))


def _frames_in_order(media: VideoFile, skipped: list[int]) -> Iterator[VideoFrame]:
    """All frames from the start. `skipped` collects the numbers of damaged packets passed over."""
    media.restart()
    context = media.stream.codec_context
    shown = 0
    for number, packet in enumerate(chain(media.packets(), [None])):
        if packet is not None and not packet.size:
            continue  # an empty packet would end the stream for the decoder
        try:
            frames = context.decode(packet)
        except av.FFmpegError as error:
            if media.explodes:
                cause = plain_cause(error)
                raise DecodeError(f"damaged after {shown} frames ({cause})") from None
            skipped.append(number)
            continue
        shown += len(frames)
        yield from frames


def _decode_in_order(media: VideoFile, survey: _Survey, stack: FrameStack) -> None:
    """Fill `stack` by decoding from the first packet up to the last wanted frame."""
    shown = 0
    for shown, frame in enumerate(_frames_in_order(media, []), start=1):
        index = shown - 1
        if survey.reliable:
            index = survey.index_of_pts.get(frame.pts, -1) if frame.pts is not None else -1
        if index in stack.missing and not (media.explodes and frame.is_corrupt):
            stack.put(index, frame, survey.seconds_of(frame))
        if not stack.missing:
            return
    if not survey.reliable:
        stack.require_within(shown)
    raise DecodeError(f"frame {min(stack.missing)} cannot be decoded")


def _counted_info(media: VideoFile, survey: _Survey) -> VideoInfo:
    """Count by decoding everything; sets `survey.num_frames`."""
    skipped: list[int] = []
    count, rotation, size = 0, 0, (0, 0)
    for frame in _frames_in_order(media, skipped):
        if count == 0:
            rotation, size = shown_rotation(frame), shown_size(frame)
        count += 1
    if count == 0:
        raise DecodeError("no frames")
    survey.num_frames = count
    info = survey.info(media, rotation, size)
    return replace(info, damaged_packets=len(skipped))
