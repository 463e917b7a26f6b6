"""Sentences of each class, for example a language model's, from a JSON file keyed by class name.

`{"class name": ["a sentence", ...], ...}`, one or more sentences per class, as many as it likes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featstore.errors import UserError, one_line
from pipeline.prompts.sets import (
    TEMPLATES_SUFFIX,
    PromptSet,
    is_template_file,
    read_limited,
    read_templates,
    require_length,
    set_name,
)

if TYPE_CHECKING:
    from featstore.reading.store import Store


DESCRIPTIONS_SUFFIX: Final = ".json"
# 700 classes with 16 sentences of 200 bytes are 2 MB.
DESCRIPTIONS_LIMIT: Final = 16 * 2**20
MAX_SENTENCES: Final = 1000
_SHAPE = '{"class name": ["a sentence", ...], ...}'


def read_descriptions(
    path: Path, name: str | None = None, class_names: Sequence[str] | None = None
) -> PromptSet:
    """The prompt set of a file of descriptions, held against `class_names` where given.

    `name` is the set's, by default the file's without its suffix. Raises UserError, which names
    the class, for a file that is not such an object: too large, no JSON, a class named twice,
    values that are no lists of sentences, empty lists and sentences, over-long sentences, a class
    too many or too few, numbers in place of class names.
    """
    text = read_limited(path, DESCRIPTIONS_LIMIT)
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}): write {_SHAPE}") from error
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no object with class names: write {_SHAPE}")
    descriptions = {key: _sentences(path, key, lines) for key, lines in value.items()}
    found = PromptSet(set_name(path, name), (), descriptions, str(path))
    if class_names is not None:
        found.require_classes(class_names)
    return found


def prompt_sets_from(
    prompts: Sequence[str], descriptions: Sequence[Path], name: str | None = None
) -> tuple[str | PromptSet, ...]:
    """What a user named: sets by name, which stay names, template files, files of descriptions.

    `name` is for the one that comes from a file. Raises UserError as the readers, and for a name
    that could be that of several files or of none.
    """
    files = [*filter(is_template_file, prompts), *map(str, descriptions)]
    if name is not None and len(files) != 1:
        raise UserError(
            f"--prompt-set-name {name!r} names the set of one file, and {len(files)} are given: "
            "name one file, or leave it out"
        )
    return (
        *(read_templates(Path(t), name) if is_template_file(t) else t for t in prompts),
        *(read_descriptions(path, name) for path in descriptions),
    )


def is_descriptions_file(text: str) -> bool:
    """Whether `text` names a file of descriptions rather than a prompt set."""
    return text.lower().endswith(DESCRIPTIONS_SUFFIX)


def held_prompt_set(store: Store, text: str) -> str:
    """The name of the store's prompt set that `text` means: its name, or the file it is made of.

    Raises UserError for a file that is none, and when the store's set of that file has other
    sentences than the file has now, or was never made.
    """
    suffix = Path(text).suffix.lower()
    if text in store.prompt_sets or suffix not in (TEMPLATES_SUFFIX, DESCRIPTIONS_SUFFIX):
        return text
    if suffix == TEMPLATES_SUFFIX:
        prompts = read_templates(Path(text))
    else:
        prompts = read_descriptions(Path(text), class_names=store.class_names)
    prompts.require_held(store)
    return prompts.name


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(
            f"{path} has {one_line(twice, 60)!r} twice: name every class once, with all its "
            "sentences"
        )
    return value


def _sentences(path: Path, key: str, lines: Any) -> tuple[str, ...]:
    where = f"{path}, class {one_line(key, 60)!r}"
    if not key.strip():
        raise UserError(f"{path}: a class name is empty: write {_SHAPE}")
    if not isinstance(lines, list):
        kind = type(lines).__name__
        raise UserError(f"{where}: its value is of type {kind}: write a list of sentences")
    if not 1 <= len(lines) <= MAX_SENTENCES:
        raise UserError(f"{where}: it has {len(lines)} sentences: write 1 to {MAX_SENTENCES}")
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, str) or not line.strip():
            raise UserError(
                f"{where}: number {number} is {one_line(repr(line), 60)}, not a sentence: "
                "write text"
            )
        require_length(line, where)
    return tuple(line.strip() for line in lines)
