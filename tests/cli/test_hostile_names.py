"""Every command, given names that are made to act on a terminal, a shell or a file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli.main import COMMANDS
from featstore.errors import safe_text
from tests.support.processes.command_line import mote
from tests.support.worlds.tiny_world import World

NAMES = {
    "escape": "\x1b[31mred\x1b]0;t\x07",
    "one byte escape": "\x9b2J",
    "direction": "\u202egpj.\u2066x",
    "lines": "a\nerror: b\r\nc\u2028d",
    "shell": "'; rm -rf ~ #$(id)`id`",
    "quotes": "\"a\" 'b'",
    "dash": "-rf",
    "option": "--root",
    "formula": "=cmd|' /C calc'!A1",
    "markup": "[red]x[/red] :bomb: %s {0}",
    "outside": "../../outside",
    "long": "x" * 5000,
    "bytes": os.fsdecode(b"\xff\xfe\x1b[2J"),
    "nothing": "",
}

# {} is the name; every command must be here. What is not an option stands behind "--".
GIVEN: dict[str, tuple[str, ...]] = {
    "demo": ("--only={}",),
    "doctor": ("--device={}",),
    "status": ("-- {}",),
    "inspect": ("-- {}", "-- ROOT/{}"),
    "rm": ("store -- {}", "head -- {}", "dataset -- {}", "encoder -- {}", "-- {} x"),
    "pack": (
        *("--dataset={} --videos=VIDEOS", "--dataset=d --videos=ROOT/{}", "--dataset=d --tars={}"),
        *("--dataset=d --videos=VIDEOS --annotations={}", "--dataset=d -- {}"),
        *("--dataset=d --videos=VIDEOS --label-map={}", "--dataset=d --tars=a --label-field={}"),
    ),
    "extract": (
        *("--dataset={}", "--dataset=clips --encoder={}", "--dataset=clips --sampling={}"),
        *(
            "--dataset=clips --split={}",
            "--dataset=clips --prompts={}",
            "--dataset=clips --tier={}",
        ),
        *("--dataset=clips --descriptions={}", "--dataset=clips --engine={}"),
    ),
    "train-head": (
        *("--dataset={}", "--dataset=clips --name={}", "--dataset=clips --recipe={}"),
        *("--dataset=clips --head={}", "--dataset=clips --split={}", "--dataset=clips --store={}"),
        *("--dataset=clips --from-head={}", "--dataset=clips --validation={} --name=n"),
    ),
    "finetune": ("--dataset={}", "--dataset=clips --name={}", "--dataset=clips --recipe={}"),
    "eval": (
        *("--closeset={}", "--zeroshot={}", "--protocol={}", "--closeset=clips --head={}"),
        *("--closeset=clips --store={}", "--closeset=clips --views={}", "--fewshot={}"),
        *("--closeset=clips --sweep={}", "--fewshot=clips --lists-from={}"),
    ),
    "compare": ("-- {} clips-mote", "-- ROOT/{} clips-mote"),
    "tradeoff": ("-- {}", "--closeset={} -- clips-mote"),
    "predict": (
        *("--classes=a,b -- {}", "--classes=a,b -- ROOT/{}", "--classes={} -- VIDEOS"),
        *("--head={} -- VIDEOS", "--list={}", "--head=mean --classes=a,b --encoder={} -- VIDEOS"),
    ),
    "import-checkpoint": ("--name=n -- {}", "--name={} -- ROOT/x"),
    "export": ("--out=ROOT/x -- {}",),
    "descriptions": (
        *("check --dataset={} -- ROOT/x", "check --dataset=clips -- {}"),
        *("template --dataset={} -o x", "template --classes={} -o x"),
        *("check --dataset=clips --encoder={} -- ROOT/x", "import --classes={} -o x -- a b"),
    ),
    "verify": ("-- {}",),
    "protocols": ("show -- {}", "-- {}"),
    "store": (
        *("merge --out=x.zarr -- {} clips", "convert --codec={} --out=x.zarr -- STORE"),
        *("quantize --out=x.zarr -- {}", "add-texts --prompts={} -- STORE", "-- {}"),
        *("export --out=ROOT/x --split={} -- STORE", "add-tars --dataset={} -- STORE"),
    ),
}
WITHOUT_ROOT = ("demo", "protocols")


def test_every_command_is_here() -> None:
    assert GIVEN.keys() == COMMANDS.keys()


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_in_every_command(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It ends with one line, in which the name cannot act, and changes nothing."""
    monkeypatch.chdir(tmp_path)
    name = NAMES[kind]
    known = {
        "{}": name,
        "ROOT": str(world.root),
        "STORE": str(world.store),
        "VIDEOS": str(world.videos),
    }
    before = sorted(path.name for path in world.root.rglob("*"))
    for command, templates in GIVEN.items():
        for template in templates:
            if not name and any(word in template for word in ("ROOT/", "clips", "VIDEOS")):
                continue  # an option without a value is not given, and the work would begin
            words = [replaced(word, known) for word in template.split(" ")]
            place = [] if command in WITHOUT_ROOT else ["--root", str(world.root)]
            result = mote(command, *place, *words)
            said = f"{command} {template}"
            for text in (result.out, result.err):
                assert all(line == safe_text(line) for line in text.split("\n")), said
            assert result.code == 2, f"{said}: {result.err}"
            assert result.out == "", said
            assert len(result.error) < 1100, said
    assert sorted(path.name for path in world.root.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def replaced(word: str, known: dict[str, str]) -> str:
    for mark, value in known.items():
        word = word.replace(mark, value)
    return word
