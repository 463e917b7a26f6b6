"""The encoder of a head that looks at pixels itself: videos in, vectors of views out.

c crops, T' dense frames, s side of the tower's input, D = embedding width.

It stands in for the CLIP in extraction and prediction, which then need not know of it. What it
makes goes into a store like any features, so that every protocol is measured from one pass over
the videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from einops import rearrange
from torch import Tensor

from featstore.errors import UserError
from heads.arithmetic import resolve_device
from heads.files.head_file import joint_fingerprint
from heads.methods.head import Head
from heads.methods.registry import method
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.encoders.sources import LoadedClip, load_clip
from pipeline.float_frames import Style, evaluation_floats
from pipeline.preprocessing import FrameInput, Preprocessing
from pipeline.sampling import Sampling, parse_sampling

TEST_SCALE: Final = 224
"""Of "center-fraction", as released for HMDB51 and UCF101: the square is 7/8 of the short side."""


@dataclass(frozen=True)
class FloatPreprocessing(Preprocessing):
    """The preprocessing of DiST, in the place of CLIP's own (`pipeline.float_frames`)."""

    style: Style = "short-side"

    @classmethod
    def of(cls, clip: Preprocessing, style: Style = "short-side") -> FloatPreprocessing:
        """Return it with the size and the colours of a CLIP's own."""
        return cls(clip.size, clip.mean, clip.std, interpolation="bilinear", style=style)

    def crops(self, frames: FrameInput, crops: int = 1) -> Tensor:
        """Turn uint8 frames [T,H,W,3] into normalised float32 [crops,T,3,s,s]."""
        how: dict[str, Any] = {"mean": self.mean, "std": self.std, "style": self.style}
        if self.style == "center-fraction":
            how["scale"] = TEST_SCALE
        return evaluation_floats(frames, self.size[0], crops, **how)

    def require_crops(self, crops: int) -> None:
        """Raise UserError for a number of crops that is not possible."""
        if self.style == "center-fraction" and crops != 1:
            raise UserError(
                f"{crops} crops make no sense with {self.style}, which takes the central square: "
                "use 1 crop"
            )
        if crops not in (1, 3):
            raise UserError(f"{crops} crops are not supported by DiST: use 1 or 3")


class DistEncoder(Encoder):
    """A CLIP with a DiST branch beside it: T' frames of a view become T' rows (`DistHead`)."""

    def __init__(
        self,
        loaded: LoadedClip,
        head: Head,
        precision: str = "fp32",
        device: str = "cpu",
        style: Style = "short-side",
    ) -> None:
        from heads.methods.dist.branch import DistBranch
        from heads.methods.dist.model import DistModel

        super().__init__(loaded, precision, device)
        self.fingerprint = joint_fingerprint(self.fingerprint, head)
        branch = cast(DistBranch, head.branch).to(self.device)
        self.frames_together = head.config.dense_frames
        self.dist = DistModel(self.image_tower, branch, head.logit_scale).eval()
        self.preprocessing = FloatPreprocessing.of(self.preprocessing, style)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode frames of whole views, [c*T',3,s,s] -> their rows float32 [c*T',D]."""
        from heads.methods.dist.head import packed_vectors

        frames = self.frames_together
        views = rearrange(pixels, "(c t) ... -> c t ...", t=frames)
        parts = [
            packed_vectors(*self.dist.view_vectors(view.to(self.device)), frames)
            for view in torch.split(views, 1)
        ]
        return rearrange(torch.cat(parts).float(), "c t d -> (c t) d")


def encoder_of_head(
    head: Head | None,
    spec: str,
    precision: str,
    device: str,
    encoders_dir: Path | None,
    style: Style = "short-side",
) -> Encoder:
    """Load the encoder `spec`; for a head that looks at pixels, with the head's branch in it.

    `style` is how such a head cuts out of frames. For a head that adapts the towers, `spec` is the
    head's own encoder, "head:RUN", or the one that it adapts. Errors as `load_encoder`.
    """
    if head is not None and method(head.config.kind).adapts:
        from heads.prediction.adapted_encoder import AdaptedEncoder, base_encoder

        base = load_clip(base_encoder(head, spec), encoders_dir)
        return AdaptedEncoder(base, head, precision, resolve_device(device).type)
    if head is None or not method(head.config.kind).pixels:
        return load_encoder(spec, precision, device, encoders_dir=encoders_dir)
    on = resolve_device(device).type
    return DistEncoder(load_clip(spec, encoders_dir), head, precision, on, style)


def sampling_of(head: Head | None, frames: int) -> Sampling:
    """Return how prediction takes `frames` frames of a video for a head.

    Raises UserError for a number that a head which looks at pixels cannot take.
    """
    if head is None or not method(head.config.kind).pixels:
        return parse_sampling(f"uniform:{frames}")
    head.config.require_dense(frames, "prediction")
    return parse_sampling(f"dist:{frames}x1")
