"""DiST: a temporal encoder and an integration branch beside a frozen CLIP (Qing et al., 2023).

The names below are for training loops of your own; they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heads.methods.dist.config import DistConfig
from heads.methods.lazy_names import lazy_names
from heads.methods.registry import Method

if TYPE_CHECKING:
    from heads.methods.dist.head import DistHead
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


def dist_head(config: DistConfig, training_classes: int) -> DistHead:
    """Return the head of a configuration, before its weights are drawn."""
    from heads.methods.dist.head import DistHead

    return DistHead(config, training_classes)


METHOD = Method(
    name="dist",
    title="DiST",
    config=DistConfig,
    head=dist_head,
    from_store=False,
    pixels=True,
    scaled=True,
    modulated=False,
    from_elsewhere=(
        *("dense_frames", "width", "patch"),
        *("modulation_neighbours", "modulation_temperature"),  # it has none
    ),
    recipe="dist",
    prompts="name",
    official="heads.methods.dist.official",
)


__getattr__ = lazy_names(__name__, _HOMES)
