"""PyAVDecoder: the contract, and bit-exactness against plain decoding for every kind of file."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from decoder_contract import DecoderContract, sequential_frames
from hypothesis import given, settings
from hypothesis import strategies as st
from media import frame_number, make_video

from pipeline.decoding import frame_stack, pyav, video_file
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.gop_plan import PacketTable
from pipeline.decoding.pyav import PyAVDecoder

OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0"
RECIPES: dict[str, dict[str, object]] = {
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
    "hevc": {"codec": "libx265"},
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
    "av1 mp4": {"codec": "libsvtav1"},
    "gif": {"codec": "gif", "container": "gif", "pixel_format": "rgb8"},
}


@cache
def made(kind: str) -> tuple[bytes, list[npt.NDArray[np.uint8]]]:
    data = make_video(**RECIPES[kind])  # type: ignore[arg-type]
    return data, sequential_frames(data)


class TestPyAVDecoder(DecoderContract):
    @pytest.fixture
    def decoder(self) -> PyAVDecoder:
        return PyAVDecoder()


@pytest.mark.parametrize("kind", RECIPES)
def test_counts_what_plain_decoding_gives(kind: str) -> None:
    data, truth = made(kind)
    info = PyAVDecoder().probe(data)
    assert info.num_frames == len(truth)
    assert (info.height, info.width) == truth[0].shape[:2]
    assert info.damaged_packets == 0
    assert 0 < info.duration_s < 70


@settings(max_examples=6, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", RECIPES)
def test_any_choice_of_frames_equals_plain_decoding(kind: str, data: st.DataObject) -> None:
    video, truth = made(kind)
    chosen = data.draw(st.lists(st.integers(0, len(truth) - 1), min_size=1, max_size=6))
    info, frames, seconds = PyAVDecoder().decode_with_info(video, lambda _: chosen)
    assert info.num_frames == len(truth)
    for frame, index in zip(frames, chosen, strict=True):
        np.testing.assert_array_equal(frame, truth[index])
    order = np.argsort(chosen, kind="stable")
    assert (np.diff(seconds[order]) >= 0).all()


@pytest.mark.parametrize("kind", ["h264 open gop", "hevc open gop", "vp9 webm", "h264 edit list"])
def test_the_plan_itself_gives_the_frames(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("fell back to decoding in order")

    monkeypatch.setattr(pyav, "_decode_in_order", never)
    data, truth = made(kind)
    # Not strict: x264's open GOPs make a strict decoder stumble after a jump.
    decoder = PyAVDecoder(strict=False)
    frames = decoder.decode(data, range(len(truth)))
    np.testing.assert_array_equal(frames, np.stack(truth))
    for index in range(len(truth)):
        np.testing.assert_array_equal(decoder.decode(data, [index])[0], truth[index])


def test_decodes_only_the_group_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = made("h264 no b frames")
    taken: list[int] = []
    original = PacketTable.runs

    def spy(self: PacketTable, packets: object) -> object:
        runs = original(self, packets)  # type: ignore[arg-type]
        taken.extend(run.last - run.first + 1 for run in runs)
        return runs

    monkeypatch.setattr(PacketTable, "runs", spy)
    PyAVDecoder().decode(data, [26])
    assert taken == [3]  # keyframe 24, 25, 26 of 40


def test_runs_reach_back_for_leading_pictures_and_join() -> None:
    # Decoding order: I0 P3 B1 B2 | I6 B4 B5 P9 B7 B8 | I12; B4 and B5 lean on P3.
    pts = np.array([0, 3, 1, 2, 6, 4, 5, 9, 7, 8, 12])
    keyframe = np.isin(pts, [0, 6, 12])
    table = PacketTable(pts, keyframe, np.zeros(11, bool), True)
    assert table.is_reliable()
    assert table.display_order().tolist() == [0, 2, 3, 1, 5, 6, 4, 8, 9, 7, 10]
    assert [(run.first, run.last) for run in table.runs([8])] == [(4, 8)]
    assert [(run.first, run.last) for run in table.runs([5])] == [(0, 5)]
    assert [(run.first, run.last) for run in table.runs([2, 10])] == [(0, 2), (10, 10)]
    assert [(run.first, run.last) for run in table.runs([2, 5, 9, 10])] == [(0, 10)]


@pytest.mark.parametrize(
    ("pts", "keyframe", "complete"),
    [
        ([0, 1, 1], [1, 0, 0], True),
        ([0, 1, 2], [0, 1, 0], True),
        ([4, 2, 3], [1, 0, 0], True),
        ([0, 1, 2], [1, 0, 0], False),
    ],
    ids=["repeated time", "no keyframe first", "leading pictures first", "time missing"],
)
def test_a_doubtful_table_is_not_trusted(
    pts: list[int], keyframe: list[int], complete: bool
) -> None:
    table = PacketTable(np.array(pts), np.array(keyframe, bool), np.zeros(3, bool), complete)
    assert not table.is_reliable()


def test_frames_missing_before_the_first_keyframe_are_not_counted() -> None:
    """A stream cut from a longer one: its first pictures lean on packets that are gone."""
    data, _ = made("hevc open gop")
    cut = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(cut, "w", format="matroska") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.dts is not None]
        second_keyframe = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second_keyframe:]:
            packet.stream = copy
            target.mux(packet)
    truth = sequential_frames(cut.getvalue())
    decoder = PyAVDecoder()
    info = decoder.probe(cut.getvalue())
    assert info.num_frames == len(truth) < len(packets) - second_keyframe
    frames = decoder.decode(cut.getvalue(), range(info.num_frames))
    np.testing.assert_array_equal(frames, np.stack(truth))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_pictures_are_upright(rotation: int) -> None:
    data = make_video(frames=4, rotation=rotation)
    info, frames, _ = PyAVDecoder().decode_with_info(data, lambda _: [2])
    turned = rotation != 180
    assert info.rotation == rotation
    assert (info.width, info.height) == ((64, 96) if turned else (96, 64))
    assert frames.shape == (1, info.height, info.width, 3)
    np.testing.assert_array_equal(
        frames[0], np.rot90(sequential_frames(data)[2], k=-(rotation // 90))
    )


def test_times_are_those_of_the_container() -> None:
    data, _ = made("h264 variable rate")
    _, _, seconds = PyAVDecoder().decode_with_info(data, lambda _: [0, 3, 39])
    assert seconds == pytest.approx([0.0, 9 / 25, 39 * 39 / 25])
    data, _ = made("mpeg4 avi")
    _, _, seconds = PyAVDecoder().decode_with_info(data, lambda _: [0, 3, 39])
    assert seconds == pytest.approx([0.0, 3 / 25, 39 / 25])


@pytest.mark.parametrize("kind", ["h264 one gop", "mpeg4 avi"])
def test_reads_paths_and_files_like_bytes(kind: str, tmp_path: Path) -> None:
    data, truth = made(kind)
    path = tmp_path / "clip (1).mp4"
    path.write_bytes(data)
    decoder = PyAVDecoder()
    with path.open("rb") as file:
        assert decoder.probe(path) == decoder.probe(file) == decoder.probe(data)
        assert not file.closed
    np.testing.assert_array_equal(decoder.decode(path, [7])[0], truth[7])
    with pytest.raises(DecodeError, match=r"the file cannot be read \(No such file"):
        decoder.probe(tmp_path / "missing.mp4")


@pytest.mark.parametrize("kind", ["h264 no b frames", "h264 open gop", "vp9 webm"])
def test_a_large_stream_is_read_again_instead_of_kept(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyav, "KEPT_PACKET_BYTES", 100)
    data, truth = made(kind)
    info, frames, _ = PyAVDecoder().decode_with_info(data, lambda _: [30, 3, 39])
    assert info.num_frames == len(truth)
    for frame, index in zip(frames, [30, 3, 39], strict=True):
        np.testing.assert_array_equal(frame, truth[index])


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
        PyAVDecoder().decode(cut, [0])


def test_a_matroska_file_that_lost_its_tail_is_truncated() -> None:
    data = make_video(frames=100, container="matroska")
    with pytest.raises(DecodeError, match=r"truncated: [\d.]+ of 4.0 seconds can be read"):
        PyAVDecoder().probe(data[: len(data) // 2])


@pytest.mark.parametrize(
    "kind",
    ["h264 open gop", "h264 open gop mkv", "hevc", "mpeg4 avi", "vp8 webm", "vp9 webm", "av1 mp4"],
)
def test_damage_gives_the_true_frames_or_an_error(kind: str) -> None:
    """Truncation never yields a wrong frame; flipped bytes never crash."""
    data, truth = made(kind)
    draw = random.Random(0)
    for _ in range(8):
        cut = data[: draw.randrange(1, len(data))]
        try:
            info, frames, _ = PyAVDecoder().decode_with_info(cut, lambda i: range(i.num_frames - 1))
        except (DecodeError, ValueError):
            continue
        assert info.num_frames <= len(truth)
        np.testing.assert_array_equal(frames, np.stack(truth[: len(frames)]))
    for _ in range(8):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            frames = PyAVDecoder().decode(bytes(damaged), [0, len(truth) - 1])
        except DecodeError:
            continue
        assert frames.shape == (2, *truth[0].shape)


def test_damage_inside_h264_is_an_error_unless_told_otherwise() -> None:
    data = bytearray(make_video(frames=60, gop=60, options={"bf": "0", "crf": "10"}))
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [p for p in container.demux(video=0) if p.dts is not None]
    start = packets[10].pos
    assert start is not None
    for offset in range(20, min(packets[10].size, 60)):
        data[start + offset] ^= 0xFF
    with pytest.raises(DecodeError, match=r"^damaged after \d+ frames|^frame 40 cannot be decoded"):
        PyAVDecoder().decode(bytes(data), [40])
    assert PyAVDecoder(strict=False).decode(bytes(data), [40]).shape == (1, 64, 96, 3)


def test_absurd_sizes_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = made("h264 one gop")
    monkeypatch.setattr(frame_stack, "MAX_BYTES", 10 * 96 * 64 * 3)
    assert len(PyAVDecoder().decode(data, [0] * 10)) == 10
    with pytest.raises(DecodeError, match="11 frames of 96x64 need more than the limit"):
        PyAVDecoder().decode(data, [0] * 11)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(DecodeError, match="frames of 96x64 pixels are larger than the limit"):
        PyAVDecoder().probe(data)


def test_a_playlist_cannot_open_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "secret.mp4")
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile secret.mp4\n"
    (tmp_path / "list.mp4").write_bytes(playlist)
    for source in (playlist, tmp_path / "list.mp4"):
        with pytest.raises(DecodeError):
            PyAVDecoder().probe(source)


@pytest.mark.parametrize("indices", [[], [0.5]])
def test_indices_must_be_whole_numbers(indices: list[float]) -> None:
    with pytest.raises(ValueError, match="frame indices"):
        PyAVDecoder().decode(made("h264 one gop")[0], indices)


def test_threads_may_share_a_decoder() -> None:
    decoder = PyAVDecoder()
    kinds = ["h264 open gop", "hevc", "mpeg4 avi", "vp9 webm"] * 4

    def work(kind: str) -> bool:
        data, truth = made(kind)
        frames = decoder.decode(data, [39, 3, 20])
        return all(
            np.array_equal(frame, truth[index])
            for frame, index in zip(frames, [39, 3, 20], strict=True)
        )

    for kind in kinds:
        made(kind)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, kinds))


def test_frame_numbers_survive_encoding() -> None:
    """The recipes themselves: what is drawn into a frame can be read back."""
    _, truth = made("h264 one gop")
    assert [frame_number(frame) for frame in truth] == list(range(40))
