"""`tables.toml`: what data sets, annotation files and their columns are called."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any, Final

TABLES: Final[dict[str, Any]] = tomllib.loads(
    files("pipeline.annotations").joinpath("tables.toml").read_text("utf-8")
)
