"""The settings of a run, `config.json`: written when it begins, compared when it continues."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from featstore.errors import UserError
from featstore.files.durable import write_json
from heads.files.run_files import CONFIG_FILE, HEAD_FILE, read_config
from heads.methods.registry import DEFAULT_METHOD, config_from_json, method
from heads.training.config import TrainConfig

log = logging.getLogger(__name__)

# Names of the same weights and places may differ between machines; hashes already fix what the
# words and templates describe.
_INFORMATIVE = frozenset({"data.encoder", "data.trained_on", "data.prompt_templates"})


def open_run(run_dir: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Begin the run or, if `config.json` agrees, continue it; UserError if it may not."""
    begun = read_config(run_dir)
    if begun is None:
        if (run_dir / HEAD_FILE).is_file():
            raise UserError(f"{run_dir} holds a head that was not trained here: choose --name")
        if resume:
            log.info("there is no run %s to continue: starting it", run_dir.name)
        write_json(run_dir / CONFIG_FILE, settings)
        return
    require_same_run(run_dir, begun, settings, resume, TrainConfig, _INFORMATIVE)


def require_same_run(
    run_dir: Path,
    begun: Mapping[str, Any],
    settings: Mapping[str, Any],
    resume: bool,
    training: type[TrainConfig],
    informative: Collection[str],
) -> None:
    """Raise UserError unless the run begun with settings `begun` may continue with `settings`.

    Fields that are missing because an older version began the run get their defaults, in the recipe
    from its class `training`; `informative` as `setting_differences` takes it.
    """
    if not resume:
        raise UserError(
            f"run {run_dir.name} exists in {run_dir.parent}: pass --resume to continue it or "
            "--name for another one"
        )
    was, wanted = (s.get("head", {}).get("kind", DEFAULT_METHOD) for s in (begun, settings))
    if was != wanted:
        raise UserError(
            f"run {run_dir.name} in {run_dir.parent} trains {_title(was)}, not {_title(wanted)}: "
            "continue it as what it is, or choose another --name"
        )
    had = {**begun, "training": training.from_json(begun.get("training", {})).to_json()}
    if "head" in begun:
        had["head"] = config_from_json(begun["head"]).to_json()
    differences = setting_differences(had, settings, informative)
    if differences:
        raise UserError(
            f"run {run_dir.name} was begun with other settings: {'; '.join(differences[:3])}; "
            "use the same ones or another --name"
        )


def _title(kind: str) -> str:
    return method(kind).title


def setting_differences(
    begun: Mapping[str, Any], settings: Mapping[str, Any], informative: Collection[str]
) -> list[str]:
    """Describe the differences between the settings a run began with and the requested ones.

    Names are "table.field"; those in `informative` may differ.
    """
    had, asked = flat_settings(begun), flat_settings(settings)
    return [
        f"{name} is {_short(had.get(name))} in the run, asked for {_short(asked.get(name))}"
        for name in sorted(asked.keys() | had.keys())
        if name not in informative and asked.get(name) != had.get(name)
    ]


def flat_settings(settings: Any) -> dict[str, Any]:
    """Flatten settings two levels deep, through JSON: {"training": {"lr": 1}} -> "training.lr"."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": entry for inner, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
