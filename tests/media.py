"""Test clips with their recipes: every frame carries its own number, so a wrong frame shows.

`make_video` encodes a clip with PyAV; `frame_number` reads the number back from decoded pixels.
"""

from __future__ import annotations

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
