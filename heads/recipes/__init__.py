"""Recipes: a head and its training as a TOML file that a user can read, copy and pass.

A file has the tables `[head]` (fields of the configuration of its `kind`, without `dim`, which
comes from the encoder), `[training]` (fields of `TrainConfig`) and `[finetune]` (fields of
`FinetuneConfig` that differ or are added when the tower trains too). Missing fields have their
defaults. The comment at the top gives the command, the source, the published figure and what was
run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, meant, one_of
from featstore.files.documents import read_toml
from heads.end_to_end.config import FinetuneConfig
from heads.methods.registry import DEFAULT_METHOD, Method, method
from heads.methods.settings import MethodConfig
from heads.training.config import TrainConfig

DEFAULT_RECIPE: Final = "frozen-store"
FINETUNE_RECIPE: Final = "end-to-end"
"""The default of `mote-cli finetune`."""
_SUFFIX: Final = ".toml"
_TABLES: Final = {
    "training": {field.name for field in fields(TrainConfig)},
    "finetune": {field.name for field in fields(FinetuneConfig)},
}


@dataclass(frozen=True)
class Recipe:
    """The contents of one recipe file; an override of `None` leaves the recipe's value."""

    name: str
    head: Mapping[str, Any]
    training: Mapping[str, Any]
    finetune: Mapping[str, Any]

    def head_config(self, dim: int, **overrides: Any) -> MethodConfig:
        """Return the head for embeddings of width `dim`; another `kind` uses the fields it knows.

        Raises UserError if a value is out of range or the method does not know an override.
        """
        given = _given(overrides)
        chosen = _method_of(dict(self.head) | given)
        if strange := given.keys() - _head_fields(chosen):
            raise UserError(
                f"{', '.join(sorted(strange))} is no setting of {chosen.title}: leave it out"
            )
        own = {key: v for key, v in self.head.items() if key in _head_fields(chosen)}
        config: MethodConfig = chosen.config(dim=dim, **(own | given))
        return config

    def train_config(self, **overrides: Any) -> TrainConfig:
        """Return the training settings; UserError if a value is out of range."""
        return TrainConfig(**(dict(self.training) | _given(overrides)))

    def finetune_config(self, **overrides: Any) -> FinetuneConfig:
        """Return the settings for training tower and head; UserError if a value is out of range."""
        return FinetuneConfig(**(dict(self.training) | dict(self.finetune) | _given(overrides)))


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with mote."""
    found = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))


def load_recipe(name: str | Path) -> Recipe:
    """Load the recipe of that name, or from that TOML file.

    `name` is a path if it has a folder or the suffix .toml or if such a file exists; else it is a
    name. Raises UserError if there is no such recipe, if it is not TOML, and for tables, keys and
    values that a recipe cannot have (the message names them).
    """
    path = Path(name)
    own = isinstance(name, Path) or path.suffix == _SUFFIX or len(path.parts) > 1 or path.is_file()
    if not own and str(name) not in recipe_names():
        raise UserError(
            f"there is no recipe {str(name)!r}: {one_of(name, recipe_names())} or name a {_SUFFIX} "
            "file"
        )
    source = path if own else Path(str(files(__name__) / f"{name}{_SUFFIX}"))
    tables = read_toml(source, "name a recipe of mote or a file like those")
    _refuse_unknown(str(name), set(tables) - {"head", *_TABLES}, ["head", *_TABLES], "tables")
    for table in ("head", *_TABLES):
        found = tables.setdefault(table, {})
        if not isinstance(found, dict):
            raise UserError(f"recipe {name}: {table} is {found!r}, not a table [{table}]")
        known = _TABLES[table] if table in _TABLES else _head_fields(_method_of(found))
        _refuse_unknown(str(name), set(found) - known, sorted(known), f"keys in [{table}]")
    recipe = Recipe(
        path.stem if own else str(name), tables["head"], tables["training"], tables["finetune"]
    )
    try:
        recipe.head_config(_ANY_DIM, attention_heads=0)
        recipe.train_config()
        recipe.finetune_config()
    except UserError as error:
        raise UserError(f"recipe {name}: {error}") from error
    return recipe


def _method_of(head: Mapping[str, Any]) -> Method:
    return method(head.get("kind", DEFAULT_METHOD))


def _head_fields(chosen: Method) -> set[str]:
    return {field.name for field in fields(chosen.config)} - {"dim"}


_ANY_DIM: Final = 64  # attention heads can only be checked against the store's width


def _refuse_unknown(name: str, unknown: set[str], known: list[str], what: str) -> None:
    if unknown:
        raise UserError(
            f"recipe {name} has unknown {what}: {', '.join(sorted(unknown))}; "
            f"{meant(min(unknown), known)}known are {', '.join(known)}"
        )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
