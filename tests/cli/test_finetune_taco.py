"""`mote-cli finetune --method taco`: both towers train, and four weights come out of a run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from featstore.errors import UserError
from featstore.workspace import WEIGHTS, Workspace
from heads import import_taco_checkpoint, load_head
from heads.end_to_end.kept_weights import read_weights
from heads.end_to_end.publish import publish_weights
from pipeline.clip_encoder import load_encoder
from tests.support.processes.command_line import done, mote, refused
from tests.support.processes.processes import Commands, command_starter
from tests.support.worlds.tiny_world import WORDS, make_clips
from tests.support.worlds.tuning import (
    difference,
    files_of,
    same_bits,
    start_ranks,
    tuning_workspace,
)

RECIPE = """
[head]
kind = "taco"
teacher_momentum = 0.75

[training]
epochs = 2
warmup_epochs = 0.0
lr = 1e-2
frames = 2

[finetune]
train = "both-towers"
batch_size = 4
save = "mean"
blend = 1.0
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tuning_workspace(tmp_path_factory.mktemp("packed"))
    (root / "taco.toml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a finished run "r"."""
    root = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(packed, root)
    summary = done(*taco(root, "r"))
    (root / "summary.json").write_text(json.dumps(summary))
    return root


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


def taco(root: Path, name: str, *more: str) -> tuple[str, ...]:
    command = ("finetune", "--dataset", "clips", "--encoder", "tiny", "--name", name)
    return (*command, "--recipe", f"{root}/taco.toml", "--root", str(root), "--json", *more)


def kept(root: Path, name: str) -> dict[str, Any]:
    return files_of(root, name) | {"mean": load_file(root / f"heads/{name}/state/mean.safetensors")}


def test_what_is_published_is_the_mean(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["head"], summary["trained"], summary["top1"]) == ("taco", "both-towers", None)
    assert 0 <= summary["best_top1"] <= 100
    mean, tower = (
        read_weights(trained / "heads/r", "mean"),
        load_file(trained / "heads/r/tower.safetensors"),
    )
    for name, value in tower.items():
        inner = name.replace("visual.", "image_tower.", 1)
        own = mean[inner] if inner in mean else mean[f"texts.{name}"]
        assert torch.equal(own, value), name
    published = load_encoder("r", "fp32", "cpu", trained / "encoders")
    head = load_head(trained / "heads/r")
    assert head.origin is not None
    assert head.origin.encoder_fingerprint == published.fingerprint
    texts = published.class_embeddings(WORDS, "taco")
    torch.testing.assert_close(head.training_class_embeddings, texts, rtol=0, atol=1e-6)


def test_each_of_the_four_weights_is_an_encoder_and_a_head(trained: Path) -> None:
    place, prints = Workspace(trained), {}
    for which in WEIGHTS:
        folder = publish_weights(place, trained / "heads/r", which)
        head = load_head(folder)
        assert head.origin is not None
        encoder = load_encoder(head.origin.encoder, "fp32", "cpu", trained / "encoders")
        assert encoder.fingerprint == head.origin.encoder_fingerprint
        prints[which] = encoder.fingerprint
        named = place.choose_run("r" if which == "mean" else f"r/{which}")
        assert folder == publish_weights(place, trained / "heads/r", which) == named
    assert len({prints["mean"], prints["last"], prints["teacher"]}) == 3
    last, teacher = (load_head(trained / "heads/r" / which) for which in ("last", "teacher"))
    for name, value in last.named_parameters():  # the head has no teacher
        assert torch.equal(value, dict(teacher.named_parameters())[name])
    done(
        *("extract", "--dataset", "clips", "--encoder", "r-teacher", "--sampling", "uniform:2"),
        *("--precision", "fp32", "--prompts", "taco", "--root", trained),
    )
    assert "top1" in done("eval", "--closeset", "clips", "--head", "r/teacher", "--root", trained)


def test_weights_that_a_run_does_not_have(root: Path) -> None:
    done(*taco(root, "r", "--evaluate-every", "0", "--epochs", "1"))
    with pytest.raises(UserError, match="run r has no best weights: it had no evaluation"):
        publish_weights(Workspace(root), root / "heads/r", "best")
    done(*taco(root, "m", "--recipe", "end-to-end", "--epochs", "1", "--frames", "2"))
    with pytest.raises(UserError, match="run m has one kind of weights, because MoTE trains with"):
        publish_weights(Workspace(root), root / "heads/m", "teacher")
    assert not (root / "heads/m/teacher").exists()
    (root / "heads/r/state/mean.safetensors").unlink()
    with pytest.raises(UserError, match=r"run r has no mean weights: its state/mean.* is gone"):
        read_weights(root / "heads/r", "mean")


def test_kill_9_changes_no_bit(commands: Commands, trained: Path, root: Path) -> None:
    """Towers, head, moments, teacher and mean of weights are those of a run left alone."""
    command = taco(root, "r", "--checkpoint-every", "1", "--resume")
    state = root / "heads/r/state/last.safetensors"
    running = commands.start(*command)
    running.until(lambda: state.exists() or not running.alive)
    assert running.kill() == -signal.SIGKILL
    again = commands.start(*command)
    assert again.end() == 0, again.words
    assert 0 < again.json["resumed_from"] < 6
    whole = kept(trained, "r")
    assert same_bits(kept(root, "r"), whole)
    assert {name.split(".")[0] for name in whole["state"]} >= {"parameter", "exp_avg", "teacher"}
    assert done(*command)["encoder_fingerprint"] == again.json["encoder_fingerprint"]


def test_an_epoch_counts_once_in_the_mean(trained: Path, root: Path) -> None:
    """The process may end between the mean of an epoch and the record of that epoch."""
    shutil.rmtree(root)
    shutil.copytree(trained, root)
    run = root / "heads/r"
    for gone in ("head.safetensors", "tower.safetensors"):
        (run / gone).unlink()
    shutil.rmtree(root / "encoders/r")
    done(*taco(root, "r", "--resume"))
    assert same_bits(kept(root, "r"), kept(trained, "r"))
    (run / "head.safetensors").unlink()
    shutil.rmtree(root / "encoders/r")
    (run / "state/mean.safetensors").unlink()
    assert refused(1, *taco(root, "r", "--resume"))


def test_two_processes_are_one_with_twice_the_batch(commands: Commands, root: Path) -> None:
    done(*taco(root, "one", "--batch-size", "4"))
    running = start_ranks(commands, 2, *taco(root, "two", "--batch-size", "2"))
    assert [process.end() for process in running] == [0, 0], running[0].words
    one, two = kept(root, "one"), kept(root, "two")
    for part in ("tower", "mean", "head"):
        assert difference(one[part], two[part]) < 2e-4, part
    for mine, other in zip(one["metrics"], two["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["kl_loss"] == pytest.approx(other["kl_loss"], rel=1e-3, abs=1e-7)
    own = start_ranks(commands, 2, *taco(root, "own", "--batch-size", "2", "--draws", "per-rank"))
    assert [process.end() for process in own] == [0, 0], own[0].words
    assert kept(root, "own")["metrics"][-1]["kl_loss"] != two["metrics"][-1]["kl_loss"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--train", "tower"), "TACO trains both towers, so --train tower is not possible"),
        (("--shard", "fsdp"), "use --shard ddp"),
        (("--class-weights", "balanced"), "TACO cannot be trained with class weights"),
        (("--recipe", "end-to-end", "--save", "mean"), "save mean is for methods with a teacher"),
        (("--recipe", "dist", "--save", "teacher"), "save teacher is for methods with a teacher"),
        (("--guides", "x.json"), "--guides are for --method msta, not for TACO"),
        (("--save", "men"), "save 'men' is unknown"),
    ],
)
def test_what_cannot_be_trained(root: Path, more: tuple[str, ...], words: str) -> None:
    said = mote(*taco(root, "r", *more))
    assert said.code == 2, said.err
    assert words in said.err
    assert not (root / "heads/r").exists()


def test_one_class_is_too_few(root: Path, tmp_path: Path) -> None:
    make_clips(tmp_path / "videos", ("jump",))
    done("pack", "--dataset", "one", "--videos", tmp_path / "videos", "--root", root)
    said = refused(2, *taco(root, "r", "--dataset", "one"))
    assert "TACO needs at least 2 classes, not 1" in said
    assert not (root / "heads/r").exists()


def test_eval_measures_any_of_the_weights(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    shutil.rmtree(root / "features", ignore_errors=True)
    place = ("eval", "--closeset", "clips", "--head", "r", "--allow-overlap", "--root", str(root))

    def extracted(message: str) -> None:
        (command,) = re.findall(r"`(mote-cli extract [^`]+)`", message)
        done(*shlex.split(command)[1:], "--precision", "fp32", "--workers", "1")

    for which in ("teacher", "mean"):
        message = refused(2, *place, "--weights", which)
        assert f"--encoder {'r' if which == 'mean' else 'r-teacher'} " in message
        extracted(message)
    results = {which: done(*place, "--weights", which) for which in ("teacher", "mean")}
    for which, result in results.items():
        assert (result["weights"], result["projection"]) == (which, "on")
        assert (result["head"], result["epoch"], result["epoch_choice"]) == ("r", 2, "last")
        assert Path(result["file"]).parent == root / "heads/r/eval"
    assert done(*place)["file"] == results["mean"]["file"]
    found = done("compare", *(result["file"] for result in results.values()))
    assert found["incomparable"] == ["weights"]
    every = mote(*place, "--weights", "all", "--json")
    value = json.loads(every.out)
    assert [row["weights"] for row in value["rows"]] == ["mean", "teacher"]
    assert {row["weights"]: row["top1"] for row in value["rows"]} == {
        which: result["top1"] for which, result in results.items()
    }
    assert [gap["weights"] for gap in value["missing"]] == ["last", "best"]
    for gap in value["missing"]:
        assert f"{gap['weights']} weights are not measured" in every.err
        assert f"--encoder r-{gap['weights']} " in gap["reason"]
    both = done(*place, "--weights", "mean,teacher", "--sweep", "projection=on,off")
    assert [(row["weights"], row["projection"]) for row in both["rows"]] == [
        *(("mean", "on"), ("mean", "off"), ("teacher", "on"), ("teacher", "off")),
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--head", "r", "--weights", "men"), "did you mean mean"),
        (("--head", "mean", "--weights", "mean"), "--weights is for a run"),
        (("--head", "r", "--weights", "all", "--store", "x"), "leave --store out"),
    ],
)
def test_weights_that_cannot_be_measured(trained: Path, more: tuple[str, ...], words: str) -> None:
    assert words in refused(2, "eval", "--closeset", "clips", "--root", trained, *more)


def test_the_teacher_fits_the_steps_and_mirrored_labels_are_possible(root: Path) -> None:
    recipe = RECIPE.replace("0.75", "0") + 'mirror = "names"\n'
    (root / "taco.toml").write_text(recipe)
    summary = done(*taco(root, "r"))
    run, steps = root / "heads/r", 2 * -(-summary["n_listed"] // 4)
    config = json.loads((run / "config.json").read_text())
    assert config["training"]["mirror"] == "names"
    assert config["head"]["teacher_momentum"] == pytest.approx(1 - 15 / 4 / steps)
    assert load_head(run).config.teacher_momentum == config["head"]["teacher_momentum"]
    assert done(*taco(root, "r", "--resume"))


def test_the_export_of_a_run_is_imported_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "we_model.pt"
    done("export", "r", "--format", "official", "--out", file, "--root", trained)
    imported = import_taco_checkpoint(file)
    assert imported.which == "mean"
    tower = load_file(trained / "heads/r/tower.safetensors")
    assert all(torch.equal(imported.encoder_state[name], value) for name, value in tower.items())
    head = load_head(trained / "heads/r").state_dict()
    assert all(torch.equal(value, head[name]) for name, value in imported.head.named_parameters())
