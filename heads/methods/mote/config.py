"""What a head of MoTE, of the plain temporal transformer or of the mean of frames is made of.

D = embedding width, L = layers, E = experts.
R = routings of a layer: 1, or 2 where both projections are routed separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal, get_args

from featstore.errors import UserError
from heads.methods.settings import Settings

KINDS: Final = ("mote", "transformer", "mean")
"""The methods whose heads this module describes."""
Placement = Literal["ffn", "separate", "up", "down"]
Routing = Literal["multinomial", "uniform", "subset"]
Initialisation = Literal["different", "identical"]
Aggregation = Literal["weights", "outputs"]

TEMPERATURES = (-9.6, -4.8, -2.4, -1.2, -0.6, 0.6, 1.2, 2.4, 4.8, 9.6, math.inf)
"""Temperatures of the merged pass, drawn uniformly (MoTE, Zhu et al., NeurIPS 2024, released code).
A small positive one leans on the last expert, a small negative one on the first, infinity is the
plain average."""

POSITIONS = 77
"""Rows of the position table: the context length of CLIP's text tower, as in the released heads."""

NEIGHBOURS = 5  # K of modulation in the released code
MODULATION_TEMPERATURE = 0.05  # of the released code's exponential
HEAD_WIDTH = 64  # CLIP's width of one attention head (Radford et al., 2021)
_LARGEST = {"dim": 65536, "layers": 64, "experts": 256, "positions": 65536}
_CHOICES = {
    "placement": Placement,
    "routing": Routing,
    "initialisation": Initialisation,
    "aggregation": Aggregation,
}


@dataclass(frozen=True)
class HeadConfig(Settings):
    """The shape of a temporal head; validated and completed on construction.

    `kind="transformer"` is the plain temporal transformer: one expert, no merged pass; what is
    said about experts is set to the defaults. `kind="mean"` has no parameters; its layers,
    experts and attention heads are set to 0. Raises UserError when a value is out of range.

    The defaults from `placement` on are the released heads'; the others are the alternatives that
    MoTE (Zhu et al., NeurIPS 2024) compares them with. Files written before a field existed
    mean its default.
    """

    WHAT: ClassVar[str] = "head"

    dim: int
    """D, the embedding width of the encoder."""
    kind: str = "mote"
    """"mote", "transformer" (one expert) or "mean" (no head: the frames' mean)."""
    layers: int = 4
    """L, transformer blocks; 4 in the released ViT-B/16 head, 6 in the ViT-L/14 one."""
    experts: int = 4
    """E, feed-forward experts per block; 1 for kind "transformer"."""
    attention_heads: int = 0
    """Attention heads; 0 asks for D // 64, at least 1, lowered until it divides D."""
    positions: int = POSITIONS
    """Rows of the position table: the most frames per view the head can take."""
    placement: Placement = "ffn"
    """What the experts of a block are: whole feed-forwards ("ffn", one routing), both projections
    with a routing each ("separate"), or only its "up" or "down" projection."""
    routing: Routing = "multinomial"
    """Whose expert runs in the expert pass: one drawn from `expert_prior` for the batch
    ("multinomial"), one drawn evenly ("uniform"), or, for every sample, the expert of the data
    subset it belongs to ("subset", see `heads.training.schedule.data_subsets`)."""
    expert_prior: tuple[float, ...] = ()
    """[E] relative frequencies of "multinomial" routing; none is softmax(1, ..., E)."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Temperatures of the merged pass, drawn evenly. One is a fixed temperature (infinity: the
    plain average), none leaves softmax(1, ..., E) undivided."""
    initialisation: Initialisation = "different"
    """Whether experts start from draws of their own or all from the same one ("identical")."""
    aggregation: Aggregation = "weights"
    """What evaluation averages: the experts' weights, one network ("weights"), or the outputs of
    all of them ("outputs"). It differs for placement "ffn" only: a single projection is linear."""
    modulation_neighbours: int = NEIGHBOURS
    """K, classes on either side that temporal feature modulation compares; 0 turns it off."""
    modulation_temperature: float = MODULATION_TEMPERATURE
    """Scale of its exponential: the larger, the less it holds the head back."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"head kind {self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.kind == "mean":
            for name in ("layers", "experts", "attention_heads"):
                object.__setattr__(self, name, 0)
        elif self.kind == "transformer":
            object.__setattr__(self, "experts", 1)
        if self.kind != "mote":
            for field in fields(self):
                if field.name in (*_CHOICES, "expert_prior", "temperatures"):
                    object.__setattr__(self, field.name, field.default)
        self._check_design()
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

    def _check_design(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"{name} {getattr(self, name)!r} of a head is unknown: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        for name in ("expert_prior", "temperatures"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
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
        if not _is_number(self.modulation_temperature) or self.modulation_temperature <= 0:
            raise UserError(
                f"modulation_temperature is {self.modulation_temperature!r}: it must be above 0"
            )
        if not isinstance(self.modulation_neighbours, int) or self.modulation_neighbours < 0:
            raise UserError(
                f"modulation_neighbours is {self.modulation_neighbours!r}: it must be a whole "
                "number from 0 (off) up"
            )

    @property
    def routings(self) -> int:
        """R, draws that each layer takes."""
        return 2 if self.placement == "separate" else 1

    @property
    def modulates(self) -> bool:
        """Whether temporal feature modulation can change this head's output."""
        return self.kind != "mean" and self.modulation_neighbours > 0

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values; an infinite temperature is the text "inf"."""
        temperatures = [t if math.isfinite(t) else str(t) for t in self.temperatures]
        return super().to_json() | {
            "expert_prior": list(self.expert_prior),
            "temperatures": temperatures,
        }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    """`values` as floats; "inf" stands for infinity, which JSON cannot write."""
    if isinstance(values, list | tuple):
        read = [float(v) if v in ("inf", "-inf") else v for v in values]
        if all(_is_number(v) for v in read):
            return tuple(float(v) for v in read)
    raise UserError(f"{name} of a head is {values!r}: it must be a list of numbers")
