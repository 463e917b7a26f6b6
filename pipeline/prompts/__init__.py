"""Class names -> sentences: sets of templates, and sentences of each class's own."""

from __future__ import annotations

from featstore.format.class_texts import DEFAULT_PROMPTS
from pipeline.prompts.descriptions import (
    held_prompt_set,
    is_descriptions_file,
    prompt_sets_from,
    read_descriptions,
)
from pipeline.prompts.sets import (
    MAX_SENTENCE,
    MAX_TEMPLATES,
    PROMPT_SETS,
    TEMPLATES_LIMIT,
    TEMPLATES_SUFFIX,
    PromptSet,
    as_prompt_set,
    is_template_file,
    named_prompt_set,
    prompt_sets_of,
    read_templates,
    sentences,
    trained_prompt_set,
)

__all__ = [
    "DEFAULT_PROMPTS",
    "MAX_SENTENCE",
    "MAX_TEMPLATES",
    "PROMPT_SETS",
    "TEMPLATES_LIMIT",
    "TEMPLATES_SUFFIX",
    "PromptSet",
    "as_prompt_set",
    "held_prompt_set",
    "is_descriptions_file",
    "is_template_file",
    "named_prompt_set",
    "prompt_sets_from",
    "prompt_sets_of",
    "read_descriptions",
    "read_templates",
    "sentences",
    "trained_prompt_set",
]
