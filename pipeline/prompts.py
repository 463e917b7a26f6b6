"""Sentences that stand for a class in the text tower: templates, or a class's own sentences.

A file of templates has one sentence per line with "{}" for the class name. A file of descriptions,
for example a language model's, is JSON: `{"class name": ["a sentence", ...], ...}`, one or more
sentences per class. A file of rephrased names is CSV `id,name`, or JSON `{"id": "name"}`, with
names "class name: one sentence".
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featstore.errors import UserError, meant, one_line, quoted
from featstore.files.documents import read_document, read_json
from featstore.format.class_texts import DEFAULT_PROMPTS, PROMPT_SET_NAMES
from featstore.format.metadata import check_prompt_set
from featstore.spelling import comparable
from pipeline.annotations.rephrased_names import rephrased_names

if TYPE_CHECKING:
    from featstore.reading.store import Store

# Templates of the MoTE reference (Zhu et al., NeurIPS 2024), in its order and with its spelling
# ("a example"): the published class features are averages over them.
_MEDIA = ("photo", "video", "example", "demonstration")
_FORMS = (
    "a {medium} of {{}}.",
    "a {medium} of a person {{}}.",
    "a {medium} of a person using {{}}.",
    "a {medium} of a person doing {{}}.",
    "a {medium} of a person during {{}}.",
    "a {medium} of a person performing {{}}.",
    "a {medium} of a person practicing {{}}.",
)

# Those of ViCLIP's zero-shot evaluation (Wang et al., ICLR 2024), as `caption_words` leaves them.
_CLEANED: Final = "viclip16"
_VICLIP = (
    "a photo of action {}",
    "a picture of action {}",
    "human action of {}",
    "{} an action",
    "{} this is an action",
    "{} a video of action",
    "playing action of {}",
    "{}",
    "playing a kind of action {}",
    "doing a kind of action {}",
    "look the human is {}",
    "can you recognize the action of {}",
    "video classification of {}",
    "a video of {}",
    "the man is {}",
    "the woman is {}",
)
_MARKS: Final = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")

_TEMPLATES: Final = (
    tuple(form.format(medium=medium) for medium in _MEDIA for form in _FORMS),
    ("{}",),
    ("a video of {}",),
    _VICLIP,
    ("This is a video about {}",),  # of TACO's training (Zhu et al., NeurIPS 2026)
)
PROMPT_SETS: Final = dict(zip(PROMPT_SET_NAMES, _TEMPLATES, strict=True))

TEMPLATES_SUFFIX: Final = ".txt"
# CLIP reads 77 tokens; these limits stop files that are something else.
MAX_SENTENCE: Final = 1000
MAX_TEMPLATES: Final = 1000
TEMPLATES_LIMIT: Final = 2**17  # bytes; the store keeps templates in 1 MiB of JSON
DESCRIPTIONS_SUFFIX: Final = ".json"
REPHRASED_SUFFIX: Final = ".csv"
# 700 classes with 16 sentences of 200 bytes are 2 MB.
DESCRIPTIONS_LIMIT: Final = 16 * 2**20
MAX_SENTENCES: Final = 1000
_SHAPE = '{"class name": ["a sentence", ...], ...}'
_NAMED = 3  # the most names that an error shows


def bare_sentence(class_name: str, prefix: str = "") -> str:
    """Return the sentence that DiST (Qing et al., ICCV 2023) makes of a class name.

    Double quotes are taken out and outer blanks stripped; a prefix and one blank come first. The
    released configurations have no prefix, so that this is the prompt set "name".
    """
    name, first = class_name.replace('"', "").strip(), prefix.strip()
    return f"{first} {name}" if first else name


def caption_words(text: str) -> str:
    """Return a text as ViCLIP's training cleaned captions: lower case, without marks.

    Hyphens and slashes become blanks, and runs of blanks one blank.
    """
    cleaned = text.lower().replace("<person>", "person").translate(_MARKS)
    return " ".join(cleaned.split())


@dataclass(frozen=True)
class PromptSet:
    """A named set of the sentences that stand for a class.

    It has either `templates`, the same for every class with "{}" for its name, or `descriptions`,
    the sentences of each class by its name. The other one is empty. `source` is the file that the
    sentences came from, for messages. `rephrased` says that the descriptions are templates filled
    with rephrased class names.
    """

    name: str
    templates: tuple[str, ...] = ()
    descriptions: Mapping[str, tuple[str, ...]] | None = None
    source: str = ""
    rephrased: bool = False

    def sentences(self, class_name: str) -> list[str]:
        """The sentences of one class, with `class_name` put into templates verbatim.

        In "viclip16" it is put there as `caption_words` leaves it, or verbatim if that is nothing.

        Raises UserError for an empty class name or one that has no descriptions.
        """
        if not class_name.strip():
            raise UserError("a class name is empty: give every class a name")
        if self.descriptions is None:
            if self.name == _CLEANED:
                class_name = caption_words(class_name) or class_name
            return [template.replace("{}", class_name) for template in self.templates]
        key = self._key_of(class_name)
        if key is None:
            raise UserError(
                f"{self.source or self.name} has no sentences for class {class_name!r}: add some"
            )
        return list(self.descriptions[key])

    def _key_of(self, class_name: str) -> str | None:
        """Return the name under which the descriptions have a class: its own, or a spelling."""
        if class_name in (self.descriptions or {}):
            return class_name
        return self._key_by_form.get(comparable(class_name))

    @cached_property
    def _key_by_form(self) -> dict[str, str]:
        return {comparable(name): name for name in self.descriptions or {}}

    def hash(self, class_names: Sequence[str]) -> str:
        """sha256 of the sentences of these classes, in their order."""
        if self.descriptions is None:
            text = "\n".join(line for name in class_names for line in self.sentences(name))
        else:  # the hash must depend on which class a sentence belongs to
            text = json.dumps([self.sentences(name) for name in class_names])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def option(self) -> str:
        """The options that make `extract` and `store add-texts` use this set."""
        if not self.source:
            return f"--prompts {self.name}"
        kind = "--prompts" if self.descriptions is None else "--descriptions"
        own = Path(self.source).stem != self.name
        words = [kind, self.source, *(["--prompt-set-name", self.name] if own else [])]
        return shlex.join(words)

    def require_held(self, store: Store) -> None:
        """Raise UserError if the store made its class texts of this name from other sentences."""
        held = store.class_text(self.name)
        if held.templates and self.templates:  # a merged store's class texts have another hash
            same = held.templates == self.templates
        else:
            same = held.sentences_hash == self.hash(held.names)
        if not same:
            raise UserError(
                f"{store.path} has class texts {self.name!r} that were made from other sentences "
                f"than those of {self.source or 'this program'}: add these under another name, "
                "with --prompt-set-name"
            )

    def require_classes(self, class_names: Sequence[str]) -> None:
        """Raise UserError unless the descriptions have exactly these classes, however spelt."""
        if self.descriptions is None:
            return
        keys = {name: self._key_of(name) for name in class_names}
        missing = [name for name, key in keys.items() if key is None]
        unknown = [name for name in self.descriptions if name not in set(keys.values())]
        if not missing and not unknown:
            return
        if all(name.isascii() and name.isdigit() for name in self.descriptions):
            raise UserError(
                f"{self.source}: its keys are numbers, and which class has which number differs "
                "between lists (published files swap HMDB51's kick with kick ball and sword with "
                "sword exercise): write the class's name as the key, for example "
                f'{{"{class_names[0]}": [...]}}'
            )
        parts = []
        if missing:
            parts.append(f"it lacks {_some(missing)}, {len(missing)} of {len(class_names)} classes")
        if unknown:
            near = meant(unknown[0], missing).strip()
            parts.append(
                f"it has {_some(unknown)}, which are no classes of the data set"
                + (f" ({unknown[0]!r}: {near})" if near else "")
            )
        raise UserError(
            f"{self.source}: {'; '.join(parts)}: every class needs its sentences under its name, "
            "as `mote-cli inspect` lists them"
        )


def as_prompt_set(prompts: str | PromptSet, name: str | None = None) -> PromptSet:
    """Make a prompt set from what a user writes: a set's name, or the path of a template file.

    `name` is the name of a file's set, by default the file's name without its suffix. Raises
    UserError for an unknown set and for a file that holds no templates.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if is_template_file(prompts):
        return read_templates(Path(prompts), name)
    if prompts not in PROMPT_SETS:
        if is_descriptions_file(prompts):
            raise UserError(
                f"{prompts} is no template file: descriptions go with --descriptions FILE"
            )
        raise UserError(
            f"unknown prompt set {prompts!r}: {meant(prompts, PROMPT_SETS)}use one of "
            f"{', '.join(PROMPT_SETS)}, or a file FILE{TEMPLATES_SUFFIX} with one sentence per "
            "line and {} for the class name"
        )
    if name not in (None, prompts):
        raise UserError(f"prompt set {prompts!r} has its own name: leave {name!r} out")
    return PromptSet(prompts, PROMPT_SETS[prompts])


