"""Few frames of damaged files in every codec: as decoding in order gives them, or none."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial

import av
import numpy as np
import pytest

from pipeline.decoding.contract import DecodeError
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.decoding.pyav import decoder as pyav
from pipeline.decoding.pyav.reference_gaps import ReferenceGaps
from pipeline.decoding.pyav.video_file import VideoFile
from tests.support.worlds.damage import (
    CODECS,
    DAMAGES,
    KEPT,
    Recipe,
    damaged,
    encoded,
    in_order,
    outcome,
    rewritten,
)
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import KINDS, make_video

COPIES = 8  # for each codec: two of each damage
OPEN = {"x264-params": "open-gop=1:keyint=12:bframes=3"}
SHAPES = {
    **{codec: Recipe(**made) for codec, made in CODECS.items()},
    "H.264 in one group": Recipe("libx264", "mp4", gop=250),
    "H.264 in open groups": Recipe("libx264", "mp4", OPEN, noisy=False),
    "H.264 in slices": Recipe("libx264", "mp4", {"x264-params": "slices=4"}, noisy=False),
    "HEVC in one group": Recipe("libx265", "mp4", {"x265-params": "log-level=none"}, gop=250),
    "HEVC in layers": Recipe(
        "libx265", "mp4", {"x265-params": "temporal-layers=3:b-adapt=0:bframes=7:log-level=none"}
    ),
    "H.264 smooth": Recipe("libx264", "mp4", noisy=False),
    "HEVC smooth": Recipe("libx265", "mp4", {"x265-params": "log-level=none"}, noisy=False),
    "VP8 smooth": Recipe("libvpx", "webm", {"cpu-used": "8"}, noisy=False),
    "FFV1 smooth": Recipe("ffv1", "matroska", noisy=False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_frames_of_a_damaged_file_are_those_of_decoding_in_order(shape: str) -> None:
    recipe = SHAPES[shape]
    data = encoded(recipe)
    sound = in_order(data)
    found: Counter[str] = Counter()
    for copy in range(COPIES):
        draw = random.Random(f"{shape} {copy}")
        damage = DAMAGES[copy % len(DAMAGES)]
        broken = damaged(data, recipe.container, damage, draw)
        truth = in_order(broken)
        for count in (1, 4, 8):
            choose = partial(_some, draw, count)
            result = outcome(broken, truth, sound, choose)
            assert result != "wrong", f"copy {copy}, {damage}, {count} frames"
            found[result] += 1
    assert found["right"] + found["unnoticed"] > 0, "nothing was given: nothing was compared"


JUDGED = {
    **{codec: CODECS[codec] for codec in ("H.264", "HEVC", "VP9", "AV1", "MPEG-4", "FFV1")},
    "VP8": {**CODECS["VP8"], "noisy": False},
    "MPEG-2 in mkv": {**CODECS["MPEG-2"], "container": "matroska"},
    "H.264 in ts": {**CODECS["H.264"], "container": "mpegts"},
}
CHOSEN: tuple[Callable[[int], list[int]], ...] = (
    lambda count: [0],
    lambda count: [count - 1],
    lambda count: [count * (2 * at + 1) // 8 for at in range(4)],
    lambda count: [count * (2 * at + 1) // 16 for at in range(8)],
    lambda count: list(range(count)),
)


@pytest.mark.parametrize("codec", JUDGED)
def test_a_verdict_that_depends_on_the_frames_says_what_was_looked_at(codec: str) -> None:
    """Where other frames of a file fail, a row of it that passes says so or counts the damage."""
    recipe = Recipe(**JUDGED[codec])
    data = encoded(recipe)
    both = 0
    for copy in range(6):
        broken = damaged(data, recipe.container, "junk", random.Random(f"{codec} {copy}"))
        said: list[str | None] = []
        for choose in CHOSEN:
            try:
                info, _, _ = PyAVDecoder().decode_with_info(broken, lambda i: choose(i.num_frames))  # noqa: B023
            except DecodeError:
                said.append(None)
            else:
                said.append(info.remarks() + f" {info.damaged_packets}" * info.damaged_packets)
        if None in said:
            assert "" not in said, said
            both += any(said)
            with pytest.raises(DecodeError):
                frames_of(PyAVDecoder("always"), broken, [0])
    assert both or codec == "H.264 in ts", "no verdict depended on the frames: nothing was shown"


@pytest.mark.parametrize("codec", ["MJPEG", "FFV1", "VP8"])
def test_a_picture_that_holds_what_lay_in_memory_is_not_given(codec: str) -> None:
    """The second half of a packet is junk or lost: half of the picture may stay as it was."""
    recipe = Recipe(**CODECS[codec], noisy=False, width=128, height=96, frames=12)
    data = encoded(recipe)
    with av.open(io.BytesIO(data)) as opened:
        packets = [bytes(packet) for packet in opened.demux(video=0) if packet.size]
    chance = 0
    for copy in range(16):
        draw = random.Random(copy)
        number = draw.randrange(len(packets))
        lost = len(packets[number]) // 2
        rest = (draw.randbytes(lost), b"", bytes(lost))[copy % 3]
        broken = rewritten(data, recipe.container, {number: packets[number][:-lost] + rest})
        for index in only_memory(broken):
            chance += 1
            for strict in ("auto", "always"):
                with pytest.raises(DecodeError):
                    frames_of(PyAVDecoder(strict), broken, [index])  # type: ignore[arg-type]
    assert chance > 0, "no picture was left to chance: nothing was shown"


def _some(draw: random.Random, count: int, frames: int) -> list[int]:
    return [draw.randrange(frames) for _ in range(count)]


@cache
def one_group() -> tuple[bytes, list[tuple[int, bytes]]]:
    """H.264 noise in one group of pictures, and its packets with their places."""
    data = encoded(Recipe("libx264", "mp4", gop=250))
    with av.open(io.BytesIO(data)) as container:
        packets = [(p.pos or 0, bytes(p)) for p in container.demux(video=0) if p.size]
    return data, packets


def junk(number: int) -> bytes:
    data, packets = one_group()
    place, packet = packets[number]
    content = random.Random(number).randbytes(len(packet) - KEPT)
    return data[: place + KEPT] + content + data[place + len(packet) :]


def leant_on() -> list[int]:
    """The packets of `one_group` that others lean on: the type of their slices says so."""
    return [number for number, (_, packet) in enumerate(one_group()[1]) if packet[4] & 0x60]


@pytest.mark.parametrize("strict", ["auto", "always"])
def test_nothing_that_leans_on_a_lost_picture_is_given(strict: str) -> None:
    """The junk keeps its slice header, so that skipping pictures went on past it in silence."""
    numbers = [number for number in leant_on() if number > 4][:8]
    assert len(numbers) == 8
    for number in numbers:
        data = junk(number)
        for asked in ([39], [0, 39], list(range(0, 40, 5))):
            with pytest.raises(DecodeError):
                frames_of(PyAVDecoder(strict), data, asked)  # type: ignore[arg-type]
        if strict == "auto":
            truth = in_order(one_group()[0]).pictures
            np.testing.assert_array_equal(frames_of(PyAVDecoder(), data, [0])[0], truth[0])


def test_without_strictness_a_lost_picture_gives_what_decoding_in_order_gives() -> None:
    data = junk(leant_on()[5])
    truth = in_order(data)
    decoder = PyAVDecoder("never")
    with VideoFile(data, "never") as media:
        tick = float(media.stream.time_base or 0)
    assert tick > 0
    given = 0
    for index in range(40):
        try:
            _, frames, seconds = decoder.decode_with_info(data, lambda _, i=index: [i])  # type: ignore[misc]
        except DecodeError:
            continue
        given += 1
        assert any(np.array_equal(frames[0], p) for p in truth.at(index, seconds[0]))
    assert given > 30


def test_a_picture_missing_from_the_file_is_noticed_by_its_number() -> None:
    data, _ = one_group()
    truth = in_order(data).pictures
    number = leant_on()[6]
    without = rewritten(data, "mp4", {number: None})
    with pytest.raises(DecodeError, match="a picture that others lean on is missing"):
        frames_of(PyAVDecoder(), without, [38])
    np.testing.assert_array_equal(frames_of(PyAVDecoder(), without, [0])[0], truth[0])


def test_a_missing_picture_that_nothing_leans_on_is_not_missed() -> None:
    data = encoded(Recipe("libx264", "mp4", gop=250, noisy=False))
    truth = in_order(data).pictures
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    spare = [n for n, packet in enumerate(packets) if n > 8 and not packet[4] & 0x60]
    assert len(spare) > 5
    for number in spare[:5]:
        without = rewritten(data, "mp4", {number: None})
        frames = frames_of(PyAVDecoder(), without, range(39))
        assert all(any(np.array_equal(f, p) for p in truth) for f in frames)


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
@pytest.mark.parametrize("first_byte", [0x41, 0x01])  # a picture that others lean on, and a spare
def test_what_merely_lay_in_memory_is_not_given(container: str, first_byte: int) -> None:
    """A slice names a reference that cannot be: its decoder refuses it without error or mark.

    Where in its header the list of references begins is not known here, so each place is tried.
    """
    data = encoded(Recipe("libx264", container, gop=250, noisy=False, frames=24))
    with av.open(io.BytesIO(data)) as opened:
        packets = [bytes(p) for p in opened.demux(video=0) if p.size]
    start = bytes([0, 0, 1, first_byte])
    heads = [p.find(start) + 3 if container == "mpegts" else 4 for p in packets]
    number = next(n for n in range(14, 24) if packets[n][heads[n]] == first_byte)
    head = heads[number] + 1
    chance = 0
    for place in range(16, 44):
        changed = packets[number][:head] + impossible(packets[number][head:], place)
        broken = rewritten(data, container, {number: changed})
        for index in only_memory(broken):
            chance += 1
            for strict in ("auto", "always"):
                with pytest.raises(DecodeError):
                    frames_of(PyAVDecoder(strict), broken, [index])  # type: ignore[arg-type]
    assert chance > 0, "no picture was left to chance: nothing was shown"


def impossible(slice_header: bytes, place: int) -> bytes:
    """Writes at bit `place` that the list of references is changed by 512 pictures."""
    bits = "".join(f"{byte:08b}" for byte in slice_header)
    # The number has 19 bits; then the list ends, and all that follows is small.
    change = "11" + "0" * 9 + "1" + "0" * 9 + "00100" + "0" + "1" * 17
    bits = (bits[:place] + change + bits[place + len(change) :])[: len(bits)]
    return int(bits, 2).to_bytes(len(slice_header), "big")


def only_memory(data: bytes) -> list[int]:
    """Frames without a mark that are others where the decoder cannot use memory again."""
    given: list[list[bytes]] = []
    for hold in (False, True):
        pictures: list[bytes] = []
        held = []
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for packet in container.demux(stream):
                frames: list[av.VideoFrame] = []
                with suppress(av.FFmpegError):
                    frames = packet.decode()
                for frame in frames:
                    marked = frame.is_corrupt
                    pictures.append(b"" if marked else frame.to_ndarray(format="rgb24").tobytes())
                held = [*held, *frames] if hold else []
                frames, frame = [], None
        given.append(pictures)
    pairs = enumerate(zip(*given, strict=True))
    return [index for index, (one, other) in pairs if one != other]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("h264")])
def test_sound_streams_have_no_gaps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def watched(name: str) -> Callable[[ReferenceGaps, memoryview], bool]:
        real = getattr(ReferenceGaps, name)

        def ask(self: ReferenceGaps, packet: memoryview) -> bool:
            asked.append(real(self, packet))
            return asked[-1]

        return ask

    for name in ("before", "refused"):
        monkeypatch.setattr(ReferenceGaps, name, watched(name))
    data = make_video(**KINDS[kind])  # type: ignore[arg-type]
    frames_of(PyAVDecoder("always"), data, [5])
    assert len(asked) >= 60
    assert not any(asked)


def test_hostile_parameters_are_read_to_an_end() -> None:
    draw = random.Random(3)
    for _ in range(300):
        extradata = b"\x01" + draw.randbytes(draw.randrange(80))
        gaps = ReferenceGaps(extradata, draw.choice([0, 1, 4]))
        for _ in range(4):
            packet = memoryview(draw.randbytes(draw.randrange(60)))
            gaps.before(packet), gaps.refused(packet)


def test_damage_in_pictures_that_an_edit_list_hides_counts() -> None:
    """They are decoded and not shown, but the first frames that are shown lean on them."""
    data = make_video(times=range(-10, 30), gop=250, options={"bf": "0", "crf": "10"})
    with av.open(io.BytesIO(data)) as container:
        hidden = [p for p in container.demux(video=0) if p.size and p.is_discard]
    assert len(hidden) >= 8
    place, size = hidden[5].pos or 0, hidden[5].size
    broken = data[: place + KEPT] + random.Random(1).randbytes(size - KEPT) + data[place + size :]
    assert frames_of(PyAVDecoder(), data, [0]).shape == (1, 64, 96, 3)
    with pytest.raises(DecodeError):
        frames_of(PyAVDecoder(), broken, [0])


def test_a_plan_that_begins_before_others_takes_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("fell back to decoding in order")

    recipe = Recipe("libx264", "mp4", OPEN)
    data = encoded(recipe)
    truth = in_order(data).pictures
    monkeypatch.setattr(pyav, "FramesInOrder", never)
    draw = random.Random(8)
    for _ in range(20):
        chosen = _some(draw, 6, 40)
        frames = frames_of(PyAVDecoder(), data, chosen)
        for frame, index in zip(frames, chosen, strict=True):
            np.testing.assert_array_equal(frame, truth[index])


def test_the_record_says_how_much_was_looked_at() -> None:
    data = encoded(Recipe("libx264", "mp4", {"bf": "0"}, noisy=False))
    info, _, _ = PyAVDecoder().decode_with_info(data, lambda _: [26])
    assert (info.num_frames, info.checked_packets) == (40, 3)
    assert info.remarks() == "3 of 40 frames looked at for damage"
    info, _, _ = PyAVDecoder("always").decode_with_info(data, lambda _: [26])
    assert (info.checked_packets, info.remarks()) == (40, "")
