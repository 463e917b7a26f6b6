"""What decoding notices of damage, per codec and strictness: the table of docs/decoding.md.

In copies of a sound file one byte in the data of a random packet is changed. A copy counts as
changed when decoding the whole of it in order gives other pictures than the sound file, and as
noticed when asking for all frames raises `DecodeError` (or, for "never", when damaged packets are
counted). Sound files of many kinds are decoded in every mode too: none may be accused.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from pathlib import Path

import av
import common

from pipeline.decoding.contract import DecodeError, Strictness
from pipeline.decoding.pyav import PyAVDecoder

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.worlds.media import KINDS, make_video  # lies with the tests that use it

CODECS = {
    "H.264 (mp4)": {},
    "H.264 (AVI)": {"container": "avi"},
    "HEVC (mp4)": {"codec": "libx265"},
    "HEVC with picture hashes": {
        "codec": "libx265",
        "options": {"x265-params": "hash=1:log-level=none"},
    },
    "MPEG-4 (AVI)": {"codec": "mpeg4", "container": "avi", "options": {"bf": "2"}},
    "MPEG-2 (ts)": {"codec": "mpeg2video", "container": "mpegts", "options": {"bf": "2"}},
    "VP8 (webm)": {"codec": "libvpx", "container": "webm"},
    "VP9 (webm)": {"codec": "libvpx-vp9", "container": "webm"},
    "AV1 (mp4)": {"codec": "libsvtav1"},
    "MJPEG (mov)": {"codec": "mjpeg", "container": "mov", "pixel_format": "yuvj420p"},
    "GIF": {"codec": "gif", "container": "gif", "pixel_format": "rgb8"},
}
MODES: tuple[Strictness, ...] = ("never", "auto", "always")


def in_order(data: bytes) -> list[int]:
    """A hash of every picture that plain decoding gives, damage passed over."""
    pictures = []
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = context.decode(packet if packet.size else None)
            except av.FFmpegError:
                continue
            pictures += [hash(frame.to_ndarray().tobytes()) for frame in frames]
            if not packet.size:
                break
    return pictures


def noticed(data: bytes, mode: Strictness) -> bool:
    """Whether decoding all frames says that something is wrong."""
    try:
        info, _, _ = PyAVDecoder(mode).decode_with_info(data, lambda i: range(i.num_frames))
    except DecodeError:
        return True
    return info.damaged_packets > 0


def flipped(data: bytes, packets: list[tuple[int, int]], draw: random.Random) -> bytes:
    """`data` with one byte of a random packet (position, size) changed."""
    damaged = bytearray(data)
    position, size = draw.choice(packets)
    damaged[position + draw.randrange(size)] ^= draw.randrange(1, 256)
    return bytes(damaged)


def main() -> None:
    """Print the table as Markdown, and the number of sound files accused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=60, help="damaged copies per codec")
    parser.add_argument("--clips", type=Path, help="a folder of sound videos, decoded as well")
    chosen = parser.parse_args()
    print(common.machine()["name"], common.machine()["date"])
    print("| codec | copies that show other pictures | noticed: never | auto | always |")
    print("|---|---|---|---|---|")
    for name, recipe in CODECS.items():
        data = make_video(frames=60, width=320, height=240, **recipe)  # type: ignore[arg-type]
        with av.open(io.BytesIO(data)) as container:
            packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
        if any(position is None for position, _ in packets):
            packets = [(0, len(data))]
        truth, draw = in_order(data), random.Random(4)
        changed, seen = 0, dict.fromkeys(MODES, 0)
        for _ in range(chosen.copies):
            copy = flipped(data, packets, draw)
            if in_order(copy) == truth:
                continue
            changed += 1
            for mode in MODES:
                seen[mode] += noticed(copy, mode)
        cells = " | ".join(f"{seen[mode]} ({seen[mode] / max(changed, 1):.0%})" for mode in MODES)
        print(f"| {name} | {changed} of {chosen.copies} | {cells} |", flush=True)
    sound = {kind: make_video(**recipe) for kind, recipe in KINDS.items()}  # type: ignore[arg-type]
    if chosen.clips:
        files = sorted(f for f in chosen.clips.iterdir() if f.suffix in (".mp4", ".avi", ".webm"))
        sound |= {file.name: file.read_bytes() for file in files}
    for mode in MODES:
        accused = [kind for kind, data in sound.items() if noticed(data, mode)]
        print(f"{mode}: {len(accused)} of {len(sound)} sound files accused {accused or ''}")


if __name__ == "__main__":
    main()
