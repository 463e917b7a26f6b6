"""The losses of the methods, under the path that other programs import them from."""

from __future__ import annotations

from heads.methods.mote.losses import LossTerms, mote_loss

__all__ = ["LossTerms", "mote_loss"]
