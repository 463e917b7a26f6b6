"""Opens a video stream with PyAV, with its limits, strictness and errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Self, cast

import av
from av.codec.context import Flags
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from pipeline.decoding.contract import DecodeError, Source, Strictness
from pipeline.decoding.pyav import frame_stack

# Codecs in which any damage before a frame makes it fail with strictness "auto", as a frame may
# lean on pictures before its keyframe. In the others a keyframe ends what damage before it did.
NOTICING_CODECS = {"h264", "hevc"}
# Options with which decoders notice more damage. HEVC then also checks the picture hashes that some
# encoders write. The H.264 decoder would notice no more, and would fail on intact open groups of
# pictures.
ERR_DETECT = {"hevc": "crccheck+explode", "mjpeg": "explode"}

READ_BUFFER_BYTES = 1 << 18


class VideoFile:
    """An open video stream that can be started again from the beginning.

    `fails_on_damage`: the video fails as soon as the decoder notices damage. `broken_off` is the
    reason why reading packets ended before the file's end, if it did;
    `ends_early`: the file is shorter than its RIFF header (AVI) says. `alpha_left_out` as in
    `VideoInfo`.
    """

    def __init__(self, source: Source, strict: Strictness) -> None:
        self._source = source
        self.strict = strict
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def restart(self) -> None:
        """Open the source from its beginning with a fresh decoder."""
        self._opened.close()
        with ExitStack() as opening:
            self._open(opening)
            self._opened = opening.pop_all()

    def _open(self, opening: ExitStack) -> None:
        self.broken_off: str | None = None
        file = self._binary_file(opening)
        limits = {"max_pixels": str(frame_stack.MAX_PIXELS)}
        try:
            # A playlist must not make us open other files: no protocol is allowed.
            self.container = opening.enter_context(
                av.open(
                    _Nameless(file),
                    "r",
                    options={"protocol_whitelist": "none", **limits},
                    metadata_errors="ignore",
                    buffer_size=READ_BUFFER_BYTES,
                )
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DecodeError(f"not a readable video file ({plain_cause(error)})") from None
        stream = self.container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise DecodeError("no video stream")
        if stream.codec_context is None:
            raise DecodeError("no decoder for the codec of the video stream")
        self.stream = cast(VideoStream, stream)
        context = self.stream.codec_context
        frame_stack.refuse_large(context.width, context.height)
        self.codec = context.name
        self.alpha_left_out = self.stream.metadata.get("alpha_mode") == "1"
        if self.alpha_left_out and self.strict == "always":
            raise DecodeError("its transparency lies in a second stream, which is not decoded")
        # One thread per video: many videos are decoded at once, and FFmpeg's own threads cost
        # 10 to 17 % more CPU time per frame.
        context.thread_count = 1
        context.flags |= Flags.copy_opaque  # frames name their packets, see `Account`
        noticing = self.codec in NOTICING_CODECS
        self.fails_on_damage = self.strict == "always" or (self.strict == "auto" and noticing)
        context.options = dict(limits)
        if self.fails_on_damage and self.codec in ERR_DETECT:
            context.options = {**limits, "err_detect": ERR_DETECT[self.codec]}

    @property
    def formats(self) -> set[str]:
        """FFmpeg's names for the container's format."""
        return set(self.container.format.name.split(","))

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Packets of the stream in file order, up to where the file can be read."""
        try:
            for packet in self.container.demux(self.stream):
                if packet.size or packet.dts is not None:  # the last one is a dummy
                    yield packet
        except av.FFmpegError as error:
            self.broken_off = plain_cause(error)

    def _binary_file(self, opening: ExitStack) -> BinaryIO:
        """The source as a file at its beginning; sets `ends_early`."""
        source = self._source
        try:
            if isinstance(source, Path):
                file: BinaryIO = opening.enter_context(source.open("rb"))
            elif isinstance(source, bytes | bytearray | memoryview):
                file = BytesIO(source)
            else:
                file = source
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            file.seek(0)
        except OSError as error:
            raise DecodeError(f"the file cannot be read ({plain_cause(error)})") from None
        if size == 0:
            raise DecodeError("the file is empty")
        self.ends_early = head[:4] == b"RIFF" and size < 8 + int.from_bytes(head[4:], "little")
        return file


class _Nameless:
    """A file without its name, so that format detection and messages do not depend on it."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def plain_cause(error: BaseException) -> str:
    """An error's cause without the file name and numbers that FFmpeg adds."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
