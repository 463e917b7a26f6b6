"""What decoding does with damaged files: frames given against decoding the same file in order.

For each codec, shape of groups, kind of picture and size a video is encoded, and copies of it are
damaged: one packet turned to junk behind its first six bytes, zeroed, left out, or with one byte
changed. Of every copy, few frames are asked for in the default mode, in five ways. A row counts as
*wrong* when it holds a frame that decoding the copy in order, every frame of it, does not give to
the pixel. The limit is none.

A row that equals decoding in order can still differ from the sound file, where the decoder itself
noticed nothing. So of the copies that decode to other pictures than the sound file, those are
counted that fail, or count damage, when all frames are asked for: the table of docs/decoding.md.
Sound files of many kinds are decoded as well, in every mode: none may be accused.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, get_args

import common
import numpy as np

from pipeline.decoding.contract import DecodeError, Strictness
from pipeline.decoding.pyav import PyAVDecoder

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.worlds.damage import (  # lies with the tests that use it
    CODECS,
    DAMAGES,
    Recipe,
    damaged,
    encoded,
    in_order,
    outcome,
)
from tests.support.worlds.media import KINDS, make_video

# Shapes of groups of pictures for the codecs that have several. x265 opens its groups by itself.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "H.264": {
        "one group": {"gop": 250},
        "groups of 12": {},
        "open groups": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}},
        "no B": {"options": {"bf": "0"}},
        "slices": {"options": {"x264-params": "slices=4:keyint=12"}},
        "intra refresh": {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
        "mkv": {"container": "matroska"},
        "AVI": {"container": "avi"},
        "ts": {"container": "mpegts"},
    },
    "HEVC": {
        "one group": {"gop": 250},
        "open groups of 12": {},
        "closed groups": {
            "options": {"x265-params": "open-gop=0:keyint=12:min-keyint=12:log-level=none"}
        },
        "layers": {
            "options": {"x265-params": "temporal-layers=3:b-adapt=0:bframes=7:log-level=none"}
        },
        "ts": {"container": "mpegts"},
    },
    "VP9": {"one group": {"gop": 250}, "groups of 12": {}, "mp4": {"container": "mp4"}},
    "AV1": {"one group": {"gop": 250}, "groups of 12": {}},
    "MPEG-4": {"groups of 12": {}, "mp4": {"container": "mp4"}},
}
SIZES = {"320x240": (320, 240), "1920x1080": (1920, 1080)}
ASKED = {
    "1 random": lambda draw, count: [draw.randrange(count)],
    "4 random": lambda draw, count: [draw.randrange(count) for _ in range(4)],
    "8 random": lambda draw, count: [draw.randrange(count) for _ in range(8)],
    "uniform:4": lambda draw, count: (np.arange(4) * count + count // 2) // 4,
    "uniform:8": lambda draw, count: (np.arange(8) * count + count // 2) // 8,
}


def recipes(large: bool) -> list[tuple[str, str, Recipe]]:
    """Every (codec, what it is, recipe). Without `large`, no picture is larger than 320x240."""
    found = []
    for codec, base in CODECS.items():
        for shape, changes in SHAPES.get(codec, {"": {}}).items():
            for noisy in (True, False):
                what = f"{shape} {'noisy' if noisy else 'smooth'}".strip()
                found.append((codec, what, Recipe(**{**base, **changes, "noisy": noisy})))
        for name, (width, height) in list(SIZES.items())[: 2 if large else 1]:
            frames = 24 if width < 1000 else 13
            scaled = Recipe(**base, width=width, height=height, frames=frames, noisy=False)
            found.append((codec, f"{name} smooth", scaled))
    return found


def noticed(data: bytes, mode: Strictness = "auto") -> bool:
    """Whether asking for all frames fails or counts damage."""
    try:
        info, _, _ = PyAVDecoder(mode).decode_with_info(data, lambda i: range(i.num_frames))
    except DecodeError:
        return True
    return info.damaged_packets > 0


def measure(
    chosen: list[tuple[str, str, Recipe]], copies: int
) -> tuple[Counter[str], dict[str, dict[str, dict[str, int]]], list[str], int]:
    """Counts of rows, of copies by (codec, picture) and damage, wrong rows, number of files."""
    rows: Counter[str] = Counter()
    shares: dict[str, dict[str, dict[str, int]]] = {}
    wrong, files = [], 0
    for number, (codec, what, recipe) in enumerate(chosen):
        began = time.perf_counter()
        data = encoded(recipe)
        sound = in_order(data)
        large = recipe.width > 1000
        share = shares.setdefault(f"{codec}, {'noisy' if recipe.noisy else 'smooth'}", {})
        for copy in range(min(copies, 2) if large else copies):
            draw = random.Random(f"{codec} {what} {copy}")
            damage = DAMAGES[(copy + number) % len(DAMAGES)]
            broken = damaged(data, recipe.container, damage, draw)
            truth = in_order(broken)
            files += 1
            if not truth.same(sound):
                of = share.setdefault(damage, {"changed": 0, "noticed": 0})
                of["changed"] += 1
                of["noticed"] += noticed(broken)
            for asked, choose in ASKED.items():
                found = outcome(broken, truth, sound, partial(choose, draw))
                rows[found] += 1
                if found == "wrong":
                    wrong.append(f"{codec}, {what}, {damage}, copy {copy}, {asked}")
                    print("wrong:", wrong[-1], file=sys.stderr, flush=True)
        print(
            f"{codec}, {what}: {files} files, {time.perf_counter() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows, shares, wrong, files


def accused(clips: str) -> tuple[list[str], int]:
    """Sound files that some mode says are damaged, and the number of sound files."""
    sound = {kind: make_video(**recipe) for kind, recipe in KINDS.items()}  # type: ignore[arg-type]
    for file in sorted(Path(clips).iterdir()) if clips else ():
        if file.suffix in (".mp4", ".avi", ".webm", ".mkv"):
            sound[file.name] = file.read_bytes()
    modes = get_args(Strictness)
    found = [f"{k} ({mode})" for k, data in sound.items() for mode in modes if noticed(data, mode)]
    return found, len(sound)


def main() -> None:
    """Print the table as Markdown, keep it, and exit with 1 if any row was wrong."""
    chosen = common.options(__doc__, copies=32, codec="", clips="")
    if chosen.quick:
        chosen.copies = min(chosen.copies, 8)
    where = common.machine()
    asked = chosen.codec.split(",") if chosen.codec else CODECS
    every = [recipe for recipe in recipes(not chosen.quick) if recipe[0] in asked]
    rows, shares, wrong, files = measure(every, chosen.copies)
    print(f"\n| codec, picture | {' | '.join(DAMAGES)} |\n|---|{'---|' * len(DAMAGES)}")
    for name, share in shares.items():
        counts = [share.get(damage, {"noticed": 0, "changed": 0}) for damage in DAMAGES]
        cells = [f"{count['noticed']} of {count['changed']}" for count in counts]
        print(f"| {name} | {' | '.join(cells)} |")
    falsely, sound = accused(chosen.clips)
    print(f"{sound} sound files in every mode, accused: {', '.join(falsely) or 'none'}")
    print("rows:", dict(rows))
    claim = f"{rows.total()} rows of {files} damaged files of {len({r[0] for r in every})} codecs"
    unlike = f"{len(wrong)} unlike decoding in order"
    row = common.Row(claim, unlike, "decoding the same file in order", float(len(wrong)), "0")
    details = {"rows_by_outcome": rows, "shares": shares, "wrong": wrong, "accused": falsely}
    common.save("damage", where, [row], details)
    sys.exit(1 if wrong or falsely else 0)


if __name__ == "__main__":
    main()
