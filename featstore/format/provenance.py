"""How the features of a store were made, and what must be equal before more are added to it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from featstore.errors import UserError
from featstore.format.tiers import EMBEDDINGS

# The name of an encoder may be a path, which differs between machines; the fingerprint of its
# weights shows whether it is the same encoder. Library versions do not change the features.
_INFORMATIVE: Final = frozenset({"encoder", "versions"})
# Fields that older stores lack, and the values that they have then.
_LATER: Final[dict[str, Any]] = {
    "quantised": "",
    "tier": EMBEDDINGS,
    "label_map": "",
    "split": "",
    "clip_frames": 1,
}
USUAL_STYLE: Final = "short-side"
"""How heads that look at pixels cut out of frames (`pipeline.float_frames.Style`), usually."""


@dataclass(frozen=True)
class Provenance:
    """How the features of a store were made.

    `strict_decode` says which damage makes a video fail: "auto", "always" or "never".
    `label_map` says what was done if the published class names contradict the videos:
    "corrected", "as-published", or "" if they do not contradict.
    `split` names the split whose tars the store was made of, "" if it was made of all tars.
    `logit_scale` is the multiplier of cosines (already exponentiated, about 100 for CLIP).
    `sampling` says how frames were chosen ("uniform:16"). `dataset_fingerprint` changes when the
    packed tars change. `preprocessing` and `versions` hold JSON values only. `quantised` says how
    the features were rounded afterwards, "" if they were not. `tier` is the kind of the features
    (`featstore.format.tiers`); `dim` is the width of the encoder's embeddings, whatever the tier.
    An embedding is of `clip_frames` successive frames, of which the store names the first.
    Raises ValueError for a dim that is not positive or a scale that is not a positive finite
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
    clip_frames: int = 1

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"embedding size {self.dim} is not positive")
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit scale {self.logit_scale} is not a positive finite number")
        json.dumps(asdict(self), allow_nan=False)

    @property
    def of_views(self) -> bool:
        """Whether a head that looks at pixels made the rows: vectors of whole views.

        They lie where other stores have the embeddings of frames, which nothing else may take them
        for. Only the preprocessing of such heads has a style.
        """
        return "style" in self.preprocessing

    @property
    def style(self) -> str | None:
        """How such a head cuts out of frames, if not in its usual way; else None."""
        style = self.preprocessing.get("style")
        return None if style == USUAL_STYLE else style

    def to_json(self) -> dict[str, Any]:
        """Return a strictly JSON-ready dict (no NaN, no tuples, which would come back as lists).

        `tier`, `label_map`, `split` and `clip_frames` are left out if they have their usual values,
        so that earlier readers know all fields that are there.
        """
        value: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        for name in ("tier", "label_map", "split", "clip_frames"):
            if value[name] == _LATER[name]:
                del value[name]
        return value

    @classmethod
    def from_json(cls, value: Any) -> Provenance:
        """Read the dict of `to_json`; UserError if a field is missing, unknown or mistyped."""
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
        """Return why features of `other` must not be added to the store that `self` describes.

        There is one phrase per field, "sampling: store has uniform:16, asked for uniform:8", and
        for `preprocessing` one per differing entry. The list is empty if both may be mixed. The
        encoder's name and the library versions may differ; everything else must be equal.
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
