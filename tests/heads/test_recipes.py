"""Recipes: those that come with mote, files of users, and what the command makes of them."""

from __future__ import annotations

import itertools
import json
import math
import re
import tomllib
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from featstore import UserError
from heads import HeadConfig, TrainConfig, load_head
from heads.recipes import (
    DEFAULT_RECIPE,
    TRAIN_HEAD_RECIPE,
    finetune_recipe,
    load_recipe,
    recipe_names,
)
from heads.recipes.derived import DERIVED
from heads.training.schedule import learning_rates
from tests.support.stores.action_store import action_store

PAPERS = [f"dist-{data}-vit-{arch}" for data in ("k400", "ssv2") for arch in ("b16", "l14")]
PAPERS += ["paper-vit-b16", "paper-vit-l14"]
PAPERS += ["msta-base-to-novel", "msta-few-shot", "msta-zero-shot"]
NAMES = sorted(["auto", "demo", "demo-dist", "dist", "end-to-end", "frozen-store", "msta", *PAPERS])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_recipes_that_come_with_mote() -> None:
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_says_command_source_figure_and_what_was_run(name: str) -> None:
    text = (files("heads.recipes") / f"{name}.toml").read_text()
    comment = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for heading in ("Command:", "Source:", "Published:", "Run here:"):
        assert heading in comment
    assert ("not run here" in comment) == (name in PAPERS)
    assert text.startswith(comment)
    recipe = load_recipe(name)
    assert recipe.name == name
    tables = tomllib.loads(text)
    assert (recipe.head, recipe.training) == (tables["head"], tables["training"])
    assert recipe.finetune == tables.get("finetune", {})


def test_the_default_is_the_default_of_every_field() -> None:
    recipe = load_recipe(DEFAULT_RECIPE)
    assert recipe.train_config() == TrainConfig()
    assert recipe.head_config(512) == HeadConfig(dim=512)


def test_the_papers_recipes() -> None:
    """Values of the released configurations (MoTE, Zhu et al., NeurIPS 2024)."""
    base, large = load_recipe("paper-vit-b16"), load_recipe("paper-vit-l14")
    assert base.head_config(512) == HeadConfig(dim=512, layers=4, experts=4)
    assert large.head_config(768) == HeadConfig(dim=768, layers=6, experts=4)
    assert base.head_config(512).attention_heads == 8
    assert large.head_config(768).attention_heads == 12
    training = base.train_config()
    assert training == replace(TrainConfig(), lr_refresh=10)
    assert (training.epochs, training.warmup_epochs, training.batch_size) == (30, 5, 192)
    assert training.lr * training.logit_scale_lr_ratio == pytest.approx(3.5e-6)
    other = large.train_config()
    assert other.lr * other.logit_scale_lr_ratio == pytest.approx(3e-6)
    assert asdict(other) == asdict(training) | {
        "epochs": 20,
        "batch_size": 144,
        "logit_scale_lr_ratio": 0.06,
    }
    assert base.finetune_config().batch_size * 3 == training.batch_size  # the authors' 3 GPUs
    assert large.finetune_config().batch_size * 3 == other.batch_size
    assert base.finetune_config().draws == large.finetune_config().draws == "per-rank"
    rates = learning_rates(training, 1250)
    assert (rates[0, :9] == 0).all()  # the quirk of refreshing every tenth iteration
    assert (rates[0, 9:18] > 0).all()


def test_a_file_of_the_user(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mine.toml",
        '[head]\nplacement = "separate"\ntemperatures = [0.6, inf]\nexpert_prior = [1, 2, 3, 4]\n'
        "[training]\nlr = 1\nepochs = 3\n",
    )
    for name in (file, str(file)):
        recipe = load_recipe(name)
        assert recipe.name == "mine"
        head = recipe.head_config(32)
        assert head == HeadConfig(
            dim=32, placement="separate", temperatures=(0.6, math.inf), expert_prior=(1, 2, 3, 4)
        )
        training = recipe.train_config()
        assert training == TrainConfig(lr=1.0, epochs=3)
        assert isinstance(training.lr, float)