def is_template_file(text: str) -> bool:
    """Whether `text` names a template file rather than a prompt set."""
    return text not in PROMPT_SETS and text.lower().endswith(TEMPLATES_SUFFIX)


def trained_prompt_set(name: str, templates: tuple[str, ...]) -> PromptSet:
    """Return the prompt set that a head was trained with, from the values in the head's file.

    Raises UserError if the file lacks the sentences, because every class had its own.
    """
    if not templates and name not in PROMPT_SETS:
        raise UserError(
            f"the head was trained with sentences of each class (prompt set {name!r}), which new "
            "classes do not have: name a prompt set or a template file with --prompts"
        )
    return PromptSet(name, templates or PROMPT_SETS[name])


def prompt_sets_of(
    prompts: Sequence[str | PromptSet], class_names: Sequence[str] | None = None
) -> tuple[PromptSet, ...]:
    """Return the prompt sets, each once; with `class_names`, check that they have these classes.

    Raises UserError as `as_prompt_set` and `require_classes` do, and for two sets of one name.
    """
    found: dict[str, PromptSet] = {}
    for prompt_set in map(as_prompt_set, prompts):
        if found.setdefault(prompt_set.name, prompt_set) != prompt_set:
            raise UserError(
                f"two prompt sets have the name {prompt_set.name!r}: name one with "
                "--prompt-set-name"
            )
        if class_names is not None:
            prompt_set.require_classes(class_names)
    return tuple(found.values())


