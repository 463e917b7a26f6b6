"""benchmarks/gpu_extract.py without a GPU: it says so, and its parts count what they should."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.nvdec.graphs import Clip
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction.cpu_pool import encode_video
from pipeline.extraction.gpu_pool import DaliVideoPool
from pipeline.sampling import Sampling, parse_sampling
from tests.support.processes.gpu_pool_on_cpu import gpu_pool_on_cpu
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import make_encoder

ROOT = Path(__file__).parents[3]
FOUR = parse_sampling("uniform:4")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gpu_extract

        yield gpu_extract
        for name in ("gpu_extract", "common"):
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(make_encoder(tmp_path_factory.mktemp("clip")), "fp32")


def make_pool(tower: Any, sampling: Sampling) -> DaliVideoPool:
    def decode(clips: Sequence[Clip]) -> list[torch.Tensor]:
        decoder = PyAVDecoder()
        return [
            tower.preprocessing.crops(frames_of(decoder, clip.data.tobytes(), clip.frames))
            for clip in clips
        ]

    return gpu_pool_on_cpu(decode, PyAVDecoder(), tower, sampling, 1, 2, batch_videos=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_well(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_extract.py"])
    benchmark.main()
    assert capsys.readouterr().out.startswith("no GPU: not run (")


def test_the_pools_results_come_in_order_and_agree(benchmark: ModuleType, encoder: Encoder) -> None:
    videos = [make_video(frames=10, first=n, width=64 + 16 * (n % 3)) for n in range(20)]
    pool = make_pool(encoder, FOUR)
    seconds, results = benchmark.run_pool(pool, videos)
    pool.close()
    assert seconds > 0
    for video, got in zip(videos, results, strict=True):
        want = encode_video(video, PyAVDecoder(), encoder, FOUR)
        assert benchmark.frame_cosines(got.features, want.features).min() > 0.999999
    assert benchmark.decoding_rate(make_pool, benchmark.NoTower(encoder), FOUR, videos) > 0
    assert benchmark.encoding_rate(encoder, FOUR, 1) > 0


def test_a_failing_video_stops_the_benchmark(benchmark: ModuleType, encoder: Encoder) -> None:
    pool = make_pool(encoder, FOUR)
    with pytest.raises(RuntimeError, match="a video of the benchmark failed: the file is empty"):
        benchmark.run_pool(pool, [make_video(), b""])
    pool.close()


def test_cosines_are_per_frame(benchmark: ModuleType) -> None:
    got = np.array([[[3.0, 4.0], [1.0, 0.0]]], np.float32)
    want = np.array([[[6.0, 8.0], [0.0, 2.0]]], np.float16)
    np.testing.assert_allclose(benchmark.frame_cosines(got, want), [[1, 0]], atol=1e-12)


def test_utilisation_is_the_mean_of_what_nvidia_smi_knows(benchmark: ModuleType) -> None:
    lines = "90, 40, 1000\n100, 60, 3000\n50"  # the last line may be cut off
    assert benchmark.mean_utilisation(lines) == {
        "gpu_percent": 95,
        "decoder_percent": 50,
        "memory_mib": 2000,
    }
    assert benchmark.mean_utilisation("90, [N/A], 1000\n") == {
        "gpu_percent": 90,
        "memory_mib": 1000,
    }
    assert benchmark.mean_utilisation("") == {}
