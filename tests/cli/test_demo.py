"""The demo: all of its result is real, a second run keeps what is there, and the world shows it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

import heads.demo
import pipeline.demo.world
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds import dist_training, msta_training


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw, write = pipeline.demo.world.draw_world, pipeline.demo.world.write_world
    monkeypatch.setattr(
        pipeline.demo.world, "draw_world", functools.partial(draw, known_classes=6, new_classes=6)
    )
    monkeypatch.setattr(
        pipeline.demo.world, "write_world", functools.partial(write, train_clips=2, test_clips=1)
    )
    short = tmp_path / "short.toml"
    short.write_text('[training]\nepochs = 2\nprecision = "fp32"\n')
    taco = tmp_path / "taco.toml"
    text = (files("heads.recipes") / "demo-taco.toml").read_text()
    taco.write_text(text.replace("epochs = 5", "epochs = 1").replace("= 2.0", "= 0.0"))
    recipes = {
        "demo": short,
        "demo-dist": dist_training.small_recipe(tmp_path),
        "demo-msta": msta_training.small_recipe(tmp_path),
        "demo-taco": taco,
    }
    kinds = [replace(kind, recipe=str(recipes[kind.recipe])) for kind in heads.demo.KINDS]
    monkeypatch.setattr(heads.demo, "KINDS", kinds)


def test_the_demo_runs_every_stage_and_reports_it(small_world: None, tmp_path: Path) -> None:
    report = done("demo", "--seed", "3", "--root", tmp_path)
    rows = report["rows"]
    assert [(row["head"], row["modulated"]) for row in rows] == [
        *(("mean", False), ("transformer", False), ("transformer", True)),
        *(("mote", False), ("mote", True)),
    ]
    for row in rows:
        close, zero = row["closeset_top1"], row["zeroshot_top1"]
        assert 0 <= close <= 100
        assert 0 <= zero <= 100
        assert row["harmonic_mean"] == pytest.approx(
            2 * close * zero / (close + zero) if close + zero else 0
        )
    assert report["seed"] == 3
    assert report["seconds"] > 0
    assert report["peak_rss_mb"] > 100
    assert Path(report["figure"]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "datasets" / "demo-known-3" / "dataset.json").is_file()
    assert (tmp_path / "heads" / "demo-mote-3" / "head.safetensors").is_file()


def test_a_second_run_gives_the_same_and_does_nothing_twice(
    small_world: None, tmp_path: Path
) -> None:
    first = done("demo", "--root", tmp_path)
    heads = sorted((tmp_path / "heads").glob("*/head.safetensors"))
    times = [head.stat().st_mtime_ns for head in heads]
    assert done("demo", "--root", tmp_path)["rows"] == first["rows"]
    assert times == [head.stat().st_mtime_ns for head in heads]


def test_the_same_seed_gives_the_same_table_in_another_workspace(
    small_world: None, tmp_path: Path
) -> None:
    first = done("demo", "--root", tmp_path / "a")
    assert done("demo", "--root", tmp_path / "b")["rows"] == first["rows"]


def test_seeds_give_mean_and_spread(small_world: None, tmp_path: Path) -> None:
    report = done("demo", "--seeds", "2", "--root", tmp_path)
    for row in report["rows"]:
        one, two = row["closeset_top1_per_seed"]
        assert row["closeset_top1"] == pytest.approx((one + two) / 2)
        assert row["closeset_top1_std"] == pytest.approx(abs(one - two) / 2)


def test_the_table_names_the_next_command(small_world: None, tmp_path: Path) -> None:
    result = mote("demo", "--root", tmp_path)
    assert result.code == 0
    assert "mote-cli pack --dataset my-clips --videos DIR" in result.out
    assert "transformer" in result.out


def test_fine_tuning_adds_its_rows(small_world: None, tmp_path: Path) -> None:
    report = done("demo", "--finetune", "1", "--root", tmp_path)
    assert report["finetune_epochs"] == 1
    *frozen, plain, modulated = report["rows"]
    assert [(row["head"], row["modulated"]) for row in (plain, modulated)] == [
        ("mote-finetuned", False),
        ("mote-finetuned", True),
    ]
    assert frozen == done("demo", "--root", tmp_path)["rows"]
    tuned = tmp_path / "heads" / "demo-finetuned-0-1"
    assert json.loads((tuned / "config.json").read_text())["from_head"]["run"] == "demo-mote-0"
    assert (tmp_path / "encoders" / "demo-finetuned-0-1" / "open_clip_config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fine_tuning_from_the_frozen_head_improves_the_known_classes(tmp_path: Path) -> None:
    rows = done("demo", "--finetune", "3", "--root", tmp_path)["rows"]
    frozen, tuned = rows[3], rows[5]
    assert tuned["closeset_top1"] > frozen["closeset_top1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_world_shows_what_the_method_is_for(tmp_path: Path) -> None:
    rows = done("demo", "--root", tmp_path)["rows"]
    mean, transformer, _, expert, _ = rows
    assert expert["closeset_top1"] >= transformer["closeset_top1"] - 1
    assert expert["zeroshot_top1"] >= transformer["zeroshot_top1"] + 3
    assert expert["closeset_top1"] >= mean["closeset_top1"] + 20


def test_methods_that_train_on_videos_have_rows_beside_the_others(
    small_world: None, tmp_path: Path
) -> None:
    place = ("demo", "--methods", "mote,dist,msta,taco", "--root", tmp_path / "w")
    report = done(*place, "--seeds", "2")
    assert [(row["head"], row["modulated"], row.get("ensemble")) for row in report["rows"]] == [
        *(("mean", False, None), ("mote", False, None), ("mote", True, None)),
        *(("dist", False, None), ("dist", False, 0.5), ("msta", False, None)),
        *(("taco", False, None), ("mean-finetuned", False, None)),
        *(("mote-on-taco", False, None), ("mote-on-taco", True, None)),
    ]
    for row in report["rows"]:
        one, two = row["zeroshot_top1_per_seed"]
        assert row["zeroshot_top1_std"] == pytest.approx(abs(one - two) / 2)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").glob("*/demo-*/*/zarr.json")}
    made |= {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "heads").glob("*/*.safetensors")}
    shown = mote(*place, "--seeds", "2", width=80)
    assert "dist, ensemble 0.5" in shown.out
    assert max(len(line) for line in shown.out.splitlines() if "\u2502" in line) <= 80
    assert made == {path: path.stat().st_mtime_ns for path in made}
    table = json.loads((tmp_path / "w" / "demo" / "demo.json").read_text())
    assert table["rows"] == report["rows"]
    # The rows of adapters are what the commands measure on the features that their head makes.
    root = ("--root", tmp_path / "w")
    said = done("eval", "--closeset", "demo-known-0", "--head", "demo-msta-0", *root)
    measured = {row["head"]: row for row in report["rows"] if not row["modulated"]}
    assert said["top1"] == measured["msta"]["closeset_top1_per_seed"][0]
    # So are those of a head on towers that a teacher held: it was trained on their features.
    said = done("eval", "--closeset", "demo-known-0", "--head", "demo-mote-on-taco-0", *root)
    assert said["encoder"] == "demo-taco-0"
    plain = json.loads((tmp_path / "w/heads/demo-mean-finetuned-0/config.json").read_text())
    assert (plain["head"]["kind"], plain["training"]["train"]) == ("mean", "both-towers")
    settings = json.loads((tmp_path / "w/heads/demo-msta-0/config.json").read_text())
    assert settings["data"]["adapted_encoder"] == "demo-clip"


def test_a_method_that_tunes_the_towers_is_looked_at_through_its_own_encoder(
    small_world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads.demo, "KINDS", heads.demo.KINDS[-1:])  # mote as if it could only that
    report = done("demo", "--methods", "mote", "--root", tmp_path)
    assert [(row["head"], row["modulated"]) for row in report["rows"]] == [
        *(("mean", False), ("mote", False)),
    ]
    assert (tmp_path / "encoders" / "demo-mote-0" / "open_clip_config.json").is_file()
    data = ("demo-known-0", "--head", "demo-mote-0", "--no-modulate", "--root", tmp_path)
    said = done("eval", "--closeset", *data)
    assert said["top1"] == report["rows"][1]["closeset_top1"]


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("mote,dst", "the demo has no method 'dst': did you mean dist"),
        ("mean", "the demo has no method 'mean': choose"),
        ("linear", "the demo has no method 'linear': choose"),
        ("mote,mote", "once each, with commas, such as mote,dist"),
        ("", "the demo has no method ''"),
    ],
)
def test_methods_that_the_demo_cannot_show_are_refused(
    methods: str, words: str, tmp_path: Path
) -> None:
    assert words in refused(2, "demo", "--methods", methods, "--root", tmp_path)
    assert not [*tmp_path.iterdir()]
    given = ("demo", "--methods", "dist", "--finetune", "1", "--root", tmp_path)
    assert "fine-tunes with the head mote: name that method, too" in refused(2, *given)
