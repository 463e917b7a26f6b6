"""The random draw of one training step: which experts run, at which temperatures they merge.

B = batch, L = layers, E = experts, R = routings of a layer: 1, or 2 where both projections are
routed separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from heads.methods.mote.config import HeadConfig
from heads.methods.mote.experts import temperature_weights


@dataclass(frozen=True)
class RoutingDraw:
    """The random draw of one training step: per layer one expert and one merging temperature.

    A draw is shared by the whole batch, as in the released code. With placement "separate" every
    layer has two entries, for its up and then its down projection.
    """

    experts: tuple[int, ...]
    """[L*R] expert that runs in the expert pass, 0-based; ignored for "subset" routing."""
    temperatures: tuple[float, ...]
    """[L*R] temperature of the merged pass."""

    @classmethod
    def sample(cls, config: HeadConfig, generator: torch.Generator) -> RoutingDraw:
        """Draw L*R experts from the head's prior, then L*R temperatures evenly (that order).

        The released prior, softmax(1..E), favours the last expert and is not learned (MoTE,
        section 3.2: with four experts 3.2, 8.7, 23.7 and 64.4 per cent). "subset" routing draws
        no experts. `generator` must be on the CPU.
        """
        entries = config.layers * config.routings
        if config.kind != "mote":
            return cls((0,) * entries, (math.inf,) * entries)
        experts: list[int] = [0] * entries
        if config.routing != "subset":
            prior = expert_probabilities(config)
            experts = torch.multinomial(
                prior, entries, replacement=True, generator=generator
            ).tolist()
        choices = config.temperatures or (1.0,)
        picks = torch.randint(len(choices), (entries,), generator=generator)
        return cls(tuple(experts), tuple(choices[pick] for pick in picks.tolist()))


def expert_probabilities(config: HeadConfig) -> torch.Tensor:
    """Return the probabilities [E] float32 of the expert draw (released: softmax(1, ..., E))."""
    if config.routing == "uniform":
        return torch.full((config.experts,), 1 / config.experts)
    if not config.expert_prior:
        return temperature_weights(1.0, config.experts)
    return torch.tensor(config.expert_prior) / sum(config.expert_prior)
