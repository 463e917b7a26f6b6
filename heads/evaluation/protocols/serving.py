"""Which protocols the features of an extraction serve, said before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heads.evaluation.protocols.catalogue import PROTOCOLS
from heads.evaluation.protocols.protocol import Protocol
from pipeline.annotations.known_sets import known_dataset


@dataclass(frozen=True)
class Serving:
    """The protocols of a data set, divided by what features with these `views` are good for."""

    views: str
    """Clips x crops of every video."""
    served: tuple[str, ...]
    not_served: dict[str, str]
    """Why each of the other protocols is not served, by its name."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON values."""
        return {"views": self.views, "served": list(self.served), "not_served": self.not_served}

    def facts(self) -> dict[str, str]:
        """Return the same in words, a line for each of the two groups."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.not_served.items():
            reasons.setdefault(reason, []).append(name)
        others = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
        return {
            "protocols": f"{self.views} views serve {', '.join(self.served) or 'none of them'}",
            **({"not for": others} if others else {}),
        }


def sampling_for(views: str, frames: int) -> tuple[str, int]:
    """Return the sampling and the number of crops that give `views` ("4x3") of `frames` frames."""
    clips, _, crops = views.partition("x")
    return (f"uniform:{frames}" if clips == "1" else f"clips:{frames}x{clips}"), int(crops)


def protocols_served(
    dataset: str, views: str, *, frames: int, splits: Sequence[str] | None = None
) -> Serving | None:
    """Say which protocols of `dataset` features with `views` ("3x1") serve, and which not.

    `frames` are those of one view. `splits` are the splits that are extracted, None if they are
    not known. Returns None for a data set without protocols of its own.
    """
    own = [p for p in PROTOCOLS.values() if p.dataset == known_dataset(dataset)]
    if not own:
        return None
    reasons = {protocol.name: _lacking(protocol, views, frames, splits) for protocol in own}
    return Serving(
        views,
        tuple(name for name, reason in reasons.items() if not reason),
        {name: reason for name, reason in reasons.items() if reason},
    )


def _lacking(protocol: Protocol, views: str, frames: int, splits: Sequence[str] | None) -> str:
    """Return why features do not serve a protocol, with the options that would; "" if they do."""
    if protocol.views and views not in protocol.views:
        sampling, crops = sampling_for(protocol.views[0], frames)
        more = f" --crops {crops}" if crops > 1 else ""
        return f"{protocol.views[0]} views: --sampling {sampling}{more}"
    if splits is None:
        return ""
    tests = [name for name in splits if name.startswith("test")]
    if protocol.lists == "tests" and len(tests) < 2:
        return "needs the official test lists"
    if protocol.lists == "test1" and "test1" not in tests:
        return "needs the official test lists"
    if protocol.lists in ("val", "given") and not {*tests, *({"val"} & {*splits})}:
        return "needs a test or val split"
    return ""
