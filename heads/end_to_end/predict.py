"""Prediction under the path that other programs import; it lies in `heads.prediction.predict`."""

from __future__ import annotations

from heads.prediction.predict import predict as predict
