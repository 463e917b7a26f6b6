"""End-to-end mode: the image tower trains with the head, from pixels, without a store.

The one part of `heads` that may import `pipeline` (docs/decisions/0001); `import heads` does not
import it.
"""

from __future__ import annotations

from heads.end_to_end.model import EndToEndModel, TrainingStep

__all__ = ["EndToEndModel", "TrainingStep"]
