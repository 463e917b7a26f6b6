"""`mote-cli finetune --method dist`: a run and what takes it, killed, by two processes, refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heads import load_head
from heads.recipes import load_recipe, recipe_names
from tests.support.processes.command_line import done, mote, refused
from tests.support.processes.processes import REPOSITORY, Commands, command_starter
from tests.support.worlds.dist_training import small_recipe, train_dist
from tests.support.worlds.tiny_world import WORDS, make_encoder
from tests.support.worlds.tuning import (
    difference,
    files_of,
    finetune,
    same_bits,
    start_ranks,
    tuning_workspace,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning_workspace(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def trained(packed: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a finished run "d" of DiST."""
    root = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(packed, root)
    (root / "summary.json").write_text(json.dumps(done(*train_dist(root, recipe, "d"))))
    return root


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


def test_the_run_is_evaluated_and_predicts(trained: Path, packed: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["head"], summary["epochs"], summary["frames"]) == ("dist", 2, 4)
    assert summary["next"].startswith("mote-cli eval --closeset clips --head d")
    usual = done(*shlex.split(summary["next"])[1:])
    assert (usual["n_evaluated"], usual["n_failed"]) == (6, 0)
    one = done("eval", "--closeset", "clips", "--head", "d", "--views", "1x1", "--root", trained)
    # What training measured: the same frames, pixels and weights.
    assert one["top1"] == pytest.approx(summary["top1"], abs=1e-6)
    new = done(
        *("eval", "--zeroshot", "clips", "--head", "d", "--allow-overlap", "--ensemble", "0.5"),
        *("--root", trained),
    )
    assert new["n_evaluated"] == 18
    video = next((packed.parent / "videos/val/run").iterdir())
    answer = done("predict", video, "--head", "d", "--classes", "run,sit,jump", "--root", trained)
    assert len(answer["videos"][0]["predictions"]) == 3
    inspected = done("inspect", trained / "heads/d")
    assert (inspected["mode"], inspected["finished"]) == ("finetune", True)


def test_the_tower_is_the_clip_that_it_began_with(trained: Path) -> None:
    start, published = (
        load_file(trained / "encoders" / name / "open_clip_model.safetensors")
        for name in ("tiny", "d")
    )
    assert start.keys() == published.keys()
    assert all(torch.equal(value, published[name]) for name, value in start.items())
    assert not (trained / "heads/d/tower.safetensors").exists()
    head = load_head(trained / "heads/d")
    assert torch.equal(head.logit_scale, start["logit_scale"])
    assert head.origin is not None
    assert (head.origin.encoder, head.origin.sampling) == ("d", "dist:4x1")
    assert (head.origin.prompt_set, len(head.origin.class_names or ())) == ("name", 6)


