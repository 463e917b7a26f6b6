"""Sentences that stand for a class in the text tower."""

from __future__ import annotations

from featstore.errors import UserError

# Templates of the MoTE reference (Zhu et al., NeurIPS 2024), in its order and with its spelling
# ("a example"): an average over them is what the published class features are.
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

PROMPT_SETS: dict[str, tuple[str, ...]] = {
    "mote28": tuple(form.format(medium=medium) for medium in _MEDIA for form in _FORMS),
    "name": ("{}",),
    "video": ("a video of {}",),
}


def sentences(prompt_set: str, class_name: str) -> list[str]:
    """The sentences of one class, one per template, with `class_name` put in verbatim.

    Raises UserError for an unknown prompt set or an empty class name.
    """
    if prompt_set not in PROMPT_SETS:
        raise UserError(f"unknown prompt set {prompt_set!r}: use one of {', '.join(PROMPT_SETS)}")
    if not class_name.strip():
        raise UserError("a class name is empty: give every class a name")
    return [template.replace("{}", class_name) for template in PROMPT_SETS[prompt_set]]
