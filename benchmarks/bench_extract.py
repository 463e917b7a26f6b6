"""Does extraction keep the encoder busy? Frames/s of `extract` against what its two stages allow.

The bound is measured in the same run with the same threads on the same videos: decoding alone runs
at d frames/s, encoding alone at e frames/s, so stages that share the cores can reach
1 / (1/d + 1/e). Preprocessing, tars and the store are not in the bound; they are what is tested.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch

from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction import ENCODE_BATCH, ExtractionRequest, ExtractionSummary, extract
from pipeline.machine import usable_cores
from pipeline.packing import pack
from pipeline.sampling import Sampling, parse_sampling

LIMIT = 0.85
TARS = 3  # so that partitions are written while others are being encoded


class Timed(NamedTuple):
    """What work took: wall seconds, CPU seconds of all threads; and what it returned."""

    wall: float
    cpu: float
    result: Any


def timed(work: Callable[[], Any]) -> Timed:
    """Run `work` and say what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, result)


def in_threads(work: Callable[[Any], Any], items: Sequence[Any], workers: int) -> None:
    """`work` on every item in as many threads as extraction uses, one torch thread in each."""
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, items))


def repetition(
    number: int,
    dataset: Path,
    encoder: Encoder,
    sampling: Sampling,
    videos: Sequence[bytes],
    workers: int,
) -> dict[str, float]:
    """One measurement of decoding alone, encoding alone and the whole, in alternating order."""
    frames = len(videos) * sampling.frames
    decoder = PyAVDecoder()
    batch = torch.rand(min(sampling.frames, ENCODE_BATCH), 3, *encoder.preprocessing.size)

    def decode(data: bytes) -> None:
        decoder.decode_with_info(data, lambda info: sampling.indices(info.num_frames).reshape(-1))

    def encode(_: bytes) -> None:
        for _ in range(0, sampling.frames, len(batch)):
            encoder.encode_pixels(batch)

    def whole() -> tuple[ExtractionSummary, float]:
        """The summary, and the CPU seconds without setting up."""
        started: list[float] = []

        def progress(done: float, total: float, **_: object) -> None:
            if done == 0:
                started.append(time.process_time())

        store = common.fresh(common.WORK / "extract-store") / "bench.zarr"
        request = ExtractionRequest(dataset, store, "bench", sampling, workers=workers)
        summary = extract(request, encoder=encoder, progress=progress)
        return summary, time.process_time() - started[0]

    stages: dict[str, Callable[[], Any]] = {
        "decode": lambda: in_threads(decode, videos, workers),
        "encode": lambda: in_threads(encode, videos, workers),
        "whole": whole,
    }
    took = {name: timed(stages[name]) for name in list(stages)[:: -1 if number % 2 else 1]}
    decode_wall, decode_cpu, _ = took["decode"]
    encode_wall, encode_cpu, _ = took["encode"]
    whole_wall, _, (summary, whole_cpu) = took["whole"]
    assert summary.rows_failed == 0, summary.failures
    bound = frames / (decode_wall + encode_wall)
    return {
        "decode_frames_per_second": frames / decode_wall,
        "encode_frames_per_second": frames / encode_wall,
        "bound_frames_per_second": bound,
        "extract_frames_per_second": summary.frames_per_second,
        "ratio": summary.frames_per_second / bound,
        # Class texts, making and opening the store: not in the rate.
        "setup_seconds": whole_wall - summary.seconds,
        # CPU time of the stages alone over that of the whole: other programs hardly move it, and
        # it does not see threads that wait; the share of the cores that was used does.
        "cpu_ratio": (decode_cpu + encode_cpu) / whole_cpu,
        "cpu_share": whole_cpu / (summary.seconds * workers),
    }


def main() -> None:
    """Measure uniform:16 and uniform:8 with a ViT-B/16 of random weights."""
    chosen = common.options(__doc__, clips=24, videos=36, repetitions=3, workers=usable_cores())
    if chosen.quick:
        chosen.clips, chosen.videos, chosen.repetitions = 3, 6, 1
    where = common.machine()
    clips = common.kinetics_clips(chosen.clips)
    folders = common.class_folders(common.WORK / "extract-videos", clips, chosen.videos, classes=4)
    dataset = common.fresh(common.WORK / "extract-dataset")
    pack(folders, "bench", dataset, samples_per_shard=-(-chosen.videos // TARS))
    videos = [path.read_bytes() for path in sorted(folders.rglob("*.mp4"))]
    folder = common.vit_b16_folder()
    load_seconds, _, encoder = timed(lambda: load_encoder(folder))
    print(f"{where['name']}; {chosen.workers} workers; model loaded in {load_seconds:.1f} s")

    rows, details = [], {}
    for text in ("uniform:16", "uniform:8"):
        sampling = parse_sampling(text)
        # Warm-up: page cache, thread pools, the encoder's first call.
        in_threads(lambda _: encoder.encode_pixels(torch.rand(8, 3, 224, 224)), [0, 1], 2)
        runs = [
            repetition(number, dataset, encoder, sampling, videos, chosen.workers)
            for number in range(chosen.repetitions)
        ]
        median = {name: common.middle([run[name] for run in runs]) for name in runs[0]}
        print(f"\n{text}, {len(videos)} videos, {encoder.precision}")
        shown = [
            *([f"repetition {n}", *run.values()] for n, run in enumerate(runs, start=1)),
            ["median", *median.values()],
        ]
        common.table(
            ["frames/s", *(name.replace("_frames_per_second", "") for name in median)], shown
        )
        details[text] = {"repetitions": runs, "median": median}
        rows.append(
            common.Row(
                f"`extract`, ViT-B/16 {encoder.precision}, {text}",
                f"{median['extract_frames_per_second']:.1f} frames/s",
                f"{median['bound_frames_per_second']:.1f} frames/s (decode "
                f"{median['decode_frames_per_second']:.0f}, encode "
                f"{median['encode_frames_per_second']:.1f})",
                median["ratio"],
                f">= {LIMIT}",
            )
        )
    common.save(
        "extract",
        where,
        rows,
        {"videos": len(videos), "model_load_seconds": load_seconds, "samplings": details},
    )


if __name__ == "__main__":
    main()
