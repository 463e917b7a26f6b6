"""Turns frame features into scores of classes.

What is defined here needs no torch.
"""

from __future__ import annotations

from typing import Literal

Fusion = Literal["softmax", "cosine", "features"]
"""How views become one score per class: by the mean of the softmax of cosines (MoTE, X-CLIP,
ViFi-CLIP), the mean of cosines, or the cosines of the mean video feature (Text4Vis)."""

TOP_K = 5
