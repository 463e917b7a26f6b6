"""Damaged copies of videos, and what plain decoding in order gives for them.

A recipe makes a short video in one codec; `damaged` changes one packet of it. `in_order` is the
truth that every shortcut of the decoder is held against.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet

from pipeline.decoding.contract import DecodeError, VideoInfo
from pipeline.decoding.pyav import PyAVDecoder

Damage = Literal["junk", "zero", "missing", "byte"]
DAMAGES: tuple[Damage, ...] = ("junk", "zero", "missing", "byte")
KEPT = 6  # bytes at the start of a packet that junk leaves as they are: its headers still parse


@dataclass(frozen=True)
class Recipe:
    """How `encoded` makes a video: FFmpeg's encoder, container, options, picture and size."""

    codec: str
    container: str
    options: dict[str, str] = field(default_factory=dict)
    pixel_format: str = "yuv420p"
    gop: int = 12
    noisy: bool = True
    width: int = 64
    height: int = 48
    frames: int = 40


# One container for each codec. The first four are found by their packets (docs/decoding.md).
CODECS: dict[str, dict[str, Any]] = {
    "H.264": {"codec": "libx264", "container": "mp4"},
    "HEVC": {
        "codec": "libx265",
        "container": "mp4",
        "options": {"x265-params": "log-level=none"},
    },
    "VP9": {"codec": "libvpx-vp9", "container": "webm", "options": {"cpu-used": "8"}},
    "AV1": {"codec": "libsvtav1", "container": "mp4", "options": {"preset": "12"}},
    "VP8": {"codec": "libvpx", "container": "webm", "options": {"cpu-used": "8"}},
    "MPEG-4": {"codec": "mpeg4", "container": "avi", "options": {"bf": "2"}},
    "MPEG-2": {"codec": "mpeg2video", "container": "mpegts", "options": {"bf": "2"}},
    "MPEG-1": {"codec": "mpeg1video", "container": "mpeg"},
    "MJPEG": {"codec": "mjpeg", "container": "mov", "pixel_format": "yuvj420p"},
    "MS MPEG-4": {"codec": "msmpeg4", "container": "avi"},
    "WMV": {"codec": "wmv2", "container": "asf"},
    "ProRes": {"codec": "prores_ks", "container": "mov", "pixel_format": "yuv422p10le"},
    "FFV1": {"codec": "ffv1", "container": "matroska"},
    "GIF": {"codec": "gif", "container": "gif", "pixel_format": "rgb8"},
}


def pictures(recipe: Recipe, seed: int) -> npt.NDArray[np.uint8]:
    """RGB uint8 [frames,H,W,3]: noise, or a smooth pattern that moves."""
    rng = np.random.default_rng(seed)
    shape = recipe.frames, recipe.height, recipe.width, 3
    if recipe.noisy:
        return rng.integers(0, 256, shape, np.uint8)
    y, x = np.mgrid[: recipe.height, : recipe.width] / recipe.height
    phase = rng.uniform(0, 6, 3)
    moved = np.arange(recipe.frames)[:, None, None, None] * 0.15
    waves = np.sin(6 * (x + 0.7 * y)[None, :, :, None] + phase + moved)
    return np.asarray(127 + 120 * waves, np.uint8)


def encoded(recipe: Recipe, seed: int = 0) -> bytes:
    """The recipe's video."""
    file = io.BytesIO()
    with av.open(file, "w", format=recipe.container) as output:
        stream = output.add_stream(recipe.codec, rate=25)
        stream.width, stream.height = recipe.width, recipe.height
        stream.pix_fmt, stream.gop_size = recipe.pixel_format, recipe.gop
        stream.options = dict(recipe.options)
        stream.codec_context.thread_count = 1
        for picture in pictures(recipe, seed):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def damaged(data: bytes, container: str, damage: Damage, draw: random.Random) -> bytes:
    """A copy of a file with one packet damaged.

    The bytes are changed where they lie in the file, so that its tables stay as they are. Where
    packets are not found in one piece, and to take one out, the packets are written anew.
    """
    with av.open(io.BytesIO(data)) as opened:
        found = [(p.pos, bytes(p)) for p in opened.demux(video=0) if p.size]
    number = draw.randrange(len(found))
    position, packet = found[number]
    if damage == "missing":
        # Some containers refuse to begin with what is then the first packet.
        with suppress(av.FFmpegError):
            return rewritten(data, container, {number: None})
        return rewritten(data, container, {max(number, 1): None})
    changed = bytearray(packet)
    if damage == "zero":
        changed[:] = bytes(len(packet))
    elif damage == "junk":
        changed[KEPT:] = draw.randbytes(len(packet) - min(KEPT, len(packet)))
    else:
        changed[draw.randrange(len(packet))] ^= draw.randrange(1, 256)
    if position is not None and data[position : position + len(packet)] == packet:
        return data[:position] + changed + data[position + len(packet) :]
    if data.count(packet) == 1:
        return data.replace(packet, changed)
    return rewritten(data, container, {number: bytes(changed)})


