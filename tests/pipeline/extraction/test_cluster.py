"""The Ray engine: real workers that are killed, and the rules by which tars are handed out."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest

from featstore import StoreWriter
from featstore.errors import UserError, WorkError
from pipeline.extraction.cluster import driver as cluster_engine
from pipeline.extraction.cluster.connection import Cluster, connected
from pipeline.extraction.cluster.driver import run_on_ray
from pipeline.extraction.cluster.worker import Answer, TarWorker
from pipeline.extraction.job import code_versions
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import ExtractionRequest, Share, Totals
from pipeline.extraction.run import extract
from pipeline.sampling import parse_sampling
from tests.support.processes.command_line import done, mote, refused
from tests.support.stores.store_files import committed, ray_workers, store_files
from tests.support.worlds.tiny_world import make_encoder, packed_workspace

TARS, PER_TAR = 16, 3
TWO = Cluster(workers=2, cpus_per_worker=1)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Without waiting for the disk; and workers made in this process leave no log handlers."""
    loggers = [logging.getLogger(name) for name in ("pipeline", "featstore")]
    kept = [(logger.handlers[:], logger.level) for logger in loggers]
    with mock.patch("os.fsync"):
        yield
    for logger, (handlers, level) in zip(loggers, kept, strict=True):
        logger.handlers, logger.level = handlers, level


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of this machine, with CPUs for two workers of one each."""
    with (
        mock.patch.dict(os.environ),
        mock.patch("pipeline.extraction.cluster.connection.usable_cores", return_value=2),
    ):
        os.environ.pop("RAY_ADDRESS", None)
        with connected(Cluster("local")) as ray:
            yield ray


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_workspace(tmp_path_factory.mktemp("packed"), TARS, PER_TAR)


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


def request_for(root: Path, **changes: Any) -> ExtractionRequest:
    return ExtractionRequest(
        dataset_dir=root / "datasets/clips",
        store_path=root / "features/clips/tiny.zarr",
        encoder="tiny",
        sampling=parse_sampling("uniform:4"),
        encoders_dir=root / "encoders",
        precision="fp32",
        **changes,
    )


@pytest.fixture(scope="module")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of the local engine."""
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(packed, root)
    extract(request_for(root))
    return store_files(root / "features/clips/tiny.zarr")


