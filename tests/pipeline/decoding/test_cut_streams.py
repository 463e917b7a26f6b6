"""Streams that begin inside a group of pictures: what leans on missing packets is no frame."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from pipeline.decoding.contract import Strictness
from pipeline.decoding.pyav import PyAVDecoder
from tests.support.worlds.damage import Recipe, encoded, in_order, rewritten
from tests.support.worlds.frames import frames_of

X265 = {"x265-params": "log-level=none:keyint=12:min-keyint=12:scenecut=0"}
CUTS = {
    "HEVC, open groups": Recipe("libx265", "mpegts", X265),
    "H.264": Recipe("libx264", "mpegts"),
    "H.264, open groups": Recipe(
        "libx264", "mpegts", {"x264-params": "open-gop=1:keyint=12:bframes=3"}
    ),
    "MPEG-2": Recipe("mpeg2video", "mpegts", {"bf": "2"}),
    "H.264 in mkv": Recipe("libx264", "matroska"),
    "HEVC in mkv": Recipe("libx265", "matroska", X265),
    "VP9": Recipe("libvpx-vp9", "webm", {"cpu-used": "8"}),
}


@pytest.mark.parametrize("cut", [2, 14])
@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_stream_gives_the_frames_from_its_first_keyframe_on(kind: str, cut: int) -> None:
    recipe = CUTS[kind]
    data = encoded(recipe)
    truth = in_order(data).pictures
    part = rewritten(data, recipe.container, {}, first=cut)
    for strict in get_args(Strictness):
        decoder = PyAVDecoder(strict)
        info, frames, _ = decoder.decode_with_info(part, lambda i: range(i.num_frames))
        assert info.damaged_packets == 0
        assert info.leading_pictures > 0
        assert info.num_frames + info.leading_pictures == 40 - cut
        assert "leading pictures" in info.remarks()
        np.testing.assert_array_equal(frames, truth[-info.num_frames :])
        np.testing.assert_array_equal(frames_of(decoder, part, [3])[0], frames[3])
        assert decoder.probe(part).num_frames == info.num_frames


@pytest.mark.parametrize("kind", CUTS)
def test_whole_streams_have_no_leading_pictures(kind: str) -> None:
    info = PyAVDecoder().probe(encoded(CUTS[kind]))
    assert (info.num_frames, info.leading_pictures) == (40, 0)
