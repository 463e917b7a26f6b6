"""Class texts of a text tower that stays as it is, kept in the folder of a run.

A run that continues reads them, where encoding thousands of sentences again would take minutes.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featstore.errors import UserError, WorkError
from heads.files.head_file import load_tensors, save_tensors
from heads.files.run_files import STATE_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptTexts:
    """The place of the embeddings of certain sentences, by a certain encoder, in a run's folder."""

    run_dir: Path
    encoder_fingerprint: str
    sentences_hash: str
    """Of the sentences of all classes in their order (`PromptSet.hash`)."""

    @property
    def key(self) -> str:
        """The sha256 that encoder and sentences have together."""
        return hashlib.sha256(
            f"{self.encoder_fingerprint} {self.sentences_hash}".encode()
        ).hexdigest()

    @property
    def file(self) -> Path:
        """The file that holds them; other sentences and other encoders have others."""
        return (self.run_dir / STATE_FILE).with_name(f"texts-{self.key[:16]}.safetensors")

    def read(self, classes: int, dim: int) -> Tensor | None:
        """Return the embeddings float32 [classes,dim], on the CPU; None if they have to be made.

        A damaged file is named in a warning.
        """
        if not self.file.is_file():
            return None
        try:
            tensors, card = load_tensors(self.file)
        except (UserError, WorkError) as error:
            log.warning("%s; the class texts are encoded again", error)
            return None
        found = tensors.get("embeddings", torch.zeros(0))
        sound = found.dtype == torch.float32 and found.shape == (classes, dim)
        if card.get("key") != self.key or not sound or not bool(found.isfinite().all()):
            log.warning("%s holds other texts: the class texts are encoded again", self.file)
            return None
        return found

    def write(self, embeddings: Tensor) -> None:
        """Keep embeddings float32 [C,D], complete or not at all."""
        save_tensors(self.file, {"embeddings": embeddings.cpu()}, {"key": self.key})
