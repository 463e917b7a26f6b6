"""MSTA as a head: its adapters, and the mean of what the adapted tower makes of clips.

B = views, K = clips of a view, D = embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featstore.errors import UserError
from heads.methods.head import Head
from heads.methods.msta.adapter import Adapters
from heads.methods.msta.config import MstaConfig


class MstaHead(Head):
    """The adapters of MSTA, and the scores of clips that its towers have embedded.

    The rows [B,K,D] that it takes are embeddings of whole clips, as the adapted tower made them
    (`AdaptedTowers.video_features`); a view's is their mean. Class texts are those of the adapted
    text tower.
    """

    def __init__(self, config: MstaConfig, training_classes: int) -> None:
        super().__init__(config, training_classes)
        if not (config.visual_width and config.text_width):
            raise UserError("the MSTA head does not say which towers it is made for")
        self.adapters = Adapters(config)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw first weights as the published code of its adapters does."""
        self.adapters.reset_parameters(generator)

    def hidden(self, features: Tensor) -> None:
        """See `Head.hidden`: nothing is added."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return one group of all adapters, with decay."""
        return [{"params": list(self.adapters.parameters()), "weight_decay": weight_decay}]