@dataclass
class Progress:
    """Remembers what it is told, and kills a worker that has written a partition."""

    store: Path
    kill: bool = False
    killed: int = 0
    seen: list[tuple[float, float, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, done: float, total: float, **details: float | int | str) -> None:
        self.seen.append((done, total, details))
        if self.kill and not self.killed and 1 <= len(committed(self.store)) < TARS - 2:
            self.killed = ray_workers(self.store)[0]
            os.kill(self.killed, signal.SIGKILL)


def test_a_killed_worker_costs_nothing(
    ray_cluster: Any, root: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    request = request_for(root)
    progress = Progress(request.store_path, kill=True)
    summary = extract(request, cluster=TWO, progress=progress)
    assert progress.killed
    assert f"a worker died ({socket.gethostname()}, pid {progress.killed})" in caplog.text
    assert (summary.rows_ok, summary.partitions_done) == (TARS * PER_TAR, TARS)
    assert store_files(request.store_path) == whole
    last, total, details = progress.seen[-1]
    assert last == total == TARS * PER_TAR
    assert details["tars"] == f"{TARS}/{TARS}"
    assert all(done <= total for done, total, _ in progress.seen)
    assert max(int(details["workers"]) for *_, details in progress.seen) >= 1
    # What is complete needs neither workers nor Ray.
    assert extract(request, cluster=Cluster("127.0.0.1:1")).partitions_skipped == TARS


def test_missing_and_claimed_tars_are_named_and_the_others_done(
    ray_cluster: Any, root: Path, whole: dict[str, bytes]
) -> None:
    command = (
        *("extract", "--dataset", "clips", "--encoder", "tiny", "--sampling", "uniform:4"),
        *("--precision", "fp32", "--root", str(root)),
    )
    on_ray = ("--engine", "ray", "--ray-workers", "1", "--cpus-per-worker", "2")
    store = root / "features/clips/tiny--uniform-4.zarr"
    shard = root / "datasets/clips/shards/clips-000003.tar"
    aside = shard.rename(root / "aside.tar")
    extract(replace(request_for(root, share=Share(0, 8)), store_path=store))
    with (
        StoreWriter.open(store).claim([7]),
        mock.patch.object(cluster_engine, "CLAIM_WAIT_S", 0.0),
    ):
        line = refused(1, *command, *on_ray)
    assert "2 of 16 tars cannot be used, the others are done" in line
    assert "clips-000003.tar" in line
    assert committed(store) == {str(tar) for tar in range(TARS)} - {"3", "7"}
    aside.rename(shard)
    assert done(*command)["partitions_done"] == 2
    assert store_files(store) == whole


def test_a_worker_with_other_code_or_another_encoder_refuses(root: Path) -> None:
    request = request_for(root, share=Share(0, 8))
    extract(request)
    told = TarWorker(request, {**code_versions(), "torch": "0.1"}, 0.0).do(()).result
    assert isinstance(told, UserError)
    assert "and 0.1 where the command runs" in str(told)
    shutil.rmtree(root / "encoders/tiny")
    make_encoder(root / "encoders/tiny", seed=1)  # as on a machine with another copy
    told = TarWorker(request, code_versions(), 0.0).do(()).result
    assert isinstance(told, UserError)
    assert "was made in another way, and features are never mixed (encoder" in str(told)


def test_a_worker_does_shares_and_skips_what_is_done(root: Path, whole: dict[str, bytes]) -> None:
    request = request_for(root, share=Share(0, 8))
    extract(request)
    worker = TarWorker(request, code_versions(), 0.0)
    with mock.patch.object(StoreWriter, "open", wraps=StoreWriter.open) as opened:
        assert worker.do(()).result == Totals()
        done = []
        for share in (range(10), [10], range(11, TARS)):
            totals = worker.do(share).result
            assert isinstance(totals, Totals)
            assert totals.videos == PER_TAR * len(totals.done)
            done += totals.done
    assert opened.call_count == 1, "the store is opened once, not for every share"
    assert store_files(request.store_path) == whole
    assert sorted(done) == [tar for tar in range(TARS) if tar % 8]


def test_an_encoder_that_fails_in_a_worker(root: Path) -> None:
    request = request_for(root, share=Share(0, 8))
    extract(request)
    worker = TarWorker(request, code_versions(), 0.0)
    with mock.patch(
        "pipeline.extraction.cpu_pool.encode_video", side_effect=RuntimeError("no memory")
    ):
        failure = worker.do([1]).result
    assert isinstance(failure, WorkError)
    assert "the encoder failed at" in str(failure)


def test_a_worker_waits_for_a_claimed_tar(root: Path) -> None:
    """The others of the share are done meanwhile or after; what stays claimed is named."""
    request = request_for(root, share=Share(0, 8))
    extract(request)
    store = StoreWriter.open(request.store_path)
    with store.claim([2]):
        worker = TarWorker(request, code_versions(), 0.0)
        totals = worker.do([1, 2, 3]).result
    assert isinstance(totals, Totals)
    assert totals.done == [1, 3]
    assert len(totals.damaged) == 1
    assert totals.damaged[0].startswith("clips-000002.tar: another process (pid ")
    assert "is writing partition 2 of" in totals.damaged[0]
    held = store.claim([4])
    held.__enter__()
    worker = TarWorker(request, code_versions(), 60.0)
    with mock.patch("time.sleep", side_effect=lambda _: held.__exit__(None, None, None)) as waited:
        totals = worker.do([4, 5]).result
    assert waited.call_count == 1
    assert isinstance(totals, Totals)
    assert (totals.done, totals.damaged) == ([4, 5], [])


@pytest.mark.slow
def test_errors_of_real_workers_are_one_line(ray_cluster: Any, root: Path) -> None:
    versions = {"mote-video": "0.0.1", "torch": "1"}
    with (
        mock.patch.object(cluster_engine, "code_versions", return_value=versions),
        pytest.raises(UserError) as told,
    ):
        extract(request_for(root), cluster=Cluster(workers=1))
    assert "0.0.1 where the command runs" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "spark"), "choose one of local, ray"),
        (("--ray-workers", "2"), "add --engine ray"),
        (("--engine", "ray", "--address", "127.0.0.1:1"), "no Ray cluster can be reached"),
        (("--engine", "ray", "--address", "127.0.0.1:port"), "no Ray cluster can be reached"),
        (("--engine", "ray", "--address", "ray://head:10001"), "Ray Client"),
        (("--engine", "ray", "--device", "cuda", "--gpus-per-worker", "0"), "do not fit together"),
        (("--engine", "ray", "--gpus-per-worker", "1"), "give --precision fp16"),
    ],
)
def test_wrong_options(root: Path, arguments: tuple[str, ...], words: str) -> None:
    with mock.patch("ray.is_initialized", return_value=False):
        line = refused(
            *(2, "extract", "--dataset", "clips", "--encoder", "tiny", "--root", root),
            *arguments,
        )
    assert words in line


