"""Rephrased class names are read by class, from the published layout."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from featstore.errors import UserError
from pipeline.annotations.rephrased_names import rephrased_names
from pipeline.prompts import PROMPT_SETS, prompt_sets_from, read_descriptions

CLIMB = "Climb stairs: A person is ascending or descending a set of stairs"
KICK = "Kick ball: A person is kicking a ball, such as a football"


def listed(folder: Path, *names: str, quoted: bool = True) -> Path:
    file = folder / "reworded.csv"
    lines = [f'{i},"{name}"' if quoted else f"{i},{name}" for i, name in enumerate(names)]
    file.write_text("\n".join(["id,name", *lines]) + "\n")
    return file


@pytest.mark.parametrize("quoted", [True, False])
def test_the_class_stands_before_the_colon(tmp_path: Path, quoted: bool) -> None:
    file = listed(tmp_path, CLIMB, KICK, quoted=quoted)
    assert rephrased_names(file) == {"Climb stairs": CLIMB, "Kick ball": KICK}


def test_the_whole_name_goes_into_the_published_sentences(tmp_path: Path) -> None:
    (prompts,) = prompt_sets_from([], [listed(tmp_path, CLIMB, KICK)])
    assert not isinstance(prompts, str)
    assert (prompts.name, prompts.rephrased, prompts.templates) == ("reworded", True, ())
    prompts.require_classes(["kick_ball", "climb stairs"])  # in any order and spelling
    sentences = prompts.sentences("climb stairs")
    assert sentences == [line.replace("{}", CLIMB) for line in PROMPT_SETS["mote28"]]
    assert prompts.option == f"--descriptions {tmp_path / 'reworded.csv'}"


def test_json_by_number_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "reworded.json"
    file.write_text(json.dumps({"0": CLIMB, "7": KICK}))
    found = read_descriptions(file)
    assert found.rephrased
    assert found.descriptions == read_descriptions(listed(tmp_path, CLIMB, KICK)).descriptions


def test_missing_and_extra_classes_are_named(tmp_path: Path) -> None:
    prompts = read_descriptions(listed(tmp_path, CLIMB, KICK))
    with pytest.raises(UserError, match=r"it lacks 'wave', 1 of 2 classes; it has 'Kick ball'"):
        prompts.require_classes(["climb stairs", "wave"])


def test_names_without_a_sentence_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert rephrased_names(listed(tmp_path, CLIMB, "wave"))["wave"] == "wave"
    assert "1 of 2 names has no sentence, which changes nothing: 'wave'" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("wave", "run"), "has plain class names"),
        ((": A person waves", KICK), "names no class"),
        (("Wave: one hand", "wave: two hands"), "names 0 and 1 are both for class 'wave'"),
        (("",), "must be a number that is not used yet and a class name"),
        ((), "is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rephrased_names(listed(tmp_path, *names))


def test_a_name_that_no_tower_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 1000 can be read"):
        read_descriptions(listed(tmp_path, CLIMB, "run: " + "very " * 300))
