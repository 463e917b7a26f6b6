"""Decodes a video from its start, every frame, and judges which frames can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.decoding.contract import DecodeError
from pipeline.decoding.pyav.account import Account, length_size
from pipeline.decoding.pyav.packet_survey import Survey
from pipeline.decoding.pyav.reference_gaps import ReferenceGaps
from pipeline.decoding.pyav.video_file import VideoFile, plain_cause

USED_FRAMES = 16  # decoded first where the decoder's memory must not be fresh


class FramesInOrder:
    """Iterates over every frame from the start with its index (-1 if no packet has its time).

    `shown` counts the frames so far; `first_cause` is why the first packet was skipped, in
    brackets. Raises `DecodeError` at damage if the strictness demands it.
    """

    def __init__(self, media: VideoFile, survey: Survey, *, used_memory: bool = False) -> None:
        """`used_memory`: fill the decoder's memory with other frames first."""
        self._media, self._survey, self._used_memory = media, survey, used_memory
        self._account = Account(media.codec, len(survey.table.pts))
        self._kept: list[tuple[int, int, int]] = []  # index, packet and its keyframe's packet
        self._number = 0  # the packet of the frame given last
        self._leading = set(survey.leading)
        self._skipped = survey.begin
        self._ended = False
        self.shown = 0
        self.first_cause = ""
        self._damaged = survey.damaged_when_read
        extradata = media.stream.codec_context.extradata
        self._gaps: ReferenceGaps | None = None
        if media.codec == "h264":
            self._gaps = ReferenceGaps(extradata, length_size(media.codec, extradata))

    def __iter__(self) -> Iterator[tuple[int, VideoFrame]]:
        if self._damaged and self._media.strict == "always":
            raise DecodeError(f"damaged: packets that cannot be read whole: {self._damaged}")
        packets: Iterable[Packet[VideoStream]] | None = self._survey.packets
        if packets is None or self._media.stream.codec_context.is_open:
            # A decoder that was flushed does not behave exactly like a new one.
            self._media.restart()
            packets = self._media.packets()
        if self._used_memory and self._survey.packets is not None:
            held, context = [], self._media.stream.codec_context
            for earlier in self._survey.packets[:USED_FRAMES]:
                with suppress(av.FFmpegError):
                    held.append(context.decode(earlier))
            del held
            context.flush_buffers()
        for number, packet in enumerate(chain(packets, [None])):
            if packet is None:
                self._ended = True
            elif not packet.size or number < self._survey.begin:
                continue  # an empty packet would end the stream for the decoder
            for number_of, frame in self._decoded(number, packet):
                self._number = number_of
                reliable = self._survey.reliable
                index = self._survey.index_of(frame.pts) if reliable else self.shown
                self.shown += 1
                yield index, frame

    def keep(self, index: int) -> None:
        """Say that the frame given last is kept as frame `index`: `require_whole` judges it."""
        self._kept.append((index, self._number, self._account.anchor(self._number)))

    def keep_none(self) -> None:
        """Say that the frames kept so far are not those that are wanted."""
        self._kept.clear()

    def require_whole(self) -> None:
        """Raise `DecodeError` if a packet that a kept frame may lean on gave no sound frame.

        Frames still inside the decoder are taken out of it first; there are no others after that.
        """
        if not self._ended:
            self._ended = True
            self._decoded(len(self._survey.table.pts), None)
        self._skipped += self._account.excuse(self._survey.leading)
        if self._media.strict == "never":
            return
        kept = self._kept
        if self._media.strict == "always":
            kept = [*kept, (self.shown - 1, self._number, 0)]
        for index, number, keyframe in kept:
            first = 0 if self._media.fails_on_damage else keyframe
            broken = self._account.broken(first, number)
            if broken is not None:
                raise DecodeError(
                    f"damaged: frame {index} may lean on packet {broken}, which gave no sound frame"
                )

    def seen(self) -> dict[str, Any]:
        """What `VideoInfo` says of the packets that were read so far."""
        return {
            "damaged_packets": self._damaged + (self._account.swallowed() if self._ended else 0),
            "checked_packets": self._account.sent,
            "leading_pictures": self._skipped,
        }

    def _decoded(
        self, number: int, packet: Packet[VideoStream] | None
    ) -> list[tuple[int, VideoFrame]]:
        """Decode a packet; returns the frames to show, with the numbers of their packets."""
        if self._gaps and packet is not None:
            view = memoryview(packet)
            if self._gaps.before(view):
                self._pass_over("a picture that others lean on is missing from the file")
            if number not in self._leading and self._gaps.refused(view):
                self._account.fail(number)
                self._pass_over("the header of a slice says what cannot be")
        try:
            sent = None if packet is None else self._account.send(number, packet)
            frames = self._media.stream.codec_context.decode(sent)
        except av.FFmpegError as error:
            frames = []
            if number not in self._leading:
                self._account.fail(number)
                self._pass_over(plain_cause(error))
        found: list[tuple[int, VideoFrame]] = []
        for frame in frames:
            number_of = self._account.receive(frame)
            if frame.interlaced_frame and not self._survey.reliable:
                self._account.awaits_all = False
            if number_of in self._leading and frame.is_corrupt:
                self._skipped += 1
                continue
            if frame.is_corrupt:
                self._pass_over("the decoder marks a frame as damaged")
            table = self._survey.table
            if not (self.shown or found) and self._media.codec == "h264" and table.complete_pts:
                # This decoder gives nothing before it has a whole picture to begin with, and an
                # error for every packet that it cannot decode.
                pts = table.pts[: number + 1]
                early = np.flatnonzero(pts < pts[number_of]).tolist()
                self._skipped += self._account.excuse(early)
            if not table.discard[number_of]:
                found.append((number_of, frame))
        return found

    def _pass_over(self, cause: str) -> None:
        if self._media.fails_on_damage:
            raise DecodeError(f"damaged after {self.shown} frames ({cause})")
        self.first_cause = self.first_cause or f" ({cause})"
        self._damaged += 1
