"""The texts of the training classes where the text tower trains too.

n sentences, L places for tokens, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.encoders.text_tower import (
    mean_of_sentences,
    reads_only_back,
    text_embeddings,
    text_parts,
)

CHUNK_TOKENS: Final = 1024
"""Tokens that are encoded together: large enough for fast products, small beside the images. It
never depends on the machine, because products of other sizes round otherwise."""
SHARE_OF_MEMORY: Final = 0.25
"""Of what is free, the part that activations of texts may keep until the backward pass."""


class TrainedTexts(nn.Module):
    """The text tower of an open_clip model and the sentences of the training classes.

    The tower is the model's own, not a copy, and under the same names: its parameters are trained.
    `tokens` int64 [n,L] are the sentences, class after class, and `counts` their numbers
    (`Encoder.class_tokens`). They are encoded in chunks of sentences of similar length, each up to
    its longest sentence. What a chunk needs in the backward pass is kept, or computed twice
    (`keep_within`); the numbers are the same to the bit.

    Attribute `uses_all`: every parameter gets a gradient in every step. CLIP's own tower does; what
    towers of other libraries leave unused is not known.
    """

    tokens: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        counts: Sequence[int],
        *,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        super().__init__()
        for name, part in text_parts(model):
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.add_module(name, part)
        self.requires_grad_(True)
        self.uses_all = reads_only_back(model)
        self._model = (model,)  # in a tuple, because its image tower is no part of this module
        # The places up to a sentence's end are all that count.
        whole = torch.full((len(tokens),), tokens.shape[1])
        lengths = tokens.argmax(dim=1) + 1 if self.uses_all else whole
        self._lengths, order = (part.tolist() for part in lengths.sort(stable=True))
        self.register_buffer("tokens", tokens[order], persistent=False)
        self._back = torch.tensor(order).argsort().tolist()
        self._counts = tuple(counts)
        self._chunk = max(1, chunk_tokens // self._lengths[-1])
        self._kept = len(self._chunks)
        self._kept_bytes = self._bound = 0

    def train(self, mode: bool = True) -> TrainedTexts:
        """Do nothing: the tower stays in evaluation mode, as the image tower does."""
        return super().train(False)

    def forward(self) -> Tensor:
        """Return the unit embeddings [C,D] of the classes, with gradients where they are on."""
        return self.embeddings_by(self._model[0])

    def embeddings_by(self, model: nn.Module) -> Tensor:
        """Return the embeddings that the text tower of another `model` of this kind gives."""
        where = next(model.parameters()).device
        parts = []
        for number, chunk in enumerate(torch.split(self.tokens.to(where), self._chunk)):
            if number < self._kept or not torch.is_grad_enabled():
                parts.append(text_embeddings(model, chunk))
            else:  # nothing in it is random, so that no generator needs to be set back
                again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                parts.append(checkpoint(text_embeddings, model, chunk, **again))
        return mean_of_sentences(torch.cat(parts)[self._back], self._counts)

    def keep_within(self, free: int) -> None:
        """Compute so many chunks twice that the others keep at most a share of `free` bytes."""
        longest = self.tokens[-1:].to(next(self.parameters()).device)
        one = bytes_kept(lambda: text_embeddings(self._model[0], longest), self.parameters())
        chunks = [one * sum(lengths) // self._lengths[-1] for lengths in self._chunks]
        self._bound = int(free * SHARE_OF_MEMORY)
        room = self._bound
        if sum(chunks) > room:
            room -= max(chunks)  # while one is computed again
        sums = [0, *accumulate(chunks)]
        self._kept = max(number for number, total in enumerate(sums) if not total or total <= room)
        self._kept_bytes = sums[self._kept]

    @property
    def words(self) -> str:
        """How the texts are encoded, for people; after `keep_within`."""
        sentences, chunks = len(self._lengths), len(self._chunks)
        kept, bound = self._kept_bytes / 1e9, self._bound / 1e9
        twice = f", {chunks - self._kept} computed twice" if self._kept < chunks else ""
        return (
            f"{len(self._counts)} classes, {sentences} sentences of up to {self._lengths[-1]} "
            f"tokens in {chunks} chunks: {self._kept} kept for the backward pass "
            f"({kept:.2f} GB, at most {bound:.2f}){twice}"
        )

    @property
    def kept_bytes(self) -> int:
        """Bytes of activations that are kept until the backward pass; after `keep_within`."""
        return self._kept_bytes

    @property
    def _chunks(self) -> list[list[int]]:
        """The lengths of the sentences of each chunk."""
        starts = range(0, len(self._lengths), self._chunk)
        return [self._lengths[start : start + self._chunk] for start in starts]


def bytes_kept(run: Callable[[], object], parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes that `run` keeps for a backward pass, besides `parameters`."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(kept.values())
