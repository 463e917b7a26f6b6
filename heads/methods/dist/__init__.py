"""DiST: a temporal encoder and an integration branch beside a frozen CLIP (Qing et al., 2023).

The names below are for training loops of your own; they are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.methods.dist.branch import DistBranch as DistBranch
    from heads.methods.dist.model import DistModel as DistModel
    from heads.methods.dist.training import Mix as Mix
    from heads.methods.dist.training import RateSchedule as RateSchedule
    from heads.methods.dist.training import StepParts as StepParts
    from heads.methods.dist.training import draw_mix as draw_mix
    from heads.methods.dist.training import parameter_groups as parameter_groups
    from heads.methods.dist.training import set_rates as set_rates
    from heads.methods.dist.training import training_step_parts as training_step_parts

_HOMES = {
    "DistBranch": "branch",
    "DistModel": "model",
    **dict.fromkeys(
        (
            *("Mix", "RateSchedule", "StepParts", "draw_mix", "parameter_groups", "set_rates"),
            "training_step_parts",
        ),
        "training",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
