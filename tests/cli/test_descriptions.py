"""`mote-cli descriptions`: template, check and import, as a user types them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import WORDS, World


def test_from_a_template_over_an_answer_to_a_check(world: World, tmp_path: Path) -> None:
    made, ask, place = tmp_path / "mine.json", tmp_path / "ask.txt", ("--root", world.root)
    words = ("descriptions", "template", "--dataset", "clips", "--out", made, *place)
    value = done(*words, "--prompt", ask)
    assert value["classes"] == len(WORDS)
    assert all(json.dumps(name) in ask.read_text() for name in WORDS)
    made.rename(ask.with_suffix(".json"))  # as if a language model had answered with it
    _, *follow = shlex.split(value["then"])
    checked = done(*follow)
    assert (checked["ok"], checked["hash"]) == (True, value["hash"])
    assert value["next"].startswith("mote-cli finetune --dataset clips ")
    assert f" --method msta --guides {made}" in value["next"]
    assert shlex.split(follow[2])[0] in checked["next"]
    assert checked["sentences"] == 4 * len(WORDS)
    printed = mote(*words, width=80)
    assert printed.code == 0
    request = printed.out[printed.out.index("Below is") :]  # before it stand paths
    assert max(map(len, request.splitlines())) <= 80
    assert len(request.splitlines()) == len(value["prompt"].splitlines())  # no line is broken
    assert '"climb stairs"' in printed.out


def test_a_check_lists_every_fault_and_ends_with_1(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, place = Path("mine.json"), ("--root", world.root)
    done("descriptions", "template", "--dataset", "clips", "-o", file, *place)
    value = json.loads(file.read_text())
    value["climb stars"] = value.pop("climb stairs")
    value["run"]["spatial"] = ["\x1b[31mred", " ".join(["word"] * 76)]
    file.write_text(json.dumps(value))
    tower = ("--encoder", world.encoder)
    words = ("descriptions", "check", file, "--dataset", "clips", *tower, *place)
    checked = done(*words, code=1)
    assert {found["class_name"] for found in checked["wrong"]} == {
        "climb stairs",
        "climb stars",
        "run",
    }
    assert (checked["ok"], checked["room"], checked["longest"]["tokens"]) == (False, 75, 76)
    result = mote(*words, width=80)
    assert result.code == 1
    assert "did you mean 'climb stairs'?" in " ".join(result.out.split())
    assert max(map(len, result.out.splitlines())) <= 80
    assert "\x1b" not in result.out


def test_classes_from_a_list_and_an_import(tmp_path: Path) -> None:
    names, out = tmp_path / "names.csv", tmp_path / "out.json"
    names.write_text("id,name\n0,kick\n1,kick_ball\n")
    for kind in "st":
        lines = {"0": [f"{kind}: a kick ball"], "1": [f"{kind}: a kick"]}
        (tmp_path / f"1_{kind}_description_hmdb.json").write_text(json.dumps(lines))
    files = [tmp_path / f"1_{kind}_description_hmdb.json" for kind in "st"]
    words = ("descriptions", "import", *files, "--classes", names)
    value = done(*words, "-o", out)
    assert [exchange["exchanged"] for exchange in value["exchanges"]] == [True]
    assert json.loads(out.read_text())["kick"]["spatial"] == ["s: a kick"]
    assert done("descriptions", "check", out, "--classes", names)["ok"]
    assert "exists already" in refused(2, *words, "-o", out)
    assert "descriptions import" in refused(2, *("descriptions", "check", files[0]), *words[-2:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "FILE"), "--dataset NAME or with --classes FILE"),
        (("check", "FILE", "--classes", "a,b", "--dataset", "x"), "one of them"),
        (("check", "nothere.json", "--classes", "a,b"), "cannot be read"),
        (("check", "FILE", "--dataset", "nothere"), "nothere"),
        (("check", "FILE", "--classes", "nothere.txt"), "there is none"),
        (("template", "-o", "FILE", "--classes", "a,b"), "exists already"),
        (("template", "-o", "new.json", "--classes", "a,b", "--per-class", "9"), "take 1 to 8"),
        (("template", "-o", "n.json", "--classes", "a,b", "--prompt", "FILE"), "another file"),
        (("import", "FILE", "FILE", "--classes", "nothere", "-o", "new.json"), "nothere"),
    ],
)
def test_wrong_words_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text('{"a": {"spatial": ["x"], "temporal": ["y"]}}')
    assert message in refused(2, "descriptions", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
