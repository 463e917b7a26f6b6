"""Reads all packets of a video once, to count and locate frames without decoding them."""

from __future__ import annotations

from array import array
from contextlib import suppress
from dataclasses import dataclass, replace

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.decoding.contract import DecodeError, VideoInfo
from pipeline.decoding.pyav.frame_stack import shown_rotation, shown_size
from pipeline.decoding.pyav.gop_plan import PacketTable
from pipeline.decoding.pyav.video_file import VideoFile

# Containers that give every frame a reliable time, and codecs with one shown frame per packet.
# AVI has no presentation times; VP8 hides alternate reference frames in packets of their own.
RELIABLE_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
RELIABLE_CODECS = {"h264", "hevc", "vp9", "av1", "libdav1d"}
# Formats whose keyframes are known from the container or from a parser, so that a stream can be
# seen to begin inside a group of pictures. The index of an AVI file is too often wrong.
KEYFRAME_FORMATS = RELIABLE_CONTAINERS | {"mpegts", "mpeg", "flv", "h264", "hevc", "mpegvideo"}
# A stream above one of these limits is read again instead of being kept. Packets are limited, too,
# as each takes hundreds of bytes besides its data; 20,000 are eleven minutes at 30 frames a second.
KEPT_PACKET_BYTES = 64 << 20
KEPT_PACKETS = 20_000
# A container that ends this much before its declared duration was cut off. One second and five
# percent leave room for containers that count a longer sound track or a last still frame.
LOST_SECONDS = 1.0
LOST_FRACTION = 0.05


@dataclass
class Survey:
    """What the packets of a video tell without being decoded.

    `reliable`: the table gives the display order. `timed`: frames have presentation times.
    `packet_of` int64 [frames]: the packet of every frame in display order, and `shown_pts` int64
    [frames] its time. `packets` is None when the stream is too large to keep. `likely_frames` is
    the number of frames where the table is reliable and a guess elsewhere. `damaged_when_read`
    counts packets that could not be read whole. `begin` is the first packet to decode: those before
    it belong to a group of pictures whose keyframe is not in the file. `leading` are the packets
    after it whose pictures may lean on that group.
    """

    table: PacketTable
    reliable: bool
    timed: bool
    packet_of: npt.NDArray[np.int64]
    shown_pts: npt.NDArray[np.int64]
    seconds_per_tick: float
    declared_fps: float
    end_pts: int
    packets: list[Packet[VideoStream]] | None
    likely_frames: int
    damaged_when_read: int
    begin: int
    leading: list[int]

    def index_of(self, pts: int | None) -> int:
        """The index of the frame shown at `pts`, -1 if there is none."""
        if pts is None:
            return -1
        index = int(np.searchsorted(self.shown_pts, pts))
        return index if index < len(self.shown_pts) and self.shown_pts[index] == pts else -1

    def seconds_of(self, frame: VideoFrame) -> float:
        """When the frame is shown, on the container's clock; NaN if it has no time."""
        return frame.pts * self.seconds_per_tick if frame.pts is not None else float("nan")

    def info(self, media: VideoFile, frame: VideoFrame) -> VideoInfo:
        """The video's description, with rotation and size of a decoded frame."""
        width, height = shown_size(frame)
        info = VideoInfo(
            num_frames=self.likely_frames,
            fps=self.declared_fps,
            width=width,
            height=height,
            codec=media.codec.removeprefix("lib").replace("dav1d", "av1"),
            duration_s=0.0,
            container_frames=media.stream.frames,
            rotation=shown_rotation(frame),
            damaged_packets=self.damaged_when_read,
            alpha_left_out=media.alpha_left_out,
        )
        return self.with_count(info, self.likely_frames)

    def with_count(self, info: VideoInfo, num_frames: int) -> VideoInfo:
        """Return `info` for another number of frames, on which rate and duration may depend."""
        duration = 0.0
        if self.timed and len(self.shown_pts):
            duration = (self.end_pts - int(self.shown_pts[0])) * self.seconds_per_tick
        fps = self.declared_fps
        if fps <= 0:
            fps = num_frames / duration if duration > 0 else 1.0
        seconds = duration if duration > 0 else num_frames / fps
        return replace(info, num_frames=num_frames, fps=fps, duration_s=seconds)


def read_survey(media: VideoFile) -> Survey:
    """Read all packets. Raises `DecodeError` for a truncated file and for one without packets."""
    indexed_when_opened = len(media.stream.index_entries)
    # 10 bytes a packet: a video of ten hours has a million.
    pts, keyframe, discard = array("q"), bytearray(), bytearray()
    kept: list[Packet[VideoStream]] | None = []
    kept_bytes, end_pts, complete_pts, torn, filled = 0, 0, True, 0, 0
    for packet in media.packets():
        time = packet.pts
        if packet.is_corrupt:
            torn += 1
        if time is None:
            time, complete_pts = 0, False
        pts.append(time)
        keyframe.append(packet.is_keyframe)
        discard.append(packet.is_discard)
        if not packet.is_discard:
            filled += packet.size > 0
            end_pts = max(end_pts, time + (packet.duration or 0))
        if kept is not None:
            kept.append(packet)
            kept_bytes += packet.size
            if kept_bytes > KEPT_PACKET_BYTES or len(kept) > KEPT_PACKETS:
                kept = None
    # In a transport stream a torn packet lost a part in transit; elsewhere the file ends inside it.
    ends_inside = 0 if "mpegts" in media.formats else torn
    _refuse_truncated(media, len(pts), ends_inside, indexed_when_opened, end_pts)
    if not pts:
        raise DecodeError("no frames")
    table = PacketTable(
        np.array(pts, np.int64),
        np.frombuffer(keyframe, np.bool_),
        np.frombuffer(discard, np.bool_),
        complete_pts,
    )
    reliable = (
        bool(media.formats & RELIABLE_CONTAINERS)
        and media.codec in RELIABLE_CODECS
        and table.is_reliable()
    )
    packet_of = table.display_order()
    begin, leading = 0, list[int]()
    if media.formats & KEYFRAME_FORMATS and complete_pts:
        begin, leading = table.cut_start()
    return Survey(
        table=table,
        reliable=reliable,
        timed="avi" not in media.formats and complete_pts,
        packet_of=packet_of,
        shown_pts=table.pts[packet_of],
        seconds_per_tick=float(media.stream.time_base or 0),
        declared_fps=float(media.stream.average_rate or media.stream.guessed_rate or 0),
        end_pts=end_pts,
        packets=kept,
        likely_frames=len(packet_of) if reliable else filled - begin - len(leading),
        damaged_when_read=torn + (media.broken_off is not None),
        begin=begin,
        leading=leading,
    )


def _refuse_truncated(
    media: VideoFile, packets: int, torn: int, indexed_when_opened: int, end_pts: int
) -> None:
    """Raise `DecodeError` if the container declares more than could be read."""
    readable = packets - torn
    formats = media.formats
    if "mov" in formats or "mp4" in formats:
        # Not `stream.frames`, which also counts the frames that an edit list removes.
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
    """The duration that the container declares, 0 if it lists frames or declares none."""
    if media.stream.frames or not media.formats & RELIABLE_CONTAINERS:
        return 0.0
    tag = media.stream.metadata.get("DURATION", "")
    with suppress(ValueError):
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    only_stream = len(media.container.streams) == 1
    return (media.container.duration or 0) / av.time_base if only_stream else 0.0
