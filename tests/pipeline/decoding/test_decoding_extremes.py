"""Very long, very wide, and changing videos: bounded memory and a plain reason."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from pipeline.augmentation import training_pixels
from pipeline.decoding import chosen_frames
from pipeline.decoding.contract import DecodeError, Strictness, VideoInfo
from pipeline.decoding.pyav import PyAVDecoder, frame_stack
from pipeline.decoding.pyav import decoder as pyav
from pipeline.preprocessing import Preprocessing
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import frame_number, make_video, repeat_video

TEN_HOURS = 900_000  # frames at 25 a second

# Run in a process of its own: peak memory (MB) before and after, and what decoding gave. VmHWM,
# because ru_maxrss begins with the peak of the process that started this one.
CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.pyav import PyAVDecoder
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
def decode(path):
    choose = lambda info: np.linspace(0, info.num_frames - 1, 8).astype(int)
    try:
        info, frames, seconds = PyAVDecoder(sys.argv[3]).decode_with_info(path, choose)
    except DecodeError as error:
        return error.reason
    return info.num_frames, info.container_frames, frames.shape, seconds[-1]
decode(Path(sys.argv[1]))
before = peak()
print(json.dumps([decode(Path(sys.argv[2])), peak() - before]))
"""


def decode_in_a_child(
    path: Path, tmp_path: Path, strict: Strictness = "auto"
) -> tuple[object, float]:
    """What decoding 8 frames gave, and by how many MB the peak rose above that of a small clip."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from /proc")
    make_video(tmp_path / "small.mp4")
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "small.mp4"), str(path), strict],
        capture_output=True,
        text=True,
        check=True,
    )
    result, grown = json.loads(ran.stdout)
    return result, grown


def long_video(tmp_path: Path, container: str, codec: str, frames: int) -> Path:
    target = tmp_path / f"long.{container}"
    # From mp4, because Matroska rounds times to milliseconds.
    recipe = {"container": "mp4", "options": {"bf": "2"}} if codec == "libx264" else {}
    clip = make_video(**{"frames": 25, "gop": 25, "codec": codec, "container": container, **recipe})  # type: ignore[arg-type]
    repeat_video(clip, target, container, frames)
    return target


def test_an_hour_takes_little_memory(tmp_path: Path) -> None:
    """Packet objects would take 60 MB."""
    frames = TEN_HOURS // 10
    result, grown = decode_in_a_child(long_video(tmp_path, "mp4", "libx264", frames), tmp_path)
    assert result == [frames, frames, [8, 64, 96, 3], pytest.approx((frames - 1) / 25)]
    assert grown < 45


@pytest.mark.slow
@pytest.mark.parametrize("strict", ["auto", "always"])
@pytest.mark.parametrize(
    ("container", "codec", "listed"),
    [("mp4", "libx264", TEN_HOURS), ("matroska", "libx264", 0), ("avi", "mpeg4", TEN_HOURS)],
)
def test_ten_hours_of_any_kind(
    container: str, codec: str, listed: int, strict: Strictness, tmp_path: Path
) -> None:
    """About 130 bytes a packet in all, most of them FFmpeg's own index."""
    path = long_video(tmp_path, container, codec, TEN_HOURS)
    result, grown = decode_in_a_child(path, tmp_path, strict)
    last = pytest.approx((TEN_HOURS - 1) / 25)
    assert result == [TEN_HOURS, listed, [8, 64, 96, 3], last]
    assert grown < 250


