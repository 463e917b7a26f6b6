"""Files and names made to do harm: one line of error, nothing built, nothing acts on a terminal."""

from __future__ import annotations

import csv
import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import safe_text
from featstore.files.tables import csv_rows
from tests.support.processes.command_line import Result, done, mote
from tests.support.worlds.tiny_world import (
    CLIP,
    SHORT_TRAINING,
    World,
    make_clip,
    make_encoder,
    packed_workspace,
)

DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_OBJECT = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000


def harmless(result: Result) -> Result:
    """Return the result of a command that printed nothing a terminal would obey."""
    for text in (result.out, result.err):
        assert all(line == safe_text(line) for line in text.split("\n"))
    return result


def refusal(code: int, *arguments: str | Path) -> str:
    result = harmless(mote(*arguments))
    assert result.code == code, result.err
    assert result.out == ""
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    return result.error


def encoder_with(folder: Path, change: dict[str, Any]) -> Path:
    """An encoder folder whose config differs in one entry of `vision_cfg`, `text_cfg` or itself."""
    make_encoder(folder)
    config = {**CLIP, **{name: v for name, v in change.items() if not isinstance(v, dict)}}
    for part, entries in change.items():
        if isinstance(entries, dict):
            config[part] = {**CLIP[part], **entries}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dim": 10**9}, "embed_dim is 1000000000"),
        ({"vision_cfg": {"width": 10**9}}, "width is 1000000000"),
        ({"vision_cfg": {"layers": 10**6}}, "layers is 1000000"),
        ({"vision_cfg": {"layers": [10**6, 1, 1, 1]}}, "layers is 1000000"),
        ({"vision_cfg": {"layers": [1] * 10**5}}, "lists 100000 values"),
        ({"vision_cfg": {"image_size": 10**6}}, "image_size is 1000000"),
        ({"vision_cfg": {"image_size": [32, 10**6]}}, "image_size is 1000000"),
        ({"vision_cfg": {"mlp_ratio": 1e9}}, "mlp_ratio is 1000000000.0"),
        ({"vision_cfg": {"attn_pooler_queries": 10**12}}, "attn_pooler_queries is 1"),
        ({"text_cfg": {"vocab_size": 10**9}}, "vocab_size is 1000000000"),
        ({"text_cfg": {"context_length": 10**6}}, "context_length is 1000000"),
        ({"text_cfg": {"width": -(10**30)}}, "width is -1"),
    ],
)
def test_absurd_sizes_of_an_encoder(
    own: World, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = encoder_with(tmp_path / "hostile", change)
    line = refusal(2, "extract", "--dataset", "clips", "--encoder", folder, "--root", own.root)
    assert words in line
    assert str(folder) in line


RECIPES = {
    "deep": b"[head]\na = " + DEEP,
    "dotted": b"[head]\n" + b".".join([b"a"] * 5000) + b" = 1",
    "bytes": b"\xff\x00",
    "layers": b"[head]\nlayers = 1000000000\n",
    "digits": b"[head]\nlayers = " + b"9" * 3000,
    "epochs": b"[training]\nepochs = 1000000000\n",
    "batch": b"[training]\nbatch_size = " + b"9" * 400,
    "lr": b"[training]\nlr = " + b"9" * 400,
    "nan": b"[training]\nlr = nan\n",
    "temperatures": b"[head]\ntemperatures = [" + b"9" * 400 + b"]\n",
    "large": b"#" * 10**6,
    "escape": b'[head]\nkind = "\\u001b[31m\\u202e"\n',
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(own: World, tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.toml"
    path.write_bytes(RECIPES[name])
    train = ("train-head", "--dataset", "clips", "--name", "n", "--recipe", path)
    assert len(refusal(2, *train, "--root", own.root)) < 600


@pytest.mark.parametrize(
    "content", [DEEP, DEEP_OBJECT, b"\xff", b"NaN", b'{"a": 1e999}', b"9" * 5000]
)
@pytest.mark.parametrize(
    ("file", "code", "command"),
    [
        ("datasets/clips/dataset.json", 1, "extract --dataset clips --encoder ENCODER"),
        ("datasets/clips/.packing/plan.json", 1, "pack --dataset clips --videos VIDEOS"),
        ("heads/clips-mote/config.json", 1, "inspect heads/clips-mote"),
        ("heads/clips-mote/training-keys.json", 1, "eval --closeset clips --head clips-mote"),
        ("heads/clips-mote/eval/r.json", 2, "compare heads/clips-mote/eval/r.json r.json"),
        ("STORE/zarr.json", 2, "inspect STORE"),
        ("STORE/features/zarr.json", 2, "inspect STORE"),
        ("STORE.damaged.json", 2, "extract --dataset clips --encoder ENCODER FRAMES"),
        ("sentences.json", 2, "extract --dataset clips --encoder ENCODER --descriptions FILE"),
        ("train.json", 2, "pack --dataset k400 --videos VIDEOS --annotations FILE"),
    ],
)
def test_json_in_every_file(own: World, file: str, code: int, command: str, content: bytes) -> None:
    store = str(own.store.relative_to(own.root))
    path = own.root / file.replace("STORE", store)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if "compare" in command:
        (own.root / "r.json").write_text("{}")
    words = {
        "ENCODER": [str(own.encoder)],
        "VIDEOS": [str(own.videos)],
        "FILE": [str(path)],
        "STORE": [str(own.store)],
        "FRAMES": ["--sampling", "uniform:4", "--precision", "fp32"],
    }
    arguments = [part for word in command.split() for part in words.get(word, [word])]
    arguments = [str(own.root / a) if "/" in a and not a.startswith("/") else a for a in arguments]
    place = [] if arguments[0] in ("inspect", "compare") else ["--root", str(own.root)]
    line = refusal(code, *arguments, *place)
    assert len(line) < 700
    assert path.name in line


def with_card(file: Path, card: bytes) -> None:
    """Put another text into the header of a safetensors file, tensors unchanged."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = {"mote": card.decode()}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


CARD = {"format": 1, "origin": None}


@pytest.mark.parametrize(
    ("card", "code"),
    [
        (DEEP, 2),
        (b"NaN", 2),
        (b'{"format": "\\u001b[31m"}', 2),
        (json.dumps({**CARD, "head": {"dim": 10**9, "kind": "mote"}}).encode(), 2),
        (json.dumps({**CARD, "head": {"dim": 32, "kind": "mote", "layers": 10**6}}).encode(), 2),
        (json.dumps({**CARD, "head": {"dim": 65536, "layers": 64, "experts": 256}}).encode(), 2),
        (json.dumps({**CARD, "head": {"dim": 32, "kind": "\u202e\x1b]0;x\x07"}}).encode(), 2),
        (json.dumps({**CARD, "head": {"dim": int("9" * 400)}}).encode(), 2),
    ],
)
def test_the_card_of_a_head(own: World, card: bytes, code: int) -> None:
    with_card(own.root / "heads/clips-mote/head.safetensors", card)
    refusal(code, "eval", "--closeset", "clips", "--head", "clips-mote", "--root", own.root)


@pytest.mark.parametrize("size", [0, 2**62, 10**8])
def test_the_header_of_a_head(own: World, size: int) -> None:
    (own.root / "heads/clips-mote/head.safetensors").write_bytes(struct.pack("<Q", size) + DEEP)
    refusal(1, "eval", "--closeset", "clips", "--head", "clips-mote", "--root", own.root)


# Names of classes too: no two of them read the same.
HOSTILE = (
    *("\x1b[31mred", "\u202egpj", "a\nb", "c\td", "\x9b2J", "e\u2028f"),
    *(":bomb: [red]x", "=1+1"),
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos whose names and class folders hold what a terminal or a spreadsheet would obey."""
    folder = tmp_path_factory.mktemp("hostile") / "videos"
    for number, name in enumerate(HOSTILE):
        make_clip(folder / name / f"{name}.mp4", number)
        (folder / name / f"-bad {name}.mp4").write_bytes(b"no video")
    (folder / HOSTILE[0] / os.fsdecode(b"\xff\x1b[2J.mp4")).write_bytes(b"")
    return folder


def test_names_reach_the_terminal_as_escapes(hostile: Path, tmp_path: Path) -> None:
    place = ("--root", tmp_path / "root")
    pack = harmless(mote("pack", "--dataset", "own", "--videos", hostile, *place))
    assert pack.code == 1
    assert "9 of 17 videos failed" in pack.error
    encoder = make_encoder(tmp_path / "tiny")
    allowed = ("--max-failures", "1")
    extract = ("extract", "--dataset", "own", "--encoder", encoder, *allowed, *place)
    harmless(mote(*extract, "--sampling", "uniform:4", "--precision", "fp32"))
    store = next((tmp_path / "root/features").rglob("*.zarr"))
    packed = mote("inspect", tmp_path / "root/datasets/own").out
    assert r"\x1b" in packed
    assert r"\u202e" in packed
    for shown in (tmp_path / "root/datasets/own", store):
        result = harmless(mote("inspect", shown))
        assert result.code == 0
        assert done("inspect", shown)
    train = ("train-head", "--dataset", "own", "--frames", "4", *SHORT_TRAINING, *place)
    assert harmless(mote(*train)).code == 0
    evaluated = harmless(mote("eval", "--zeroshot", "own", "--head", "mean", *place))
    assert evaluated.code == 0
    tables = list((tmp_path / "root").rglob("*.csv"))
    assert {"failures.csv"} < {path.name for path in tables}
    for path in tables:
        for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()):
            for cell in row:
                assert cell == safe_text(cell)
                assert cell[:1] not in ("=", "+", "@", "-", "\t")
    columns, *rows = csv_rows((tmp_path / "root/datasets/own/failures.csv").read_bytes())
    assert len(rows) == 9
    assert r"\x1b[31mred/-bad \x1b[31mred.mp4" in {row[columns.index("path")] for row in rows}


@pytest.mark.parametrize("name", [*HOSTILE, os.fsdecode(b"\xff\xfe")])
def test_a_name_in_an_error(own: World, name: str) -> None:
    root = ("--root", own.root)
    for arguments in (
        ("extract", "--dataset", name),
        ("extract", "--dataset", "clips", "--encoder", name),
        ("pack", "--dataset", "d", "--videos", own.root / name),
        ("train-head", "--dataset", "clips", "--recipe", name),
        ("eval", "--closeset", "clips", "--split", name),
        ("eval", "--closeset", "clips", "--head", name),
        ("predict", own.root / name, "--classes", "a,b"),
        (name,),
    ):
        refusal(2, *arguments, *(root if len(arguments) > 1 else ()))
    refusal(2, "inspect", own.root / name)


@pytest.fixture
def group_mask() -> Iterator[int]:
    """The umask of people who share a workspace with their group only."""
    before = os.umask(0o007)
    yield 0o007
    os.umask(before)


def test_files_have_the_modes_of_the_umask(tmp_path: Path, group_mask: int) -> None:
    root = packed_workspace(tmp_path, 2, 3)
    place = ("--root", root)
    extract = ("extract", "--dataset", "clips", "--encoder", "tiny", "--sampling", "uniform:4")
    done(*extract, "--precision", "fp32", *place)
    done("train-head", "--dataset", "clips", "--frames", "4", *SHORT_TRAINING, *place)
    done("eval", "--zeroshot", "clips", "--allow-overlap", "--no-modulate", *place)
    paths = list(root.rglob("*"))
    assert {"head.safetensors", "dataset.json", "zarr.json"} <= {path.name for path in paths}
    for path in paths:
        wanted = (0o777 if path.is_dir() else 0o666) & ~group_mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
