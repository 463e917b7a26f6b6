"""DiST as a head: its branch, and the arithmetic on what an encoder makes with it of every view.

B = views, T' = dense frames, D = embedding width, C = classes.

A store keeps T' rows of float16 for every view. DiST needs two vectors of a view: its own unit
feature, and the mean of CLIP's unit embeddings for the ensemble. Each takes two rows: its float16
value, and what rounding left of it, which together are as exact as float32. The other rows are 0.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from featstore.errors import UserError
from heads.methods.dist.branch import DistBranch
from heads.methods.dist.config import DistConfig
from heads.methods.head import Head
from heads.methods.settings import MethodConfig
from heads.methods.text_classifier import class_cosines

ROWS: Final = 4


def packed_vectors(video: Tensor, clip: Tensor, rows: int) -> Tensor:
    """Arrange two vectors [B,D] of every view as rows that fit float16, [B,rows,D]."""
    packed = video.new_zeros(len(video), rows, video.shape[-1])
    for at, vector in ((0, video), (2, clip)):
        packed[:, at] = vector.half()
        packed[:, at + 1] = vector - packed[:, at]
    return packed


def unpacked_vectors(features: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Invert `packed_vectors`, [B,rows,D] -> two [B,D]; UserError for another number of rows."""
    if features.shape[1] != rows:
        raise UserError(
            f"{features.shape[1]} rows a view are not what DiST made: it needs all {rows}; leave "
            "--frames out"
        )
    return features[:, 0] + features[:, 1], features[:, 2] + features[:, 3]


class DistHead(Head):
    """The branch of DiST, and the scores of views that `packed_vectors` describes."""

    of_views = True

    def __init__(self, config: DistConfig, training_classes: int) -> None:
        super().__init__(config, training_classes)
        if not (config.width and config.patch and config.selected_layers):
            raise UserError("the DiST head does not say which image tower it is made for")
        if config.dense_frames < ROWS:
            raise UserError(f"a DiST head needs at least {ROWS} frames, not {config.dense_frames}")
        self.branch = DistBranch(config)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw first weights as the published code does."""
        self.branch.reset_parameters(generator)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the groups of the branch, some of them without decay; see `training`."""
        from heads.methods.dist.training import parameter_groups

        return parameter_groups(self.branch, weight_decay)

    def draw(self, generator: torch.Generator) -> int:
        """Draw the seed of how a batch is mixed."""
        return int(torch.randint(2**32, (), generator=generator))

    def view_vectors(self, features: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Head.view_vectors`: DiST's own unit features, and the means of CLIP's."""
        features = self.checked(features, "features", 3)
        return None, *unpacked_vectors(features, self.config.dense_frames)

    def forward(self, features: Tensor, class_embeddings: Tensor, modulate: bool = True) -> Tensor:
        """Return cosines [B,C] of what DiST made of views, [B,T',D]; `modulate` has no effect."""
        _, video, _ = self.view_vectors(features)
        return class_cosines(video, self.checked(class_embeddings, "class embeddings", 2))


class ClipOfViews(Head):
    """CLIP's mean of the slow frames of views, as `packed_vectors` keeps it: the head "mean".

    `rows` are those of a view.
    """

    of_views = True

    def __init__(self, config: MethodConfig, rows: int) -> None:
        super().__init__(config, 0)
        self._rows = rows

    def hidden(self, features: Tensor) -> None:
        """See `Head.hidden`."""

    def view_vectors(self, features: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Head.view_vectors`: both are the means of CLIP's unit features."""
        _, clip = unpacked_vectors(self.checked(features, "features", 3), self._rows)
        return None, clip, clip
