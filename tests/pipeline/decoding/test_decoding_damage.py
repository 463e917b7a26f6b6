"""Damaged files: no crash, no hang, the true frames or an error, and nothing of another video."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import cycle
from typing import get_args

import av
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.decoding.contract import DecodeError, Strictness
from pipeline.decoding.pyav import PyAVDecoder
from tests.pipeline.decoding.decoder_contract import sequential_frames
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import KINDS, make_video

KINDS_DAMAGED = [
    "h264 b pyramid",
    "h264 open gop",
    "h264 open gop mkv",
    "h264 10 bit",
    "h264 odd size",
    "h264 edit list",
    "h264 variable rate",
    "h264 fragmented",
    "h264 mpegts",
    "h264 rotated",
    "hevc",
    "hevc open gop",
    "hevc 10 bit",
    "mpeg4 avi b frames",
    "mpeg2 ts",
    "vp8 webm",
    "vp9 webm",
    "av1 mp4",
    "mjpeg mov",
    "gif",
]
FEW, MANY = range(5), range(5, 25)
BYSTANDERS = ["h264 b pyramid", "mpeg4 avi b frames", "vp9 webm"]


@cache
def made(kind: str, first: int = 0) -> tuple[bytes, list[npt.NDArray[np.uint8]]]:
    """A file and all its frames, upright, by plain decoding."""
    data = make_video(first=first, **KINDS[kind])  # type: ignore[arg-type]
    quarters = int(str(KINDS[kind].get("rotation", 0))) // 90
    return data, [np.rot90(frame, k=-quarters) for frame in sequential_frames(data)]


def truncated(kind: str, seed: int) -> bytes:
    data, _ = made(kind)
    return data[: random.Random(f"cut {kind} {seed}").randrange(1, len(data))]


def flipped(kind: str, seed: int) -> bytes:
    """One byte changed at a random place, which may lie in the container's own tables."""
    damaged = bytearray(made(kind)[0])
    draw = random.Random(f"flip {kind} {seed}")
    damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
    return bytes(damaged)


def outcome(decoder: PyAVDecoder, data: bytes) -> str:
    """What decoding some frames gives: a digest of their pixels, or the reason of the failure."""
    try:
        info, frames, _ = decoder.decode_with_info(
            data, lambda i: np.linspace(0, i.num_frames - 1, 5).astype(int)
        )
    except DecodeError as error:
        return error.reason
    assert frames.shape == (5, info.height, info.width, 3)
    return f"{info} {hashlib.sha256(frames.tobytes()).hexdigest()}"


def check_truncation(kind: str, seeds: range) -> None:
    _, truth = made(kind)
    # Where no table says how long a packet is, the last one may be cut short in silence, and with
    # it the frames shown before it that lean on it.
    unsure = 4 if kind.endswith(" ts") or kind.endswith("mpegts") else 1
    for seed in seeds:
        try:
            info, frames, _ = PyAVDecoder().decode_with_info(
                truncated(kind, seed), lambda i: range(i.num_frames)
            )
        except DecodeError:
            continue
        assert info.num_frames <= len(truth)
        for frame, true_frame in zip(frames[:-unsure], truth, strict=False):
            np.testing.assert_array_equal(frame, true_frame)


def check_isolation(kind: str, seeds: range) -> None:
    """One decoder, four threads, damaged and sound videos by turns.

    Sound ones stay exact. What comes of a damaged one does not depend on what else was decoded
    before or beside it: it holds nothing of another video and nothing of old memory.
    """
    copies = [make(kind, seed) for seed in seeds for make in (truncated, flipped)]
    for strict in get_args(Strictness):
        decoder = PyAVDecoder(strict)
        alone = [outcome(decoder, copy) for copy in copies]
        assert all(alone)
        assert "\n" not in "".join(alone)
        bystanders = [made(name, first=1000)[0] for name in BYSTANDERS]
        expected = [outcome(PyAVDecoder(strict), data) for data in bystanders]
        jobs, results = [], []
        for copy, result, data, sound in zip(
            copies, alone, cycle(bystanders), cycle(expected), strict=False
        ):
            jobs += [copy, data]
            results += [result, sound]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda data, d=decoder: outcome(d, data), jobs)) == results  # type: ignore[misc]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS_DAMAGED)
@pytest.mark.parametrize("check", [check_truncation, check_isolation])
def test_damage_does_no_harm(kind: str, check: Callable[[str, range], None]) -> None:
    check(kind, FEW)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", KINDS_DAMAGED)
@pytest.mark.parametrize("check", [check_truncation, check_isolation])
def test_more_damage_does_no_harm(kind: str, check: Callable[[str, range], None]) -> None:
    check(kind, MANY)