def test_without_ray(root: Path) -> None:
    with mock.patch.dict("sys.modules", {"ray": None}):
        result = mote(
            *("extract", "--dataset", "clips", "--encoder", "tiny", "--root", root),
            *("--engine", "ray"),
        )
    assert result.code == 2
    assert "pip install 'mote-video[cluster]'" in result.error


@pytest.mark.parametrize(
    ("cluster", "machines", "expected"),
    [
        (Cluster(), [(8, 0)], (1, 8)),
        (Cluster(), [(8, 0), (8, 0), (0, 0)], (2, 8)),
        (Cluster(), [(16, 0), (8, 0)], (3, 8)),
        (Cluster(workers=2), [(2, 0)], (2, 1)),
        (Cluster(workers=4, cpus_per_worker=2), [(8, 0)], (4, 2)),
        (Cluster(gpus_per_worker=1), [(16, 4), (4, 0)], (4, 4)),
        (Cluster(gpus_per_worker=0.5), [(16, 1)], (2, 8)),
    ],
)
def test_workers_and_their_cpus(
    cluster: Cluster, machines: list[tuple[float, float]], expected: tuple[int, int]
) -> None:
    sized = cluster.sized([{"CPU": cpus, "GPU": gpus} for cpus, gpus in machines])
    assert (sized.workers, sized.cpus_per_worker) == expected


def test_workers_that_fit_nowhere() -> None:
    with pytest.raises(UserError, match=r"fits on no machine .* \(the largest has 8 and 0\)"):
        Cluster(cpus_per_worker=9).sized([{"CPU": 8}, {"CPU": 4}])
    with pytest.raises(UserError, match="1 GPUs fits on no machine"):
        Cluster(gpus_per_worker=1).sized([{"CPU": 8}])


class Died(Exception):
    """Stands for Ray's error of a dead worker."""


@dataclass
class MadeUpRay:
    """Calls at once, in this process, what Ray would call elsewhere; stands for the store as well.

    `script[tar]` lists what becomes of the tar, try by try: "done", "dies", "dies after writing",
    or what `do` is to give back. A share is done tar by tar.
    """

    script: dict[int, list[Any]] = field(default_factory=dict)
    starts: list[Exception] = field(default_factory=list)  # how the first workers fail to start
    cpus: int = 2
    tried: list[int] = field(default_factory=list)
    shares: list[Sequence[int]] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    killed: int = 0
    provenance: Any = field(default_factory=lambda: mock.Mock(precision="fp32"))

    class exceptions:
        RayActorError = Died

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(self.cpus)}}]

    def remote(self, cls: type) -> MadeUpRay:
        return self

    def options(self, **_: Any) -> Any:
        return mock.Mock(remote=lambda *_: MadeUpWorker(self))

    def wait(self, calls: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Any) -> Any:
        return call()

    def kill(self, worker: Any) -> None:
        self.killed += 1

    def pending(self) -> list[int]:
        """As a store's writer says it."""
        return [tar for tar in range(TARS) if tar not in self.written]


