"""Is decoding by the plan worth it? CPU time of one video's frames against decoding in order.

`decode_with_info`, which is what extraction calls, counts the frames and gives the chosen ones. The
baseline opens the same file with PyAV, decodes all of it in order with one thread, and converts
only the chosen frames, as it must when nobody told it how many frames there are. Both alternate
within one repetition; CPU time, so that other programs hardly matter.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import common
import numpy as np
import numpy.typing as npt

from pipeline.decoding.pyav import PyAVDecoder
from pipeline.sampling import parse_sampling

GOPS = (12, 50, 250)  # x264's default is 250
FRAMES = (8, 16, 32)
LIMITS = {(12, 8): 3.0, (50, 8): 1.4}


def planned(data: bytes, frames: int) -> npt.NDArray[np.uint8]:
    """Uniformly chosen frames, RGB uint8 [frames, height, width, 3], as extraction gets them."""
    sampling = parse_sampling(f"uniform:{frames}")
    return PyAVDecoder().decode_with_info(data, lambda i: sampling.indices(i.num_frames)[0])[1]


def in_order(data: bytes, indices: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The same frames by decoding everything."""
    wanted = set(indices)
    found = {}
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24", threads=1)
    return np.stack([found[index] for index in indices])


def cpu_ms(work: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1000


def compare(videos: Sequence[bytes], frames: int, repetitions: int) -> tuple[float, float]:
    """Median over repetitions of the mean CPU milliseconds per video: (planned, in order)."""
    chosen = []
    for data in videos:
        num_frames = PyAVDecoder().probe(data).num_frames
        indices = parse_sampling(f"uniform:{frames}").indices(num_frames)[0].tolist()
        np.testing.assert_array_equal(planned(data, frames), in_order(data, indices))
        chosen.append(indices)
    rounds: list[tuple[float, float]] = []
    for _ in range(repetitions):
        took = [
            (cpu_ms(lambda d=data: planned(d, frames)), cpu_ms(lambda d=data, i=i: in_order(d, i)))  # type: ignore[misc]
            for data, i in zip(videos, chosen, strict=True)
        ]
        rounds.append(tuple(np.mean(took, axis=0).tolist()))
    return common.middle([r[0] for r in rounds]), common.middle([r[1] for r in rounds])


def clips_with_gop(sources: Sequence[Path], gop: int) -> list[bytes]:
    """The benchmark clips with a key frame at least every `gop` frames, made once."""
    folder = common.WORK / f"decode-gop{gop}-{common.RECIPE}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        target = folder / source.name
        if target.is_file():
            continue
        partial = target.with_suffix(".partial")
        with av.open(str(source)) as old, av.open(str(partial), "w", format="mp4") as new:
            pictures = old.streams.video[0]
            stream = new.add_stream("libx264", rate=pictures.average_rate)
            stream.width, stream.height, stream.pix_fmt = pictures.width, pictures.height, "yuv420p"
            stream.gop_size = gop
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(old.decode(pictures)):
                copy = av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")
                copy.pts = number
                new.mux(stream.encode(copy))
            new.mux(stream.encode(None))
        partial.rename(target)
    return [(folder / source.name).read_bytes() for source in sources]


def main() -> None:
    """Measure all groups of pictures and frame counts, and the files of `--clips` one by one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one clip, two repetitions")
    parser.add_argument("--clips", type=Path, help="a folder of videos to measure as well")
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    if options.quick:
        options.videos, options.repetitions = 1, 2
    where = common.machine()
    sources = common.kinetics_clips(options.videos)
    sets = {f"GOP {gop}": (gop, clips_with_gop(sources, gop)) for gop in GOPS}
    if options.clips:
        suffixes = (".mp4", ".avi", ".webm", ".mkv", ".mov")
        for file in sorted(f for f in options.clips.iterdir() if f.suffix in suffixes):
            sets[file.name] = (0, [file.read_bytes()])
    rows, lines = [], []
    for name, (gop, videos) in sets.items():
        for frames in FRAMES:
            ours, baseline = compare(videos, frames, options.repetitions)
            lines.append([name, frames, ours, baseline, baseline / ours])
            limit = LIMITS.get((gop, frames))
            if limit:
                rows.append(
                    common.Row(
                        f"decoding {frames} frames of a 10 s clip, {name}",
                        f"{ours:.1f} ms CPU",
                        f"{baseline:.1f} ms CPU (all frames in order)",
                        baseline / ours,
                        f">= {limit}",
                    )
                )
    header = ["videos", "frames", "planned ms", "in order ms", "ratio"]
    common.table(header, lines)
    table = [dict(zip(header, line, strict=True)) for line in lines]
    common.save("decode", where, rows, {"videos": options.videos, "table": table})


if __name__ == "__main__":
    main()
