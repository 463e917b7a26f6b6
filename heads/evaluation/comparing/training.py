"""What the heads of several results were trained with and on, and in what that differs.

Everything comes from `config.json` of the run that a result lies in. So a setting that training
records is compared without a word about it here.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from featstore.errors import UserError, WorkError
from heads.evaluation.comparing.compare import SavedResult
from heads.files.run_files import learned_nothing, read_config
from heads.methods.registry import untrained
from heads.training.run_settings import flat_settings

log = logging.getLogger(__name__)

TRAINED, NO_TRAINING, UNKNOWN = "trained", "none: CLIP alone", "unknown"
NOT_SAID: Final = "-"
LONGEST: Final = 60  # letters of a value in a table; --json has it whole
# Lists that hashes and counts beside them stand for, and what no number depends on.
_LEFT_OUT: Final = frozenset(
    {"format", "data.class_names", "data.prompt_templates", "data.dataset_fingerprint"}
)


@dataclass(frozen=True)
class TrainingDifference:
    """One setting of training, or fact about its data, in which results differ."""

    name: str
    """As in config.json, such as "training.lr"; or "training", "classes", "classes unlike A"."""
    values: tuple[Any, ...]
    """One JSON value per result; None where its run does not say it."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The values in a few words each, for a table."""
        return tuple(_text(value) for value in self.values)


def training_settings(result: SavedResult) -> dict[str, Any] | None:
    """Return the flat settings of the run that `result` lies in; None if they are not known.

    Empty where nothing was trained: a head without parameters on a tower as it was.
    """
    try:
        settings = read_config(result.path.parent.parent)
    except (UserError, WorkError) as error:
        log.warning("training unknown: %s", error)
        return None
    if settings is None:
        return {} if untrained(result.values.get("kind")) else None
    return {} if learned_nothing(settings) else flat_settings(settings)


def training_differences(results: Sequence[SavedResult]) -> tuple[TrainingDifference, ...]:
    """List the settings of training in which results differ; the first result is A.

    Where nothing was trained, or nothing is known of it, the difference "training" says so, and
    the others are differences among the rest.
    """
    found = [training_settings(result) for result in results]
    classes = [_classes(settings) for settings in found]
    facts: dict[str, list[Any]] = {
        "training": [UNKNOWN if s is None else TRAINED if s else NO_TRAINING for s in found],
        "classes": [None if names is None else len(names) for names in classes],
    }
    if classes[0] is not None:
        own = classes[0]
        facts["classes unlike A"] = [None if c is None else len(c - own) for c in classes]
    for name in dict.fromkeys(name for settings in found for name in settings or ()):
        if name not in _LEFT_OUT:
            facts[name] = [(settings or {}).get(name) for settings in found]
    known = [bool(settings) for settings in found]
    return tuple(
        TrainingDifference(name, tuple(values))
        for name, values in facts.items()
        if _differ(values if name == "training" else list(itertools.compress(values, known)))
    )


def _classes(settings: Mapping[str, Any] | None) -> set[str] | None:
    """Return the names of the classes that were trained on; None if they are not known."""
    names = (settings or {}).get("data.class_names")
    return set(map(str, names)) if isinstance(names, list) else None


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _text(value: Any) -> str:
    if value is None:
        return NOT_SAID
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026"
