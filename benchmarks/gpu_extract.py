"""Does extraction keep a GPU busy? Videos/s of the whole of `extract` on one, against its stages.

Decoding (reading, surveying and NVDEC, without the tower) runs at d videos/s, encoding (the tower
alone, on pixels that lie on the GPU) at e. NVDEC is a circuit of its own, so stages that overlap
can reach min(d, e). Tars and the store are not in the bound; they are what is tested. Beside it:
how busy the GPU and its decoder were, and how far the features are from those of videos that PyAV
decodes and Pillow resizes, as the cosine of every frame.

On a machine without a usable GPU this prints one line and does nothing.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import torch

from featstore import open_store
from featstore.files.machine import usable_cores
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.nvdec.batcher import BATCH_VIDEOS
from pipeline.decoding.nvdec.graphs import dali_problem, dali_version
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction.cpu_pool import EncodedVideo, VideoPool, encode_video
from pipeline.extraction.gpu_pool import DaliVideoPool
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.run import extract
from pipeline.sampling import Sampling, parse_sampling
from pipeline.tars.packing import pack

LIMIT = 0.92
MIN_COSINE = 0.999
TARS = 8  # so that partitions are written while others are being encoded
COMPARED = 32  # videos whose features are held against the CPU path's

MakePool = Callable[[Encoder, Sampling], VideoPool]


class NoTower:
    """An encoder that takes no time: what is left of the pool is decoding."""

    def __init__(self, encoder: Encoder) -> None:
        self.device, self.precision = encoder.device, encoder.precision
        self.preprocessing, self.dim = encoder.preprocessing, encoder.dim

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), self.dim, device=self.device)


def run_pool(pool: VideoPool, videos: Sequence[bytes]) -> tuple[float, list[EncodedVideo]]:
    """Seconds that the pool takes for the videos, never more than its window at once; and its
    results in the videos' order. Raises RuntimeError when one fails."""
    waiting: set[Future[EncodedVideo | str]] = set()
    futures = []
    started = time.perf_counter()
    for video in videos:
        while len(waiting) >= pool.window:
            waiting = wait(waiting, return_when=FIRST_COMPLETED).not_done
        future = pool.submit(partial(bytes, video))
        futures.append(future)
        waiting.add(future)
    results = [future.result() for future in futures]
    seconds = time.perf_counter() - started
    for result in results:
        if isinstance(result, str):
            raise RuntimeError(f"a video of the benchmark failed: {result}")
    return seconds, [result for result in results if isinstance(result, EncodedVideo)]


def decoding_rate(
    make_pool: MakePool, encoder: Any, sampling: Sampling, videos: Sequence[bytes]
) -> float:
    """Videos/s of the pool without a tower."""
    pool = make_pool(encoder, sampling)
    try:
        run_pool(pool, videos[:BATCH_VIDEOS])  # makes the decoders
        return len(videos) / run_pool(pool, videos)[0]
    finally:
        pool.close()


