from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing protects against power cuts, which no test makes, and costs most of the time.

    Processes that tests start sync as usual; test_durability checks that syncs are asked for.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
