"""TACO: both towers of a CLIP tuned while a teacher holds them (Zhu et al., NeurIPS 2026).

The names below are for training loops of your own; they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heads.methods.lazy_names import lazy_names
from heads.methods.registry import Method
from heads.methods.taco.config import TacoConfig

if TYPE_CHECKING:
    from heads.methods.taco.head import Projection as Projection
    from heads.methods.taco.head import TacoHead
    from heads.methods.taco.head import draw_anchors as draw_anchors
    from heads.methods.taco.training import StepParts as StepParts
    from heads.methods.taco.training import WeightMean as WeightMean
    from heads.methods.taco.training import class_features as class_features
    from heads.methods.taco.training import few_shot_positions as few_shot_positions
    from heads.methods.taco.training import relations as relations
    from heads.methods.taco.training import relative_structure_loss as relative_structure_loss
    from heads.methods.taco.training import teacher_momentum as teacher_momentum
    from heads.methods.taco.training import training_step_parts as training_step_parts
    from heads.methods.taco.training import update_teacher as update_teacher

_HOMES = {
    **dict.fromkeys(("Projection", "TacoHead", "draw_anchors"), "head"),
    **dict.fromkeys(
        (
            *("StepParts", "WeightMean", "class_features", "few_shot_positions"),
            *("relations", "relative_structure_loss", "training_step_parts"),
            *("teacher_momentum", "update_teacher"),
        ),
        "training",
    ),
}


def taco_head(config: TacoConfig, training_classes: int) -> TacoHead:
    """Return the head of a configuration, before its weights are drawn."""
    from heads.methods.taco.head import TacoHead
    from heads.methods.taco.head import draw_anchors as draw_anchors

    return TacoHead(config, training_classes)


METHOD = Method(
    name="taco",
    title="TACO",
    config=TacoConfig,
    head=taco_head,
    losses=("ce", "kl"),
    from_store=False,
    taught=True,
    modulated=False,
    from_elsewhere=("modulation_neighbours", "modulation_temperature"),  # it has none
    recipe="taco",
    prompts="taco",
    official="heads.methods.taco.official",
)


__getattr__ = lazy_names(__name__, _HOMES)
