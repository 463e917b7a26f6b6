"""What every decoder must do; a decoder's test module inherits `DecoderContract`."""

from __future__ import annotations

import io

import av
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.decoding.contract import DecodeError, Decoder
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import frame_number, make_video


def sequential_frames(data: bytes) -> list[npt.NDArray[np.uint8]]:
    """All frames by plain decoding from the start: the truth every plan is held against."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


class DecoderContract:
    """Needs a fixture `decoder`. `tolerance` is the largest difference in grey levels allowed."""

    tolerance = 0

    def assert_same(self, got: npt.NDArray[np.uint8], want: npt.NDArray[np.uint8]) -> None:
        assert got.shape == want.shape
        assert np.abs(got.astype(int) - want.astype(int)).max() <= self.tolerance

    def test_gives_the_frames_asked_for_in_the_order_asked(self, decoder: Decoder) -> None:
        data = make_video(frames=40, gop=12)
        truth = sequential_frames(data)
        asked = [39, 0, 13, 13, 5, 12, 38]
        frames = frames_of(decoder, data, asked)
        assert frames.dtype == np.uint8
        assert frames.shape == (7, 64, 96, 3)
        assert [frame_number(frame) for frame in frames] == asked
        for frame, index in zip(frames, asked, strict=True):
            self.assert_same(frame, truth[index])

    def test_counts_frames_and_describes_the_video(self, decoder: Decoder) -> None:
        info = decoder.decode_with_info(make_video(frames=33, fps=25), lambda _: [32])[0]
        assert (info.num_frames, info.width, info.height) == (33, 96, 64)
        assert (info.fps, info.codec, info.rotation) == (25.0, "h264", 0)
        assert info.duration_s == pytest.approx(33 / 25)

    def test_chooses_from_the_counted_frames_in_one_go(self, decoder: Decoder) -> None:
        data = make_video(frames=20, fps=10)
        info, frames, seconds = decoder.decode_with_info(data, lambda i: [0, i.num_frames - 1, 7])
        assert info.num_frames == 20
        assert [frame_number(frame) for frame in frames] == [0, 19, 7]
        assert seconds == pytest.approx([0.0, 1.9, 0.7])

    def test_one_frame_is_a_video(self, decoder: Decoder) -> None:
        data = make_video(frames=1)
        assert [frame_number(frame) for frame in frames_of(decoder, data, [0, 0])] == [0, 0]

    @pytest.mark.parametrize("index", [40, 10**9, -1])
    def test_a_frame_that_does_not_exist_is_an_error(self, decoder: Decoder, index: int) -> None:
        with pytest.raises(DecodeError, match=f"there is no frame {index}"):
            frames_of(decoder, make_video(frames=40), [0, index])

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "the file is empty"),
            (b"not a video, only words\n" * 40, "not a readable video file"),
            (make_video(audio_only=True), "no video stream"),
            (make_video()[:1500], "not a readable video file"),
        ],
        ids=["empty", "text", "audio only", "truncated"],
    )
    def test_unreadable_files_fail_with_a_plain_reason(
        self, decoder: Decoder, data: bytes, reason: str
    ) -> None:
        with pytest.raises(DecodeError) as caught:
            frames_of(decoder, data, [0])
        assert caught.value.reason.startswith(reason)
        assert "\n" not in caught.value.reason
        assert "0x" not in caught.value.reason
