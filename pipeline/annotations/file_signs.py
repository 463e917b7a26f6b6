"""Tells by its first bytes whether a file without an extension holds a video."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SIGN_BYTES: Final = 1024
"""How much of a file `looks_like_video` wants to see."""

_BEGINNINGS: Final = (
    b"\x1aE\xdf\xa3",  # Matroska and WebM (EBML)
    b"FLV\x01",
    b"0&\xb2u\x8ef\xcf\x11",  # ASF: WMV
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"OggS",
    b"GIF87a",
    b"GIF89a",
    b"YUV4MPEG2 ",
    b"\x06\x0e+4\x02\x05\x01\x01",  # MXF
    b"nut/multimedia container",
)
_ATOMS: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # MP4 and QuickTime
_PICTURES: Final = (b"avif", b"heic", b"heix", b"mif1", b"M4A ", b"crx ")  # ftyp, and no video
_TS_PACKETS: Final = ((0, 188), (4, 192))  # MPEG transport stream; M2TS has four bytes before each


def looks_like_video(beginning: bytes) -> bool:
    """Whether the first `SIGN_BYTES` bytes of a file are those of a container of videos."""
    if beginning.startswith(_BEGINNINGS):
        return True
    if beginning[4:8] in _ATOMS:
        return beginning[8:12] not in _PICTURES
    if beginning[:4] == b"RIFF":
        return beginning[8:11] == b"AVI"
    return any(
        len(beginning) > start + 2 * size
        and all(beginning[at] == 0x47 for at in range(start, len(beginning), size))
        for start, size in _TS_PACKETS
    )


def holds_video(path: Path) -> bool:
    """Whether the file looks like a video; False for one that is no file or cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return False
        with open(path, "rb") as file:
            return looks_like_video(file.read(SIGN_BYTES))
    except OSError:
        return False
