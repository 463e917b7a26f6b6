"""Shared fixtures; puts this folder on the path, so that tests can import its helpers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed by the authors' own code (tests/data/golden/README.md)."""
    return DATA / "golden"
