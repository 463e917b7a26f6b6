"""Which videos go to NVDEC: the rule on its facts, and the facts of made files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest

from pipeline.decoding.contract import DecodeError
from pipeline.decoding.nvdec.rule import (
    DecoderSizes,
    NvdecCapabilities,
    StreamFacts,
    nvdec_refusal,
    survey_video,
)
from pipeline.decoding.pyav import PyAVDecoder
from tests.support.worlds.media import make_video

TURING, AMPERE, GA10X, HOPPER = ((7, 5), (8, 0), (8, 6), (9, 0))
SOUND = StreamFacts(
    frozenset({"mov", "mp4"}), "h264", reliable=True, pixel_format="yuv420p", width=340, height=256
)


def refusal(facts: StreamFacts, gpu: tuple[int, int] = HOPPER) -> str | None:
    return nvdec_refusal(facts, NvdecCapabilities.of(gpu))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codec": "hevc"},
        {"codec": "vp9", "formats": frozenset({"matroska", "webm"})},
        {"colour_space": 5},
        {"colour_space": 6},
        {"width": 4096, "height": 4096},
        {"width": 48, "height": 16},
        {"codec": "hevc", "width": 8192, "height": 4320},
        {"leading": True},  # H.264: DALI jumps to IDR pictures only
    ],
    ids=str,
)
def test_what_nvdec_decodes(changes: dict[str, Any]) -> None:
    assert refusal(replace(SOUND, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"formats": frozenset({"avi"})}, "container other than mp4, mkv or webm"),
        ({"codec": "mpeg4"}, "codec mpeg4, which this GPU does not decode"),
        ({"reliable": False}, "frames cannot be numbered from the packets"),
        ({"video_streams": 2}, "several video streams"),
        ({"discarded": 1}, "edit list or frames that are not shown"),
        ({"negative_times": True}, "edit list or frames that are not shown"),
        ({"damaged": 1}, "damaged packets"),
        ({"pixel_format": "yuv420p10le"}, "pixel format yuv420p10le instead of 8-bit 4:2:0"),
        ({"pixel_format": "yuv444p"}, "pixel format yuv444p instead of 8-bit 4:2:0"),
        ({"pixel_format": "gray"}, "pixel format gray instead of 8-bit 4:2:0"),
        ({"interlaced": True}, "interlaced"),
        ({"upright": False}, "turned or mirrored by its metadata"),
        ({"colour_space": 1}, "colours other than BT.601, limited range"),
        ({"colour_space": 9}, "colours other than BT.601, limited range"),
        ({"full_range": True}, "colours other than BT.601, limited range"),
        ({"width": 341}, "odd width or height"),
        ({"height": 255}, "odd width or height"),
        ({"width": 4098}, "size beyond what NVDEC decodes"),
        ({"width": 46}, "size beyond what NVDEC decodes"),
        ({"codec": "hevc", "height": 142}, "size beyond what NVDEC decodes"),
        ({"codec": "vp9", "hidden": True}, "VP9 with hidden or repeated pictures"),
        ({"codec": "hevc", "leading": True}, "HEVC with open groups of pictures"),
        ({"close_keyframes": True}, "keyframes so close that a jump can miss"),
    ],
    ids=str,
)
def test_what_goes_to_pyav_and_why(changes: dict[str, Any], why: str) -> None:
    assert refusal(replace(SOUND, **changes)) == why


def test_av1_goes_to_nvdec_only_where_the_gpu_has_it() -> None:
    av1 = replace(SOUND, codec="av1")
    assert refusal(av1, GA10X) is None
    for gpu in (TURING, AMPERE, HOPPER):
        assert refusal(av1, gpu) == "codec av1, which this GPU does not decode"


QUARTER = {"frames": 30, "width": 320, "height": 240}


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({}, None),
        ({"container": "matroska"}, None),
        ({"times": [n * n for n in range(30)]}, None),
        ({"options": {"x264-params": "open-gop=1:bframes=3"}}, None),
        ({"options": {"x264-params": "colormatrix=smpte170m"}}, None),
        ({"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=0"}}, None),
        ({"codec": "libvpx-vp9", "container": "webm"}, None),
        ({"codec": "libx265", "gop": 10}, "HEVC with open groups of pictures"),
        (
            {"options": {"x264-params": "colormatrix=bt709"}},
            "colours other than BT.601, limited range",
        ),
        ({"pixel_format": "yuvj420p"}, "pixel format yuvj420p instead of 8-bit 4:2:0"),
        ({"pixel_format": "yuv420p10le"}, "pixel format yuv420p10le instead of 8-bit 4:2:0"),
        ({"rotation": 90}, "turned or mirrored by its metadata"),
        ({"rotation": 180}, "turned or mirrored by its metadata"),
        ({"options": {"x264-params": "interlaced=1"}}, "interlaced"),
        ({"times": list(range(-5, 25))}, "frames cannot be numbered from the packets"),
        ({"gop": 3, "options": {"bf": "2"}}, "keyframes so close that a jump can miss"),
        ({"container": "avi", "codec": "mpeg4"}, "container other than mp4, mkv or webm"),
    ],
    ids=str,
)
def test_facts_of_made_files(recipe: dict[str, Any], why: str | None) -> None:
    data = make_video(**{**QUARTER, **recipe})
    survey = survey_video(data)
    assert refusal(survey.facts) == why
    if why is None:
        asked = [0, 29, 3, 17]
        info, _, seconds = PyAVDecoder().decode_with_info(data, lambda _: asked)
        assert survey.info == info
        assert survey.seconds is not None
        np.testing.assert_allclose(survey.seconds[asked], seconds)


def rewritten(data: bytes, change: Callable[[int, bytes], bytes]) -> bytes:
    """The video `data` with the bytes of every packet changed by `change(number, bytes)`."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="webm") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, old in enumerate(packets):
            packet = av.Packet(change(number, bytes(old)))
            packet.pts, packet.dts, packet.time_base = old.pts, old.dts, old.time_base
            packet.is_keyframe = old.is_keyframe
            packet.stream = stream
            target.mux(packet)
    return file.getvalue()


