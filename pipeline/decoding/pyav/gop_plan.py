"""Finds the packets that must be decoded for the chosen frames; does no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class PacketRun:
    """Packets `first` to `last` (inclusive, in file order) decoded without a gap for `wanted`."""

    first: int
    last: int
    wanted: frozenset[int]


@dataclass(frozen=True)
class PacketTable:
    """Packets of one video stream in file (decoding) order.

    `pts` int64 [packets] in the stream's time base, `keyframe` bool [packets], `discard` bool
    [packets] (decoded but not shown: edit lists). `complete_pts` is False when a packet has no
    time.
    """

    pts: npt.NDArray[np.int64]
    keyframe: npt.NDArray[np.bool_]
    discard: npt.NDArray[np.bool_]
    complete_pts: bool

    def display_order(self) -> npt.NDArray[np.int64]:
        """Packet number of every shown frame, in display order: int64 [frames]."""
        shown = np.flatnonzero(~self.discard)
        return shown[np.argsort(self.pts[shown], kind="stable")]

    def is_reliable(self) -> bool:
        """Whether display order can be read off the table without decoding.

        Every packet needs a time of its own, and the stream must begin with a keyframe that no
        shown frame precedes: pictures shown before it depend on packets that are not in the file,
        so no decoder gives them.
        """
        shown = self.pts[~self.discard]
        return bool(
            self.complete_pts
            and len(shown) > 0
            and self.keyframe[0]
            and len(np.unique(shown)) == len(shown)
            and shown.min() >= self.pts[0]
        )

    def cut_start(self) -> tuple[int, list[int]]:
        """The first keyframe, and the packets that may lean on what is missing before it.

        The first keyframe is packet 0 unless the stream was cut inside a group of pictures. The
        others come in the file after it, before the next keyframe, and are shown before it.
        """
        keyframes = np.flatnonzero(self.keyframe)
        if not len(keyframes):
            return 0, []
        begin = int(keyframes[0])
        end = int(keyframes[1]) if len(keyframes) > 1 else len(self.pts)
        return begin, (begin + np.flatnonzero(self.pts[begin:end] < self.pts[begin])).tolist()

    def is_leading(self, packets: Iterable[int]) -> bool:
        """Whether any of the packets is a leading picture: shown before the keyframe before it."""
        keyframes = np.flatnonzero(self.keyframe)
        groups = np.searchsorted(keyframes, sorted(packets), side="right") - 1
        return bool((self.pts[sorted(packets)] < self.pts[keyframes[np.maximum(groups, 0)]]).any())

    def runs(self, packets: Iterable[int]) -> list[PacketRun]:
        """The runs of packets that must be decoded to get the frames of `packets`.

        A run begins at the keyframe before its first wanted packet. A picture shown before its
        own keyframe (leading picture of an open GOP) depends on the previous GOP, so that is
        decoded too. Adjacent runs are joined.
        """
        keyframes = np.flatnonzero(self.keyframe)
        runs: list[PacketRun] = []
        for packet in sorted(set(packets)):
            group = max(int(np.searchsorted(keyframes, packet, side="right")) - 1, 0)
            if self.pts[packet] < self.pts[keyframes[group]] and group > 0:
                group -= 1
            first = int(keyframes[group])
            wanted = frozenset({packet})
            # A leading picture can reach back behind several runs that were planned before it.
            while runs and first <= runs[-1].last + 1:
                previous = runs.pop()
                first, wanted = min(first, previous.first), wanted | previous.wanted
            runs.append(PacketRun(first, packet, wanted))
        return runs