class MadeUpWorker:
    def __init__(self, ray: MadeUpRay) -> None:
        self.ray = ray
        self.dead: Exception | None = None
        self.do = mock.Mock(remote=lambda share: lambda: self.answer(share))

    def answer(self, share: Sequence[int]) -> Answer:
        record = logging.makeLogRecord(
            {"name": "pipeline.somewhere", "levelno": 30, "msg": "something is odd"}
        )
        return Answer("here", self.result(share), [record])

    def result(self, share: Sequence[int]) -> Any:
        if self.dead:
            raise self.dead
        if not share and self.ray.starts:
            failure = self.ray.starts.pop(0)
            if isinstance(failure, Died):
                raise failure
            return failure
        if share:
            self.ray.shares.append(share)
        for tar in share:
            self.ray.tried.append(tar)
            what = (self.ray.script.get(tar) or ["done"]).pop(0)
            if isinstance(what, Exception):
                return what
            if what != "dies":
                self.ray.written.add(tar)
            if what.startswith("dies"):
                self.dead = Died(
                    "The actor is dead because X. Worker exit detail: it broke. Some common causes"
                )
                raise self.dead
        return Totals(videos=PER_TAR * len(share), done=list(share))


@pytest.fixture
def plan(packed: Path) -> ExtractionPlan:
    return ExtractionPlan(request_for(packed))


def run(ray: MadeUpRay, plan: ExtractionPlan, workers: int = 2) -> Totals:
    with mock.patch("pipeline.extraction.cluster.connection._import_ray", return_value=ray):
        cluster = Cluster(workers=workers, cpus_per_worker=1)
        return run_on_ray(plan, cast(Any, ray), cluster)


def test_every_tar_is_done_once(plan: ExtractionPlan) -> None:
    ray = MadeUpRay()
    totals = run(ray, plan)
    assert sorted(ray.tried) == sorted(totals.done) == list(range(TARS))
    assert totals.videos == TARS * PER_TAR
    assert ray.killed == 2, "no worker is left behind"
    assert len(ray.shares[0]) > 1, "shares are of several tars"
    assert len(ray.shares[-1]) == 1, "and of one at the end, so that workers end together"


def test_notices_of_workers_are_told(
    plan: ExtractionPlan, caplog: pytest.LogCaptureFixture
) -> None:
    run(MadeUpRay(), plan)
    assert "something is odd (worker on here)" in caplog.text


@pytest.mark.parametrize("deaths", [1, 3])
def test_tars_of_a_dead_worker_are_done_by_another(plan: ExtractionPlan, deaths: int) -> None:
    ray = MadeUpRay({5: ["dies"] * deaths + ["done"]})
    totals = run(ray, plan)
    assert sorted(totals.done) == list(range(TARS))
    assert totals.damaged == []
    assert ray.tried.count(5) == deaths + 1
    assert len(ray.tried) == TARS + deaths, "what a dead worker had written is not done again"


def test_a_tar_that_no_worker_survives_is_named(
    plan: ExtractionPlan, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever was in the same share is not blamed: after the first death it is done alone."""
    ray = MadeUpRay({5: ["dies"] * 9})
    totals = run(ray, plan)
    assert sorted(totals.done) == [tar for tar in range(TARS) if tar != 5]
    assert ray.tried.count(5) == 4
    assert totals.damaged == [
        "clips-000005.tar: 4 workers died doing it, the last on here: it broke."
    ]
    assert caplog.text.count("a worker died (here)") == 4


def test_a_tar_whose_worker_died_after_writing_it_counts(plan: ExtractionPlan) -> None:
    ray = MadeUpRay({2: ["dies after writing"]})
    totals = run(ray, plan)
    assert sorted(totals.done) == list(range(TARS))
    assert totals.videos == TARS * PER_TAR
    assert ray.tried.count(2) == 1


def test_failures_end_the_work(plan: ExtractionPlan) -> None:
    ray = MadeUpRay({2: [WorkError("the encoder failed")]})
    with pytest.raises(WorkError, match=r"^the encoder failed$"):
        run(ray, plan)
    assert ray.killed == 2
    ray = MadeUpRay(starts=[UserError("no such encoder")])
    with pytest.raises(UserError, match=r"^no such encoder$"):
        run(ray, plan)


def test_workers_that_die_at_the_start(plan: ExtractionPlan) -> None:
    died = Died("Worker exit detail: out of memory. Some common causes")
    assert len(run(MadeUpRay(starts=[died] * 3), plan).done) == TARS
    with pytest.raises(WorkError, match=r"4 workers died while they started .* out of memory\."):
        run(MadeUpRay(starts=[died] * 4), plan)
