"""Recipes: a head and its training as a TOML file that a user can read, copy and pass.

A file has the tables `[head]` (fields of the configuration of its `kind`, without `dim`, which
comes from the encoder), `[training]` (fields of `TrainConfig`) and `[finetune]` (fields of
`FinetuneConfig` that differ or are added when the tower trains too). Missing fields have their
defaults; some fields of `[training]` may be "auto" (`heads.recipes.derived`). The comment at the
top gives the command, the source, the published figure and what was run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, meant, one_of
from featstore.files.documents import read_toml
from heads.end_to_end.config import FinetuneConfig
from heads.methods.registry import DEFAULT_METHOD, Method, method
from heads.methods.settings import MethodConfig
from heads.recipes.derived import AUTO, DERIVED, derived, derived_beside_tower
from heads.training.config import TrainConfig

DEFAULT_RECIPE: Final = "frozen-store"
"""The default of evaluations that train a head."""
TRAIN_HEAD_RECIPE: Final = "auto"
"""The default of `mote-cli train-head`."""
_SUFFIX: Final = ".toml"
_FROM_STORE: Final = {"patience", "keep_best", "shrinkage"}  # `FinetuneConfig` has its own `save`
_TABLES: Final = {
    "training": {field.name for field in fields(TrainConfig)},
    "finetune": {field.name for field in fields(FinetuneConfig)} - _FROM_STORE,
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

    @property
    def beside_tower(self) -> str | None:
        """The recipe's method, if it is one beside a frozen tower; else it may be another one."""
        chosen = _method_of(self.head)
        return chosen.name if chosen.keeps_towers else None

    @property
    def from_data(self) -> list[str]:
        """The settings of training that are derived from the data."""
        return sorted(name for name in self.training if self.training[name] == AUTO)

    def train_config(self, **overrides: Any) -> TrainConfig:
        """Return the training settings; UserError for "auto" and if a value is out of range."""
        return TrainConfig(**self._with(self.training, overrides))

    def fitted(
        self, *, videos: int, classes: int, dim: int, repeats: int | None = None, **overrides: Any
    ) -> tuple[TrainConfig, int]:
        """Return the training settings for a set of videos, and how often an epoch has each.

        Arguments as `derived`, which gives every "auto" a number; UserError if a value is out of
        range.
        """
        given = dict(self.training) | _given(overrides)
        TrainConfig(**{name: v for name, v in given.items() if v != AUTO or name not in DERIVED})
        wide = {"videos": videos, "classes": classes, "dim": dim}
        found, repeats = derived(given, **wide, repeats=repeats)
        return TrainConfig(**found), repeats

    def finetune_config(
        self, videos: Callable[[], int] | None = None, **overrides: Any
    ) -> FinetuneConfig:
        """Return the settings for training tower and head; errors as `train_config`.

        `videos` counts the training videos. It is called where the recipe leaves settings of a
        head beside a frozen tower to them (`derived_beside_tower`).
        """
        training = {name: v for name, v in self.training.items() if name not in _FROM_STORE}
        found = training | dict(self.finetune)
        if videos is not None and _method_of(self.head).pixels:
            found |= _given(overrides)
            if AUTO in [found.get(name) for name in DERIVED]:
                found = derived_beside_tower(found, videos())
        return FinetuneConfig(**self._with(found, overrides))

    def _with(self, settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with `overrides`; UserError if one that cannot be a word is "auto"."""
        found = dict(settings) | _given(overrides)
        left = [name for name in DERIVED if found.get(name) == AUTO]
        if left:
            raise UserError(
                f"recipe {self.name} derives {', '.join(left)} from the videos of a store, which "
                "only train-head does: choose another recipe, such as frozen-store or end-to-end"
            )
        return found


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with mote."""
    return sorted(_files())


def _files() -> dict[str, Path]:
    """Return the files of the recipes that come with mote, by name; the authors' lie apart."""
    here = Path(str(files(__name__)))
    return {path.stem: path for folder in (here, here / "papers") for path in folder.glob("*.toml")}


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
    source = path if own else _files()[str(name)]
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
        chosen = _method_of(recipe.head)
        derived_heads = {"attention_heads": 0} if "attention_heads" in _head_fields(chosen) else {}
        recipe.head_config(_ANY_DIM, **derived_heads)
        config, _ = recipe.fitted(videos=_ANY_NUMBER, classes=2, dim=_ANY_DIM)
        number = {name: getattr(config, name) for name in recipe.from_data}
        recipe.finetune_config(lambda: _ANY_NUMBER, **number)
    except UserError as error:
        raise UserError(f"recipe {name}: {error}") from error
    return recipe


def finetune_recipe(asked: str | Path | None, kind: str | None) -> Recipe:
    """Return the recipe that was asked for, or the usual one for fine-tuning a method.

    `kind` is the method's name, None: the usual one. The recipe is then one for this method.
    """
    recipe = load_recipe(asked or method(kind or DEFAULT_METHOD).recipe)
    if kind is None:
        return recipe
    own, settings = _method_of(recipe.head), {**recipe.training, **recipe.finetune}
    left = [name for name in DERIVED if settings.get(name) == AUTO]
    if own.pixels and own.name != kind and left:
        raise UserError(
            f"recipe {recipe.name} derives {', '.join(left)} for {own.title}, and "
            f"{method(kind).title} is to be trained: choose another one, such as "
            f"{method(kind).recipe}"
        )
    return replace(recipe, head={**recipe.head, "kind": kind})


def _method_of(head: Mapping[str, Any]) -> Method:
    return method(head.get("kind", DEFAULT_METHOD))


def _head_fields(chosen: Method) -> set[str]:
    return {field.name for field in fields(chosen.config)} - {"dim", *chosen.from_elsewhere}


_ANY_DIM: Final = 64  # attention heads can only be checked against the store's width
_ANY_NUMBER: Final = 1000


def _refuse_unknown(name: str, unknown: set[str], known: list[str], what: str) -> None:
    if unknown:
        raise UserError(
            f"recipe {name} has unknown {what}: {', '.join(sorted(unknown))}; "
            f"{meant(min(unknown), known)}known are {', '.join(known)}"
        )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
