"""Turns frame features into scores of classes; what is defined here needs no torch."""

from typing import Final, Literal

Fusion = Literal["softmax", "cosine", "features"]
"""How views become one score per class: by the mean of the softmax of cosines (MoTE, X-CLIP,
ViFi-CLIP), the mean of cosines, or the cosines of the mean video feature (Text4Vis)."""

TOP_K: Final = 5
"""The places of the second accuracy that is reported, and the classes that are named of a video."""
