"""Which videos go to NVDEC: the rule on its facts, and the facts of made files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from pipeline.decoding.contract import DecodeError
from pipeline.decoding.nvdec import batcher as nvdec_batcher
from pipeline.decoding.nvdec import rule
from pipeline.decoding.nvdec.batcher import NvdecBatcher
from pipeline.decoding.nvdec.rule import NvdecSurvey, nvdec_codecs, survey_video
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.decoding.pyav.gop_plan import PacketTable
from pipeline.decoding.pyav.packet_survey import read_survey
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video

TURING, AMPERE, GA10X, HOPPER = ((7, 5), (8, 0), (8, 6), (9, 0))
QUARTER = {"frames": 30, "width": 320, "height": 240}
UNTOUCHED = make_video(**QUARTER)
DISCARDED = PacketTable(np.arange(30), np.arange(30) == 0, np.arange(30) == 29, complete_pts=True)


def refusal(data: bytes, gpu: tuple[int, int] = HOPPER) -> str | None:
    found = survey_video(data, nvdec_codecs(gpu))
    return found if isinstance(found, str) else None


class Frame:
    """Stands in for the first frame of a video."""

    format = SimpleNamespace(name="yuv420p")
    width, height = 340, 256
    interlaced_frame = False
    colorspace, color_range = 2, 1
    side_data: Mapping[str, bytes] = {}


@pytest.fixture
def seen_as(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every H.264 video taken for one of another codec, first frame or packet survey."""

    def change(codec: str = "h264", survey: Mapping[str, Any] | None = None, **frame: Any) -> None:
        first = type("Changed", (Frame,), frame)()
        monkeypatch.setitem(rule._CODEC_NAMES, "h264", codec)
        monkeypatch.setattr(rule, "_first_frame", lambda media, packet: first)
        changed = dict(survey or {})
        monkeypatch.setattr(
            rule, "read_survey", lambda media: replace(read_survey(media), **changed)
        )

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codec": "hevc"},
        {"colorspace": 5},
        {"colorspace": 6},
        {"width": 4096, "height": 4096},
        {"width": 48, "height": 16},
        {"codec": "hevc", "width": 8192, "height": 4320},
    ],
    ids=str,
)
def test_what_nvdec_decodes(seen_as: Callable[..., None], changes: dict[str, Any]) -> None:
    seen_as(**changes)
    assert refusal(UNTOUCHED) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"codec": "mpeg4"}, "codec mpeg4, which this GPU does not decode"),
        ({"survey": {"reliable": False}}, "frames cannot be numbered from the packets"),
        ({"survey": {"packets": None}}, "frames cannot be numbered from the packets"),
        ({"survey": {"table": DISCARDED}}, "edit list or frames that are not shown"),
        (
            {"survey": {"shown_pts": np.arange(-1, 29)}},
            "edit list or frames that are not shown",
        ),
        ({"survey": {"damaged_when_read": 1}}, "damaged packets"),
        (
            {"format": SimpleNamespace(name="yuv444p")},
            "pixel format yuv444p instead of 8-bit 4:2:0",
        ),
        ({"colorspace": 1}, "colours other than BT.601, limited range"),
        ({"colorspace": 9}, "colours other than BT.601, limited range"),
        ({"color_range": 2}, "colours other than BT.601, limited range"),
        ({"width": 341}, "odd width or height"),
        ({"height": 255}, "odd width or height"),
        ({"width": 4098}, "size beyond what NVDEC decodes"),
        ({"width": 46}, "size beyond what NVDEC decodes"),
        ({"codec": "hevc", "height": 142}, "size beyond what NVDEC decodes"),
    ],
    ids=str,
)
def test_what_goes_to_pyav_and_why(
    seen_as: Callable[..., None], changes: dict[str, Any], why: str
) -> None:
    seen_as(**changes)
    assert refusal(UNTOUCHED) == why


def test_several_streams_go_to_pyav() -> None:
    file = io.BytesIO()
    with av.open(io.BytesIO(UNTOUCHED)) as source, av.open(file, "w", format="mp4") as target:
        copies = [target.add_stream_from_template(source.streams.video[0]) for _ in range(2)]
        for packet in source.demux(video=0):
            for copy in copies if packet.size else []:
                packet.stream = copy
                target.mux(packet)
    assert refusal(file.getvalue()) == "several video streams"


