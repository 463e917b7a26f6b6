"""Where the features of a store come from, and what must agree before more are added to it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from featstore.errors import UserError
from featstore.format.tiers import EMBEDDINGS

# The name of an encoder may be a path, which differs between machines; its weights' fingerprint
# says whether it is the same one. Library versions change without changing the features.
_INFORMATIVE: Final = frozenset({"encoder", "versions"})
# Fields that stores written before them lack, with what their absence means.
_LATER: Final = {"quantised": "", "tier": EMBEDDINGS, "label_map": "", "split": ""}


@dataclass(frozen=True)
class Provenance:
    """How the features of a store were made.

    `strict_decode` says which damage failed a video: "auto", "always" or "never".
    `label_map` says what was done with a published file of class names that contradicts the
    videos: "corrected", "as-published", or "" where none did.
    `split` is the one whose tars the store was made of, "" when it was made of all.
    `logit_scale` is the multiplier of cosines (already exponentiated, about 100 for CLIP);
    `sampling` the text of the frame choice ("uniform:16"); `dataset_fingerprint` changes when the
    packed tars change; `preprocessing` and `versions` hold JSON values only; `quantised` says how
    the features were rounded afterwards, "" when they were not; `tier` what they are
    (`featstore.format.tiers`), and `dim` the width of the encoder's embeddings also where they are
    others. ValueError for a dim that is not positive or a scale that is not a positive finite
    number.
    """

    encoder: str
    encoder_fingerprint: str
    dim: int
    logit_scale: float
    precision: str
    sampling: str
    crops: int
    preprocessing: dict[str, Any]
    decoder: str
    strict_decode: str = "auto"
    versions: dict[str, str] = field(default_factory=dict)
    dataset: str = ""
    dataset_fingerprint: str = ""
    quantised: str = ""
    tier: str = EMBEDDINGS
    label_map: str = ""
    split: str = ""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"embedding size {self.dim} is not positive")
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit scale {self.logit_scale} is not a positive finite number")
        json.dumps(asdict(self), allow_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Strictly JSON-ready dict (no NaN, no tuples that would come back as lists).

        `tier`, `label_map` and `split` are there only where they are not the usual ones, so that
        earlier readers know the rest.
        """
        value: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        for name in ("tier", "label_map", "split"):
            if value[name] == _LATER[name]:
                del value[name]
        return value

    @classmethod
    def from_json(cls, value: Any) -> Provenance:
        """Read what `to_json` gave; UserError when a field is missing, unknown or mistyped."""
        wanted = {f.name: f.type for f in fields(cls)}
        if isinstance(value, dict):
            value = _LATER | value
        if not isinstance(value, dict) or set(value) != set(wanted):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise UserError(
                f"provenance holds {found}: a store of this format holds {sorted(wanted)}; "
                "read it with the version of mote that wrote it"
            )
        kinds: dict[str, tuple[type, ...]] = {
            "str": (str,),
            "int": (int,),
            "float": (int, float),
        }
        for name, annotation in wanted.items():
            allowed = kinds.get(str(annotation), (dict,))
            if isinstance(value[name], bool) or not isinstance(value[name], allowed):
                raise UserError(
                    f"provenance {name} is {value[name]!r}: it must be of type "
                    f"{allowed[-1].__name__}; the store's zarr.json was changed by hand"
                )
        try:
            return cls(**value)
        except ValueError as error:
            raise UserError(f"provenance is not valid: {error}; make the store again") from error

    def differences(self, other: Provenance) -> list[str]:
        """What keeps features of `other` out of the store that `self` describes.

        One phrase per field, "sampling: store has uniform:16, asked for uniform:8"; of
        `preprocessing` only the entries that differ. Empty when they may be mixed. The encoder's
        name and the library versions are informative; everything else must be equal.
        """
        mine, theirs = _LATER | self.to_json(), _LATER | other.to_json()
        phrases = []
        for name in mine:
            if name in _INFORMATIVE or mine[name] == theirs[name]:
                continue
            if isinstance(mine[name], dict):
                phrases += _entry_differences(name, mine[name], theirs[name])
            elif name == "encoder_fingerprint":
                phrases.append(
                    f"encoder: store has {self.encoder} (weights {_short(mine[name])}), "
                    f"asked for {other.encoder} (weights {_short(theirs[name])})"
                )
            else:
                has, asked = mine[name], theirs[name]
                if name == "dataset_fingerprint":  # 64 digits say no more than 16
                    has, asked = _short(has), _short(asked)
                phrases.append(f"{name}: store has {has or 'none'}, asked for {asked or 'none'}")
        return phrases


def _entry_differences(name: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"{name} {key}: store has {mine.get(key, 'none')}, asked for {theirs.get(key, 'none')}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def _short(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) <= 16 else fingerprint[:16]
