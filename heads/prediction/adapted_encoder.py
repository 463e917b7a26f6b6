"""The encoder of a head that adapts both towers: clips and sentences in, embeddings out.

N = clips, T = frames, s = side of the tower's input, n = sentences, L = tokens of a sentence, D =
embedding width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from featstore.commands import ADAPTED_BY
from featstore.errors import UserError
from featstore.workspace import Workspace
from heads.arithmetic import resolve_device
from heads.compatibility import check_encoder
from heads.files.head_cards import adapting_card
from heads.files.head_file import joint_fingerprint, load_head
from heads.methods.head import Head
from pipeline.clip_encoder import PRECISIONS, SENTENCES_PER_BATCH, Encoder
from pipeline.encoders.sources import LoadedClip, load_clip


class AdaptedEncoder(Encoder):
    """A CLIP or ViCLIP with a head's adapters on both towers; one embedding for T frames.

    `precision` is that of what lies below the first adapter; everything else is float32, and so is
    "auto". The fingerprint covers adapters and CLIP.
    """

    def __init__(
        self, loaded: LoadedClip, head: Head, precision: str = "auto", device: str = "cpu"
    ) -> None:
        from heads.methods.msta.head import MstaHead
        from heads.methods.msta.towers import AdaptedTowers

        super().__init__(loaded, "fp32", device)
        if precision in ("bf16", "fp16"):
            self.precision = precision  # type: ignore[assignment]
        self.fingerprint = joint_fingerprint(self.fingerprint, head)
        self.clip_frames = self.frames_together = head.config.frames
        adapters = cast(MstaHead, head).adapters.to(self.device)
        self.towers = AdaptedTowers(self.model, adapters, PRECISIONS[self.precision]).eval()

    def _encode_batch(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        clips = pixels if pixels.ndim == 5 else pixels[:, None]
        return self.towers.video_features(clips.to(self.device)).float()

    def run_image_tower(self, pixels: Tensor) -> None:
        """Raise UserError: what is inside the tower is of frames, and not of clips."""
        raise UserError(
            f"{self.name} with adapters gives embeddings of clips only: leave --tier out, or take "
            "the tokens of the encoder itself, with --encoder"
        )

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode token ids int64 [n,L] -> float32 [n,D], as `Encoder.encode_tokens`."""
        self._check_tokens(tokens)
        if not len(tokens):
            return torch.zeros(0, self.dim, device=self.device)
        parts = torch.split(tokens.to(self.device), SENTENCES_PER_BATCH)
        return torch.cat([self.towers.text_features(part).float() for part in parts])


def encoder_of_run(workspace: Workspace, run: str, precision: str, device: str) -> Encoder:
    """Load the encoder of a head that adapts both towers, and check that it is the head's own.

    Raises UserError for another head, for an encoder that has changed, and as `load_clip`.
    """
    card = adapting_card(workspace, run)
    head, on = load_head(workspace.choose_run(run)), resolve_device(device).type
    base = load_clip(base_encoder(head, card.origin.encoder), workspace.root / "encoders")
    encoder = AdaptedEncoder(base, head, precision, on)
    check_encoder(card.origin, card.origin.adapted_encoder, encoder.fingerprint)
    return encoder


def base_encoder(head: Head, spec: str) -> str:
    """Return the spec of the encoder that a head adapts; `spec` itself if it names another one."""
    if not spec.startswith(ADAPTED_BY):
        return spec
    if head.origin is None or not head.origin.adapted_encoder:
        raise UserError(
            f"the head {spec.removeprefix(ADAPTED_BY)} does not say which encoder it adapts: train "
            "or import it again"
        )
    return head.origin.adapted_encoder
