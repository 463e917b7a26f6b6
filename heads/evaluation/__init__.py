"""Evaluates heads: from the name of a protocol to a result that can be compared with others.

It may import every other part of `heads`; only `heads/__init__.py` and `heads/demo.py` import it,
so that models and training know nothing of protocols (docs/decisions/0021). Its name below is
loaded when it is first asked for, because protocols and next steps need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.evaluation.protocols.half_class import half_class_accuracy as half_class_accuracy

__all__ = ["half_class_accuracy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from heads.evaluation.protocols.half_class import half_class_accuracy

    return half_class_accuracy
