"""Holds the packets that a decoder was sent against the frames that came out of it.

A decoder may swallow a packet without a frame and without an error, and the frames that lean on it
then come out as if nothing were wrong. So every packet carries its number through the decoder, and
a frame counts only if each packet that it may lean on came out as a sound frame as well.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import Any, cast

from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

# In these codecs every packet gives a frame, or says in its header that it shows none. In others
# (MPEG-4 and its kin, whose "not coded" pictures give nothing) a missing frame proves nothing.
ANSWERING_CODECS = {
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d"),
    *("mpeg1video", "mpeg2video", "mjpeg", "prores", "dnxhd", "ffv1", "gif"),
}
_UNSENT, _SENT, _FRAME, _SILENT, _BAD = range(5)


class Account:
    """What became of every packet of a stream, by its number in file order.

    A packet was not sent, or it is awaited, came out as a sound frame, shows nothing (by its
    header), or is bad: it could not be decoded, or only with errors. `sent` counts packets.
    """

    def __init__(self, codec: str, packets: int) -> None:
        self._codec = codec
        self._state = bytearray(packets)
        self._keys = array("q")  # the packets of the keyframes that came out, ascending
        # Not where two fields, each with a packet of its own, may make one frame.
        self.awaits_all = codec in ANSWERING_CODECS
        self.sent = self._last = 0

    def send(self, number: int, packet: Packet[VideoStream]) -> Packet[VideoStream]:
        """Return the packet as the decoder must get it, marked with its number."""
        if packet.is_discard:
            # The decoder would drop the frame, and nobody would learn whether it was sound.
            shown: Packet[Any] = Packet(bytes(packet))
            shown.pts, shown.dts, shown.time_base = packet.pts, packet.dts, packet.time_base
            packet = shown
        packet.opaque = [number]  # a new object each time: PyAV tells them apart by their address
        hidden = self._codec == "vp8" and not memoryview(packet)[0] & 0x10
        self._state[number] = _SILENT if hidden else _SENT
        self.sent += 1
        self._last = number
        return packet

    def fail(self, number: int) -> None:
        """Say that a packet could not be decoded."""
        if number < len(self._state):
            self._state[number] = _BAD

    def receive(self, frame: VideoFrame) -> int:
        """Enter a frame that came out; returns its packet's number."""
        # A decoder that shows an earlier picture again may not pass the number on.
        number = cast(list[int], frame.opaque or [self._last])[0]
        if frame.is_corrupt:
            self._state[number] = _BAD
        elif self._state[number] != _BAD:
            self._state[number] = _FRAME
            if frame.key_frame and (not self._keys or number > self._keys[-1]):
                self._keys.append(number)
        return number

    def anchor(self, number: int) -> int:
        """The packet of the keyframe from which the frame of packet `number` was decoded.

        It must be asked when that frame has come out: a keyframe that is shown later is none for
        it. 0 if none has come out.
        """
        place = bisect_right(self._keys, number)
        return self._keys[place - 1] if place else 0

    def excuse(self, numbers: list[int]) -> int:
        """Expect no frame of these packets any more; returns how many were still awaited."""
        awaited = [number for number in numbers if self._state[number] == _SENT]
        for number in awaited:
            self._state[number] = _SILENT
        return len(awaited)

    def swallowed(self) -> int:
        """How many packets gave neither frame nor error; asked when no frame is to come."""
        return self._state.count(_SENT) if self.awaits_all else 0

    def broken(self, first: int, last: int) -> int | None:
        """The first packet from `first` to `last` (inclusive) that is bad or gave no frame."""
        states = (_BAD, _SENT) if self.awaits_all else (_BAD,)
        found = [self._state.find(state, first, last + 1) for state in states]
        return min((number for number in found if number >= 0), default=None)


def length_size(codec: str, extradata: bytes | None) -> int:
    """The bytes that give the length of each unit in a packet of H.264 or HEVC.

    0 if units are not told apart by lengths (other codecs, and streams with start codes).
    """
    place = {"h264": 4, "hevc": 21}.get(codec)
    if place is None or extradata is None or len(extradata) <= place or extradata[0] != 1:
        return 0
    return (extradata[place] & 3) + 1


def temporal_layer(codec: str, packet: Packet[VideoStream], length_bytes: int) -> int:
    """The temporal sub-layer of a packet of HEVC; 0 in H.264.

    Pictures of a higher layer may lean on those that `nobody_leans_on` says are not leant on.
    """
    if codec != "hevc" or packet.size < length_bytes + 2:
        return 0
    return memoryview(packet)[length_bytes + 1] & 7


def unit_heads(packet: Packet[VideoStream], length_bytes: int) -> list[int]:
    """Where each unit of a packet begins; none if it is not exactly a row of whole units."""
    view = memoryview(packet)
    end, at, heads = len(view), 0, []
    while at < end:
        start = at + length_bytes
        at = start + int.from_bytes(view[at:start], "big")
        if not start < at <= end or view[start] & 0x80:  # the first bit must be zero
            return []
        heads.append(start)
    return heads


def nobody_leans_on(codec: str, packet: Packet[VideoStream], length_bytes: int) -> bool:
    """Whether the headers of a packet of H.264 or HEVC say that no other picture leans on it.

    False for a packet that is not exactly a row of whole units, and for one that holds parameters.
    `length_bytes` is what `length_size` returns.
    """
    view, pictures = memoryview(packet), 0
    for start in unit_heads(packet, length_bytes):
        head = view[start]
        if codec == "h264":
            # A slice, or what goes with pictures (ITU-T H.264, table 7-1).
            kind = head & 0x1F
            if kind == 1 and not head & 0x60:
                pictures += 1
            elif kind not in (6, 9, 12):
                return False
        else:
            # A sub-layer non-reference picture, or what goes with them (ITU-T H.265, table 7-1).
            kind = head >> 1
            if kind < 16 and kind % 2 == 0:
                pictures += 1
            elif kind not in (35, 38, 39, 40):
                return False
    return pictures > 0
