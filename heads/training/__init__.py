"""Training of heads on the features of a store."""

from __future__ import annotations

from heads.training.trainer import build_optimizer, learning_rates

__all__ = ["build_optimizer", "learning_rates"]
