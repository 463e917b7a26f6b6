"""What is to be done and by whom: shares, finished stores, room on the disk, estimates."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore import StoreWriter, UserError, WorkError, open_store, verify
from featstore.files.disk import free_bytes
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction.estimate import estimate
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, Share
from pipeline.extraction.run import extract
from pipeline.sampling import parse_sampling
from pipeline.tars.dataset import load_dataset
from pipeline.tars.packing import pack
from tests.support.stores.store_files import store_files
from tests.support.worlds.tiny_world import make_clips, make_encoder

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    make_encoder(folder / "tiny")
    make_clips(folder / "videos")
    pack(folder / "videos", "clips", folder / "clips", samples_per_shard=3)
    return folder


@pytest.fixture(scope="module")
def encoder(world: Path) -> Encoder:
    return load_encoder(world / "tiny", "fp32")


@pytest.fixture
def request_for(world: Path, tmp_path: Path) -> Callable[..., ExtractionRequest]:
    def make(**changes: Any) -> ExtractionRequest:
        request = ExtractionRequest(
            world / "clips",
            tmp_path / "store.zarr",
            str(world / "tiny"),
            parse_sampling("uniform:2"),
            precision="fp32",
            workers=2,
        )
        return replace(request, **changes)

    return make


Request = Callable[..., ExtractionRequest]


# Shares


@given(tars=st.integers(0, 40), count=st.integers(1, 12), first=st.integers(0, 1))
def test_shares_cover_every_tar_once_counted_from_0_or_1(tars: int, count: int, first: int) -> None:
    shares = [Share.parse(f"{k}/{count}", {}) for k in range(first, count + first)]
    taken = [tar for s in shares if s for tar in range(s.index, tars, s.count)]
    assert sorted(taken) == list(range(tars))


@pytest.mark.parametrize("text", ["", "3", "4/3", "1/0", "-1/2", "a/b", "1/2/3", "1.0/2", "½/2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--partition"):
        Share.parse(text, {})


def job_array(task: int, count: int, first: int) -> dict[str, str]:
    names = ("ID", "COUNT", "MIN")
    return {
        f"SLURM_ARRAY_TASK_{name}": str(value)
        for name, value in zip(names, (task, count, first), strict=True)
    }


SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "2/4"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8"}, "1/8"),
        (SRUN | {"SLURM_STEP_ID": "0"}, "1/8"),
        (SRUN, None),  # a batch script that did not write srun
        (job_array(3, 3, 1), "2/3"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"} | job_array(1, 2, 0), "1/2"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, None),
    ],
)
def test_the_environments_share(environment: dict[str, str], expected: str | None) -> None:
    share = Share.parse("auto", environment)
    assert (share.text if share else None) == expected
    assert Share.parse("all", environment) is None


def test_shares_of_processes_fill_one_store(
    request_for: Request, encoder: Encoder, tmp_path: Path
) -> None:
    """Two at the same time, in threads, each with a writer of its own."""
    whole = request_for(store_path=tmp_path / "whole.zarr")
    extract(whole, encoder=encoder)
    summaries = {}

    def part(k: int) -> None:
        summaries[k] = extract(request_for(share=Share(k, 2)), encoder=encoder)

    threads = [threading.Thread(target=part, args=[k]) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tars = open_store(whole.store_path).schema.tars
    assert summaries[0].partitions_done + summaries[1].partitions_done == tars
    assert {summaries[k].partition for k in (0, 1)} == {"0/2", "1/2"}
    assert store_files(tmp_path / "store.zarr") == store_files(whole.store_path)


def test_one_share_leaves_the_rest_to_others(request_for: Request, encoder: Encoder) -> None:
    summary = extract(request_for(share=Share(1, 3)), encoder=encoder)
    store = open_store(request_for().store_path)
    assert list(store.partitions()) == list(range(1, store.schema.tars, 3))
    assert summary.partitions_missing == store.schema.tars - summary.partitions_done
    assert extract(request_for(), encoder=encoder).partitions_missing == 0
    assert verify(store.path, deep=True).ok


# Finished stores


def test_a_finished_store_needs_no_torch(request_for: Request, world: Path) -> None:
    """Running the same command again must not wait for libraries and weights."""
    request = request_for(precision="auto")
    extract(request)
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from pipeline.extraction.run import extract\n"
        "from pipeline.extraction.request import ExtractionRequest\n"
        "from pipeline.sampling import parse_sampling\n"
        f"request = ExtractionRequest(Path({str(request.dataset_dir)!r}), "
        f"Path({str(request.store_path)!r}), {request.encoder!r}, parse_sampling('uniform:2'))\n"
        "summary = extract(request)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "print(summary.rows_ok, summary.partitions_done)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert ran.stdout.split() == [str(extract(request).rows_ok), "0"]


def test_changed_weights_under_the_same_name_are_noticed(
    request_for: Request, world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    make_encoder(folder)
    request = request_for(encoder=str(folder))
    extract(request)
    make_encoder(folder, seed=1)
    with pytest.raises(UserError, match="encoder: store has"):
        extract(request)


@pytest.mark.parametrize(
    "changes",
    [{"sampling": parse_sampling("uniform:1")}, {"strict": "always"}, {"prompt_sets": ("name",)}],
)
def test_a_finished_store_made_in_another_way_is_refused(
    request_for: Request, changes: dict[str, Any]
) -> None:
    extract(request_for())
    with pytest.raises(UserError, match=r"made in another way|mote-cli store add-texts"):
        extract(request_for(**changes))


class Moody(PyAVDecoder):
    """Fails the first time it is asked for a video that is 8 frames long."""

    failing = True

    def decode_with_info(self, source: Any, choose: Any) -> Any:
        if self.failing:
            raise DecodeError("not in the mood")
        return super().decode_with_info(source, choose)


def test_failed_videos_are_done_once_more_when_asked(
    request_for: Request, encoder: Encoder
) -> None:
    decoder = Moody()
    first = extract(request_for(), decoder=decoder, encoder=encoder)
    assert first.rows_ok == 0
    assert first.too_many_failures
    decoder.failing = False
    again = extract(request_for(), decoder=decoder, encoder=encoder)
    assert (again.partitions_done, again.rows_ok) == (0, 0)
    retried = extract(request_for(retry_failed=True), decoder=decoder, encoder=encoder)
    packed = load_dataset(request_for().dataset_dir).packed
    assert retried.rows_ok == packed
    assert ExtractionPlan(request_for(retry_failed=True)).pending == []
    assert verify(request_for().store_path, deep=True).ok


# Order and speed


def test_a_long_video_does_not_hold_up_the_others(request_for: Request, encoder: Encoder) -> None:
    """While one video is decoded, the other worker finishes and writes tar after tar."""
    request = request_for()
    tars = len(load_dataset(request.dataset_dir).tars)
    others_done = threading.Event()
    begun = threading.Lock()

    class OneIsLong(PyAVDecoder):
        def decode_with_info(self, source: Any, choose: Any) -> Any:
            if begun.acquire(blocking=False):
                assert others_done.wait(60), "the others wait for the long one"
            return super().decode_with_info(source, choose)

    written: list[int] = []
    write = StoreWriter.write_partition

    def watched(writer: StoreWriter, tar: int, partition: Any) -> None:
        write(writer, tar, partition)
        written.append(tar)
        if len(written) == tars - 1:
            others_done.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "write_partition", watched)
        summary = extract(request, decoder=OneIsLong(), encoder=encoder)
    assert written[-1] == 0
    assert sorted(written) == list(range(tars))
    assert summary.rows_failed == 0 or summary.rows_ok > 0


# What the containers say


def test_counted_and_container_frames_are_kept(request_for: Request, encoder: Encoder) -> None:
    class Boasting(PyAVDecoder):
        def decode_with_info(self, source: Any, choose: Any) -> Any:
            info, frames, seconds = super().decode_with_info(source, choose)
            more = replace(info, container_frames=info.num_frames + 2, damaged_packets=1)
            return more, frames, seconds

    summary = extract(request_for(), decoder=Boasting(), encoder=encoder)
    store = open_store(request_for().store_path)
    ok = store.status == 1
    np.testing.assert_array_equal(store.container_frames[ok], store.num_frames[ok] + 2)
    assert (store.damaged_packets[ok] == 1).all()
    assert not store.container_frames[~ok].any()
    assert summary.rows_damaged == summary.rows_miscounted == ok.sum()


# Room


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))


@pytest.mark.usefixtures("small_disk")
def test_a_disk_without_room_is_told_before_anything_is_made(
    request_for: Request, encoder: Encoder
) -> None:
    with pytest.raises(WorkError, match=r"will take .* must stay free, and .*: make room"):
        extract(request_for(), encoder=encoder)
    assert not request_for().store_path.exists()
    found = estimate(request_for(), seconds=0.01)
    assert not found.fits
    with pytest.raises(WorkError, match="make room"):
        found.require_room()


def test_bytes_needed_is_what_the_store_takes(request_for: Request, encoder: Encoder) -> None:
    request = request_for(sampling=parse_sampling("clips:8x4"), crops=3)
    plan = ExtractionPlan(request)
    extract(request, encoder=encoder)
    taken = sum(file.stat().st_size for file in request.store_path.rglob("*") if file.is_file())
    needed = plan.bytes_needed(plan.mine, plan.schema(encoder.dim))
    assert taken * 0.8 < needed < taken * 1.25


def test_an_estimate_makes_nothing(request_for: Request, encoder: Encoder, tmp_path: Path) -> None:
    request = request_for()
    found = estimate(request)
    dataset = load_dataset(request.dataset_dir)
    assert not request.store_path.exists()
    assert not list(tmp_path.glob("store.zarr*"))
    assert found.videos == dataset.packed
    assert found.frames == 2 * dataset.packed
    assert found.encoder_fingerprint == encoder.fingerprint
    assert found.tars == len(dataset.tars)
    assert 0 < found.videos_sampled <= dataset.packed
    assert found.hours is not None
    assert found.hours * 3600 == pytest.approx(found.videos / found.videos_per_second)
    extract(request, encoder=encoder)
    after = estimate(request)
    assert (after.videos, after.tars, after.bytes_needed, after.hours) == (0, 0, 0, 0.0)


def test_an_estimate_refuses_what_extract_refuses(request_for: Request, encoder: Encoder) -> None:
    extract(request_for(), encoder=encoder)
    with pytest.raises(UserError, match="made in another way"):
        estimate(request_for(strict="never"))


def test_free_bytes_of_a_place_not_made_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a/b/c.zarr") > 0