def encoding_rate(encoder: Encoder, sampling: Sampling, videos: int) -> float:
    """Videos/s of the tower alone, in batches as the pool makes them."""
    frames = sampling.clips * sampling.frames
    height, width = encoder.preprocessing.size
    pixels = torch.rand(BATCH_VIDEOS * frames, 3, height, width, device=encoder.device)
    batches = -(-videos // BATCH_VIDEOS)
    encoder.encode_pixels(pixels).cpu()
    started = time.perf_counter()
    for _ in range(batches):
        last = encoder.encode_pixels(pixels)
    last.cpu()  # waits for the GPU
    return batches * BATCH_VIDEOS / (time.perf_counter() - started)


def frame_cosines(
    got: npt.NDArray[np.floating[Any]], want: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.float64]:
    """Cosine of every frame's features [..., dim]."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: npt.NDArray[np.float64] = (a * b).sum(-1) / lengths
    return cosines


class Utilisation:
    """Asks nvidia-smi every half second how busy the GPU is, while it is entered."""

    def __init__(self, device: int = 0) -> None:
        self._command = [
            "nvidia-smi",
            f"--id={device}",
            "--query-gpu=utilization.gpu,utilization.decoder,memory.used",
            "--format=csv,noheader,nounits",
            "--loop-ms=500",
        ]
        self.means: dict[str, float] = {}

    def __enter__(self) -> Utilisation:
        try:
            self._asking: subprocess.Popen[str] | None = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._asking = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._asking is not None:
            self._asking.terminate()
            self.means = mean_utilisation(self._asking.communicate()[0])


def mean_utilisation(lines: str) -> dict[str, float]:
    """Means of nvidia-smi's lines `gpu %, decoder %, MiB`; what it does not know is left out."""
    names = ("gpu_percent", "decoder_percent", "memory_mib")
    rows = [line.split(",") for line in lines.splitlines() if line.count(",") == 2]
    columns = zip(names, zip(*rows, strict=True), strict=True) if rows else ()
    found = {name: [float(x) for x in values if _is_number(x)] for name, values in columns}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdigit()


def main() -> None:
    """Measure uniform:16 and uniform:8 with a ViT-B/16 of random weights."""
    chosen = common.options(__doc__, clips=64, videos=2048, repetitions=3, workers=usable_cores())
    problem = dali_problem()
    if problem is not None:
        print(f"no GPU: not run ({problem})")
        return
    if chosen.quick:
        chosen.clips, chosen.videos, chosen.repetitions = 8, 64, 1
    where = common.machine()
    where["gpu"] = torch.cuda.get_device_name()
    where["versions"] |= dali_version()
    clips = common.kinetics_clips(chosen.clips)
    folders = common.class_folders(common.WORK / "gpu-videos", clips, chosen.videos, classes=4)
    dataset = common.fresh(common.WORK / "gpu-dataset")
    pack(folders, "bench", dataset, samples_per_shard=-(-chosen.videos // TARS))
    videos = [path.read_bytes() for path in sorted(folders.rglob("*.mp4"))]
    encoder = load_encoder(common.vit_b16_folder(), "bf16", "cuda")

    def make_pool(tower: Encoder, sampling: Sampling) -> VideoPool:
        return DaliVideoPool(PyAVDecoder(), tower, sampling, 1, chosen.workers)

    def whole(sampling: Sampling) -> dict[str, float]:
        store = common.fresh(common.WORK / "gpu-store") / "bench.zarr"
        request = ExtractionRequest(
            dataset,
            store,
            "bench",
            sampling,
            device="cuda",
            decoder="dali",
            workers=chosen.workers,
        )
        with Utilisation() as utilisation:
            summary = extract(request, encoder=encoder)
        assert summary.rows_failed == 0, summary.failures
        assert open_store(store).provenance.decoder == "dali"
        return {"extract_videos_per_second": summary.videos_per_second, **utilisation.means}

    print(f"{where['name']}; {where['gpu']}; {chosen.workers} readers")
    rows, details = [], {}
    for text in ("uniform:16", "uniform:8"):
        sampling = parse_sampling(text)
        runs = []
        for _ in range(chosen.repetitions):
            decode = decoding_rate(make_pool, NoTower(encoder), sampling, videos)
            encode = encoding_rate(encoder, sampling, len(videos))
            run = {
                "decode_videos_per_second": decode,
                "encode_videos_per_second": encode,
                "bound_videos_per_second": min(decode, encode),
                **whole(sampling),
            }
            run["ratio"] = run["extract_videos_per_second"] / run["bound_videos_per_second"]
            runs.append(run)
        median = {name: common.middle([run[name] for run in runs]) for name in runs[0]}
        pool = make_pool(encoder, sampling)
        try:
            compared = run_pool(pool, videos[:COMPARED])[1]
        finally:
            pool.close()
        decoder = PyAVDecoder()
        cosines = [
            float(
                frame_cosines(
                    got.features, encode_video(video, decoder, encoder, sampling).features
                ).min()
            )
            for got, video in zip(compared, videos, strict=False)
        ]
        print(f"\n{text}, {len(videos)} videos, {encoder.precision}")
        common.table(
            ["", *(name.replace("_videos_per_second", " videos/s") for name in median)],
            [
                *([f"repetition {n}", *run.values()] for n, run in enumerate(runs, start=1)),
                ["median", *median.values()],
            ],
        )
        print(
            f"least cosine of a frame to the CPU path's, per video: least {min(cosines):.6f}, "
            f"median {common.middle(cosines):.6f}"
        )
        details[text] = {"repetitions": runs, "median": median, "least_cosines": cosines}
        rows += [
            common.Row(
                f"`extract --device cuda`, {where['gpu']}, ViT-B/16 {encoder.precision}, {text}",
                f"{median['extract_videos_per_second']:.0f} videos/s",
                f"{median['bound_videos_per_second']:.0f} videos/s (decode "
                f"{median['decode_videos_per_second']:.0f}, encode "
                f"{median['encode_videos_per_second']:.0f})",
                median["ratio"],
                f">= {LIMIT}",
            ),
            common.Row(
                f"features of NVDEC against PyAV, {text}",
                f"least cosine {min(cosines):.6f}",
                "1",
                min(cosines),
                f">= {MIN_COSINE}",
            ),
        ]
    common.save("gpu_extract", where, rows, {"videos": len(videos), "samplings": details})


if __name__ == "__main__":
    main()
