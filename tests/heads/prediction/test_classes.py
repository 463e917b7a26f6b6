"""Which classes a user names with a text or a file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from featstore.errors import UserError
from heads.prediction.classes import read_classes

FILES = {
    "plain.txt": (
        "run\n\n# a comment\ncut, chop\r\n\"say 'no'\"\n",
        ("run", "cut, chop", "say 'no'"),
    ),
    "bom.txt": ("\ufeffrun\njump\n", ("run", "jump")),
    "quotes.txt": ('opening a "thing"\nrun\n', ('opening a "thing"', "run")),
    "no suffix": ("run\njump\n", ("run", "jump")),
    "one column.csv": ('run\n"cut, chop"\n', ("run", "cut, chop")),
    "header.csv": ('id,name\n0,run\n1,"cut, ""chop"""\n', ("run", 'cut, "chop"')),
    "class.csv": ("Class;id\nrun;0\njump;1\n", ("run", "jump")),
    "tabs.tsv": ("id\tclass\n0\trun\n1\tcut, chop\n", ("run", "cut, chop")),
    "list.json": ('["run", "cut, chop"]', ("run", "cut, chop")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = FILES[name]
    Path(name).write_text(text)
    with caplog.at_level(logging.INFO):
        found = read_classes(name)
    assert (found.names, found.descriptions) == (names, None)
    assert f"{name}: {len(names)} classes read from this file" in caplog.text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("run, a dog", ("run", "a dog")),
        ('run, "cut, chop"', ("run", "cut, chop")),
        ("run,\n jump,,", ("run", "jump")),
        ("eat 1.5 apples, txt", ("eat 1.5 apples", "txt")),
        ("x" * 5000 + ",y", ("x" * 5000, "y")),
    ],
)
def test_a_text(text: str, names: tuple[str, ...]) -> None:
    assert read_classes(text).names == names


@pytest.mark.parametrize("name", ["own.json", "own.csv"])
def test_descriptions_become_sentences(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith("json"):
        file.write_text(json.dumps({"run": ["feet, fast"], "sit": ["a chair", "a bench"]}))
    else:
        file.write_text('class,description\nrun,"feet, fast"\nsit,a chair\n')
    found = read_classes(str(file))
    assert found.names == ("run", "sit")
    assert found.descriptions is not None
    assert found.descriptions.sentences("run") == ["feet, fast"]
    assert found.descriptions.sentences("sit")[0] == "a chair"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.txt", "", "names no class"),
        ("c.txt", "\n# only this\n", "names no class"),
        ("c.csv", "class\n", "names no class"),
        ("c.csv", "", "names no class"),
        ("c.json", "[]", "names no class"),
        ("c.json", "{}", "no object with class names"),
        ("c.txt", "run\n", "one class to choose from, 'run'"),
        ("c.txt", "run\nsit\nrun\n", "names 'run' twice"),
        ("c.csv", "class,id\nrun,1\nrun,2\n", "names 'run' twice"),
        ("c.json", '["run", "run"]', "names 'run' twice"),
        ("c.json", '{"run": ["a"], "run": ["b"]}', "'run' twice"),
        ("c.txt", "run, sit, wave\n", "write one class a line"),
        ("c.csv", "run,1\nsit,2\n", "names none of them class"),
        ("c.csv", "class,description\nrun,fast\nsit\n", "row 3 has 1 columns"),
        ("c.csv", "class,description\nrun,fast\nsit,\n", "no description of 'sit'"),
        ("c.csv", "class,id\nrun,1\n,2\n", "class 2 is empty"),
        ("c.json", "[1, 2]", "no list of names"),
        ("c.json", '{"run": "a sentence"}', "write a list of sentences"),
        ("c.json", "[" * 100_000, "is not JSON"),
        ("c.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_file_that_names_no_classes(
    name: str, content: str | bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as error:
        read_classes(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("words.txt", "looks like a file and there is none"),
        ("run, no.CSV", "looks like a file"),
        ("words.json, run", "the file 'words.json' among classes"),
        (" , ", "names no class"),
        ("run", "one class to choose from, 'run'"),
        ("run, sit, run", "'run' twice"),
    ],
)
def test_a_text_that_names_no_classes(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_classes(text)


def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run,sit").mkdir()
    assert read_classes("run,sit").names == ("run", "sit")