def superframe(number: int, data: bytes) -> bytes:
    if number != 20:
        return data
    # A superframe of one picture (VP9, annex B): marker, its size in two bytes, marker.
    marker = bytes([0b110_01_000])
    return data + marker + len(data).to_bytes(2, "little") + marker


def repeat(number: int, data: bytes) -> bytes:
    return bytes([0b1000_1000]) if number == 20 else data  # show_existing_frame of slot 0


@pytest.mark.parametrize("change", [superframe, repeat])
def test_vp9_packets_of_other_than_one_new_picture(change: Callable[[int, bytes], bytes]) -> None:
    plain = make_video(**QUARTER, codec="libvpx-vp9", container="webm")
    assert refusal(survey_video(rewritten(plain, lambda _, data: data)).facts) is None
    changed = rewritten(plain, change)
    assert refusal(survey_video(changed).facts) == "VP9 with hidden or repeated pictures"
    assert len(PyAVDecoder().decode(changed, [0, 29])) == 2


def test_a_truncated_file_is_an_error_as_it_is_for_pyav() -> None:
    data = make_video(frames=40, container_options={"movflags": "faststart"})
    with pytest.raises(DecodeError, match="truncated: "):
        survey_video(data[: len(data) * 3 // 4])


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"container_options": {"movflags": "faststart"}},
        {"codec": "libx265"},
        {"codec": "libvpx-vp9", "container": "webm"},
        {"container": "matroska"},
    ],
    ids=str,
)
def test_damaged_files_are_surveyed_or_fail_plainly(recipe: dict[str, Any]) -> None:
    data = make_video(**{**QUARTER, **recipe})
    rng = np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(data[: int(rng.integers(len(data) // 2, len(data)))])
        if rng.random() < 0.7:
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 20):
                damaged[place] = int(rng.integers(256))
        try:
            survey = survey_video(bytes(damaged))
        except DecodeError:
            continue
        if refusal(survey.facts) is None:
            assert survey.info is not None
            assert survey.seconds is not None
            assert len(survey.seconds) == survey.info.num_frames > 0


def test_one_picture_size_for_each_coded_size() -> None:
    sizes = DecoderSizes()
    tall, low = (replace(SOUND, width=640, height=height) for height in (368, 360))
    assert tall.coded_size == low.coded_size
    assert sizes.refusal(low) is None
    assert sizes.refusal(tall) == "another picture size shares its coded size"
    assert sizes.refusal(low) is None
    assert sizes.refusal(replace(tall, codec="hevc")) is None
    assert sizes.refusal(SOUND) is None
