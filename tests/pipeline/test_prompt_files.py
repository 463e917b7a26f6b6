"""Template files and descriptions: what is read, what is refused, and how classes are embedded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.prompts import (
    MAX_SENTENCE,
    PROMPT_SETS,
    PromptSet,
    as_prompt_set,
    prompt_sets_from,
    prompt_sets_of,
    read_descriptions,
    read_templates,
    trained_prompt_set,
)
from tests.support.worlds.tiny_world import make_encoder

CLASSES = ("kick", "kick ball", "sword")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(str(make_encoder(tmp_path_factory.mktemp("clip") / "tiny")), "fp32", "cpu")


def text_file(folder: Path, text: str | bytes, name: str = "mine.txt") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_a_template_file(tmp_path: Path) -> None:
    file = text_file(tmp_path, "\ufeff# two ways\na clip of {}.\r\n\n  {} seen from afar  \n")
    found = read_templates(file)
    assert found == PromptSet("mine", ("a clip of {}.", "{} seen from afar"), source=str(file))
    assert found.sentences("climb {} up") == [
        "a clip of climb {} up.",
        "climb {} up seen from afar",
    ]
    assert read_templates(file, "other").name == "other"
    assert as_prompt_set(str(file)) == found
    assert found.option == f"--prompts {file}"
    assert read_templates(file, "other").option == f"--prompts {file} --prompt-set-name other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 sentences"),
        ("a clip\n", r"line 1: 'a clip' must have \{\} once"),
        ("{}\n{} {}\n", r"line 2: .* must have \{\} once"),
        ("{}\na {}\n{}\n", "line 3: '{}' is line 1 again"),
        ("{}" + "x" * MAX_SENTENCE, "line 1: a sentence has 1002 characters"),
        (b"\xff{}\n", "is not UTF-8"),
        ("{} x\n" * 300_000, "has more than 131072 bytes"),
        ("".join(f"{{}} {i}\n" for i in range(1001)), "has 1001 sentences"),
    ],
)
def test_template_files_that_are_none(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_templates(text_file(tmp_path, text))


def test_names_of_sets(tmp_path: Path) -> None:
    file = text_file(tmp_path, "{}\n", "mote28.txt")
    with pytest.raises(UserError, match="'mote28' is the name of a prompt set that comes with"):
        read_templates(file)
    with pytest.raises(UserError, match="--prompt-set-name gives"):
        read_templates(text_file(tmp_path, "{}\n", "my set.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        as_prompt_set(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="has its own name: leave 'x' out"):
        as_prompt_set("video", "x")
    with pytest.raises(UserError, match="--prompt-set-name 'x' names the set of one file, but 0"):
        prompt_sets_from(["video"], [], "x")
    one = text_file(tmp_path, "{}\n", "one.txt")
    deep = tmp_path / "deep"
    deep.mkdir()
    other = text_file(deep, "a {}\n", "one.txt")
    found = prompt_sets_of(prompt_sets_from(["video", str(one), str(one)], []))
    assert [prompts.name for prompts in found] == ["video", "one"]
    with pytest.raises(UserError, match="two prompt sets have the name 'one'"):
        prompt_sets_of(prompt_sets_from([str(one), str(other)], []))


DESCRIPTIONS = {
    "kick": ["A leg swings."],
    "kick ball": ["A ball flies.", " A foot. "],
    "sword": ["x"],
}


def json_file(folder: Path, value: Any) -> Path:
    return text_file(folder, value if isinstance(value, str) else json.dumps(value), "mine.json")


def test_descriptions(tmp_path: Path) -> None:
    file = json_file(tmp_path, DESCRIPTIONS)
    found = read_descriptions(file)
    found.require_classes(CLASSES)
    assert found.name == "mine"
    assert found.templates == ()
    assert found.sentences("kick ball") == ["A ball flies.", "A foot."]
    assert found.option == f"--descriptions {file}"
    with pytest.raises(UserError, match="has no sentences for class 'jump'"):
        found.sentences("jump")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**DESCRIPTIONS, "jump": ["x"]}, "it has 'jump', which are no classes of the data set"),
        ({"kick": ["x"], "sword": ["x"]}, "it lacks 'kick ball', 1 of 3 classes"),
        (
            {"kick": ["x"], "sword": ["x"], "kickball": ["x"]},
            r"it has 'kickball'.*'kickball': did you mean 'kick ball'\?",
        ),
        ({"0": ["x"], "1": ["x"], "2": ["x"]}, r"its keys are numbers.*kick with kick ball.*write"),
        ({**DESCRIPTIONS, "kick": []}, "class 'kick': it has 0 sentences"),
        ({**DESCRIPTIONS, "kick": "A leg."}, "its value is of type str: write a list"),
        ({**DESCRIPTIONS, "kick": ["x", 3]}, "class 'kick': number 2 is 3, not a sentence"),
        ({**DESCRIPTIONS, "kick": ["  "]}, "number 1 is ' ', not a sentence"),
        ({**DESCRIPTIONS, "kick": ["x" * 1001]}, "a sentence has 1001 characters"),
        ('{"kick": ["a"], "kick": ["b"]}', "has 'kick' twice"),
        ({" ": ["x"]}, "a class name is empty"),
        ([], "holds no object"),
        ({}, "holds no object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"kick": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"kick": NaN}', "NaN, which is no finite number"),
        ('"' + "x" * 2**24 + '"', "has more than 16777216 bytes"),
    ],
)  # fmt: skip
def test_descriptions_that_do_not_fit(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_descriptions(json_file(tmp_path, value)).require_classes(CLASSES)


def test_numbers_may_be_class_names(tmp_path: Path) -> None:
    file = json_file(tmp_path, {"0": ["a zero"], "1": ["a one"]})
    found = read_descriptions(file)
    found.require_classes(("0", "1"))
    assert found.sentences("1") == ["a one"]


@settings(max_examples=50)
@given(st.dictionaries(st.text(min_size=1), st.lists(st.text())))
def test_any_object_is_read_or_refused(tmp_path_factory: Any, value: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(value))
    refused = not value or any(
        not name.strip() or not lines or not all(line.strip() for line in lines)
        for name, lines in value.items()
    )
    if refused:
        with pytest.raises(UserError, match=r"^[^\n]*$"):
            read_descriptions(file)
        return
    lines = {name: tuple(line.strip() for line in lines) for name, lines in value.items()}
    assert read_descriptions(file).descriptions == lines


def test_the_hash_is_of_the_sentences(tmp_path: Path) -> None:
    video = as_prompt_set("video")
    same = read_templates(text_file(tmp_path, "a video of {}\n"))
    assert video.hash(CLASSES) == same.hash(CLASSES) != video.hash(CLASSES[::-1])
    one = PromptSet("x", (), {"a": ("1", "2"), "b": ("3",)})
    other = PromptSet("x", (), {"a": ("1",), "b": ("2", "3")})
    assert one.hash(("a", "b")) != other.hash(("a", "b"))  # which sentence is whose counts


def test_classes_are_means_of_unit_sentences(encoder: Encoder) -> None:
    prompts = PromptSet("x", (), {"a": ("one", "two words", "three"), "b": ("four",)})
    made = encoder.class_embeddings(["b", "a"], prompts)
    rows = torch.nn.functional.normalize(
        encoder.encode_text(["four", "one", "two words", "three"]), dim=-1
    )
    mean = rows[1:].mean(0)
    torch.testing.assert_close(made[0], rows[0])
    torch.testing.assert_close(made[1], mean / mean.norm())
    # As many sentences or not, the arithmetic is that of the 28 prompts.
    torch.testing.assert_close(
        encoder.class_embeddings(["run"], "mote28"),
        encoder.class_embeddings(["run"], PromptSet("y", PROMPT_SETS["mote28"])),
        rtol=0,
        atol=0,
    )
    with pytest.raises(UserError, match=r"has 90 tokens, the encoder tiny takes 75"):
        encoder.class_embeddings(["a"], PromptSet("x", (), {"a": ("run " * 90,)}))


def test_what_a_head_was_trained_with() -> None:
    assert trained_prompt_set("mote28", ()).templates == PROMPT_SETS["mote28"]
    assert trained_prompt_set("mine", ("a {}",)).templates == ("a {}",)
    with pytest.raises(UserError, match="sentences of each class"):
        trained_prompt_set("mine", ())
