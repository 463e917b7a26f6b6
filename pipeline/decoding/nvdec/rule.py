"""Decides which videos the GPU's decoder (NVDEC, through DALI) decodes exactly.

DALI finds frames much as `PyAVDecoder` does: it sorts all packets by presentation time. A video
goes to PyAV if DALI might number its frames differently, get its colours wrong, or fail without an
error. The sources are DALI's code and issue tracker and NVIDIA's tables (Video Codec SDK, NVDEC
application note); see docs/gpu.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.decoding.contract import VideoInfo
from pipeline.decoding.pyav.account import length_size, unit_heads
from pipeline.decoding.pyav.frame_stack import UPRIGHT, display_matrix
from pipeline.decoding.pyav.packet_survey import RELIABLE_CONTAINERS, read_survey
from pipeline.decoding.pyav.reference_gaps import ReferenceGaps
from pipeline.decoding.pyav.video_file import VideoFile

# The smallest and the largest (width, height) that NVDEC decodes.
SIZES = {
    "h264": ((48, 16), (4096, 4096)),
    "hevc": ((144, 144), (8192, 8192)),
    "vp9": ((128, 128), (8192, 8192)),
    "av1": ((128, 128), (8192, 8192)),
}
# Compute capabilities of GPUs with an AV1 decoder: GA10x, Ada, GeForce and RTX PRO Blackwell. Not
# Turing, GA100 or Hopper; the others are unknown.
AV1_CAPABILITIES = {(8, 6), (8, 9), (12, 0)}
# Matrix coefficients (ITU-T H.273): unspecified, and the two of BT.601. DALI always converts by
# BT.601, and FFmpeg does so for unspecified ones.
BT601_COLOURS = {2, 5, 6}
_FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
_CODEC_NAMES = {"libdav1d": "av1", "libvpx-vp9": "vp9"}


def nvdec_codecs(compute_capability: tuple[int, int]) -> frozenset[str]:
    """Return FFmpeg's names of the codecs that a GPU decodes in 8-bit 4:2:0.

    The GPU is given by its CUDA compute capability, such as (9, 0) for Hopper.
    """
    av1 = {"av1"} if compute_capability in AV1_CAPABILITIES else set()
    return frozenset({"h264", "hevc", "vp9"} | av1)


@dataclass(frozen=True, slots=True)
class NvdecSurvey:
    """A video that NVDEC decodes exactly. `seconds` float64 [frames] are its frames' times.

    `codec`, `width` and `height` are those of the coded picture.
    """

    info: VideoInfo
    seconds: npt.NDArray[np.float64]
    codec: str
    width: int
    height: int


def survey_video(data: bytes, codecs: frozenset[str]) -> NvdecSurvey | str:
    """Read the packets of `data` and decode its first frame; a string says why PyAV must decode it.

    `codecs` are the codecs that the GPU decodes. Raises `DecodeError` as `PyAVDecoder` does for a
    file that no decoder can read to its end.
    """
    with VideoFile(data, "auto") as media:
        survey = read_survey(media)
        codec = _CODEC_NAMES.get(media.codec, media.codec)
        table, packets = survey.table, survey.packets
        if not media.formats & RELIABLE_CONTAINERS:
            return "container other than mp4, mkv or webm"
        if codec not in codecs:
            return f"codec {codec}, which this GPU does not decode"
        frame = _first_frame(media, packets[0]) if survey.reliable and packets else None
        if frame is None or packets is None:
            return "frames cannot be numbered from the packets"
        size = frame.width, frame.height
        limits = zip(*SIZES[codec], size, strict=True)
        colours = int(frame.colorspace) in BT601_COLOURS and int(frame.color_range) != _FULL_RANGE
        refusals = {
            "several video streams": len(media.container.streams.video) > 1,
            # Discarded packets are decoded and not shown.
            "edit list or frames that are not shown": table.discard.any()
            or survey.shown_pts[0] < 0,
            "damaged packets": survey.damaged_when_read,
            f"pixel format {frame.format.name} instead of 8-bit 4:2:0": frame.format.name
            != "yuv420p",
            "interlaced": frame.interlaced_frame,
            "turned or mirrored by its metadata": display_matrix(frame) != UPRIGHT,
            "colours other than BT.601, limited range": not colours,
            "odd width or height": any(side % 2 for side in size),
            "size beyond what NVDEC decodes": not all(a <= side <= b for a, b, side in limits),
            "VP9 with hidden or repeated pictures": codec == "vp9"
            and any(map(_is_vp9_with_hidden, packets)),
            # In H.264 DALI jumps to IDR pictures only.
            "HEVC with open groups of pictures": codec == "hevc"
            and _has_leading(table.pts, table.keyframe),
            "packets that are not whole, or a missing picture": _has_damage(media, packets),
            "parameters or sizes that change inside the file": _changes(media, codec, packets),
            "keyframes so close that a jump can miss": _has_close_keyframes(
                packets, table.pts, table.keyframe
            ),
        }
        for reason, found in refusals.items():
            if found:
                return reason
        seconds = survey.shown_pts.astype(np.float64) * survey.seconds_per_tick
        return NvdecSurvey(survey.info(media, frame), seconds, codec, *size)


def _has_damage(media: VideoFile, packets: list[Packet[VideoStream]]) -> bool:
    """Whether the headers of packets of H.264 or HEVC tell of damage; NVDEC tells of none."""
    extradata = media.stream.codec_context.extradata
    units = length_size(media.codec, extradata)
    gaps = ReferenceGaps(extradata, units) if media.codec == "h264" else None
    return any(
        (units and not unit_heads(packet, units))
        or (gaps and (gaps.before(memoryview(packet)) or gaps.refused(memoryview(packet))))
        for packet in packets
    )


def _changes(media: VideoFile, codec: str, packets: list[Packet[VideoStream]]) -> bool:
    """Whether the pictures may change within the file, such as in size. DALI crops all alike."""
    extradata = media.stream.codec_context.extradata or b""
    if codec == "vp9":
        return len({size for packet in packets if (size := _vp9_size(packet))}) > 1
    units = length_size(media.codec, extradata)
    first, *others = (_parameters(media.codec, packet, units) for packet in packets)
    found = first.union(*others)
    return len(found) > 1 or any(part not in extradata for part in found - first)


def _parameters(codec: str, packet: Packet[VideoStream], length_bytes: int) -> set[bytes]:
    """The parameters of a sequence of pictures that lie in a packet of H.264, HEVC or AV1."""
    data, found = memoryview(packet), set[bytes]()
    if codec in ("h264", "hevc"):
        heads = unit_heads(packet, length_bytes) if length_bytes else []
        for start, end in zip(heads, [*(h - length_bytes for h in heads[1:]), None], strict=False):
            if (data[start] & 0x1F == 7) if codec == "h264" else (data[start] >> 1 == 33):
                found.add(bytes(data[start:end]))
        return found
    at = 0
    while at < len(data):  # units of AV1 (5.3.1): a head, its size in bytes of seven bits, content
        head, size, at = data[at], 0, at + 1 + (data[at] >> 2 & 1)
        for place, byte in enumerate(data[at : at + 8] if head & 2 else b""):
            size, at = size | (byte & 0x7F) << 7 * place, at + 1
            if byte < 0x80:
                break
        end = at + size if head & 2 else len(data)
        if head >> 3 == 1:
            found.add(bytes(data[at:end]))
        at = end
    return found


def _vp9_size(packet: Packet[VideoStream]) -> tuple[int, int] | None:
    """The size that a shown picture of VP9 states; None if it has that of another (VP9, 7.2)."""
    bits = "".join(f"{byte:08b}" for byte in memoryview(packet)[:16]).ljust(128, "0")
    if bits[5] == "0":  # a keyframe: its sign and colours come first
        at = 36
    else:
        at = 28 if bits[7] == "1" else 30
        if "1" in bits[at : at + 3]:
            return None
        at += 3
    return int(bits[at : at + 16], 2) + 1, int(bits[at + 16 : at + 32], 2) + 1


def _first_frame(media: VideoFile, packet: Packet[VideoStream]) -> VideoFrame | None:
    """Return the first keyframe, None if it cannot be decoded alone. Ends the decoder's stream."""
    context = media.stream.codec_context
    try:
        frames = [*context.decode(packet), *context.decode(None)]
    except av.FFmpegError:
        return None
    return frames[0] if frames and not frames[0].is_corrupt else None


def _is_vp9_with_hidden(packet: Packet[VideoStream]) -> bool:
    """Whether a VP9 packet is a superframe or shows an earlier picture again (VP9, annex B, 6.2).

    DALI gives one packet's time to each decoded picture: both would shift every later frame.
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

    After a jump to such a keyframe NVDEC's parser drops that picture, and DALI miscounts frames.
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