def test_av1_goes_to_nvdec_only_where_the_gpu_has_it(seen_as: Callable[..., None]) -> None:
    seen_as(codec="av1")
    assert refusal(UNTOUCHED, GA10X) is None
    for gpu in (TURING, AMPERE, HOPPER):
        assert refusal(UNTOUCHED, gpu) == "codec av1, which this GPU does not decode"


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
    survey = survey_video(data, nvdec_codecs(HOPPER))
    if why is not None:
        assert survey == why
    else:
        assert isinstance(survey, NvdecSurvey)
        asked = [0, 29, 3, 17]
        info, _, seconds = PyAVDecoder().decode_with_info(data, lambda _: asked)
        assert survey.info == replace(info, checked_packets=0)  # nothing looks for damage
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
    assert refusal(rewritten(plain, lambda _, data: data)) is None
    changed = rewritten(plain, change)
    assert refusal(changed) == "VP9 with hidden or repeated pictures"
    assert len(frames_of(PyAVDecoder(), changed, [0, 29])) == 2


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "matroska", {"x264-params": "repeat-headers=1:keyint=10:bframes=0"}),
        (
            *("libx265", "matroska"),
            {"x265-params": "repeat-headers=1:log-level=none:open-gop=0:bframes=0"},
        ),
        ("libvpx-vp9", "webm", {"cpu-used": "8", "lag-in-frames": "0", "auto-alt-ref": "0"}),
        ("libsvtav1", "matroska", {"preset": "12", "svtav1-params": "pred-struct=1"}),
    ],
)
def test_what_changes_inside_a_file_goes_to_pyav(
    codec: str, container: str, options: dict[str, str]
) -> None:
    how: dict[str, Any] = {"codec": codec, "container": container, "options": options}
    same = make_video(**QUARTER, **how), make_video(**QUARTER, **how)
    other = make_video(**{**QUARTER, "width": 256}, **how)
    changed = joined(container, same[0], other)
    info, frames, _ = PyAVDecoder().decode_with_info(changed, lambda _: [3, 40])
    assert ([frame.shape[1] for frame in frames], info.num_frames) == ([320, 256], 60)
    assert refusal(joined(container, *same), GA10X) is None
    assert refusal(changed, GA10X) == "parameters or sizes that change inside the file"


def joined(container: str, first: bytes, second: bytes) -> bytes:
    """The packets of two videos, one after the other, as one stream of the first."""
    file = io.BytesIO()
    with av.open(io.BytesIO(first)) as source, av.open(file, "w", format=container) as target:
        template = source.streams.video[0]
        if template.codec_context.name == "libdav1d":  # FFmpeg has no muxer's codec of that name
            stream = target.add_stream("libsvtav1", rate=25)
            stream.width, stream.height = template.width, template.height
            stream.codec_context.extradata = template.codec_context.extradata
        else:
            stream = target.add_stream_from_template(template)
        with av.open(io.BytesIO(second)) as more:
            number = 0
            for old in (*source.demux(video=0), *more.demux(video=0)):
                if not old.size:
                    continue
                packet = av.Packet(bytes(old))
                packet.pts = packet.dts = number * 40
                packet.time_base, packet.is_keyframe = Fraction(1, 1000), old.is_keyframe
                packet.stream = stream
                target.mux(packet)
                number += 1
    return file.getvalue()


def test_a_truncated_file_is_an_error_as_it_is_for_pyav() -> None:
    data = make_video(frames=40, container_options={"movflags": "faststart"})
    with pytest.raises(DecodeError, match="truncated: "):
        refusal(data[: len(data) * 3 // 4])


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
            survey = survey_video(bytes(damaged), nvdec_codecs(HOPPER))
        except DecodeError:
            continue
        if isinstance(survey, NvdecSurvey):
            assert len(survey.seconds) == survey.info.num_frames > 0


def test_one_picture_size_for_each_coded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec_batcher, "SHOWN_SIZES", {})
    batcher: Any = NvdecBatcher(lambda clips: [], lambda clip, output: None, nvdec_codecs(HOPPER))

    def refusal_of(height: int, **recipe: Any) -> str | None:
        plan = batcher.plan(
            make_video(frames=5, width=640, height=height, **recipe), lambda info: np.arange(2)
        )
        return plan if isinstance(plan, str) else None

    assert refusal_of(360) is None
    assert refusal_of(368) == "another picture size shares its coded size"
    assert refusal_of(360) is None
    assert refusal_of(368, codec="libvpx-vp9", container="webm") is None
    assert refusal_of(256) is None