def read_templates(path: Path, name: str | None = None) -> PromptSet:
    """Read the prompt set of a template file: a sentence per line with "{}" for the class name.

    Blank lines and lines that begin with "#" are left out. Raises UserError, with the line, for a
    file that cannot be read or is not such a list, and for a name that is taken.
    """
    raw = read_document(path, "name a text file of sentences", limit=TEMPLATES_LIMIT)
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    templates: dict[str, int] = {}
    for number, line in numbered:
        if not line or line.startswith("#"):
            continue
        where = f"{path} line {number}"
        if line.count("{}") != 1:
            raise UserError(
                f"{where}: {quoted(line, 80)} must have {{}} once, where the class name goes"
            )
        _require_length(line, where)
        if line in templates:
            raise UserError(
                f"{where}: {quoted(line, 80)} is line {templates[line]} again: leave one out"
            )
        templates[line] = number
    if not 1 <= len(templates) <= MAX_TEMPLATES:
        raise UserError(
            f"{path} has {len(templates)} sentences: write 1 to {MAX_TEMPLATES}, one per line, "
            "with {} for the class name"
        )
    return PromptSet(_set_name(path, name), tuple(templates), source=str(path))


def read_descriptions(path: Path, name: str | None = None) -> PromptSet:
    """Read the prompt set of a file of descriptions, or of rephrased names (`read_rephrased`).

    `name` is the name of the set, by default the file's name without its suffix. Raises UserError,
    which names the class, for a file that is too large, is not a JSON object, names a class twice,
    has a value that is no list of sentences, an empty list or sentence, or an over-long sentence.
    """
    if path.suffix.lower() == REPHRASED_SUFFIX:
        return read_rephrased(path, name)
    value = read_json(path, f"write {_SHAPE}, every class once", limit=DESCRIPTIONS_LIMIT)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no object with class names: write {_SHAPE}")
    if all(key.isdecimal() and isinstance(text, str) for key, text in value.items()):
        return read_rephrased(path, name)
    descriptions = {key: _sentences(path, key, lines) for key, lines in value.items()}
    return PromptSet(_set_name(path, name), (), descriptions, str(path))


