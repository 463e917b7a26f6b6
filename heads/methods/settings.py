"""The configuration of every method's head, and the record of what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar, Final, Literal, Self, cast, get_args, get_origin, get_type_hints

from featstore.errors import UserError, one_line, one_of

_HUGE: Final = 1e300  # no setting comes near; greater whole numbers cannot become floats


def within(default: Any, least: int, most: int | None = None) -> Any:
    """Make a field of `Settings` for a number from `least` up, or from `least` to `most`."""
    return field(default=default, metadata={"range": (least, most)})


class AsJson:
    """A dataclass that is written as strict JSON values."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return asdict(cast(Any, self))


@dataclass(frozen=True)
class Settings:
    """A dataclass that checks its fields by their types and can be written and read as JSON.

    A `Literal` must be one of its choices and a bool true or false; a number must be finite and lie
    in the range that `within` gives it, from 0 up without one. Numbers for a float field become
    floats, and lists for a tuple become tuples. Any other value raises UserError.
    """

    WHAT: ClassVar[str]
    """The name of the configuration in errors."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for each in fields(self):
            value = _checked(each, kinds[each.name], getattr(self, each.name))
            object.__setattr__(self, each.name, value)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON values, an infinite number as text.

        Fields marked as `later` are left out if they are empty.
        """
        later = {each.name for each in fields(self) if "later" in each.metadata}
        found = {name: _plain(value) for name, value in asdict(self).items()}
        return {name: value for name, value in found.items() if value or name not in later}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Invert `to_json`; UserError for missing fields and for fields unknown to this version."""
        if not isinstance(value, Mapping):
            raise UserError(f"the {cls.WHAT} configuration is {type(value).__name__}, no object")
        unknown = sorted(set(value) - {each.name for each in fields(cls)})
        if unknown:
            raise UserError(
                f"the {cls.WHAT} configuration has unknown fields {', '.join(unknown)}: "
                "it was written by a newer version of mote; update"
            )
        required = (MISSING, MISSING)
        missing = sorted(
            each.name
            for each in fields(cls)
            if (each.default, each.default_factory) == required and each.name not in value
        )
        if missing:
            raise UserError(
                f"the {cls.WHAT} configuration lacks {', '.join(missing)}: it is incomplete"
            )
        return cls(**value)


def _checked(each: Field[Any], kind: Any, value: Any) -> Any:
    """Return the value of a field, converted to its type; UserError if it does not fit."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    shown = one_line(repr(value), 60)
    if choices and value not in choices:
        raise UserError(f"{each.name} {shown} is unknown: {one_of(value, choices)}")
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{each.name} is {shown}: it must be true or false")
    if kind is int or kind is float:
        least, most = each.metadata.get("range", (0, None))
        fits = isinstance(value, kind if kind is int else int | float) and abs(value) < _HUGE
        if not fits or value < least or value > (math.inf if most is None else most):
            raise UserError(
                f"{each.name} is {shown}: it must be a {'whole ' if kind is int else ''}number "
                f"from {least} {'up' if most is None else f'to {most}'}"
            )
    elif kind == tuple[float, ...]:
        listed = value if isinstance(value, list | tuple) else [math.nan]
        listed = [float(v) if v in ("inf", "-inf") else v for v in listed]
        numbers = (isinstance(v, int | float) for v in listed)
        if not all(numbers) or not all(abs(v) < _HUGE or abs(v) == math.inf for v in listed):
            raise UserError(f"{each.name} is {shown}: it must be a list of numbers")
        return tuple(map(float, listed))
    if isinstance(value, list):
        return tuple(value)
    return float(value) if kind is float else value


def _plain(value: Any) -> Any:
    """Convert the value of a field to a JSON value."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if value in (math.inf, -math.inf) else value


class MethodConfig(Settings):
    """The configuration of a head, with the fields that code outside its method may use.

    Each method has a frozen dataclass with these fields and usually more.
    """

    dim: int
    """D, the embedding width of the encoder."""
    kind: str
    """Name of the method in `heads.methods.registry`."""
    modulation_neighbours: int
    """K, classes on either side that temporal feature modulation compares; 0 turns it off."""
    modulation_temperature: float
    """Scale of modulation's exponential: a larger one reduces the head's effect less."""

    @property
    def modulates(self) -> bool:
        """Whether temporal feature modulation can change this head's output."""
        return self.modulation_neighbours > 0

    @property
    def projects(self) -> bool:
        """Whether the head adds a projection that is for the classes of its training alone."""
        return False


@dataclass(frozen=True)
class HeadOrigin(Settings):
    """The record of what a head was trained on: all that is needed to give it the right features.

    For an imported head less is known: unknown fields are empty, and class names are None if nobody
    gave them.
    """

    WHAT: ClassVar[str] = "head origin"

    dataset: str
    dataset_fingerprint: str
    encoder: str
    encoder_fingerprint: str
    """Fingerprint of the tower's weights; features of another tower are refused."""
    encoder_precision: str
    sampling: str
    """Sampling of the store that the head was trained on, for example "uniform:16"."""
    crops: int
    preprocessing: dict[str, Any]
    prompt_set: str
    class_names: tuple[str, ...] | None
    """[C] training classes, in the order of `training_class_embeddings`; None if not known."""
    frames: int
    """T, frames per view in training."""
    prompt_templates: tuple[str, ...] = ()
    """Sentences of the prompt set, with {} for the class name; empty if every class had its own
    sentences or if they are not known."""
    trained_on: str = field(default="", metadata={"later": True})
    """A description of the training videos, such as "train1, 16 videos per class (draw 1)"; empty
    if not known."""
    initial_head: str = field(default="", metadata={"later": True})
    """Fingerprint of the head whose weights training started from; empty for a new head."""
    label_map: str = field(default="", metadata={"later": True})
    """As `featstore.Provenance.label_map`."""
    adapted_encoder: str = field(default="", metadata={"later": True})
    """The encoder whose towers the head adapts; `encoder` is then the head's own, "head:RUN"."""