def rewritten(
    data: bytes, container: str, changes: dict[int, bytes | None], first: int = 0
) -> bytes:
    """`data` with other bytes in some packets (None: left out), from packet `first` on.

    `container` is FFmpeg's name of the format to write.
    """
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        with av.open(file, "w", format=container) as output:
            if stream.codec_context.name == "libdav1d":  # FFmpeg has no muxer's codec of that name
                copy = output.add_stream("libsvtav1", rate=25)
                copy.width, copy.height = stream.width, stream.height
                copy.codec_context.extradata = stream.codec_context.extradata
            else:
                copy = output.add_stream_from_template(stream)
            for number, packet in enumerate(p for p in source.demux(stream) if p.size):
                content = changes.get(number, bytes(packet))
                if content is None or number < first:
                    continue
                new = Packet(content)
                new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
                new.duration, new.is_keyframe = packet.duration, packet.is_keyframe
                new.stream = copy
                output.mux(new)
    return file.getvalue()


@dataclass
class InOrder:
    """What plain decoding gives: pictures by their number and, if they have one, by their time."""

    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    times: list[float | None] = field(default_factory=list)
    errors: int = 0
    by_time: bool = False  # whether the container tells every frame's time reliably

    def at(self, index: int, second: float | None) -> list[npt.NDArray[np.uint8]]:
        """The picture shown at `second`, or the one of this number if no time is given."""
        if second is None:
            return self.pictures[index : index + 1]
        return [p for p, t in zip(self.pictures, self.times, strict=True) if t == second]

    def same(self, other: InOrder) -> bool:
        """Whether the other has the same pictures."""
        return len(self.pictures) == len(other.pictures) and all(
            map(np.array_equal, self.pictures, other.pictures)
        )


def in_order(data: bytes) -> InOrder:
    """Decode every packet from the start, passing over errors; nothing of an unreadable file."""
    found = InOrder()
    with suppress(av.FFmpegError), av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count = 1
        tick = float(stream.time_base or 0)
        named = {"mp4", "mov", "matroska", "webm"} & set(container.format.name.split(","))
        found.by_time = bool(named) and context.name in ("h264", "hevc", "vp9", "libdav1d")
        for packet in container.demux(stream):
            if not packet.size and packet.dts is not None:
                continue
            try:
                frames = context.decode(packet if packet.size else None)
            except av.FFmpegError:
                found.errors += 1
                continue
            for frame in frames:
                found.pictures.append(frame.to_ndarray(format="rgb24"))
                found.times.append(None if frame.pts is None else frame.pts * tick)
    return found


def outcome(
    data: bytes, truth: InOrder, sound: InOrder, choose: Callable[[int], npt.ArrayLike]
) -> str:
    """What asking for the frames that `choose` gives of so many does in the default mode.

    "failed"; "wrong" if a frame differs from `truth`, decoding the same file in order; "unnoticed"
    if all are as in order but one differs from the `sound` file; "right" otherwise.
    """
    chosen: list[int] = []

    def remembered(info: VideoInfo) -> npt.ArrayLike:
        chosen[:] = np.asarray(choose(info.num_frames)).tolist()
        return chosen

    try:
        _, frames, seconds = PyAVDecoder().decode_with_info(data, remembered)
    except DecodeError:
        return "failed"
    times = seconds.tolist() if truth.by_time else [None] * len(chosen)

    def equals(other: InOrder) -> bool:
        given = zip(chosen, frames, times, strict=True)
        return all(any(np.array_equal(f, p) for p in other.at(i, s)) for i, f, s in given)

    if not equals(truth):
        return "wrong"
    return "right" if equals(sound) else "unnoticed"
