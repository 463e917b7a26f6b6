"""The configuration of heads of kind MoTE, plain temporal transformer and mean of frames.

D = embedding width, L = layers, E = experts.
R = routings of a layer: 1, or 2 where both projections are routed separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar, Final, Literal

from featstore.errors import UserError
from heads.methods.settings import MethodConfig, within

Kind = Literal["mote", "transformer", "mean"]
"""The methods whose heads this module describes."""
Placement = Literal["ffn", "separate", "up", "down"]
Routing = Literal["multinomial", "uniform", "subset"]
Initialisation = Literal["different", "identical"]
Aggregation = Literal["weights", "outputs"]

TEMPERATURES = (-9.6, -4.8, -2.4, -1.2, -0.6, 0.6, 1.2, 2.4, 4.8, 9.6, math.inf)
"""Temperatures of the merged pass, drawn uniformly (MoTE, Zhu et al., NeurIPS 2024, released code).
A small positive one favours the last expert, a small negative one the first, and infinity gives
the plain average."""

POSITIONS = 77
"""Rows of the position table: the context length of CLIP's text tower, as in the released heads."""

NEIGHBOURS = 5  # K of modulation in the released code
MODULATION_TEMPERATURE = 0.05  # of the released code's exponential
# 16 GiB in fp32, 64 with the optimiser. The paper's largest head (ViT-L/14) has 1.3e8.
MOST_PARAMETERS: Final = 2**32
HEAD_WIDTH = 64  # CLIP's width of one attention head (Radford et al., 2021)
_OF_EXPERTS = ("placement", "routing", "initialisation", "aggregation", "expert_prior")
_UNUSED: Final = {
    "transformer": (*_OF_EXPERTS, "temperatures", "experts"),
    "mean": (*_OF_EXPERTS, "temperatures", "experts", "layers", "attention_heads"),
}


@dataclass(frozen=True)
class HeadConfig(MethodConfig):
    """The configuration of a temporal head; validated and completed on construction.

    `kind="transformer"` is the plain temporal transformer: one expert, no merged pass; the fields
    about experts are set to their defaults. `kind="mean"` has no parameters; its layers,
    experts and attention heads are set to 0. Raises UserError when a value is out of range.

    The defaults from `placement` on are the released heads'; the others are the alternatives that
    MoTE (Zhu et al., NeurIPS 2024) compares them with. In files older than a field, the field has
    its default.
    """

    WHAT: ClassVar[str] = "head"

    dim: int = field(metadata={"range": (1, 65536)})
    """D, the embedding width of the encoder."""
    kind: Kind = "mote"
    """MoTE, the transformer with one expert, or no head (the mean of the frames)."""
    layers: int = within(4, 1, 64)
    """L, transformer blocks; 4 in the released ViT-B/16 head, 6 in the ViT-L/14 one."""
    experts: int = within(4, 1, 256)
    """E, feed-forward experts per block; 1 for kind "transformer"."""
    attention_heads: int = 0
    """Attention heads; 0 asks for D // 64, at least 1, lowered until it divides D."""
    positions: int = within(POSITIONS, 1, 65536)
    """Rows of the position table: the most frames per view the head can take."""
    placement: Placement = "ffn"
    """What the experts of a block are: whole feed-forwards ("ffn", one routing), both projections
    with a routing each ("separate"), or only its "up" or "down" projection."""
    routing: Routing = "multinomial"
    """Which expert runs in the expert pass: one drawn from `expert_prior` for the batch
    ("multinomial"), one drawn evenly ("uniform"), or, for every sample, the expert of the data
    subset it belongs to ("subset", see `heads.training.schedule.data_subsets`)."""
    expert_prior: tuple[float, ...] = ()
    """[E] relative frequencies of "multinomial" routing; if empty, softmax(1, ..., E)."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Temperatures of the merged pass, drawn evenly. A single one is fixed (infinity: the plain
    average); without any, softmax(1, ..., E) is not divided."""
    initialisation: Initialisation = "different"
    """Whether experts start from draws of their own or all from the same one ("identical")."""
    aggregation: Aggregation = "weights"
    """What evaluation averages: the experts' weights, one network ("weights"), or the outputs of
    all of them ("outputs"). It differs for placement "ffn" only: a single projection is linear."""
    modulation_neighbours: int = NEIGHBOURS
    modulation_temperature: float = MODULATION_TEMPERATURE

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name in _UNUSED.get(self.kind, ()):
                object.__setattr__(self, each.name, each.default)
        super().__post_init__()
        if self.kind == "mean":
            object.__setattr__(self, "layers", 0)
        if self.kind != "mote":
            object.__setattr__(self, "experts", int(self.kind == "transformer"))
        wanted = self.attention_heads
        if not wanted and self.kind != "mean":
            wanted = max(1, self.dim // HEAD_WIDTH)
            while self.dim % wanted:
                wanted -= 1
            object.__setattr__(self, "attention_heads", wanted)
        if wanted and self.dim % wanted:
            raise UserError(
                f"{wanted} attention heads do not divide the embedding width {self.dim}: "
                "choose a divisor of it"
            )
        blocks = self.layers * (4 + 8 * self.experts) * self.dim**2 + self.positions * self.dim
        if blocks > MOST_PARAMETERS:
            raise UserError(
                f"a head with {self.layers} layers, {self.experts} experts, {self.positions} "
                f"positions and width {self.dim} has {blocks:.1e} parameters, more than "
                f"{MOST_PARAMETERS:.1e}: choose smaller numbers"
            )
        prior = self.expert_prior
        if prior and (
            self.routing != "multinomial"
            or len(prior) != self.experts
            or not all(0 <= share < math.inf for share in prior)
            or not sum(prior)
        ):
            raise UserError(
                f"expert_prior {list(prior)} does not fit {self.routing} routing of {self.experts} "
                "experts: give multinomial routing one frequency from 0 up for each, not all 0"
            )
        if 0 in self.temperatures:
            raise UserError("temperature 0 divides by zero: use small ones, or inf for the average")
        if not self.modulation_temperature:
            raise UserError("modulation_temperature is 0: it must be above 0")

    @property
    def routings(self) -> int:
        """R, the number of draws for each layer."""
        return 2 if self.placement == "separate" else 1

    @property
    def modulates(self) -> bool:
        """Whether temporal feature modulation can change this head's output."""
        return self.kind != "mean" and super().modulates
