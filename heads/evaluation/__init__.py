"""Evaluates heads: from the name of a protocol to a result that can be compared with others.

It may import every other part of `heads`; only `heads/__init__.py` and `heads/demo.py` import it,
so that models and training know nothing of protocols (docs/decisions/0021).
"""

from __future__ import annotations

from heads.evaluation.protocols.half_class import half_class_accuracy

__all__ = ["half_class_accuracy"]
