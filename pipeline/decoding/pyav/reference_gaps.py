"""Finds what the headers of slices of H.264 give away and its decoder does not tell.

A decoder puts a copy of another picture in the place of one that is missing, without an error, and
which one depends on what else it decoded. In H.264 the pictures that others lean on are numbered
(`frame_num`, ITU-T H.264, 7.4.3), so a missing one leaves a gap. The other codecs have no such
number.

A slice may also name what cannot be, while its header is otherwise whole. The decoder has begun the
picture by then, and gives it as it found its memory, with neither an error nor a mark.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Profiles whose parameters begin with the format of the picture (ITU-T H.264, 7.3.2.1.1).
_HIGH_PROFILES = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}
_HEADER_BYTES = 48  # of a slice: what is read lies within them in all but the longest
_PARAMETER_BYTES = 4096
_SLICES = (1, 2, 5)  # a slice, the first part of a partitioned one, a slice of an IDR picture
_MAX_LONG_TERM = 31
_MAX_CHANGES = 33  # of a list of references, with the code that ends them


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What a sequence parameter set says that a slice's header needs."""

    number_bits: int  # of `frame_num`
    colour_planes: bool
    order_type: int
    order_bits: int
    order_deltas: bool
    frames_only: bool
    adaptive: bool
    macroblocks: int


@dataclass(frozen=True, slots=True)
class _Picture:
    """What a picture parameter set says that a slice's header needs."""

    sequence: int
    bottom_order: bool
    redundant: bool


class _Impossible(Exception):
    """A header says something that no sound stream says."""


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
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, _Picture] = {}
        for unit in _listed_parameters(extradata) if length_bytes else _marked_units(extradata):
            self._read_if_parameters(unit)

    def before(self, packet: memoryview) -> bool:
        """Whether a reference picture between the packet before and this one is missing."""
        units = self._counted_units(packet) if self._length_bytes else _marked_units(packet)
        for unit in units:
            if not len(unit):
                continue
            kind = unit[0] & 0x1F
            if kind in _SLICES:
                return self._is_gap(unit, kind) if self._bits else False
            self._read_if_parameters(unit)
        return False

    def refused(self, packet: memoryview) -> bool:
        """Whether the decoder refuses a picture of this packet after it has begun it.

        That is decided by the first slice of a frame or field: a later one that is refused leaves
        a hole, which the decoder notices. It must be asked after `before`.
        """
        units = self._counted_units(packet) if self._length_bytes else _marked_units(packet)
        first = True
        for unit in units:
            if len(unit) < 2 or unit[0] & 0x1F not in _SLICES:
                continue
            if first or unit[1] & 0x80:  # this bit: the slice begins at macroblock 0
                bits = _Bits(unit[1:_HEADER_BYTES])
                try:
                    self._read_slice(bits, unit[0] & 0x1F == 5)
                except _Impossible:
                    return True
                if bits.ended and len(unit) <= _HEADER_BYTES:
                    return True
            first = False
        return False

    def _read_slice(self, bits: _Bits, idr: bool) -> None:
        """Read a slice's header up to its lists of references (ITU-T H.264, 7.3.3)."""
        macroblock, kind = bits.golomb(), bits.golomb() % 5
        picture = self._pictures.get(bits.golomb())
        sequence = self._sequences.get(picture.sequence) if picture else None
        if picture is None or sequence is None:
            return  # the decoder says so itself
        if sequence.colour_planes:
            bits.take(2)
        bits.take(sequence.number_bits)
        field = not sequence.frames_only and bits.take(1) == 1
        if field:
            bits.take(1)
        if macroblock << int(field or sequence.adaptive) >= sequence.macroblocks:
            raise _Impossible
        if idr:
            bits.golomb()
        bottom = picture.bottom_order and not field
        if sequence.order_type == 0:
            bits.take(sequence.order_bits)
            if bottom:
                bits.golomb()
        elif sequence.order_type == 1 and sequence.order_deltas:
            bits.golomb()
            if bottom:
                bits.golomb()
        if picture.redundant:
            bits.golomb()
        lists = {0: 1, 1: 2, 3: 1}.get(kind, 0)  # P, B, SP; the others lean on nothing
        if lists == 2:
            bits.take(1)
        if lists and bits.take(1):
            for _ in range(lists):
                bits.golomb()
        for _ in range(lists):
            if bits.take(1):
                _pass_changes(bits, 1 << sequence.number_bits + int(field))

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

    def _read_if_parameters(self, unit: memoryview) -> None:
        kind = unit[0] & 0x1F if len(unit) else 0
        if kind == 7:
            self._read_sequence(_Bits(unit[1:_PARAMETER_BYTES]))
        elif kind == 8:
            self._read_picture(_Bits(unit[1:_PARAMETER_BYTES]))

    def _read_picture(self, bits: _Bits) -> None:
        name, sequence = bits.golomb(), bits.golomb()
        bits.take(1)
        bottom_order = bits.take(1) == 1
        grouped = bits.golomb() > 0
        bits.golomb(), bits.golomb(), bits.take(3)  # references, weights
        bits.golomb(), bits.golomb(), bits.golomb(), bits.take(2)  # quantisers, filter, prediction
        redundant = bits.take(1) == 1
        self._pictures.pop(name, None)
        # Nothing is said of slices in groups. No more names than these are allowed.
        if name < 256 and not grouped and not bits.ended:
            self._pictures[name] = _Picture(sequence, bottom_order, redundant)

    def _read_sequence(self, bits: _Bits) -> None:
        profile = bits.take(8)
        bits.take(16)  # constraints and level
        name = bits.golomb()
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
        order, order_bits, order_deltas = bits.golomb(), 0, False
        if order == 0:
            order_bits = bits.golomb() + 4
        elif order == 1:
            order_deltas = bits.take(1) == 0
            bits.golomb(), bits.golomb()
            for _ in range(min(bits.golomb(), 255)):
                bits.golomb()
        bits.golomb()  # reference pictures
        gaps_allowed = bits.take(1)
        self._colour_planes = colour_planes
        self._bits = length if length <= 16 and not gaps_allowed and not bits.ended else 0
        macroblocks = (bits.golomb() + 1) * (bits.golomb() + 1)
        frames_only = bits.take(1) == 1
        adaptive = not frames_only and bits.take(1) == 1
        self._sequences.pop(name, None)
        if name < 32 and length <= 16 and order_bits <= 16 and not bits.ended:
            self._sequences[name] = _Sequence(
                length,
                colour_planes,
                order,
                order_bits,
                order_deltas,
                frames_only,
                adaptive,
                macroblocks if frames_only else 2 * macroblocks,
            )

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


def _pass_changes(bits: _Bits, numbers: int) -> None:
    """Pass the changes of a list of references among so many `numbers` of pictures."""
    for _ in range(_MAX_CHANGES):
        code = bits.golomb()
        if code == 3 or bits.ended:
            return
        value = bits.golomb()
        if code > 3 or value > (_MAX_LONG_TERM if code == 2 else numbers - 1):
            raise _Impossible
    raise _Impossible


def _pass_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following and not bits.ended:
            code = bits.golomb()
            following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
        last = following or last


def _listed_parameters(extradata: bytes | None) -> list[memoryview]:
    """The sequence and picture parameter sets of an `avcC` record (ISO/IEC 14496-15)."""
    record, at, found = memoryview(extradata or b""), 5, []
    for mask in (0x1F, 0xFF):
        count, at = (record[at] & mask if len(record) > at + 1 else 0), at + 1
        for _ in range(count):
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
