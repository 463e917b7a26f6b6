"""The text half of a CLIP: token ids in, embeddings of sentences and classes out.

n sentences, L places for tokens, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

# What an open_clip model has beside its text tower.
_OTHER_PARTS: Final = {"visual", "text_decoder", "logit_scale", "logit_bias"}


def text_embeddings(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Embed token ids int64 [n,L] with the text tower of an open_clip model -> [n,D].

    At least float32, not normalised, with gradients where they are on.
    """
    clip = cast(Any, model)
    if not reads_only_back(model):
        return _at_least_float32(cast(torch.Tensor, clip.encode_text(tokens)))
    # Attention only looks back, and the embedding is read at the end-of-text token (the
    # largest id). Places after the last such token in the batch change nothing, so most of
    # the 77 places need no computation.
    ends = tokens.argmax(dim=-1)
    used = int(ends.max()) + 1
    hidden = clip.token_embedding(tokens[:, :used]) + clip.positional_embedding[:used]
    hidden = clip.transformer(hidden, attn_mask=clip.attn_mask[:used, :used])
    hidden = clip.ln_final(hidden[torch.arange(len(tokens), device=tokens.device), ends])
    projection = clip.text_projection
    if isinstance(projection, nn.Linear):
        hidden = projection(hidden)
    elif projection is not None:
        hidden = hidden @ projection
    return _at_least_float32(cast(torch.Tensor, hidden))


def reads_only_back(model: nn.Module) -> bool:
    """Whether it is CLIP's own text tower, in which no token sees those that follow it."""
    clip = cast(Any, model)
    usual = type(clip) is open_clip.CLIP and clip.text_pool_type == "argmax"
    return usual and clip.attn_mask is not None


def text_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Yield the modules and the parameters of their own of a model's text tower, by their names."""
    parts: dict[str, nn.Module | nn.Parameter] = dict(model.named_children())
    parts |= model.named_parameters(recurse=False)
    yield from ((name, part) for name, part in parts.items() if name not in _OTHER_PARTS)


def mean_of_sentences(embeddings: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Average the embeddings [n,D] of sentences, class after class, to unit vectors [C,D].

    `counts` are the numbers of sentences of the classes. Every sentence is normalised, and so is
    the mean (MoTE, Zhu et al., NeurIPS 2024).
    """
    of_classes = torch.split(F.normalize(embeddings, dim=-1), list(counts))
    return F.normalize(torch.stack([lines.mean(dim=0) for lines in of_classes]), dim=-1)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