def test_what_is_given_beside_a_recipe_wins_and_none_gives_nothing() -> None:
    recipe = load_recipe("demo")
    assert recipe.train_config(lr=None, epochs=7) == replace(recipe.train_config(), epochs=7)
    assert recipe.head_config(16, kind=None, layers=2).layers == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nlearning_rate = 1\nepoch = 2\n", r"keys in \[training\]: epoch, learning_ra"),
        ("[head]\ndim = 512\n", r"unknown keys in \[head\]: dim; known are .*placement"),
        ("[model]\nlayers = 4\n", "unknown tables: model; known are head, training"),
        ("layers = 4\n", "unknown tables: layers"),
        ("head = 4\n", r"head is 4, not a table \[head\]"),
        ("[training\n", "is not TOML"),
        ('[training]\nlr = "fast"\n', "lr is 'fast'"),
        ("[training]\nepochs = 2.5\n", "epochs is 2.5"),
        ("[training]\nlr = -1\n", "lr is -1"),
        ("[training]\nlr = nan\n", "lr is nan"),
        ("[head]\nlayers = 0\n", "layers is 0"),
        ('[head]\nplacement = "both"\n', "placement 'both'"),
    ],
)
def test_faults_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path / "mine.toml", text))
    assert "\n" not in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"'paper': did you mean paper-vit-b16 or paper-vit-l14\? choose one of auto, ",
    ):
        load_recipe("paper")
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        load_recipe(tmp_path / "mine.toml")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not TOML"):
        load_recipe(tmp_path / "binary.toml")