@pytest.mark.parametrize("frames", [2_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_a_gif_of_many_frames_takes_little_memory(frames: int, tmp_path: Path) -> None:
    clip = make_video(
        frames=22, width=32, height=32, codec="gif", container="gif", pixel_format="rgb8"
    )
    target = tmp_path / "long.gif"
    repeat_video(clip, target, "gif", frames)
    result, grown = decode_in_a_child(target, tmp_path)
    assert isinstance(result, list)
    assert frames <= result[0] == result[1] < frames + 22
    assert grown < 60


@pytest.mark.parametrize("guess_is_right", [True, False])
def test_a_file_that_must_be_counted_is_decoded_once(
    guess_is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likely count is the number of packets; where that was wrong, all is decoded again."""
    data = make_video(codec="mpeg4", container="avi")
    passes: list[object] = []
    original = pyav.FramesInOrder

    class Spy(original):  # type: ignore[misc, valid-type]
        def __init__(self, media: object, survey: object, **extra: bool) -> None:
            passes.append(media)
            super().__init__(media, survey, **extra)
            if not guess_is_right and len(passes) == 1:
                survey.likely_frames += 3  # type: ignore[attr-defined]

    monkeypatch.setattr(pyav, "FramesInOrder", Spy)
    asked: list[VideoInfo] = []

    def last_and_first(info: VideoInfo) -> list[int]:
        asked.append(info)
        return [info.num_frames - 1, 0]

    info, frames, _ = PyAVDecoder().decode_with_info(data, last_and_first)
    assert (info.num_frames, replace(asked[-1], checked_packets=40)) == (40, info)
    assert [frame_number(frame) for frame in frames] == [39, 0]
    assert len(passes) == len(asked) == (1 if guess_is_right else 2)


def black_png(width: int, height: int) -> bytes:
    """A real PNG of any size that costs little: one bit a pixel, all the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("stream.png", black_png(16384, 16384) * 3, "the limit is 67108864 pixels a frame"),
        ("strip.png", black_png(16384, 64), "frames of 16384x64 pixels are larger than the limit"),
        (
            "strip.mp4",
            make_video(frames=2, width=16384, height=64),
            "frames of 16384x64 pixels are larger than the limit of 12288 pixels a side",
        ),
    ],
    ids=["16k x 16k", "16k x 64", "16k x 64 H.264"],
)
def test_frames_16k_wide_are_refused_before_they_take_memory(
    name: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    result, grown = decode_in_a_child(tmp_path / name, tmp_path)
    assert reason in str(result)
    assert grown < 60


@pytest.mark.parametrize("later", [False, True])
def test_a_size_that_the_container_hides_is_refused_too(later: bool, tmp_path: Path) -> None:
    """JPEG headers that say 16k x 16k in a file that says 96x64: at once, or after a sound one."""
    data = bytearray(make_video(codec="mjpeg", container="avi", pixel_format="yuvj420p"))
    start, found = 0, 0
    while (start := data.find(b"\xff\xc0\x00\x11", start) + 1) > 0:
        found += 1
        if found > later:
            data[start + 4 : start + 8] = struct.pack(">HH", 16384, 16384)
    assert found == 40
    (tmp_path / "hidden.avi").write_bytes(data)
    result, grown = decode_in_a_child(tmp_path / "hidden.avi", tmp_path)
    assert grown < 60
    if later:
        info = PyAVDecoder().probe(bytes(data))
        assert (info.num_frames, info.damaged_packets, info.container_frames) == (1, 39, 40)
    else:
        assert "the limit is 67108864 pixels a frame" in str(result)


def test_absurd_sizes_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_video()
    monkeypatch.setattr(frame_stack, "MAX_BYTES", 10 * 96 * 64 * 3)
    assert len(frames_of(PyAVDecoder(), data, [0] * 10)) == 10
    with pytest.raises(DecodeError, match="11 frames of 96x64 need more than the limit"):
        frames_of(PyAVDecoder(), data, [0] * 11)
    monkeypatch.setattr(frame_stack, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(DecodeError, match="frames of 96x64 pixels are larger than the limit"):
        PyAVDecoder().probe(data)


def test_frames_of_a_video_whose_size_changes_keep_their_sizes() -> None:
    small = make_video(frames=20, container="mpegts")
    large = make_video(frames=20, first=20, width=160, height=96, container="mpegts")
    decoder = PyAVDecoder()
    assert decoder.probe(small + large).num_frames == 40
    frames = decoder.decode_with_info(small + large, lambda _: [0, 19])[1]
    assert [frame_number(frame) for frame in frames] == [0, 19]
    for chosen, others in [([0, 30], 1), ([25, 39], 2), ([30, 1, 30], 2)]:
        info, frames, _ = decoder.decode_with_info(small + large, lambda _, c=chosen: c)  # type: ignore[misc]
        assert (info.width, info.height, info.other_sizes) == (96, 64, others)
        assert [frame_number(frame) for frame in frames] == chosen
        assert [frame.shape[1] for frame in frames] == [96 if i < 20 else 160 for i in chosen]
    jpegs: dict[str, Any] = {"container": "mjpeg", "codec": "mjpeg", "pixel_format": "yuvj420p"}
    jpeg = make_video(frames=2, **jpegs) + make_video(frames=2, width=160, height=96, **jpegs)
    assert frames_of(PyAVDecoder("always"), jpeg, [0, 1]).shape == (2, 64, 96, 3)
    with pytest.raises(DecodeError, match="is 96x64, 2 of those asked for are not"):
        frames_of(PyAVDecoder("always"), jpeg, [1, 2, 3])
    assert frames_of(decoder, small + large, [25, 39]).shape == (2, 96, 160, 3)


def test_frames_of_several_sizes_are_preprocessed_one_by_one() -> None:
    small = make_video(frames=20, container="mpegts")
    large = make_video(frames=20, first=20, width=64, height=128, container="mpegts")
    frames = frames_of(PyAVDecoder(), small + large, [3, 30])
    how = Preprocessing(size=(32, 32))
    pixels = how.crop_pixels(frames, 3)
    for place, frame in enumerate(frames):
        assert torch.equal(pixels[:, [place]], how.crop_pixels(frame[None], 3))
    trained = training_pixels(frames, 32, np.random.default_rng(5))
    for place, frame in enumerate(frames):
        alone = training_pixels(frame[None], 32, np.random.default_rng(5))
        assert torch.equal(trained[[place]], alone)
    one_size = [3, 4]
    chosen = frames_of(PyAVDecoder(), small + large, one_size)
    assert torch.equal(
        training_pixels(chosen, 32, np.random.default_rng(5))[[0]],
        training_pixels(chosen[:1], 32, np.random.default_rng(5)),
    )


def test_a_later_size_is_held_to_the_limit_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_video(frames=20, container="mpegts")
    strip = make_video(frames=20, width=2048, height=32, container="mpegts")
    monkeypatch.setattr(chosen_frames, "MAX_RESIZED_PIXELS", 224 * 400)
    with pytest.raises(DecodeError, match="frames of 2048x32 pixels would be resized to"):
        chosen_frames.decode_chosen(
            data + strip, PyAVDecoder(), lambda _: np.array([0, 30]), (224, 224)
        )


def test_what_is_transparent_lies_on_black() -> None:
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[..., 0], picture[8:, :, 1] = 200, 100
    picture[:, :8, 3], picture[:, 8:12, 3] = 255, 128
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as output:
        stream = output.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgba"
        for _ in range(2):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        output.mux(stream.encode(None))
    frame = frames_of(PyAVDecoder(), file.getvalue(), [1])[0]
    np.testing.assert_array_equal(frame[:, :8], picture[:, :8, :3])
    np.testing.assert_array_equal(frame[:8, 8:12], np.broadcast_to([100, 0, 0], (8, 4, 3)))
    assert not frame[:, 12:].any()


def test_transparency_that_is_not_decoded_is_said_and_refused_by_option() -> None:
    how: dict[str, Any] = {"container": "webm", "codec": "libvpx-vp9", "frames": 5}
    plain, clear = (make_video(**how, pixel_format=f"yuv{a}420p") for a in ("", "a"))
    for data, said in ((plain, ""), (clear, "transparency left out")):
        info, frames, _ = PyAVDecoder().decode_with_info(data, lambda _: range(5))
        assert (info.remarks(), len(frames)) == (said, 5)
    assert len(frames_of(PyAVDecoder("always"), plain, [4])) == 1
    with pytest.raises(DecodeError, match="transparency lies in a second stream"):
        frames_of(PyAVDecoder("always"), clear, [4])
