"""Training of heads on the features of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.training.schedule import build_optimizer, learning_rates

__all__ = ["build_optimizer", "learning_rates"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from heads.training import schedule  # torch, which the recipes do without

    return getattr(schedule, name)
