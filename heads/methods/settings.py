"""What every method's head says of itself: its configuration, and what it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, Self, cast

from featstore.errors import UserError


class MethodConfig(Protocol):
    """The shape of a head, as everything outside its method sees it.

    A method's own class is a frozen dataclass that checks itself when it is made (UserError), takes
    `dim` and `kind` by name, and has `from_json`, the inverse of `to_json`.
    """

    @property
    def dim(self) -> int:
        """D, the embedding width of the encoder."""

    @property
    def kind(self) -> str:
        """Name of the method, as `heads.methods.registry` has it."""

    @property
    def modulates(self) -> bool:
        """Whether temporal feature modulation can change this head's output."""

    @property
    def modulation_neighbours(self) -> int:
        """K, classes on either side that modulation compares."""

    @property
    def modulation_temperature(self) -> float:
        """Scale of modulation's exponential."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values, `kind` among them."""


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


class AsJson:
    """A dataclass that is written as strict JSON values."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values."""
        return asdict(cast(Any, self))


class Settings(AsJson):
    """A dataclass of settings, written as JSON and read again."""

    WHAT: ClassVar[str]
    """Which configuration it is, in errors."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; UserError names fields this version does not know."""
        return cls(**known_fields(cls, value, cls.WHAT))


_LATER_ORIGIN = frozenset({"trained_on", "initial_head", "label_map"})


@dataclass(frozen=True)
class HeadOrigin:
    """What a head was trained on: everything needed to use it on the right features.

    An imported head says less than one trained here: what is not known is empty, and class names
    that nobody gave are None, never invented.
    """

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
    class_names: tuple[str, ...] | None
    """[C] training classes, in the order of `training_class_embeddings`; None when not known."""
    frames: int
    """T, frames per view it was trained with."""
    prompt_templates: tuple[str, ...] = ()
    """Sentences of the prompt set, with {} for the class name; empty where every class had its
    own or they are not known."""
    trained_on: str = ""
    """Which videos of the data set, in words: "train1, 16 videos per class (draw 1)"; "" where
    nothing is known."""
    initial_head: str = ""
    """Fingerprint of the head whose weights it started from, "" for a new one."""
    label_map: str = ""
    """As `featstore.Provenance.label_map`."""

    def to_json(self) -> dict[str, Any]:
        """The fields as strict JSON values; later ones only where they say something."""
        names = None if self.class_names is None else list(self.class_names)
        value = {
            **asdict(self),
            "class_names": names,
            "prompt_templates": list(self.prompt_templates),
        }
        return {k: v for k, v in value.items() if v or k not in _LATER_ORIGIN}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HeadOrigin:
        """The inverse of `to_json`."""
        known = known_fields(cls, value, "head origin")
        names = known["class_names"]
        known["class_names"] = None if names is None else tuple(names)
        known["prompt_templates"] = tuple(known.get("prompt_templates", ()))
        return cls(**known)
