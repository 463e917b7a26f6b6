"""`eval` by protocol, with sweeps, blends, the ensemble and leaks; `protocols list` and `show`."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore import Store
from heads import HeadConfig, HeadOrigin, build_head, save_head
from heads.evaluation.comparing.published import published_of
from heads.evaluation.protocols.choose import PROTOCOLS
from heads.files.run_files import write_training_keys
from tests.support.processes.command_line import done, mote, refused
from tests.support.stores.action_store import ACTIONS, action_store

OFFICIAL = ("train1", "test1", "test2", "test3", "rest")
NAMES = (*ACTIONS, "clap", "dive", "golf", "hug")


def make_store(root: Path, dataset: str, name: str, **options: Any) -> Store:
    settings: dict[str, Any] = {
        "classes": 12,
        "class_names": NAMES,
        "samples": 120,
        "split_names": OFFICIAL,
        "noise": 5.0,
        "dataset": dataset,
    }
    return action_store(root / "features" / dataset / f"{name}.zarr", **(settings | options))


def make_head(root: Path, store: Store, name: str, facts: Any = None, **origin: Any) -> None:
    """A run of a head with weights that make a difference, on the store's classes."""
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    generator = torch.Generator().manual_seed(0)
    head = build_head(HeadConfig(dim=16, layers=1, experts=2), text, generator=generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    made = store.provenance
    head.origin = replace(
        HeadOrigin(
            *("k400", "", made.encoder, made.encoder_fingerprint, "fp32", "uniform:8", 1, {}),
            *("mote28", tuple(store.class_names), 8),
        ),
        **origin,
    )
    run = root / "heads" / name
    save_head(head, run / "head.safetensors")
    settings = {"head": head.config.to_json(), "training": {"epochs": 7}, **(facts or {})}
    (run / "config.json").write_text(json.dumps(settings))
    write_training_keys(run, "k400", ["elsewhere"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("protocols")
    store = make_store(root, "hmdb51", "a", views=3)
    make_store(root, "clips", "a", split_names=("train", "val"))
    make_head(root, store, "first")
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Callable[..., Any]:
    root = tmp_path / "data"
    shutil.copytree(made, root)
    return lambda *arguments, **options: done("eval", *arguments, "--root", root, **options)


def test_the_protocols_are_listed() -> None:
    listed = done("protocols", "list")["protocols"]
    assert [protocol["name"] for protocol in listed] == list(PROTOCOLS)
    table = mote("protocols", "list").out
    assert all(name in table for name in PROTOCOLS)
    assert "14,131 / 14,078 / 14,167 or others" in table


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_shown_from_its_object(name: str) -> None:
    protocol = PROTOCOLS[name]
    value = done("protocols", "show", name)
    figures = [figure.to_json() for figure in published_of(name)]
    assert value.pop("published") == figures
    assert value == json.loads(json.dumps(protocol.to_json()))
    text = mote("protocols", "show", name, width=2000).out  # no line is folded
    for part in (protocol.title, protocol.trained_on, protocol.test_list, protocol.source):
        assert part in text
    assert all(difference in text for difference in protocol.differences)
    assert all(expected.source in text for expected in protocol.expected)
    told = text.partition("published figures, in per cent\n")[2]
    assert told.count("\n") == len(figures)
    assert all(f"{figure['value']:g}" in told for figure in figures)


def test_an_unknown_protocol() -> None:
    assert "choose one of closeset" in refused(2, "protocols", "show", "k400")
    assert "choose one of closeset" in refused(2, "eval", "--protocol", "k400")


def test_the_usual_protocol_of_a_data_set(run: Callable[..., Any]) -> None:
    result = run("--zeroshot", "hmdb51")
    assert result["protocol_name"] == "hmdb51-zeroshot-3splits"
    assert [part["split"] for part in result["per_split"]] == ["test1", "test2", "test3"]
    assert result["notes"][0].startswith("test1 lists 24 videos, published lists have 1,530")
    assert (result["trained_on"], result["epoch"], result["epoch_choice"]) == ("k400", 7, "last")
    assert result["n_trained_on"] == 0
    one = run("--zeroshot", "hmdb51", "--split", "test2")
    assert one["protocol_name"] == "zeroshot"
    assert one["per_split"] == [result["per_split"][1]]
    file = Path(result["file"])
    assert file.name.startswith("hmdb51-zeroshot-3splits--3x1--uniform8--mote28--softmax--modul")
    assert json.loads(file.read_text())["result_format"] == 2
    with file.with_suffix(".per-class.csv").open(encoding="utf-8-sig") as text:
        assert len(list(csv.DictReader(text))) == 3 * 12


@pytest.mark.parametrize("variant", ["full", "test1"])
def test_half_class_by_name(run: Callable[..., Any], variant: str) -> None:
    result = run("--protocol", f"hmdb51-halfclass-{variant}")
    assert (result["protocol"], result["dataset"]) == ("halfclass", "hmdb51")
    assert [part["split"] for part in result["per_split"]] == [f"draw{s}" for s in range(10)]
    listed = "all lists 120" if variant == "full" else "test1 lists 24"
    assert result["notes"][0].startswith(f"{listed} videos, published lists have")
    assert result["fusion"] == "cosine"


def test_a_protocol_of_any_data_set(run: Callable[..., Any]) -> None:
    result = run("--protocol", "halfclass", "--dataset", "clips", "--head", "mean")
    assert (result["dataset"], result["protocol_name"]) == ("clips", "halfclass")
    named = run("--protocol", "hmdb51-zeroshot-full", "--dataset", "clips", "--head", "mean")
    assert (named["dataset"], named["n_listed"]) == ("clips", 120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--protocol", "halfclass"), "takes any data set: name one with --dataset"),
        (("--zeroshot", "clips", "--dataset", "clips"), "--dataset goes with --protocol"),
        (("--protocol", "closeset", "--zeroshot", "clips"), "exactly one of"),
        (("--protocol", "hmdb51-zeroshot-full", "--split", "test1"), "is defined by its list"),
        (("--protocol", "k400-closeset-4x3", "--dataset", "clips"), "has 1 view, not 12"),
        (("--zeroshot", "clips", "--sweep", "views=1"), "one of modulation-temperature"),
        (("--zeroshot", "clips", "--sweep", "ensemble"), "write NAME=VALUE,VALUE"),
        (("--zeroshot", "clips", "--sweep", "ensemble=half"), "ensemble 'half' is not a number"),
        (("--zeroshot", "clips", "--sweep", "ensemble=0,2"), "2 is not between 0"),
        (("--zeroshot", "clips", "--sweep", "blend=2"), "blend 2 is out of range"),
        (("--zeroshot", "clips", "--sweep", "fusion=sum"), "fusion 'sum' is unknown"),
        (
            ("--zeroshot", "clips", "--sweep", "ensemble=0", "--sweep", "ensemble=1"),
            "is given twice",
        ),
        (
            ("--zeroshot", "clips", "--ensemble", "0.5", "--sweep", "ensemble=0,1"),
            "contradict each other",
        ),
        (("--zeroshot", "clips", "--modulation-neighbours", "5.5"), "is not a whole number"),
        (("--zeroshot", "clips", "--modulation-neighbours", "13"), "compares the 13 nearest"),
        (
            ("--zeroshot", "clips", "--head", "mean", "--modulation-neighbours", "5"),
            "--modulation-neighbours changes nothing for",
        ),
        (
            ("--fewshot", "clips", "--no-modulate", "--modulation-temperature", "0.1"),
            "--modulation-temperature changes nothing with --no-modulate",
        ),
        (("--zeroshot", "clips", "--clip-store", "a"), "--clip-store works only with --ensemble"),
        (
            ("--zeroshot", "clips", "--no-modulate", "--sweep", "modulation-temperature=1"),
            "changes nothing without modulation",
        ),
        (
            ("--zeroshot", "clips", "--sweep", "blend=0.5,1"),
            "first has no tuned tower to blend with CLIP's",
        ),
    ],
)
def test_what_eval_refuses(made: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(2, "eval", *arguments, "--root", made)


def test_a_sweep_is_one_result_per_setting(run: Callable[..., Any]) -> None:
    table = run(
        *("--zeroshot", "hmdb51", "--sweep", "modulation-temperature=0.02,0.1,none"),
        *("--sweep", "ensemble=0,0.5", "--fusion", "all"),
    )
    rows = table["rows"]
    assert table["missing"] == []
    assert len(rows) == 3 * 2 * 3
    settings = {(r["modulation_temperature"], r["ensemble"], r["fusion"]) for r in rows}
    assert len(settings) == len(rows) == len({row["file"] for row in rows})
    for row in (rows[0], rows[7], rows[-1]):
        temperature = row["modulation_temperature"] or "off"
        alone = run(
            *("--zeroshot", "hmdb51", "--modulation-temperature", str(temperature)),
            *("--ensemble", str(row["ensemble"]), "--fusion", row["fusion"]),
        )
        assert {name: alone[name] for name in row} == row
    assert {row["modulate"] for row in rows} == {True, False}
    assert len({row["top1"] for row in rows}) > 3


def test_a_sweep_as_a_table(made: Path) -> None:
    printed = mote(
        *("eval", "--zeroshot", "hmdb51", "--sweep", "modulation-neighbours=0,3,5"),
        *("--root", made),
    )
    assert printed.code == 0, printed.err
    assert "neighbours" in printed.out
    assert "fusion" not in printed.out.splitlines()[3]
    shutil.rmtree(made / "heads" / "first" / "eval")


def test_an_ensemble_with_the_clip_of_another_store(tmp_path: Path) -> None:
    root = tmp_path / "data"
    tuned = make_store(root, "clips", "tuned", encoder="tuned", encoder_fingerprint="77")
    make_store(root, "clips", "raw", seed=3)
    make_head(root, tuned, "first")
    both = ("eval", "--zeroshot", "clips", "--root", root)
    result = done(*both, "--ensemble", "1", "--clip-store", "raw")
    clip = done(*both, "--head", "mean", "--store", "raw", "--ensemble", "1")
    assert result["per_split"] == clip["per_split"]
    assert (result["store"], result["clip_store"]) == ("tuned.zarr", "raw.zarr")


def test_a_sweep_of_blends_says_what_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shares = {"b0": 0.0, "b50": 0.5, "b99": 0.99}
    for number, (name, share) in enumerate(shares.items()):
        made = {"encoder": name, "encoder_fingerprint": str(number)}
        other = make_store(root, "clips", name, seed=number, **made)
        facts = {"file": "MoTE.pt", "sha256": "feed", "blend": share, "epoch": 29}
        make_head(root, other, name, {"imported": facts})
    shutil.rmtree(root / "features" / "clips" / "b50.zarr")
    stranger = {"imported": {"sha256": "beef", "blend": 0.25}}
    make_head(root, other, "stranger", stranger)
    place = ("--head", "b99", "--root", root)
    table = done("eval", "--zeroshot", "clips", "--sweep", "blend=0,0.25,0.5,0.99", *place)
    assert [row["blend"] for row in table["rows"]] == [0.0, 0.99]
    assert [row["head"] for row in table["rows"]] == ["b0", "b99"]
    assert [Path(row["file"]).parents[1].name for row in table["rows"]] == ["b0", "b99"]
    quarter, half = table["missing"]
    assert (quarter["blend"], half["blend"]) == (0.25, 0.5)
    assert "import-checkpoint MoTE.pt --name b99-blend25 --blend 0.25" in quarter["remedy"]
    assert "extract --dataset clips --encoder b99-blend25" in quarter["remedy"]
    assert half["reason"].startswith("no store of data set 'clips' fits: b0.zarr was made with")
    assert "mote-cli" not in half["reason"]  # the remedy says it, once
    extract = f"extract --dataset clips --encoder b50 --sampling uniform:8 --root {root}"
    assert half["remedy"] == f"`mote-cli {extract}`"
    line = refused(2, "eval", "--zeroshot", "clips", "--sweep", "blend=0.5", *place)
    assert "no store of clips was made with one of these blends" in line


def test_tested_training_videos_are_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    head = tmp_path / "data" / "heads" / "first"
    write_training_keys(head, "clips", ["clip000", "clip004", "clip001"])
    line = refused(2, "eval", "--zeroshot", "clips", "--root", tmp_path / "data")
    assert "3 of 120 tested videos are in the training of first (clip000, clip001, clip" in line
    assert run("--zeroshot", "clips", "--allow-overlap")["n_trained_on"] == 3
    assert run("--zeroshot", "clips", "--head", "mean")["n_trained_on"] is None
