"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

# Before anything of ours is imported: the terminal that the tests run in must not decide how wide
# tables are, and two processes of a test share the cores.
os.environ.pop("COLUMNS", None)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.support.servers.s3_server import FailingProxy, S3Server, environment, running_server

torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed by the authors' own code (tests/data/golden/README.md)."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3-compatible server on loopback."""
    with running_server(tmp_path_factory.mktemp("s3") / "server.log") as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of an empty bucket; the environment lets obstore use it, and caches are the test's."""
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOTE_CACHE", str(tmp_path / "cache"))
    return s3_server.make_bucket(f"bucket-{next(_bucket_number)}")


@pytest.fixture
def proxy(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FailingProxy]:
    """The way to the bucket, where things can go wrong."""
    failing = FailingProxy(s3_server.port)
    for name, value in environment(failing.port).items():
        monkeypatch.setenv(name, value)
    yield failing
    failing.stop()


_bucket_number = count()
