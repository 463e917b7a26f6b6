"""Whatever state a workspace is in: each command that is printed as the next one works there."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from featstore import Workspace
from heads.evaluation import next_steps
from heads.evaluation.next_steps import first_extraction
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.foreign_tars import labelled_tars
from tests.support.worlds.tiny_world import (
    SHORT_TRAINING,
    World,
    make_clip,
    make_encoder,
    rewrite_origin,
)

SMALL = {
    "extract": ("--precision", "fp32", "--workers", "1"),
    "train-head": (*SHORT_TRAINING, "--precision", "fp32"),
}


def videos(folder: Path, *names: str, splits: tuple[str, ...] = ("",), each: int = 2) -> Path:
    """Class folders, in folders of splits where these have names."""
    number = 0
    for split in splits:
        for name in names:
            for _ in range(each):
                make_clip(folder / split / name / f"{number}.mp4", number)
                number += 1
    return folder


def run(words: str) -> dict[str, object]:
    """Run a printed command with little work; return its JSON."""
    program, command, *rest = shlex.split(words)
    assert program == "mote-cli"
    result = mote(command, *rest, *SMALL.get(command, ()), "--json")
    assert result.code == 0, f"{words}: {result.err}"
    value: dict[str, object] = result.json
    return value


def follow(root: Path, first: object = None) -> list[str]:
    """Run `first`, and what is printed as next after it, then what `status` names, to the end."""
    taken: list[str] = []
    waiting = [first] if first else []
    while True:
        steps = done("status", "--root", root)["next"]
        waiting += [step["command"] for step in steps if step["command"]]
        left = [words for words in waiting if words not in taken]
        if not left:
            return [shlex.split(words)[1] for words in taken]
        words = left[0]
        value = run(words)
        taken.append(words)
        following = value.get("next")
        waiting = [following] if isinstance(following, str) else []
        assert len(taken) < 12, taken


def packed(root: Path, folder: Path, *more: str) -> object:
    """Pack a folder; return the next command."""
    return done("pack", "--dataset", "own", "--videos", folder, *more, "--root", root)["next"]


@pytest.fixture
def root(inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with an encoder that is not the default one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs[1], tmp_path / "a root/encoders/tiny")
    return tmp_path / "a root"


FIVE = ("run", "sit", "hop", "nod", "wave")
STATES: dict[str, tuple[dict[str, object], list[str]]] = {
    "only val": ({"splits": ("val",)}, ["extract", "eval"]),
    "only test": ({"splits": ("test",)}, ["extract", "eval"]),
    "no splits": ({}, ["extract", "train-head", "inspect"]),
    "one class": ({"names": ("run",)}, ["extract", "inspect"]),
    "one class, two splits": ({"names": ("run",), "splits": ("train", "val")}, []),
    "three classes": ({"names": FIVE[:3], "splits": ("train", "val")}, []),
    "five classes": ({"splits": ("train", "val")}, ["extract", "train-head", "eval"]),
    "one video a class": ({"each": 1}, []),
    "one video a class, test": ({"each": 1, "splits": ("train", "test")}, []),
}


@pytest.mark.parametrize("state", STATES)
def test_own_folders(root: Path, tmp_path: Path, state: str) -> None:
    how, wanted = STATES[state]
    how = {"names": FIVE, **how}
    folder = videos(tmp_path / "v", *how.pop("names"), **how)  # type: ignore[arg-type,misc]
    first = packed(root, folder)
    assert "--encoder tiny" in str(first)
    taken = follow(root, first)
    assert taken[0] == "extract"
    if wanted:
        assert taken == wanted
    if "train-head" in taken and ("test" in state or "classes" in state):
        assert "eval" in taken


def test_what_the_demo_left_is_no_example_for_own_videos(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(root)
    tiny = first_extraction(workspace, "own")
    assert tiny.encoder == "tiny"
    for number, name in enumerate(("demo-finetuned-0-2", "demo-clip"), start=1):
        shutil.copytree(root / "encoders/tiny", root / "encoders" / name)
        os.utime(root / "encoders" / name, (2**31, 2**31 + number))
    assert first_extraction(workspace, "demo-new-1").encoder == "demo-clip"
    assert first_extraction(workspace, "own") == tiny
    origin = SimpleNamespace(
        dataset="demo-known-0", encoder="demo-clip", sampling="uniform:16", crops=1, frames=8,
        prompt_set="name", class_names=None, adapted_encoder="",
    )  # fmt: skip
    card = SimpleNamespace(origin=origin, config=SimpleNamespace(kind="mote"))
    monkeypatch.setattr(next_steps, "cards", lambda _: [card])
    assert first_extraction(workspace, "demo-new-1").prompts == "name"
    assert first_extraction(workspace, "own") == tiny
    origin.dataset = "clips"  # own videos, with the demo's encoder by choice
    assert first_extraction(workspace, "own").encoder == "demo-clip"


def test_what_the_next_command_has_to_fetch_is_said_before_it(root: Path, tmp_path: Path) -> None:
    shown = videos(tmp_path / "v", *FIVE, each=1)
    pack = ("pack", "--dataset", "own", "--videos", shown, "--root", root)
    assert "needs" not in done(*pack)
    shutil.rmtree(root / "encoders/tiny")
    found = done(*pack)
    assert "ViT-B-16/openai" in found["next"]
    assert found["needs"].startswith("the weights of ViT-B-16/openai, once, from the model hub")
    assert "`mote-cli demo`" in found["needs"]
    (step,) = done("status", "--root", root)["next"]
    assert step["missing"] == f"packed, not extracted, which needs {found['needs']}"
    printed = mote(*pack, width=80).out.splitlines()
    names = [line.split()[0] for line in printed if line[:1].strip()]
    assert names.index("needs") < names.index("next")


def test_packing_without_splits_says_what_a_test_needs(root: Path, tmp_path: Path) -> None:
    shown = mote("pack", "--dataset", "own", "--videos", videos(tmp_path / "v", *FIVE))
    assert "eval --closeset" in shown.out
    parts = videos(tmp_path / "w", *FIVE, splits=("train", "val"))
    assert "eval --closeset" not in mote("pack", "--dataset", "two", "--videos", parts).out


def test_videos_without_labels(root: Path, tmp_path: Path) -> None:
    for number in range(2):
        make_clip(tmp_path / f"v/{number}.mp4", number)
    assert follow(root, packed(root, tmp_path / "v")) == ["extract", "inspect"]


def test_a_known_name_without_labels_serves_no_protocol(root: Path, tmp_path: Path) -> None:
    make_clip(tmp_path / "v/1.mp4", 1)
    made = done(
        *("pack", "--dataset", "k400", "--videos", tmp_path / "v", "--unlabelled", "--root", root)
    )
    assert "protocols" not in run(made["next"])


def unfinished(folder: Path) -> None:
    """As packing leaves a data set when it is killed before the end."""
    (folder / "dataset.json").unlink()
    for record in sorted((folder / ".packing").glob("*-000000.json"))[:1]:
        record.unlink()


def test_unfinished_packing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos(tmp_path / "my v", *FIVE)
    listed = "".join(f"{name}/{n * 2}.mp4,{name}\n" for n, name in enumerate(FIVE))
    (tmp_path / "a list.csv").write_text(listed)
    options = ("--annotations", "a list.csv", "--seed", "3", "--class-names-as", "raw")
    packed(root, Path("my v"), *options)
    unfinished(root / "datasets/own")
    monkeypatch.chdir("/")
    (step,) = (s for s in done("status", "--root", root)["next"] if s["about"] == "own")
    assert step["missing"] == "packing is not finished"
    assert step["command"] in refused(2, "extract", "--dataset", "own", "--root", root)
    assert step["command"] in refused(2, "eval", "--closeset", "own", "--root", root)
    assert follow(root)[:2] == ["pack", "extract"]


def test_unfinished_packing_of_tars(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled_tars(tmp_path / "tars")
    patterns = ("--tars", "train=tars/*0.tar", "--tars", "val=tars/clips-{000001..000001}.tar")
    done("pack", "--dataset", "own", *patterns, "--root", root)
    unfinished(root / "datasets/own")
    monkeypatch.chdir("/")
    taken = follow(root)
    assert taken == ["pack", "extract", "train-head", "eval"]
    assert done("inspect", "own", "--root", root)["splits"] == {"train": 6, "val": 6}


def test_unfinished_packing_whose_command_is_not_known(root: Path, tmp_path: Path) -> None:
    """As an earlier version, or Python code, leaves it."""
    labelled_tars(tmp_path / "tars")
    done("pack", "--dataset", "own", "--tars", "tars/*.tar", "--root", root)
    unfinished(root / "datasets/own")
    note = root / "datasets/own/.packing/command.json"
    for content in (None, '{"words": [1]}', "[", '{"words": "x"}'):
        note.unlink() if content is None else note.write_text(content)
        (step,) = (s for s in done("status", "--root", root)["next"] if s["about"] == "own")
        assert step["command"] is None
        assert "pack --dataset own --tars PATTERN" in step["missing"]
        assert "--videos" not in refused(2, "extract", "--dataset", "own", "--root", root)


def test_unfinished_extraction(root: Path, tmp_path: Path) -> None:
    folder = videos(tmp_path / "v", *FIVE, splits=("train", "val"))
    words = str(packed(root, folder, "--samples-per-shard", "4"))
    part = run(f"{words} --partition 0/2")
    assert "extract" in str(part["next"])
    assert follow(root, part["next"]) == ["extract", "train-head", "eval"]


@pytest.mark.parametrize("change", ["trained", "imported", "few shots"])
def test_heads(own: World, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.root.parent)
    make_encoder(own.root / "encoders/tiny")
    place = ("--root", own.root)
    for name in ("mean", "transformer"):
        shutil.rmtree(own.root / f"heads/clips-{name}")
    if change == "imported":
        shutil.rmtree(own.root / "features")
        run_dir = own.root / "heads/clips-mote"
        rewrite_origin(run_dir / "head.safetensors", encoder="tiny", sampling="", dataset="")
    if change == "few shots":
        shutil.rmtree(own.root / "heads")
        done(
            *("eval", "--fewshot", "clips", "--shots", "1", "--head", "none")[:5],
            *("--epochs", "1", "--batch-size", "4", *place),
        )
    taken = follow(own.root)
    assert {"trained": "eval", "imported": "extract"}.get(change, taken[0]) == taken[0]


@pytest.mark.parametrize("what", ["first", "inspect"])
def test_nothing_is_printed_as_a_dictionary(root: Path, tmp_path: Path, what: str) -> None:
    folder = videos(tmp_path / "v", *FIVE)
    (folder / "run/broken.mp4").write_bytes(b"no video")
    words = packed(root, folder, "--max-failures", "1")
    if what == "first":
        mote(*shlex.split(str(words))[1:], *SMALL["extract"], "--max-failures", "1")
    store = [*(root / "features/own").glob("*.zarr")]
    for path in (root / "datasets/own", *store):
        shown = mote("inspect", path)
        assert shown.code == 0
        assert "{" not in shown.out
        assert "run%2Fbroken: " in shown.out