def run(root: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(app, ["train-head", *arguments, "--root", str(root), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_command_takes_a_recipe_and_options_win(tmp_path: Path) -> None:
    store = tmp_path / "features" / "toy" / "tiny--uniform-8.zarr"
    store.parent.mkdir(parents=True)
    action_store(store)
    file = write(
        tmp_path / "mine.toml",
        '[head]\nlayers = 1\nexperts = 2\nplacement = "up"\n'
        "[training]\nepochs = 2\nbatch_size = 8\nframes = 4\nmerged_weight = 0\n",
    )
    summary = run(tmp_path, "--recipe", str(file), "--epochs", "1", "--experts", "3")
    assert (summary["run"], summary["head"], summary["epochs"]) == ("toy-mote", "mote", 1)
    begun = json.loads((tmp_path / "heads/toy-mote/config.json").read_text())
    assert begun["head"]["placement"] == "up"
    assert begun["training"]["merged_weight"] == 0
    head = load_head(tmp_path / "heads" / "toy-mote").config
    assert (head.layers, head.experts, head.placement) == (1, 3, "up")
    plain = run(tmp_path, "--recipe", str(file), "--head", "transformer", "--epochs", "1")
    assert plain["run"] == "toy-transformer"
    with pytest.raises(UserError, match="no recipe 'nothing'"):
        run(tmp_path, "--recipe", "nothing")


@pytest.mark.parametrize("head", ["linear", "knn", "mean", "transformer"])
def test_options_without_effect_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, head: str
) -> None:
    store = tmp_path / "features" / "toy" / "tiny--uniform-8.zarr"
    store.parent.mkdir(parents=True)
    action_store(store)
    run(tmp_path, "--head", head, "--epochs", "1", "--lr", "0.1", "--patience", "0")
    said = "no effect of --epochs, --patience, --lr on"
    assert (said in caplog.text) == (head != "transformer")
    assert "or choose another --head" in caplog.text or head == "transformer"
    caplog.clear()
    run(tmp_path, "--head", head, "--name", "plain", *(["--epochs", "1"] * (head[0] == "t")))
    assert "no effect of" not in caplog.text


def begun(root: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "heads" / run / "config.json").read_text())
    return found


def test_the_default_fits_the_data_and_the_run_holds_its_numbers(tmp_path: Path) -> None:
    store = tmp_path / "features" / "toy" / "tiny--uniform-8.zarr"
    store.parent.mkdir(parents=True)
    action_store(store, samples=60, classes=5, noise=0.5, confused=0.9)
    small = ("--layers", "1", "--experts", "2", "--frames", "4")
    summary = run(tmp_path, *small)
    settings, repeats = load_recipe(TRAIN_HEAD_RECIPE).fitted(videos=30, classes=5, dim=16)
    config = begun(tmp_path, "toy-mote")
    assert config["training"] == replace(settings, frames=4).to_json()
    assert config["data"]["repeats"] == repeats > 1
    assert config["data"]["validation"] == "val"
    assert summary["validation"]["source"] == "val"
    assert run(tmp_path, *small, "--resume")["resumed_from"] == summary["epochs"]
    last = ["eval", "--closeset", "toy", "--head", "toy-mote/last", "--root", str(tmp_path)]
    result = CliRunner().invoke(app, [*last, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["top1"] == pytest.approx(summary["validation"]["last_top1"])


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--epochs", "epochs", 2),
        ("--warmup-epochs", "warmup_epochs", 1.5),
        ("--patience", "patience", 0),
        ("--batch-size", "batch_size", 7),
        ("--lr", "lr", 0.25),
        ("--weight-decay", "weight_decay", 0.125),
        ("--shrinkage", "shrinkage", 0.375),
    ],
)
def test_every_derived_setting_can_be_given(option: str, field: str, value: float) -> None:
    recipe = load_recipe("auto")
    assert set(recipe.from_data) == set(DERIVED)
    settings, repeats = recipe.fitted(videos=100, classes=9, dim=64, **{field: value})
    assert getattr(settings, field) == value
    assert repeats == 1 or field not in ("epochs", "batch_size")
    assert recipe.fitted(videos=100, classes=9, dim=64, repeats=5)[1] == 5
    help_text = CliRunner().invoke(app, ["train-head", "--help"], env={"COLUMNS": "200"}).output
    assert option in help_text


def test_the_rules_fit_any_set() -> None:
    steps, batches = [], []
    for videos in (1, 2, 5, 20, 100, 1000, 10_000, 250_000):
        settings, repeats = load_recipe("auto").fitted(videos=videos, classes=5, dim=64)
        assert settings.batch_size <= videos
        assert 10 <= settings.epochs <= 60
        assert 0 < settings.patience < settings.epochs
        assert 0 < settings.warmup_epochs < settings.epochs
        steps.append(settings.epochs * repeats * videos / settings.batch_size)
        batches.append(settings.batch_size)
        classes = (1, 2, 10, videos)
        shares = [
            load_recipe("auto").fitted(videos=videos, classes=c, dim=64)[0].shrinkage
            for c in classes
        ]
        assert shares == sorted(shares)
        assert (shares[0] == 0) == (videos > 60)
        assert shares[-1] == 1
    assert batches == sorted(batches)
    assert all(more > 1.5 * few for few, more in itertools.pairwise(steps[2:]))
    wide, narrow = (load_recipe("auto").fitted(videos=9, classes=2, dim=d)[0] for d in (512, 16))
    assert 0 < wide.lr < narrow.lr
    rates = [
        load_recipe("auto").fitted(videos=videos, classes=c, dim=64)[0].lr
        for videos, c in ((5, 5), (20, 10), (20, 4), (40, 10), (100, 40), (1000, 400))
    ]
    assert rates == [0.004, 0.004, 0.002, 0.002, 0.002, 0.002]


def test_what_is_left_to_the_data_needs_the_data(tmp_path: Path) -> None:
    for config in (load_recipe("auto").train_config, load_recipe("auto").finetune_config):
        with pytest.raises(UserError, match=r"recipe auto derives .*lr.* only train-head does"):
            config()
    file = write(tmp_path / "mine.toml", '[training]\nlr = "auto"\nepochs = 3\nkeep_best = true\n')
    recipe = load_recipe(file)
    settings, repeats = recipe.fitted(videos=100, classes=9, dim=256)
    assert (settings.epochs, settings.batch_size, repeats) == (3, 192, 1)
    assert settings.keep_best
    assert settings.lr == load_recipe("auto").fitted(videos=100, classes=9, dim=256)[0].lr
    assert recipe.finetune_config(lr=1e-3).lr == 1e-3
    for line in ('seed = "auto"', 'frames = "auto"', 'lr = "car"', "keep_best = 1"):
        with pytest.raises(UserError, match=line.split()[0]):
            load_recipe(write(tmp_path / "wrong.toml", f"[training]\n{line}\n"))


def test_help_names_every_recipe() -> None:
    of_stores = ("auto", "frozen-store")
    beside = [name for name in NAMES if "dist" in name or "msta" in name]
    for command in ("train-head", "finetune"):
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        text = re.sub(r"[│\s]+", " ", result.output)
        elsewhere = beside if command[0] == "t" else of_stores
        assert all(name in text for name in NAMES if name not in elsewhere)


def test_settings_of_a_branch_beside_a_frozen_tower_fit_the_videos() -> None:
    recipe = finetune_recipe(None, "dist")
    assert (recipe.name, recipe.beside_tower) == ("dist", "dist")
    found = [recipe.finetune_config(lambda n=n: n) for n in (1, 60, 300, 10**6)]  # type: ignore[misc]
    assert [config.batch_size for config in found] == [1, 4, 16, 32]
    assert all(
        config.lr == round(3.2e-4 * math.sqrt(config.batch_size / 256), 7) for config in found
    )
    assert {(config.epochs, config.warmup_epochs) for config in found} == {(36, 6)}
    given = recipe.finetune_config(lambda: 60, batch_size=64, epochs=12)
    assert (given.batch_size, given.lr, given.warmup_epochs) == (64, 1.6e-4, 2)
    settled = {"batch_size": 2, "lr": 1e-3, "epochs": 3, "warmup_epochs": 1}
    assert recipe.finetune_config(lambda: 1 // 0, **settled).epochs == 3  # nobody is asked
    with pytest.raises(UserError, match="recipe dist derives batch_size, epochs"):
        recipe.finetune_config()
    assert finetune_recipe(None, None).name == finetune_recipe(None, "mote").name == "end-to-end"
    assert finetune_recipe("end-to-end", "transformer").head_config(64).kind == "transformer"
