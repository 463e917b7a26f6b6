"""Class descriptions without a language model, and the request for one that writes better ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from featstore.errors import UserError
from pipeline.descriptions.class_descriptions import ClassDescriptions

SPATIAL_TEMPLATES: Final = (
    "a still picture from a video of {}",
    "people, objects and places seen in {}",
    "what {} looks like at one moment",
    "a photo of {} taken from near by",
    "the surroundings in which {} happens",
    "the body and the hands during {}",
    "the objects that are used for {}",
    "a picture of {} taken from far away",
)
"""The spatial sentences of `template_descriptions`, in order; "{}" is the class name."""
TEMPORAL_TEMPLATES: Final = (
    "how {} begins, goes on and ends",
    "the movements of {}, one after another",
    "a video of {} from start to end",
    "the steps of {} in their order",
    "what changes from frame to frame during {}",
    "how fast and in which direction things move in {}",
    "the moment before {} and the moment after it",
    "a movement that is repeated during {}",
)
"""The temporal sentences of `template_descriptions`, in order."""
MOST_TEMPLATES: Final = len(SPATIAL_TEMPLATES)
USUAL_PER_CLASS: Final = 2
"""Sentences of each kind for a class; two were best for MSTA (Chen et al., CVPR 2025)."""

REQUEST: Final = """\
Below is a JSON list of names of actions. Describe each action for a
program that recognises actions in videos. For every action write exactly
{count} "spatial" and exactly {count} "temporal" sentences.

- A spatial sentence says what one still picture of the action shows:
  people, parts of the body, objects and places. It says nothing of time.
- A temporal sentence says how the action proceeds: what moves, in which
  order, and how it begins and ends. It contains the name of the action.
- Each sentence is in English, has at most {words} words, and stands for
  itself. Say what tells this action apart from the others in the list. Do
  not repeat a sentence.

Answer with one JSON object and nothing else. Its keys are the names
exactly as they are written below, each once, in the same order:

{"NAME": {"spatial": [{count} sentences], "temporal": [{count} sentences]}, ...}

The actions:

{classes}
"""
"""What a person gives to any language model; `docs/descriptions.md` shows the same text."""
MOST_WORDS: Final = 18
"""Words that a sentence may have: they fit into the 30 tokens that ViCLIP's text tower takes."""


def template_descriptions(
    class_names: Sequence[str], per_class: int = USUAL_PER_CLASS
) -> ClassDescriptions:
    """Make descriptions from the first templates of each kind, 1 to `MOST_TEMPLATES` of them.

    They say nothing of a class but its name. Raises UserError for another number, and without
    classes.
    """
    if not class_names:
        raise UserError("there are no classes to describe: name some")
    if not 1 <= per_class <= MOST_TEMPLATES:
        raise UserError(
            f"--per-class {per_class}: there are {MOST_TEMPLATES} templates of each kind: take 1 "
            f"to {MOST_TEMPLATES}"
        )
    seen, steps = (
        tuple(tuple(line.replace("{}", name) for line in lines[:per_class]) for name in class_names)
        for lines in (SPATIAL_TEMPLATES, TEMPORAL_TEMPLATES)
    )
    return ClassDescriptions(tuple(class_names), seen, steps)


def request_text(class_names: Sequence[str], per_class: int = USUAL_PER_CLASS) -> str:
    """Return `REQUEST` for these classes and so many sentences of each kind."""
    names = json.dumps(list(class_names), ensure_ascii=False, indent=1)
    filled = REQUEST.replace("{count}", str(per_class)).replace("{words}", str(MOST_WORDS))
    return filled.replace("{classes}", names)
