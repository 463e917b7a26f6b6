"""Test clips with their recipes: every frame carries its own number, so a wrong frame shows.

`make_video` encodes a clip with PyAV; `frame_number` reads the number back from decoded pixels.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

# Encoders that write their settings to stderr, and how to ask them not to.
_QUIET = {"libx265": {"x265-params": "log-level=none"}}

BITS = 12  # the number of a frame is drawn as a row of 12 black or white squares


OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0"
# Arguments of `make_video` for every kind of file that has met a bug in some decoder.
KINDS: dict[str, dict[str, object]] = {
    "h264 one gop": {"gop": 250},
    "h264 no b frames": {"options": {"bf": "0"}},
    "h264 b pyramid": {"options": {"bf": "4", "x264-params": "b-pyramid=normal"}},
    "h264 open gop": {"options": {"bf": "3", "x264-params": OPEN_GOP}},
    "h264 open gop mkv": {
        "container": "matroska",
        "options": {"bf": "3", "x264-params": OPEN_GOP},
    },
    "h264 intra refresh": {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
    "h264 10 bit": {"pixel_format": "yuv420p10le"},
    "h264 odd size": {"width": 97, "height": 63, "pixel_format": "yuv444p"},
    "h264 variable rate": {"times": [i * i for i in range(40)]},
    "h264 edit list": {"times": range(-10, 30), "options": {"bf": "3"}},
    "h264 late start": {"times": range(25, 65)},
    "h264 fragmented": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264 mpegts": {"container": "mpegts"},
    "h264 avi": {"container": "avi", "options": {"bf": "2"}},
    "h264 interlaced": {"options": {"x264-params": "tff=1:bframes=2"}},
    "h264 several slices": {"options": {"x264-params": "slices=4:keyint=12"}},
    "h264 long references": {"options": {"x264-params": "ref=8:bframes=8:b-adapt=0:keyint=20"}},
    "h264 rotated": {"rotation": 90, "options": {"bf": "2"}},
    "h264 odd height": {"height": 65, "width": 97, "pixel_format": "yuv444p10le"},
    "hevc": {"codec": "libx265"},
    "hevc b pyramid mkv": {
        "codec": "libx265",
        "container": "matroska",
        "options": {"x265-params": "bframes=4:b-pyramid=1:keyint=12:log-level=none"},
    },
    "hevc variable rate": {"codec": "libx265", "times": [i * i for i in range(40)]},
    "hevc edit list": {"codec": "libx265", "times": range(-10, 30)},
    "hevc open gop": {"codec": "libx265", "options": {"x265-params": f"{OPEN_GOP}:log-level=none"}},
    "hevc 10 bit": {"codec": "libx265", "pixel_format": "yuv420p10le"},
    "mpeg4 avi": {"codec": "mpeg4", "container": "avi"},
    "mpeg4 avi b frames": {"codec": "mpeg4", "container": "avi", "options": {"bf": "2"}},
    "mpeg4 avi gaps": {
        "codec": "mpeg4",
        "container": "avi",
        "times": [*range(20), *range(25, 45)],
    },
    "mjpeg mov": {"codec": "mjpeg", "container": "mov", "pixel_format": "yuvj420p"},
    "vp8 webm": {"codec": "libvpx", "container": "webm"},
    "vp9 webm": {"codec": "libvpx-vp9", "container": "webm"},
    "vp9 odd size": {"codec": "libvpx-vp9", "container": "webm", "width": 97, "height": 63},
    "vp9 mp4 variable rate": {"codec": "libvpx-vp9", "times": [i * i for i in range(40)]},
    "av1 mp4": {"codec": "libsvtav1"},
    "av1 mkv": {"codec": "libsvtav1", "container": "matroska"},
    "av1 10 bit": {"codec": "libsvtav1", "pixel_format": "yuv420p10le"},
    "av1 variable rate": {"codec": "libsvtav1", "times": [i * i for i in range(40)]},
    "mpeg2 ts": {"codec": "mpeg2video", "container": "mpegts", "options": {"bf": "2"}},
    "mpeg4 mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "gif": {"codec": "gif", "container": "gif", "pixel_format": "rgb8"},
}


def numbered_frame(number: int, width: int = 96, height: int = 64) -> npt.NDArray[np.uint8]:
    """An RGB frame uint8 [H,W,3]: a gradient that depends on `number`, and its bits as squares."""
    x = np.linspace(0, 255, width, dtype=np.float32)[None, :]
    y = np.linspace(0, 255, height, dtype=np.float32)[:, None]
    frame = np.stack(
        [x + 0 * y, y + 0 * x, np.full((height, width), (number * 7) % 256, np.float32)], axis=-1
    ).astype(np.uint8)
    cell, top = width // BITS, height // 2
    for bit in range(BITS):
        value = 235 if number >> bit & 1 else 20
        frame[top : top + height // 4, bit * cell : (bit + 1) * cell] = value
    return frame


def frame_number(frame: npt.NDArray[np.uint8]) -> int:
    """The number drawn into a frame by `numbered_frame`, read back from (lossy) pixels."""
    height, width = frame.shape[:2]
    cell, top = width // BITS, height // 2
    patch = frame[top + 2 : top + height // 4 - 2, :, :].mean(axis=(0, 2))
    bits = [patch[bit * cell + 2 : (bit + 1) * cell - 2].mean() > 127 for bit in range(BITS)]
    return sum(1 << bit for bit, on in enumerate(bits) if on)


def make_video(
    target: Path | None = None,
    *,
    frames: int = 40,
    first: int = 0,
    width: int = 96,
    height: int = 64,
    fps: int = 25,
    container: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    audio_only: bool = False,
) -> bytes:
    """Encode a numbered clip and return its bytes (also written to `target` when given).

    `first` is the number drawn into the first frame.
    `times`: presentation time of every frame in units of 1/fps (variable rate; negative ones are
    cut off by an edit list in mp4). `rotation`: degrees clockwise written into the metadata.
    """
    # A real file: moving the index to the front (faststart) opens the output again by name.
    with tempfile.NamedTemporaryFile() as file:
        with av.open(
            file.name, "w", format=container, container_options=container_options or {}
        ) as output:
            if audio_only:
                sound = output.add_stream("aac", rate=16000)
                wave = av.AudioFrame.from_ndarray(
                    np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
                )
                wave.sample_rate = 16000
                output.mux(sound.encode(wave))
                output.mux(sound.encode(None))
            else:
                stream = output.add_stream(codec, rate=fps)
                stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
                stream.gop_size = gop
                stream.time_base = Fraction(1, fps)
                stream.options = {**_QUIET.get(codec, {}), **(options or {})}
                if rotation:
                    stream.set_display_rotation(-rotation)  # FFmpeg counts counterclockwise
                for number in range(frames):
                    image = av.VideoFrame.from_ndarray(
                        numbered_frame(first + number, width, height), format="rgb24"
                    )
                    image.pts = times[number] if times is not None else number
                    output.mux(stream.encode(image))
                output.mux(stream.encode(None))
        data = Path(file.name).read_bytes()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return data


def repeat_video(clip: bytes, target: Path, container: str, frames: int) -> None:
    """Write a long file cheaply: the packets of `clip` again and again, with later times.

    `clip` must be one closed group of pictures. `frames` are at least so many.
    """
    with (
        av.open(io.BytesIO(clip)) as source,
        av.open(str(target), "w", format=container) as output,
    ):
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        times = [(packet.pts, packet.dts, packet.duration) for packet in packets]
        length = sum(duration or 1 for _, _, duration in times)
        # A GIF's first packet holds the file's header as well, and its last one the end.
        once = {0, len(packets) - 1} if container == "gif" else set()
        written, shift = 0, -length
        while written < frames:
            shift += length
            for number, (packet, (pts, dts, _)) in enumerate(zip(packets, times, strict=True)):
                if number in once and (written or number):
                    continue
                packet.stream, packet.time_base = copy, stream.time_base
                packet.pts = None if pts is None else pts + shift
                packet.dts = None if dts is None else dts + shift
                output.mux(packet)
                written += 1
