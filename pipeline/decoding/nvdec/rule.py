"""Which videos the GPU's decoder (NVDEC, through DALI) gives exactly: a survey and a rule.

DALI finds frames much as `PyAVDecoder` does: all packets, sorted by presentation time. Where its
way and ours can part, where its colours are wrong, or where it fails in silence, the rule sends the
video to PyAV. What it rests on was read in DALI's sources and issue tracker and in NVIDIA's tables
(Video Codec SDK, NVDEC application note); see docs/gpu.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.decoding.contract import VideoInfo
from pipeline.decoding.pyav.packet_survey import RELIABLE_CONTAINERS, read_survey
from pipeline.decoding.pyav.video_file import VideoFile

if TYPE_CHECKING:
    from av.sidedata.sidedata import SideData

# (least width, least height), (greatest width, greatest height) of what NVDEC decodes.
SIZES = {
    "h264": ((48, 16), (4096, 4096)),
    "hevc": ((144, 144), (8192, 8192)),
    "vp9": ((128, 128), (8192, 8192)),
    "av1": ((128, 128), (8192, 8192)),
}
# Compute capabilities of GPUs with an AV1 decoder: GA10x, Ada, GeForce and RTX PRO Blackwell. Not
# Turing, GA100 or Hopper; others are left out until they are known.
AV1_CAPABILITIES = {(8, 6), (8, 9), (12, 0)}
# Matrix coefficients (ITU-T H.273): unspecified, and the two that are BT.601, by which DALI
# converts whatever the stream says. FFmpeg takes unspecified for BT.601 too.
UNSPECIFIED_COLOURS = 2
BT601_COLOURS = {UNSPECIFIED_COLOURS, 5, 6}
_FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
_UNTURNED = (1 << 16, 0, 0, 0, 1 << 16)  # display matrix, 16.16 fixed point
_CODEC_NAMES = {"libdav1d": "av1", "libvpx-vp9": "vp9"}
_BLOCK = 16  # sizes are coded in blocks of at most this many pixels


@dataclass(frozen=True, slots=True)
class NvdecCapabilities:
    """What one GPU's decoder can do: `codecs` by FFmpeg's names, 8-bit 4:2:0 of each."""

    codecs: frozenset[str]

    @classmethod
    def of(cls, compute_capability: tuple[int, int]) -> NvdecCapabilities:
        """Of a GPU by its CUDA compute capability, such as (9, 0) for Hopper."""
        codecs = {"h264", "hevc", "vp9"}
        if compute_capability in AV1_CAPABILITIES:
            codecs.add("av1")
        return cls(frozenset(codecs))


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What the rule looks at: the container's packet table and the first frame of one video.

    `reliable`: every packet stands for one shown frame with a time of its own. `discarded`: packets
    that are decoded and not shown. `damaged`: packets that could not be read whole. `hidden`:
    packets with pictures that are not shown, or that show an earlier one again (VP9). `leading`:
    pictures shown before the keyframe that they follow. `close_keyframes`: a keyframe is decoded
    before the previous one is shown.
    """

    formats: frozenset[str]
    codec: str
    reliable: bool
    pixel_format: str = ""
    width: int = 0
    height: int = 0
    upright: bool = True
    interlaced: bool = False
    colour_space: int = UNSPECIFIED_COLOURS
    full_range: bool = False
    video_streams: int = 1
    discarded: int = 0
    negative_times: bool = False
    damaged: int = 0
    hidden: bool = False
    leading: bool = False
    close_keyframes: bool = False

    @property
    def coded_size(self) -> tuple[str, int, int]:
        """(codec, width, height) that a decoder is made for: rounded up to whole blocks."""
        up = [-(-side // _BLOCK) * _BLOCK for side in (self.width, self.height)]
        return self.codec, up[0], up[1]


@dataclass(frozen=True, slots=True)
class NvdecSurvey:
    """What the readers learn of a video. `info` and `seconds` float64 [frames] only if reliable."""

    facts: StreamFacts
    info: VideoInfo | None = None
    seconds: npt.NDArray[np.float64] | None = None


def nvdec_refusal(facts: StreamFacts, capabilities: NvdecCapabilities) -> str | None:
    """Why PyAV must decode this video, or None when NVDEC gives the same frames."""
    if not facts.formats & RELIABLE_CONTAINERS:
        return "container other than mp4, mkv or webm"
    if facts.codec not in capabilities.codecs:
        return f"codec {facts.codec}, which this GPU does not decode"
    if not facts.reliable:
        return "frames cannot be numbered from the packets"
    if facts.video_streams > 1:
        return "several video streams"
    if facts.discarded or facts.negative_times:
        return "edit list or frames that are not shown"
    if facts.damaged:
        return "damaged packets"
    if facts.pixel_format != "yuv420p":
        return f"pixel format {facts.pixel_format} instead of 8-bit 4:2:0"
    if facts.interlaced:
        return "interlaced"
    if not facts.upright:
        return "turned or mirrored by its metadata"
    if facts.full_range or facts.colour_space not in BT601_COLOURS:
        return "colours other than BT.601, limited range"
    least, greatest = SIZES[facts.codec]
    size = facts.width, facts.height
    if any(side % 2 for side in size):
        return "odd width or height"
    if any(not a <= side <= b for a, side, b in zip(least, size, greatest, strict=True)):
        return "size beyond what NVDEC decodes"
    if facts.hidden:
        return "VP9 with hidden or repeated pictures"
    if facts.codec == "hevc" and facts.leading:
        return "HEVC with open groups of pictures"
    if facts.close_keyframes:
        return "keyframes so close that a jump can miss"
    return None


def survey_video(data: bytes) -> NvdecSurvey:
    """Read the packets of `data` and decode its first frame.

    Raises `DecodeError` as `PyAVDecoder` does for a file that no decoder can read to its end.
    """
    with VideoFile(data, "auto") as media:
        survey = read_survey(media)
        codec = _CODEC_NAMES.get(media.codec, media.codec)
        formats = frozenset(media.formats)
        table, packets = survey.table, survey.packets
        if not survey.reliable or packets is None:
            return NvdecSurvey(StreamFacts(formats, codec, reliable=False))
        frame = _first_frame(media, packets[0])
        if frame is None:
            return NvdecSurvey(StreamFacts(formats, codec, reliable=False))
        facts = StreamFacts(
            formats,
            codec,
            reliable=True,
            pixel_format=frame.format.name,
            width=frame.width,
            height=frame.height,
            upright=_is_upright(frame),
            interlaced=bool(frame.interlaced_frame),
            colour_space=int(frame.colorspace),
            full_range=int(frame.color_range) == _FULL_RANGE,
            video_streams=len(media.container.streams.video),
            discarded=int(table.discard.sum()),
            negative_times=bool(survey.shown_pts[0] < 0),
            damaged=survey.damaged_when_read,
            hidden=codec == "vp9" and any(map(_is_vp9_with_hidden, packets)),
            leading=_has_leading(table.pts, table.keyframe),
            close_keyframes=_has_close_keyframes(packets, table.pts, table.keyframe),
        )
        info = survey.info(media, frame, survey.num_frames)
        seconds = survey.shown_pts.astype(np.float64) * survey.seconds_per_tick
        return NvdecSurvey(facts, info, seconds)


def _first_frame(media: VideoFile, packet: Packet[VideoStream]) -> VideoFrame | None:
    """The first keyframe, None when it does not come out by itself. Ends the decoder's stream."""
    context = media.stream.codec_context
    try:
        frames = [*context.decode(packet), *context.decode(None)]
    except av.FFmpegError:
        return None
    return frames[0] if frames and not frames[0].is_corrupt else None


def _is_upright(frame: VideoFrame) -> bool:
    matrix = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    return matrix is None or tuple(np.frombuffer(bytes(matrix), np.int32)[:5].tolist()) == _UNTURNED


def _is_vp9_with_hidden(packet: Packet[VideoStream]) -> bool:
    """Whether a VP9 packet is a superframe or shows an earlier picture again (VP9, annex B, 6.2).

    DALI hands out the packets' times one per decoded picture: both would shift every later frame.
    """
    if not packet.size:
        return True
    view = memoryview(packet)
    first, last = view[0], view[-1]
    show_existing = first & 0b1000  # after the marker and two profile bits; profile 0 is 8-bit
    hidden = not first & 0b10 and not show_existing
    return bool(last & 0xE0 == 0xC0 or show_existing or hidden)


def _has_leading(pts: npt.NDArray[np.int64], keyframe: npt.NDArray[np.bool_]) -> bool:
    """Whether a picture is shown before the keyframe that it follows in the file.

    A jump to such a keyframe makes NVDEC's parser drop them, and DALI miscount what comes after.
    """
    current = np.maximum.accumulate(np.where(keyframe, np.arange(len(pts)), 0))
    return bool((pts < pts[current]).any())


def _has_close_keyframes(
    packets: list[Packet[VideoStream]],
    pts: npt.NDArray[np.int64],
    keyframe: npt.NDArray[np.bool_],
) -> bool:
    """Whether a jump by a keyframe's presentation time could land on the next keyframe.

    DALI jumps by presentation time, mp4 files are searched by decoding time.
    """
    keys = np.flatnonzero(keyframe)[1:]
    before = np.flatnonzero(keyframe)[:-1]
    dts = [packets[k].dts for k in keys]
    return any(d is None or d <= pts[b] for d, b in zip(dts, before, strict=True))


class DecoderSizes:
    """Remembers which picture size each coded size stands for, for the whole process.

    DALI keeps decoders by size and can give one made for 640x368 to a video of 640x360: both are
    coded as 640x368, but the crop is the decoder's, and the colours come from the wrong rows. So
    the first picture size of a coded size goes to NVDEC, others of the same coded size to PyAV.
    """

    def __init__(self) -> None:
        self._shown: dict[tuple[str, int, int], tuple[int, int]] = {}

    def refusal(self, facts: StreamFacts) -> str | None:
        """Why PyAV must decode this video, or None; call it from one thread at a time."""
        size = facts.width, facts.height
        owner = self._shown.setdefault(facts.coded_size, size)
        if owner == size:
            return None
        return "another picture size shares its coded size"