def test_a_second_run_begins_with_the_first(trained: Path, recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    more = ("finetune", "--dataset", "clips", "--name", "e", "--from-head", "d", "--frames", "4")
    more += ("--epochs", "1", "--batch-size", "4", "--lr", "0", "--save", "best")
    summary = done(*more, "--root", root)  # the usual recipe of the head's method
    assert (summary["head"], summary["encoder"]) == ("dist", "d")
    a, b = (load_file(root / "heads" / name / "head.safetensors") for name in "de")
    assert difference(a, b) == 0  # at rate 0
    result = done("eval", "--closeset", "clips", "--head", "e", "--root", root)
    assert (result["epoch"], result["epoch_choice"]) == (1, "best on val")
    assert (
        result["top1"] == done("eval", "--closeset", "clips", "--head", "d", "--root", root)["top1"]
    )
    wrong = refused(2, *more, "--name", "f", "--frames", "8", "--root", root)
    assert "8 frames do not fit the head to begin with, which takes 4: use --frames 4" in wrong


def test_resuming_a_finished_run_tells_the_same(trained: Path, recipe: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    again = done(*train_dist(trained, recipe, "d", "--resume"))
    assert again | {"resumed_from": 0} == summary


def test_kill_9_changes_no_bit(commands: Commands, trained: Path, root: Path, recipe: Path) -> None:
    command = train_dist(root, recipe, "d", "--checkpoint-every", "1", "--resume")
    state = root / "heads/d/state/last.safetensors"
    running = commands.start(*command)
    running.until(lambda: state.exists() or not running.alive)
    assert running.kill() == -signal.SIGKILL
    again = commands.start(*command)
    assert again.end() == 0, again.words
    assert 0 < again.json["resumed_from"] < 6
    assert same_bits(files_of(root, "d"), files_of(trained, "d"))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_torchrun_itself_trains_one_head_with_two_processes(root: Path, tmp_path: Path) -> None:
    """The documented command, over gloo: what one process with twice the batch trains."""
    recipe = small_recipe(tmp_path, mixed=False)
    done(*train_dist(root, recipe, "one", batch_size=6))
    command = train_dist(root, recipe, "two", batch_size=3)
    torchrun = (Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", "-m")
    ended = subprocess.run(
        [*torchrun, "cli.main", *command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)  # of the first process alone
    assert (summary["processes"], summary["videos_per_step"]) == (2, 6)
    one, two = files_of(root, "one"), files_of(root, "two")
    assert difference(one["head"], two["head"]) < 2e-5
    assert [record["samples"] for record in two["metrics"]] == [12, 12]
    of_both = {
        done("eval", "--closeset", "clips", "--head", name, "--root", root)["top1"]
        for name in ("one", "two")
    }
    assert len(of_both) == 1


def test_two_processes_are_one_with_twice_the_batch(
    commands: Commands, root: Path, tmp_path: Path
) -> None:
    """Without mixing, which pairs the clips of a process."""
    recipe = small_recipe(tmp_path, mixed=False)
    done(*train_dist(root, recipe, "one", batch_size=6))
    running = start_ranks(commands, 2, *train_dist(root, recipe, "two", batch_size=3))
    assert [process.end() for process in running] == [0, 0], running[0].words
    one, two = files_of(root, "one"), files_of(root, "two")
    assert difference(one["head"], two["head"]) < 2e-5
    for mine, other in zip(one["metrics"], two["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["samples"] == other["samples"] == 12


@pytest.mark.slow
def test_two_processes_continue_after_kill_9(commands: Commands, root: Path, recipe: Path) -> None:
    more = ("--epochs", "40", "--checkpoint-every", "1", "--evaluate-every", "0", "--resume")
    command = train_dist(root, recipe, "d", *more, batch_size=2)
    running = start_ranks(commands, 2, *command)
    running[1].until((root / "heads/d/state/last.safetensors").exists)
    assert [process.kill() for process in running] == [-signal.SIGKILL] * 2
    running = start_ranks(commands, 2, *command)
    assert [process.end() for process in running] == [0, 0], running[0].words
    assert 0 < running[0].json["resumed_from"] < 120
    assert len((root / "heads/d/metrics.jsonl").read_text().splitlines()) == 40


def untouched(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--frames", "5"), "5 frames are not divisible by alpha 2"),
        (("--frames", "2"), "a DiST head needs at least 4 frames, not 2"),
        (("--layers", "1"), "layers is no setting of DiST: leave it out"),
        (("--train", "tower"), "--train tower is not possible"),
        (("--class-weights", "balanced"), "DiST cannot be trained with class weights: leave --cl"),
        (("--blend", "0.5"), "--blend mixes a tuned tower with the one it began with"),
        (("--recipe", "paper-vit-b16", "--frames", "4"), "--train tower is not possible"),
        (
            ("--method", "linear"),
            "features with `mote-cli train-head --dataset clips --head linear",
        ),
        (("--method", "dits"), "head kind 'dits' is unknown: did you mean dist?"),
        (("--method", "mote", "--frames", "2"), "cannot be set for MoTE"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_nothing(
    root: Path, recipe: Path, more: tuple[str, ...], words: str
) -> None:
    before = untouched(root)
    assert words in refused(2, *train_dist(root, recipe, "d", *more)).replace(" --json", "")
    assert untouched(root) == before


def test_layers_that_the_tower_does_not_have(root: Path, recipe: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    head = 'kind = "dist"\nselected_layers = [0, 7]'
    wrong.write_text(recipe.read_text().replace('kind = "dist"', head))
    before = untouched(root)
    said = refused(2, *train_dist(root, wrong, "d"))
    assert "selected layer 7 is out of range: the image tower has 2 blocks, 0 to 1" in said
    wrong.write_text(recipe.read_text().replace('kind = "dist"', 'kind = "dist"\npatch = 8'))
    assert "unknown keys in [head]: patch" in refused(2, *train_dist(root, wrong, "d"))
    assert untouched(root) == before


def test_runs_of_another_method_and_other_classes(
    trained: Path, packed: Path, recipe: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    done(*finetune(root, "m", "--epochs", "1"))
    before = untouched(root)
    begins = ("--from-head", "m")
    said = refused(2, *train_dist(root, recipe, "x", *begins))
    assert "DiST is to be trained, and run m is MoTE: begin with a run of DiST" in said
    assert "run m is MoTE" in refused(
        2, *("finetune", "--dataset", "clips", "--name", "x", *begins, "--recipe", recipe),
        *("--root", root),
    )  # fmt: skip
    said = refused(2, *finetune(root, "x", "--method", "mote", "--from-head", "d"))
    assert "run d is DiST" in said.replace("layers is no setting", "")
    said = refused(2, *train_dist(root, recipe, "m", "--resume"))
    assert "run m in " in said
    assert "trains MoTE, not DiST" in said
    said = refused(2, *finetune(root, "d", "--resume"))
    assert "trains DiST, not MoTE" in said
    assert untouched(root) == before
    videos = tmp_path / "videos"
    for name in ("run", "sit"):
        shutil.copytree(packed.parent / "videos/train" / name, videos / "train" / name)
    done("pack", "--dataset", "other", "--videos", videos, "--root", root)
    said = refused(
        2,
        *("finetune", "--dataset", "other", "--name", "x", "--from-head", "d", "--frames", "4"),
        *("--root", root),
    )
    assert "the head was trained on 6 classes that are not the 2 of other" in said
    assert not (root / "heads/x").exists()


def test_what_a_finished_run_cannot_be_used_for(trained: Path, tmp_path: Path) -> None:
    before, place = untouched(trained), ("--root", trained)
    for words, said in (
        (
            ("train-head", "--dataset", "clips", "--from-head", "d", "--name", "x"),
            "DiST cannot be trained from a store: begin with a run of another method",
        ),
        (
            ("eval", "--closeset", "clips", "--head", "d", "--sweep", "blend=0.5,1"),
            "d has no tuned tower to blend with CLIP's",
        ),
        # Its tower has narrower attention heads than the format's readers would build.
        (
            ("export", "d", "--format", "official", "--out", tmp_path / "d.pyth"),
            "is not built as OpenAI's CLIPs are",
        ),
    ):
        assert said in refused(2, *words, *place)
    assert {path for path in untouched(trained) if "features" not in path} <= before
    assert not (tmp_path / "d.pyth").exists()


def test_sentences_of_ones_own(root: Path, recipe: Path, tmp_path: Path) -> None:
    """Evaluation takes those that any class can have."""
    (tmp_path / "mine.txt").write_text("a video of {}\n")
    summary = done(
        *train_dist(root, recipe, "d", "--epochs", "1", "--prompts", tmp_path / "mine.txt")
    )
    assert done(*shlex.split(summary["next"])[1:])["n_evaluated"] == 6
    words = json.dumps({name: [f"somebody does {name}"] for name in WORDS})
    (tmp_path / "own.json").write_text(words)
    said = refused(2, *train_dist(root, recipe, "e", "--prompts", tmp_path / "own.json"))
    assert "has sentences of its own for every class" in said


def test_a_newcomer_reads_it_at_80_columns(root: Path, recipe: Path) -> None:
    words = [word for word in train_dist(root, recipe, "d") if word != "--json"]
    result = mote(*words, width=80)
    assert result.code == 0, result.err
    assert "training DiST beside the frozen tower" in result.err
    assert "mote-cli eval --closeset clips --head d" in result.out.replace("\n", "")
    shown = result.out.replace(str(root), "DIR")  # a long word that nothing can fold
    lines = [line for line in shown.splitlines() if not line.startswith("next")]
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)


def test_the_published_recipes_differ_in_what_was_published() -> None:
    names = [name for name in recipe_names() if re.match("dist-.*-vit-", name)]
    assert names == [f"dist-{d}-vit-{a}" for d in ("k400", "ssv2") for a in ("b16", "l14")]
    for name in names:
        found = load_recipe(name)
        head, config = found.head_config(512), found.finetune_config()
        kinetics = "k400" in name
        assert head.pooling_layers == (4 if kinetics else 2)  # type: ignore[attr-defined]
        assert config.mirror == ("plain" if kinetics else "names")
        assert config.frames == (16 if "b16" in name else 64)
        assert (config.epochs, config.warmup_epochs, config.batch_size) == (36, 6, 32)
        assert config.mixing == {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


def test_a_tower_that_dist_cannot_use(root: Path, recipe: Path) -> None:
    make_encoder(
        root / "encoders/resnet",
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    )
    said = refused(2, *train_dist(root, recipe, "d", "--encoder", "resnet"))
    assert "DiST cannot use: it needs a vision transformer of CLIP" in said