def read_rephrased(path: Path, name: str | None = None) -> PromptSet:
    """Read the prompt set of a file of rephrased class names (`rephrased_names`).

    All of such a name takes the place of the class name in the sentences of "mote28", as in TACO's
    tests (Zhu et al., NeurIPS 2026). `name` as for `read_descriptions`. Raises UserError as
    `rephrased_names`, and for a name that is too long.
    """
    found = {}
    for key, text in rephrased_names(path).items():
        _require_length(text, f"{path}, class {quoted(key, 60)}")
        found[key] = tuple(line.replace("{}", text) for line in PROMPT_SETS[DEFAULT_PROMPTS])
    return PromptSet(_set_name(path, name), (), found, str(path), rephrased=True)


def prompt_sets_from(
    prompts: Sequence[str], descriptions: Sequence[Path], name: str | None = None
) -> tuple[str | PromptSet, ...]:
    """Read the template files and descriptions that a user gave; names of sets stay names.

    `name` is the name of the set that comes from a file. Raises UserError as the readers do, and
    for a `name` unless exactly one file is given.
    """
    files = [*filter(is_template_file, prompts), *map(str, descriptions)]
    if name is not None and len(files) != 1:
        raise UserError(
            f"--prompt-set-name {name!r} names the set of one file, but {len(files)} are given: "
            "name one file, or leave it out"
        )
    return (
        *(read_templates(Path(t), name) if is_template_file(t) else t for t in prompts),
        *(read_descriptions(path, name) for path in descriptions),
    )


def is_descriptions_file(text: str) -> bool:
    """Whether `text` names a file of descriptions or rephrased names rather than a prompt set."""
    return text.lower().endswith((DESCRIPTIONS_SUFFIX, REPHRASED_SUFFIX))


def held_prompt_set(store: Store, text: str) -> str:
    """Return the name of the store's prompt set that `text`, a set's name or a file, means.

    Raises UserError for a file that holds no prompt set, and when the store has no set from that
    file or one with other sentences than the file has now.
    """
    if text in store.prompt_sets or not (is_template_file(text) or is_descriptions_file(text)):
        return text
    prompts = (read_templates if is_template_file(text) else read_descriptions)(Path(text))
    prompts.require_classes(store.class_names)
    prompts.require_held(store)
    return prompts.name


def _set_name(path: Path, name: str | None) -> str:
    """Return the name for the set in a file. Raises UserError for a bad or a built-in name."""
    chosen = path.stem if name is None else name
    if chosen in PROMPT_SETS:
        raise UserError(
            f"{chosen!r} is the name of a prompt set that comes with the program: give the "
            f"sentences of {path} another name with --prompt-set-name"
        )
    try:
        return check_prompt_set(chosen)
    except UserError as error:
        raise UserError(f"{error}; --prompt-set-name gives {path} another name") from error


def _require_length(sentence: str, where: str) -> None:
    """Raise UserError for a sentence too long for any text tower; the tokeniser checks exactly."""
    if len(sentence) > MAX_SENTENCE:
        raise UserError(
            f"{where}: a sentence has {len(sentence)} characters, at most {MAX_SENTENCE} can be "
            f"read (CLIP takes 77 tokens): shorten {quoted(sentence, 40)}"
        )


def _sentences(path: Path, key: str, lines: Any) -> tuple[str, ...]:
    where = f"{path}, class {quoted(key, 60)}"
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
        _require_length(line, where)
    return tuple(line.strip() for line in lines)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quoted(name, 60) for name in names[:_NAMED])
    return f"{shown}, ..." if len(names) > _NAMED else shown
