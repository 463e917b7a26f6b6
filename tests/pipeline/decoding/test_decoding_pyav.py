"""PyAVDecoder: the contract, and bit-exactness against plain decoding for every kind of file."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import get_args

import av
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding.contract import DecodeError, Strictness
from pipeline.decoding.pyav import PyAVDecoder, packet_survey
from pipeline.decoding.pyav import decoder as pyav
from pipeline.decoding.pyav.gop_plan import PacketTable
from tests.pipeline.decoding.decoder_contract import DecoderContract, sequential_frames
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import KINDS, frame_number, make_video


@cache
def made(kind: str) -> tuple[bytes, list[npt.NDArray[np.uint8]]]:
    """The file and all its frames, upright, by plain decoding."""
    data = make_video(**KINDS[kind])  # type: ignore[arg-type]
    quarters = int(str(KINDS[kind].get("rotation", 0))) // 90
    return data, [np.rot90(frame, k=-quarters) for frame in sequential_frames(data)]


class TestPyAVDecoder(DecoderContract):
    @pytest.fixture
    def decoder(self) -> PyAVDecoder:
        return PyAVDecoder()


@pytest.mark.parametrize("kind", KINDS)
def test_counts_what_plain_decoding_gives(kind: str) -> None:
    data, truth = made(kind)
    info = PyAVDecoder().probe(data)
    assert info.num_frames == len(truth)
    assert (info.height, info.width) == truth[0].shape[:2]
    assert info.damaged_packets == 0
    assert 0 < info.duration_s < 70


@settings(max_examples=8, deadline=None)
@given(data=st.data(), strict=st.sampled_from(get_args(Strictness)))
@pytest.mark.parametrize("kind", KINDS)
def test_any_choice_of_frames_equals_plain_decoding(
    kind: str, data: st.DataObject, strict: Strictness
) -> None:
    video, truth = made(kind)
    chosen = data.draw(st.lists(st.integers(0, len(truth) - 1), min_size=1, max_size=6))
    info, frames, seconds = PyAVDecoder(strict).decode_with_info(video, lambda _: chosen)
    assert (info.num_frames, info.damaged_packets) == (len(truth), 0)
    for frame, index in zip(frames, chosen, strict=True):
        np.testing.assert_array_equal(frame, truth[index])
    order = np.argsort(chosen, kind="stable")
    assert (np.diff(seconds[order]) >= 0).all()


@pytest.mark.parametrize("kind", ["h264 open gop", "hevc open gop", "vp9 webm", "h264 edit list"])
def test_the_plan_itself_gives_the_frames(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("fell back to decoding in order")

    monkeypatch.setattr(pyav, "FramesInOrder", never)
    data, truth = made(kind)
    decoder = PyAVDecoder()
    frames = frames_of(decoder, data, range(len(truth)))
    np.testing.assert_array_equal(frames, np.stack(truth))
    for index in range(len(truth)):
        np.testing.assert_array_equal(frames_of(decoder, data, [index])[0], truth[index])


def test_decodes_only_the_group_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = made("h264 no b frames")
    taken: list[int] = []
    original = PacketTable.runs

    def spy(self: PacketTable, packets: object) -> object:
        runs = original(self, packets)  # type: ignore[arg-type]
        taken.extend(run.last - run.first + 1 for run in runs)
        return runs

    monkeypatch.setattr(PacketTable, "runs", spy)
    frames_of(PyAVDecoder(), data, [26])
    assert taken == [1, 3]  # the first frame; keyframe 24, 25, 26 of 40


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
    assert [(run.first, run.last) for run in table.runs([2, 4, 5])] == [(0, 5)]
    assert [(run.first, run.last) for run in table.runs([4, 5])] == [(0, 5)]


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
    frames = frames_of(decoder, cut.getvalue(), range(info.num_frames))
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
    np.testing.assert_array_equal(frames_of(decoder, path, [7])[0], truth[7])
    with pytest.raises(DecodeError, match=r"the file cannot be read \(No such file"):
        decoder.probe(tmp_path / "missing.mp4")


@pytest.mark.parametrize("kind", ["h264 no b frames", "h264 open gop", "vp9 webm"])
def test_a_large_stream_is_read_again_instead_of_kept(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packet_survey, "KEPT_PACKET_BYTES", 100)
    data, truth = made(kind)
    info, frames, _ = PyAVDecoder().decode_with_info(data, lambda _: [30, 3, 39])
    assert info.num_frames == len(truth)
    for frame, index in zip(frames, [30, 3, 39], strict=True):
        np.testing.assert_array_equal(frame, truth[index])


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
        frames_of(PyAVDecoder(), made("h264 one gop")[0], indices)


def test_threads_may_share_a_decoder() -> None:
    decoder = PyAVDecoder()
    kinds = ["h264 open gop", "hevc", "mpeg4 avi", "vp9 webm"] * 4

    def work(kind: str) -> bool:
        data, truth = made(kind)
        frames = frames_of(decoder, data, [39, 3, 20])
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
