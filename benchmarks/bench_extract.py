"""Does extraction keep the encoder busy? Frames/s of `extract` against what its two stages allow.

The bound is measured in the same run with the same threads on the same videos: decoding alone runs
at d frames/s, encoding alone at e frames/s, so stages that share the cores can reach
1 / (1/d + 1/e). Preprocessing, tars and the store are not in the bound; they are what is tested.

Stages and whole take short turns (decode, encode, whole, whole, encode, decode; in the next
repetition the other way round), so that a machine that gets slower or faster by the minute does
it to all of them. Every turn is measured on the wall, in CPU seconds, and in core seconds (see
`core_time`), whose ratio the limit is for: on an idle machine it is that of the wall, on a shared
one other programs are not charged.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import common
import torch
from core_time import Took, Watch, timed

from featstore.files.machine import usable_cores
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction.cpu_pool import ENCODE_BATCH
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.run import extract
from pipeline.sampling import Sampling, parse_sampling
from pipeline.tars.packing import pack

LIMIT = 0.92
TARS = 3  # so that partitions are written while others are being encoded
TURNS = ("decode", "encode", "whole", "whole", "encode", "decode")


class Inside:
    """A decoder or encoder that adds up the CPU seconds its threads spend in one of its methods."""

    def __init__(self, stage: Any, method: str) -> None:
        self._stage = stage
        self._lock = Lock()
        self.cpu = 0.0
        inner = getattr(stage, method)

        def counted(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return inner(*arguments, **named)
            finally:
                took = time.thread_time() - began
                with self._lock:
                    self.cpu += took

        setattr(self, method, counted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


class Bench:
    """The three kinds of turns over one packed set with one way of sampling."""

    def __init__(
        self, dataset: Path, videos: Sequence[bytes], encoder: Encoder, sampling: Sampling
    ) -> None:
        self.dataset = dataset
        self.videos = videos
        self.encoder = encoder
        self.sampling = sampling
        self.decoder = PyAVDecoder()
        self.workers = usable_cores()
        self.frames = len(videos) * sampling.frames
        self.batch = torch.rand(min(sampling.frames, ENCODE_BATCH), 3, *encoder.preprocessing.size)

    def _in_threads(self, work: Callable[[bytes], Any]) -> Took:
        """`work` on every video in as many threads as extraction uses, one torch thread in each."""

        def run() -> None:
            with ThreadPoolExecutor(
                self.workers, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                list(pool.map(work, self.videos))

        return timed(run)[0]

    def decode(self) -> tuple[Took, float]:
        """Decoding alone; no share of the stages."""
        indices = self.sampling.indices
        return self._in_threads(
            lambda data: self.decoder.decode_with_info(
                data, lambda info: indices(info.num_frames).reshape(-1)
            )
        ), 0.0

    def encode(self) -> tuple[Took, float]:
        """Encoding alone: the same pixels again and again."""

        def encode(_: bytes) -> None:
            for _ in range(0, self.sampling.frames, len(self.batch)):
                self.encoder.encode_pixels(self.batch)

        return self._in_threads(encode), 0.0

    def whole(self) -> tuple[Took, float]:
        """`extract` from its first report to its end, and the CPU seconds of its two stages."""
        watches: list[Watch] = []

        def progress(done: float, total: float, **_: object) -> None:
            if not watches:
                watches.append(Watch())

        store = common.fresh(common.WORK / "extract-store") / "bench.zarr"
        request = ExtractionRequest(
            self.dataset, store, "bench", self.sampling, workers=self.workers
        )
        decoder = Inside(self.decoder, "decode_with_info")
        encoder: Any = Inside(self.encoder, "encode_pixels")
        summary = extract(request, decoder=decoder, encoder=encoder, progress=progress)
        took = watches[0].read()
        assert summary.rows_failed == 0, summary.failures
        return took, decoder.cpu + encoder.cpu

    def repetition(self, number: int) -> dict[str, float]:
        """Six turns, in the one order or the other."""
        took: dict[str, Took] = defaultdict(lambda: Took(0.0, 0.0, 0.0))
        stages_cpu = 0.0
        half = len(TURNS) // 2
        for turn in TURNS if number % 2 == 0 else TURNS[half:] + TURNS[:half]:
            measured, inside = getattr(self, turn)()
            took[turn] += measured
            stages_cpu += inside
        decode, encode, whole = (took[turn] for turn in ("decode", "encode", "whole"))
        alone = decode + encode
        frames = 2 * self.frames
        return {
            "decode_frames_per_second": frames / decode.wall,
            "encode_frames_per_second": frames / encode.wall,
            "bound_frames_per_second": frames / alone.wall,
            "extract_frames_per_second": frames / whole.wall,
            "wall_ratio": alone.wall / whole.wall,
            "core_ratio": alone.core / whole.core,
            "cpu_ratio": alone.cpu / whole.cpu,
            # Of the CPU time of `extract`, what its own decoding and encoding took: nothing is
            # compared with another moment, so it hardly moves.
            "cpu_inside": stages_cpu / whole.cpu,
            # Of the time that the cores were to be had, what was used: below 1, threads wait.
            "cores_used": whole.cpu / whole.core,
            "cores_of_others": 1 - whole.core / (whole.wall * self.workers),
        }


def main() -> None:
    """Measure uniform:16 and uniform:8 with a ViT-B/16 of random weights."""
    chosen = common.options(__doc__, videos=12, repetitions=9)
    if chosen.quick:
        chosen.videos, chosen.repetitions = 6, 1
    where = common.machine()
    clips = common.kinetics_clips(chosen.videos)
    folders = common.class_folders(common.WORK / "extract-videos", clips, chosen.videos, classes=4)
    dataset = common.fresh(common.WORK / "extract-dataset")
    pack(folders, "bench", dataset, samples_per_shard=-(-chosen.videos // TARS))
    videos = [path.read_bytes() for path in sorted(folders.rglob("*.mp4"))]
    encoder = load_encoder(common.vit_b16_folder())
    print(f"{where['name']}; {usable_cores()} workers; {encoder.precision}")

    rows, details = [], {}
    for text in ("uniform:16", "uniform:8"):
        bench = Bench(dataset, videos, encoder, parse_sampling(text))
        bench.decode(), bench.encode(), bench.whole()  # page cache, thread pools, first calls
        runs = [bench.repetition(number) for number in range(chosen.repetitions)]
        median = {name: common.middle([run[name] for run in runs]) for name in runs[0]}
        print(f"\n{text}, {len(videos)} videos a turn")
        shown = [
            *([f"repetition {n}", *run.values()] for n, run in enumerate(runs, start=1)),
            ["median", *median.values()],
            *(
                [name, *(pick(run[column] for run in runs) for column in median)]
                for name, pick in (("lowest", min), ("highest", max))
            ),
        ]
        common.table(
            ["frames/s", *(name.replace("_frames_per_second", "") for name in median)], shown
        )
        details[text] = {"repetitions": runs, "median": median}
        rows.append(
            common.Row(
                f"`extract`, ViT-B/16 {encoder.precision}, {text}, core seconds a frame "
                f"(wall {median['wall_ratio']:.3f})",
                f"{median['extract_frames_per_second']:.1f} frames/s",
                f"{median['bound_frames_per_second']:.1f} frames/s (decode "
                f"{median['decode_frames_per_second']:.0f}, encode "
                f"{median['encode_frames_per_second']:.1f})",
                median["core_ratio"],
                f">= {LIMIT}",
            )
        )
    common.save("extract", where, rows, {"videos": len(videos), "samplings": details})


if __name__ == "__main__":
    main()
