"""Finds reference pictures that are missing from a stream of H.264, by the numbers they carry.

A decoder puts a copy of another picture in the place of one that is missing, without an error, and
which one depends on what else it decoded. In H.264 the pictures that others lean on are numbered
(`frame_num`, ITU-T H.264, 7.4.3), so a missing one leaves a gap. The other codecs have no such
number.
"""

from __future__ import annotations

from collections.abc import Iterator

# Profiles whose parameters begin with the format of the picture (ITU-T H.264, 7.3.2.1.1).
_HIGH_PROFILES = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}
_HEADER_BYTES = 48  # of a slice: its number lies within the first few
_PARAMETER_BYTES = 4096
_SLICES = (1, 2, 5)  # a slice, the first part of a partitioned one, a slice of an IDR picture


class ReferenceGaps:
    """Reads packets of H.264 in file order and says where a reference picture is missing.

    It says nothing of streams whose parameters allow gaps or cannot be read.
    """

    def __init__(self, extradata: bytes | None, length_bytes: int) -> None:
        """`length_bytes` as from `length_size`; 0 for a stream with start codes."""
        self._length_bytes = length_bytes
        self._bits = 0  # of a picture's number; 0 if numbers tell nothing
        self._colour_planes = False
        self._previous: int | None = None
        for unit in _listed_parameters(extradata) if length_bytes else _marked_units(extradata):
            self._read_parameters(unit)

    def before(self, packet: memoryview) -> bool:
        """Whether a reference picture between the packet before and this one is missing."""
        units = self._counted_units(packet) if self._length_bytes else _marked_units(packet)
        for unit in units:
            if not len(unit):
                continue
            kind = unit[0] & 0x1F
            if kind == 7:
                self._read_parameters(unit)
            elif kind in _SLICES and self._bits:
                return self._is_gap(unit, kind)
        return False

    def _is_gap(self, unit: memoryview, kind: int) -> bool:
        bits = _Bits(unit[1:_HEADER_BYTES])
        for _ in range(3):  # first macroblock, type of slice, parameters of the picture
            bits.golomb()
        if self._colour_planes:
            bits.take(2)
        number, previous = bits.take(self._bits), self._previous
        if unit[0] & 0x60 or kind == 5:
            self._previous = number
        if kind == 5 or previous is None:
            return False
        return number not in (previous, (previous + 1) % (1 << self._bits))

    def _read_parameters(self, unit: memoryview) -> None:
        bits = _Bits(unit[1:_PARAMETER_BYTES])
        profile = bits.take(8)
        bits.take(16)  # constraints and level
        bits.golomb()
        colour_planes = False
        if profile in _HIGH_PROFILES:
            chroma = bits.golomb()
            colour_planes = chroma == 3 and bits.take(1) == 1
            bits.golomb(), bits.golomb(), bits.take(1)  # bit depths, lossless
            if bits.take(1):
                for number in range(12 if chroma == 3 else 8):
                    if bits.take(1):
                        _pass_scaling_list(bits, 16 if number < 6 else 64)
        length = bits.golomb() + 4
        order = bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.take(1), bits.golomb(), bits.golomb()
            for _ in range(min(bits.golomb(), 255)):
                bits.golomb()
        bits.golomb()  # reference pictures
        gaps_allowed = bits.take(1)
        self._colour_planes = colour_planes
        self._bits = length if length <= 16 and not gaps_allowed and not bits.ended else 0

    def _counted_units(self, packet: memoryview) -> Iterator[memoryview]:
        at = 0
        while at + self._length_bytes < len(packet):
            start = at + self._length_bytes
            at = start + int.from_bytes(packet[at:start], "big")
            yield packet[start:at]


class _Bits:
    """Reads bits of a unit, without the bytes that keep start codes apart; zeros after its end."""

    def __init__(self, unit: memoryview) -> None:
        plain = bytes(unit).replace(b"\0\0\3", b"\0\0")
        self._value, self._left = int.from_bytes(plain, "big"), 8 * len(plain)
        self.ended = False

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            self.ended = True
            return 0
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb code (ITU-T H.264, 9.1)."""
        rest = self._value & ((1 << max(self._left, 0)) - 1)
        zeros = self._left - rest.bit_length()
        if zeros > 31 or self._left <= 0:
            self.ended = True
            return 0
        self.take(zeros)
        return self.take(zeros + 1) - 1


def _pass_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following and not bits.ended:
            code = bits.golomb()
            following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
        last = following or last


def _listed_parameters(extradata: bytes | None) -> list[memoryview]:
    """The sequence parameter sets of an `avcC` record (ISO/IEC 14496-15)."""
    record, at, found = memoryview(extradata or b""), 6, []
    for _ in range(record[5] & 0x1F if len(record) > 6 else 0):
        size = int.from_bytes(record[at : at + 2], "big")
        found.append(record[at + 2 : at + 2 + size])
        at += 2 + size
    return [unit for unit in found if len(unit)]


def _marked_units(stream: bytes | memoryview | None) -> Iterator[memoryview]:
    """Units that begin with start codes."""
    view = memoryview(stream or b"")
    content = bytes(view)
    start = content.find(b"\0\0\1")
    while start >= 0:
        end = content.find(b"\0\0\1", start + 3)
        yield view[start + 3 : end if end >= 0 else len(content)]
        start = end
