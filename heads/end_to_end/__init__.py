"""End-to-end mode: the image tower trains with the head, from pixels, without a store.

The one part of `heads` that may import `pipeline` (docs/decisions/0001); `import heads` does not
import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.end_to_end.models.end_to_end_model import EndToEndModel, TrainingStep

__all__ = ["EndToEndModel", "TrainingStep"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from heads.end_to_end.models import end_to_end_model  # torch, which the recipes do without

    return getattr(end_to_end_model, name)