@pytest.mark.parametrize(
    ("recipe", "listed"),
    [
        ({"container_options": {"movflags": "faststart"}, "gop": 1}, 40),
        ({"container_options": {"movflags": "faststart"}, "codec": "libx265", "gop": 1}, 40),
        ({"codec": "mpeg4", "container": "avi", "frames": 300}, 300),
    ],
    ids=["h264 mp4", "hevc mp4", "mpeg4 avi"],
)
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.75])
def test_a_truncated_file_is_named_so(recipe: dict[str, object], listed: int, keep: float) -> None:
    data = make_video(**recipe)  # type: ignore[arg-type]
    cut = data[: int(len(data) * keep)]
    with pytest.raises(DecodeError, match=rf"^truncated: \d+ of {listed} frames can be read$"):
        PyAVDecoder().probe(cut)
    with pytest.raises(DecodeError, match=r"^truncated"):
        frames_of(PyAVDecoder(), cut, [0])


def test_a_matroska_file_that_lost_its_tail_is_truncated() -> None:
    data = make_video(frames=100, container="matroska")
    with pytest.raises(DecodeError, match=r"truncated: [\d.]+ of 4.0 seconds can be read"):
        PyAVDecoder().probe(data[: len(data) // 2])


def with_damaged_packet(number: int = 10, **recipe: object) -> bytes:
    """A file of 60 frames, most bytes of one packet's data wrong."""
    data = bytearray(make_video(frames=60, **recipe))  # type: ignore[arg-type]
    with av.open(io.BytesIO(bytes(data))) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
    assert packet.pos is not None
    assert packet.size > 21
    for offset in range(20, min(packet.size, 60)):
        data[packet.pos + offset] ^= 0xFF
    return bytes(data)


def test_strictness_auto_fails_damaged_h264_and_never_counts_it() -> None:
    data = with_damaged_packet(gop=60, options={"bf": "0", "crf": "10"})
    for strict in ("auto", "always"):
        with pytest.raises(DecodeError, match=r"^damaged after 10 frames \(the decoder marks"):
            frames_of(PyAVDecoder(strict), data, [40])
    info, frames, _ = PyAVDecoder("never").decode_with_info(data, lambda _: [40])
    assert frames.shape == (1, 64, 96, 3)
    assert info.damaged_packets >= 1


def test_strictness_always_looks_at_frames_that_nobody_asked_for() -> None:
    data = with_damaged_packet(40, gop=12, options={"bf": "0", "crf": "10"})
    truth = sequential_frames(data)
    np.testing.assert_array_equal(frames_of(PyAVDecoder(), data, [3])[0], truth[3])
    for attempt in (
        lambda: frames_of(PyAVDecoder("always"), data, [3]),
        lambda: PyAVDecoder("always").probe(data),
    ):
        with pytest.raises(DecodeError, match=r"^damaged after 40 frames"):
            attempt()


def test_strictness_always_fails_what_other_codecs_pass_over() -> None:
    data = with_damaged_packet(codec="mpeg4", container="avi", gop=20)
    # The damage lies in the first group: the others do not lean on it.
    info, _, _ = PyAVDecoder().decode_with_info(data, lambda i: range(20, i.num_frames))
    with pytest.raises(DecodeError, match=r"frame 19 may lean on packet 10"):
        frames_of(PyAVDecoder(), data, [19])
    assert (info.num_frames, info.container_frames) == (60, 60)
    assert info.damaged_packets >= 1
    with pytest.raises(DecodeError, match=r"^damaged after \d+ frames \("):
        PyAVDecoder("always").probe(data)


def test_a_file_that_decodes_to_fewer_frames_than_packets_is_damaged_when_strict() -> None:
    """An AV1 packet that the decoder refuses takes the frames that lean on it along."""
    data = with_damaged_packet(1, codec="libsvtav1", gop=60)
    assert frames_of(PyAVDecoder("never"), data, [5]).shape == (1, 64, 96, 3)
    with pytest.raises(DecodeError, match=r"^frame \d+ cannot be decoded"):
        frames_of(PyAVDecoder("never"), data, range(60))
    with pytest.raises(DecodeError, match=r"^damaged"):
        frames_of(PyAVDecoder("always"), data, [5])


def test_picture_hashes_in_hevc_are_checked() -> None:
    options = {"x265-params": "hash=1:log-level=none"}
    sound = make_video(codec="libx265", options=options)
    assert PyAVDecoder("always").probe(sound).damaged_packets == 0
    data = with_damaged_packet(codec="libx265", options=options)
    with pytest.raises(DecodeError, match=r"^damaged after"):
        frames_of(PyAVDecoder(), data, range(20))


def test_the_container_s_count_stands_beside_the_counted_frames() -> None:
    for recipe, listed in [
        ({"times": range(-10, 30)}, 40),
        ({"container": "matroska"}, 0),
        ({"codec": "mpeg4", "container": "avi"}, 40),
    ]:
        info = PyAVDecoder().probe(make_video(**recipe))  # type: ignore[arg-type]
        assert info.container_frames == listed
        assert info.num_frames == (30 if "times" in recipe else 40)


def test_an_unknown_strictness_is_refused() -> None:
    with pytest.raises(ValueError, match="strict must be one of"):
        PyAVDecoder("sometimes")  # type: ignore[arg-type]
