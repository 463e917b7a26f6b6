"""Prompt sets: the authors' 28 sentences, word for word, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import open_clip
import pytest

from featstore.errors import UserError
from pipeline.prompts import PROMPT_SETS, as_prompt_set, caption_words


def test_the_28_sentences_of_the_method() -> None:
    written = as_prompt_set("mote28").sentences("juggling balls")
    assert len(written) == 28
    assert written[0] == "a photo of juggling balls."
    assert written[7:14] == [
        "a video of juggling balls.",
        "a video of a person juggling balls.",
        "a video of a person using juggling balls.",
        "a video of a person doing juggling balls.",
        "a video of a person during juggling balls.",
        "a video of a person performing juggling balls.",
        "a video of a person practicing juggling balls.",
    ]
    assert written[14] == "a example of juggling balls."
    assert written[27] == "a demonstration of a person practicing juggling balls."


@pytest.mark.parametrize("data_set", ["ucf101", "k600_split1"])
def test_tokens_are_the_authors(data_set: str, golden: Path) -> None:
    case = json.loads((golden / "token_hashes.json").read_text())[data_set]
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    per_class = [as_prompt_set("mote28").sentences(name) for name in case["classes"]]
    rows = [tokenizer([texts[prompt] for texts in per_class]) for prompt in range(28)]
    tokens = [row.numpy().astype("<i8") for row in rows]
    assert [len(tokens), *tokens[0].shape] == case["shape"]
    digest = hashlib.sha256(b"".join(row.tobytes() for row in tokens)).hexdigest()
    assert digest == case["sha256_int64_C_order"]


def test_small_sets_and_braces_in_names() -> None:
    assert as_prompt_set("name").sentences("a {} b") == ["a {} b"]
    assert as_prompt_set("video").sentences("surfing") == ["a video of surfing"]
    assert all(len(set(templates)) == len(templates) for templates in PROMPT_SETS.values())


# The sentences as they are published, before the cleaning that ViCLIP's captions went through.
VICLIP = (
    *("a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action"),
    *("{} this is an action", "{}, a video of action", "Playing action of {}", "{}"),
    *("Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}"),
    *("Can you recognize the action of {}?", "Video classification of {}", "A video of {}"),
    *("The man is {}", "The woman is {}"),
)


@pytest.mark.parametrize("name", ["tai-chi/karate", "Throwing (a) Ball!", 'he\'s "up"', "wave"])
def test_the_16_sentences_of_viclip_are_cleaned_with_the_name(name: str) -> None:
    found = as_prompt_set("viclip16").sentences(name)
    assert found == [caption_words(sentence.replace("{}", name)) for sentence in VICLIP]
    assert as_prompt_set("video").sentences(name) == [f"a video of {name}"]
    assert as_prompt_set("viclip16").sentences("?!")[7] == "?!"  # never an empty sentence


def test_wrong_names_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"unknown prompt set 'mote': did you mean mote28\? use one of mote28"
    ):
        as_prompt_set("mote").sentences("surfing")
    with pytest.raises(UserError, match="class name is empty"):
        as_prompt_set("name").sentences("  ")
