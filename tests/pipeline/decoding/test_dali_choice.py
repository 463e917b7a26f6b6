"""When DALI decodes: what is asked for against what the machine has."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.errors import UserError
from pipeline.clip_encoder import load_encoder
from pipeline.decoding.nvdec import graphs
from pipeline.decoding.nvdec.graphs import (
    NVDEC_LIBRARY,
    dali_problem,
    dali_version,
    import_problem,
    wants_dali,
)
from pipeline.extraction import gpu_pool
from pipeline.extraction.cpu_pool import LOOKAHEAD, ThreadVideoPool, decoder_for, open_pool
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.tiers import PooledEmbeddings
from pipeline.sampling import parse_sampling
from tests.support.worlds.tiny_world import make_encoder


def no_library(name: str) -> CDLL:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, its driver's decoder and DALI."""
    monkeypatch.setattr(graphs, "import_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs, "CDLL", lambda name: None)


@pytest.mark.usefixtures("usable")
def test_auto_takes_dali_on_a_gpu_only() -> None:
    assert dali_problem() is None
    assert wants_dali("auto", "cuda")
    assert wants_dali("auto", "cuda:1")
    assert wants_dali("auto", "auto")
    assert wants_dali("dali", "cuda")
    assert not wants_dali("auto", "cpu")
    assert not wants_dali("pyav", "cuda")


def test_auto_on_a_machine_without_a_gpu_is_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(graphs, "import_problem", lambda: None)
    assert not wants_dali("auto", "auto")
    with pytest.raises(UserError, match=r"no GPU can be used; use --decoder pyav"):
        wants_dali("dali", "auto")


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("missing", ["package", "gpu", "nvdec"])
def test_what_is_missing_is_told_with_its_remedy(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = {
        "package": "DALI cannot be imported (No module named 'nvidia')",
        "gpu": "no GPU can be used",
        "nvdec": f"the driver's video decoder ({NVDEC_LIBRARY}) is missing",
    }[missing]
    if missing == "package":
        monkeypatch.setattr(graphs, "import_problem", lambda: said)
    elif missing == "gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        monkeypatch.setattr(graphs, "CDLL", no_library)
    with pytest.raises(UserError) as error:
        wants_dali("dali", "cuda")
    line = str(error.value)
    assert line.startswith(f"decoder 'dali' cannot be used: {said}")
    assert "--decoder pyav" in line
    assert "\n" not in line
    with caplog.at_level(logging.INFO):
        assert not wants_dali("auto", "cuda")
    assert len(caplog.records) == 1
    assert caplog.records[0].message.startswith(f"videos are decoded on the CPU: {said}")


@pytest.mark.usefixtures("usable")
def test_dali_by_name_needs_a_gpu_and_no_strictness() -> None:
    with pytest.raises(UserError, match=r"the device is cpu.*--device cuda"):
        wants_dali("dali", "cpu")
    with pytest.raises(UserError, match=r"--strict-decode.*--decoder pyav"):
        wants_dali("dali", "cuda", strict="always")
    assert not wants_dali("auto", "cuda", strict="always")
    assert wants_dali("dali", "cuda", strict="never")


@pytest.fixture
def request_with(tmp_path: Path) -> Callable[..., ExtractionRequest]:
    def make(**changes: Any) -> ExtractionRequest:
        sampling = parse_sampling("uniform:4")
        return ExtractionRequest(tmp_path, tmp_path / "store", "x", sampling, **changes)

    return make


@pytest.mark.usefixtures("usable")
def test_a_store_once_begun_stays_with_its_decoder(
    request_with: Callable[..., ExtractionRequest],
) -> None:
    on_gpu = request_with(device="cuda")
    assert decoder_for(on_gpu) == "dali"
    assert decoder_for(on_gpu, "pyav") == "pyav"
    assert decoder_for(request_with(), None) == "pyav"
    # Asked for by name it is the name; whether the store may go on with it is not decided here.
    assert decoder_for(replace(on_gpu, decoder="dali"), "pyav") == "dali"
    with pytest.raises(UserError, match=r"'dali' cannot be used.*the device is cpu"):
        decoder_for(request_with(), "dali")
    with pytest.raises(UserError, match="unknown"):
        decoder_for(request_with(decoder="decord"))


def test_the_pool_of_a_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = load_encoder(make_encoder(tmp_path / "clip"), "fp32")
    output = PooledEmbeddings(encoder)
    common = encoder, parse_sampling("uniform:4"), output
    pool = open_pool("pyav", *common, workers=2, strict="never")
    assert isinstance(pool, ThreadVideoPool)
    assert pool.window == 2 * LOOKAHEAD
    pool.close()
    made: list[Any] = []
    monkeypatch.setattr(gpu_pool, "DaliVideoPool", lambda *arguments: made.append(arguments))
    open_pool("dali", *common, workers=2, strict="never", crops=3)
    ((fallback, tower, _, crops, workers),) = made
    assert (fallback.name, fallback.strict, tower, crops, workers) == (
        "pyav",
        "never",
        encoder,
        3,
        2,
    )


def test_a_missing_or_broken_dali_is_a_line_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uncached = import_problem.__wrapped__
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nvidia.dali", None)
        assert uncached().startswith("DALI cannot be imported (")

    def broken(name: str) -> Any:
        raise OSError("libdali.so: undefined symbol: x")

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", broken)
        assert uncached() == "DALI is broken (libdali.so: undefined symbol: x)"


def test_version_for_provenance() -> None:
    if import_problem() is not None:
        pytest.skip(f"DALI cannot be used: {import_problem()}")
    ((package, number),) = dali_version().items()
    assert package.startswith("nvidia-dali-cuda")
    assert number[0].isdigit()
