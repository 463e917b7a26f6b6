"""What a temporal head is made of, and the random draw of one training step.

B = batch, T = frames, D = embedding width, L = layers, E = experts, C = classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from featstore.errors import UserError

HeadKind = Literal["mote", "transformer", "mean"]

TEMPERATURES = (-9.6, -4.8, -2.4, -1.2, -0.6, 0.6, 1.2, 2.4, 4.8, 9.6, math.inf)
"""Temperatures of the merged pass, drawn uniformly (MoTE, Zhu et al., NeurIPS 2024, released code).
A small positive one leans on the last expert, a small negative one on the first, infinity is the
plain average."""

POSITIONS = 77
"""Rows of the position table: the context length of CLIP's text tower, as in the released heads."""

HEAD_WIDTH = 64  # CLIP's width of one attention head (Radford et al., 2021)
_LARGEST = {"dim": 65536, "layers": 64, "experts": 256, "positions": 65536}


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a temporal head; validated and completed on construction.

    `kind="transformer"` is the plain temporal transformer: one expert, no merged pass.
    `kind="mean"` has no parameters; its layers, experts and attention heads are set to 0.
    Raises UserError when a value is out of range.
    """

    dim: int
    """D, the embedding width of the encoder."""
    kind: HeadKind = "mote"
    """"mote", "transformer" (one expert) or "mean" (no head: the frames' mean)."""
    layers: int = 4
    """L, transformer blocks; 4 in the released ViT-B/16 head, 6 in the ViT-L/14 one."""
    experts: int = 4
    """E, feed-forward experts per block; 1 for kind "transformer"."""
    attention_heads: int = 0
    """Attention heads; 0 asks for D // 64, at least 1, lowered until it divides D."""
    positions: int = POSITIONS
    """Rows of the position table: the most frames per view the head can take."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(HeadKind):
            raise UserError(
                f"head kind {self.kind!r} is unknown: choose one of {', '.join(get_args(HeadKind))}"
            )
        if self.kind == "mean":
            for name in ("layers", "experts", "attention_heads"):
                object.__setattr__(self, name, 0)
        elif self.kind == "transformer":
            object.__setattr__(self, "experts", 1)
        needed = ("dim", "positions") if self.kind == "mean" else tuple(_LARGEST)
        for name in needed:
            value, largest = getattr(self, name), _LARGEST[name]
            if not isinstance(value, int) or not 1 <= value <= largest:
                raise UserError(f"{name} of a head is {value!r}: it must be from 1 to {largest}")
        if self.kind != "mean":
            self._settle_attention_heads()

    def _settle_attention_heads(self) -> None:
        wanted = self.attention_heads
        if wanted == 0:
            wanted = max(1, self.dim // HEAD_WIDTH)
            while self.dim % wanted:
                wanted -= 1
            object.__setattr__(self, "attention_heads", wanted)
        if not isinstance(wanted, int) or wanted < 1 or self.dim % wanted:
            raise UserError(
                f"{wanted} attention heads do not divide the embedding width {self.dim}: "
                "choose a divisor of it"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HeadConfig:
        """The inverse of `to_json`; UserError names fields this version does not know."""
        return cls(**known_fields(cls, value, "head"))


def known_fields(kind: type[Any], value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`value` as keyword arguments of dataclass `kind`; UserError where it does not fit."""
    if not isinstance(value, Mapping):
        raise UserError(f"the {what} configuration is {type(value).__name__}, not an object")
    unknown = sorted(set(value) - {field.name for field in fields(kind)})
    if unknown:
        raise UserError(
            f"the {what} configuration has unknown fields {', '.join(unknown)}: "
            "it was written by a newer version of mote; update"
        )
    missing = sorted(
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING and field.name not in value
    )
    if missing:
        raise UserError(f"the {what} configuration lacks {', '.join(missing)}: it is incomplete")
    return dict(value)


@dataclass(frozen=True)
class RoutingDraw:
    """The chance of one training step: per layer one expert and one merging temperature.

    A draw is shared by the whole batch, as in the released code.
    """

    experts: tuple[int, ...]
    """[L] expert that runs in the expert pass, 0-based."""
    temperatures: tuple[float, ...]
    """[L] temperature of the merged pass."""

    @classmethod
    def sample(cls, config: HeadConfig, generator: torch.Generator) -> RoutingDraw:
        """Draw L experts from softmax(1..E), then L temperatures uniformly (that order).

        The routing prior favours the last expert and is not learned (MoTE, section 3.2: with four
        experts 3.2, 8.7, 23.7 and 64.4 per cent). One expert draws nothing from the generator
        for itself; `generator` must be on the CPU.
        """
        if config.kind != "mote":
            return cls((0,) * config.layers, (math.inf,) * config.layers)
        experts = torch.multinomial(
            routing_prior(config.experts), config.layers, replacement=True, generator=generator
        )
        picks = torch.randint(len(TEMPERATURES), (config.layers,), generator=generator)
        return cls(tuple(experts.tolist()), tuple(TEMPERATURES[pick] for pick in picks.tolist()))


def routing_prior(experts: int) -> torch.Tensor:
    """Probabilities [E] float32 of the expert draw: softmax(1, 2, ..., E)."""
    return torch.arange(1, experts + 1, dtype=torch.float32).softmax(0)


@dataclass(frozen=True)
class HeadOrigin:
    """What a head was trained on: everything needed to use it on the right features."""

    dataset: str
    dataset_fingerprint: str
    encoder: str
    encoder_fingerprint: str
    """Fingerprint of the tower's weights; features of another tower are refused."""
    encoder_precision: str
    sampling: str
    """Sampling of the store it was trained on, for example "uniform:16"."""
    crops: int
    preprocessing: dict[str, Any]
    prompt_set: str
    class_names: tuple[str, ...]
    """[C] training classes, in the order of `training_class_embeddings`."""
    frames: int
    """T, frames per view it was trained with."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return {**asdict(self), "class_names": list(self.class_names)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HeadOrigin:
        """The inverse of `to_json`."""
        known = known_fields(cls, value, "head origin")
        return cls(**{**known, "class_names": tuple(known["class_names"])})
