"""`mote-cli finetune --method msta`: a run and what takes it, killed, by two processes, refused."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featstore import open_store
from heads import load_head
from heads.methods.msta.official import read
from heads.prediction.pixel_encoder import encoder_of_head
from pipeline.clip_encoder import load_encoder
from pipeline.extraction import description_texts
from tests.support.processes.command_line import done, mote, refused
from tests.support.processes.processes import Commands, command_starter
from tests.support.worlds.msta_training import small_recipe
from tests.support.worlds.tiny_world import WORDS, make_viclip
from tests.support.worlds.tuning import (
    difference,
    files_of,
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
def guides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two spatial and two temporal descriptions of every class."""
    file = tmp_path_factory.mktemp("guides") / "guides.json"
    sentences = {
        "spatial": ["A person seen while doing {}.", "A room for {}."],
        "temporal": ["First stand, then {}.", "Begin to {}, then stop."],
    }
    of_classes = {
        name: {kind: [s.format(name) for s in lines] for kind, lines in sentences.items()}
        for name in WORDS
    }
    file.write_text(json.dumps(of_classes))
    return file


def train(
    root: Path, recipe: Path, name: str, *more: str | Path, batch_size: int = 4
) -> tuple[str, ...]:
    """The command; `more` comes last and wins."""
    command = ("finetune", "--dataset", "clips", "--encoder", "tiny", "--method", "msta")
    shape = ("--recipe", str(recipe), "--name", name, "--batch-size", str(batch_size))
    return (*command, *shape, "--root", str(root), "--json", *map(str, more))


@pytest.fixture(scope="module")
def trained(
    packed: Path, recipe: Path, guides: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A workspace with a finished run "m"."""
    root = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(packed, root)
    summary = done(*train(root, recipe, "m", "--guides", guides))
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


def run_printed(words: str) -> dict[str, Any]:
    return done(*shlex.split(words)[1:])


def test_the_run_is_extracted_evaluated_and_predicts(trained: Path, packed: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["head"], summary["epochs"], summary["frames"]) == ("msta", 2, 4)
    assert not (trained / "encoders/m").exists()
    metrics = files_of(trained, "m")["metrics"]
    assert {"classification_loss", "consistency_loss"} <= metrics[0].keys()
    assert summary["next"].startswith("mote-cli extract --dataset clips --head m")
    made = run_printed(summary["next"])
    store = open_store(made["store"])
    assert store.provenance.clip_frames == 4
    assert store.provenance.encoder == "head:m"
    assert store.schema.frames == 1
    result = run_printed(summary["then"])
    assert (result["n_evaluated"], result["n_failed"]) == (6, 0)
    assert result["frames"] == 4  # as seen, not one for the one embedding that holds them
    # What training measured: the same frames, pixels and weights.
    assert result["top1"] == pytest.approx(summary["top1"], abs=1e-6)
    new = done(
        *("eval", "--zeroshot", "clips", "--head", "m", "--allow-overlap", "--root", trained),
    )
    assert new["n_evaluated"] > 0
    video = next((packed.parent / "videos/val/run").iterdir())
    answer = done("predict", video, "--head", "m", "--classes", "run,sit,jump", "--root", trained)
    assert len(answer["videos"][0]["predictions"]) == 3
    inspected = done("inspect", trained / "heads/m")
    assert (inspected["mode"], inspected["finished"]) == ("finetune", True)
    assert done("verify", made["store"], "--root", trained)["damaged"] == []
    again = run_printed(summary["next"])
    assert again["partitions_done"] == 0


def test_messages_name_the_head_and_the_store_at_hand(
    trained: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    place = ("--root", "root")
    extract = ("extract", "--head", "m", *place)
    done(*extract, "--dataset", "clips", "--split", "val")
    store = ("--store", "head-m--uniform-4--val")
    said = refused(2, "train-head", "--dataset", "clips", *store, *place)
    assert "has no rows of split 'train' (it has val)" in said
    assert "`mote-cli extract --dataset clips --head m --sampling uniform:4 --split train" in said
    made = done(*extract, "--dataset", "clips", "--sampling", "middle:4")
    assert "--head m --store head-m--middle-4" in made["next"]
    evaluate = ("eval", "--closeset", "clips", "--head", "m", *store, *place)
    for more in (("--ensemble", "0.5"), ("--sweep", "ensemble=0,1")):
        assert "nothing of CLIP's own: name a store" in refused(2, *evaluate, *more)
    said = refused(2, *evaluate, "--frames", "3")
    assert "3 frames are no whole clips: head-m--uniform-4--val.zarr has one embedding for" in said
    assert done(*evaluate, "--frames", "4")["frames"] == 4
    assert "whose image tower alone was trained" in refused(2, *evaluate, "--sweep", "blend=0,1")
    # A head that is asked for is what comes next, though the other data set could train one.
    done("pack", "--dataset", "other", "--videos", packed.parent / "videos", *place)
    made = done(*extract, "--dataset", "other")
    assert made["next"].startswith("mote-cli eval ")
    assert "--head m" in made["next"]


def test_texts_and_clips_are_those_of_the_adapted_towers(trained: Path, packed: Path) -> None:
    head = load_head(trained / "heads/m")
    origin = head.origin
    assert origin is not None
    assert (origin.encoder, origin.adapted_encoder, origin.frames) == ("head:m", "tiny", 1)
    assert (origin.sampling, origin.prompt_set) == ("uniform:4", "video")
    encoders = trained / "encoders"
    encoder = encoder_of_head(head, "head:m", "fp32", "cpu", encoders)
    assert encoder.fingerprint == origin.encoder_fingerprint
    texts = encoder.class_embeddings(WORDS, "video")
    order = [WORDS.index(name) for name in origin.class_names or ()]
    assert torch.allclose(texts[order], head.training_class_embeddings, atol=1e-6)
    plain = load_encoder("tiny", "fp32", encoders_dir=encoders)
    assert not torch.allclose(plain.class_embeddings(WORDS, "video"), texts, atol=1e-3)
    frames = torch.randn(2, 4, 3, 32, 32)
    mean = plain.encode_pixels(frames.flatten(0, 1)).unflatten(0, (2, 4)).mean(1)
    assert not torch.allclose(encoder.encode_clips(frames), mean, atol=1e-3)
    size = (trained / "heads/m/head.safetensors").stat().st_size
    held = sum(4 * value.numel() for value in head.state_dict().values())
    assert size < held + 8000
    assert size < (encoders / "tiny/open_clip_model.safetensors").stat().st_size / 50


def test_a_second_run_begins_with_the_first(trained: Path, guides: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    more = ("finetune", "--dataset", "clips", "--name", "e", "--from-head", "m", "--frames", "4")
    more += ("--epochs", "1", "--batch-size", "4", "--lr", "0", "--guides", str(guides))
    summary = done(*more, "--root", root)  # the usual recipe of the head's method
    assert (summary["head"], summary["encoder"]) == ("msta", "tiny")
    a, b = (load_file(root / "heads" / name / "head.safetensors") for name in "me")
    assert difference(a, b) < 1e-6  # at rate 0
    wrong = refused(2, *more, "--name", "f", "--frames", "8", "--root", root)
    assert "8 frames do not fit the head to begin with, which takes 4: use --frames 4" in wrong


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_kill_9_changes_no_bit(
    precision: str, commands: Commands, trained: Path, root: Path, recipe: Path, guides: Path
) -> None:
    given = ("--guides", guides, "--precision", precision)
    command = train(root, recipe, "m", *given, "--checkpoint-every", "1", "--resume")
    state = root / "heads/m/state/last.safetensors"
    running = commands.start(*command)
    running.until(lambda: state.exists() or not running.alive)
    assert running.kill() == -signal.SIGKILL
    again = commands.start(*command)
    assert again.end() == 0, again.words
    assert 0 < again.json["resumed_from"] < 6
    usual = files_of(trained, "m")
    if precision != "auto":
        done(*train(root, recipe, "whole", *given))
        # In another precision the losses are near, and other numbers.
        for mine, other in zip(files_of(root, "whole")["metrics"], usual["metrics"], strict=True):
            assert mine["loss"] != other["loss"]
            assert mine["loss"] == pytest.approx(other["loss"], rel=2**-5)
        usual = files_of(root, "whole")
    assert same_bits(files_of(root, "m"), usual)


def descriptions_encoded(run: Any) -> int:
    """How often the frozen text tower is asked for descriptions while `run` runs."""
    asked = mock.Mock(wraps=description_texts._encoded)
    with mock.patch.object(description_texts, "_encoded", asked):
        run()
    return asked.call_count


def test_descriptions_are_encoded_once(
    root: Path, recipe: Path, guides: Path, tmp_path: Path
) -> None:
    more = ("--guides", guides)
    assert descriptions_encoded(lambda: done(*train(root, recipe, "m", *more))) == 2
    for name in ("head.safetensors", "metrics.jsonl"):  # as if it had been stopped early
        (root / "heads/m" / name).unlink()
    resumed = train(root, recipe, "m", *more, "--resume")
    assert descriptions_encoded(lambda: done(*resumed)) == 0
    extract = ("extract", "--dataset", "clips", "--encoder", "tiny", "--sampling", "uniform:2")
    store = Path(done(*extract, "--precision", "fp32", "--root", root)["store"])
    assert descriptions_encoded(lambda: done(*train(root, recipe, "s", *more))) == 2
    kept = {path.name for path in (store / "class_text").iterdir()}
    assert {name.partition("-")[0] for name in kept} >= {"_spatial", "_temporal"}
    assert descriptions_encoded(lambda: done(*train(root, recipe, "t", *more))) == 0
    assert same_bits(files_of(root, "s"), files_of(root, "t"))
    assert same_bits(files_of(root, "s"), files_of(root, "m"))
    assert done("verify", store, "--root", root)["damaged"] == []
    # The store has the sentences of all classes, of which half are trained.
    half = train(root, recipe, "half", *more, "--classes", "base")
    assert descriptions_encoded(lambda: done(*half)) == 0


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-4), ("bf16", 1e-3)])
def test_two_processes_are_one_with_twice_the_batch(
    precision: str, near: float, commands: Commands, root: Path, recipe: Path
) -> None:
    more = ("--precision", precision)
    done(*train(root, recipe, "one", *more, batch_size=6))
    running = start_ranks(commands, 2, *train(root, recipe, "two", *more, batch_size=3))
    assert [process.end() for process in running] == [0, 0], running[0].words
    one, two = files_of(root, "one"), files_of(root, "two")
    for mine, other in zip(one["metrics"], two["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=near)
    assert difference(one["head"], two["head"]) < 10 * near


def test_descriptions_change_what_is_learnt(
    trained: Path, root: Path, recipe: Path, tmp_path: Path
) -> None:
    result = mote(*train(root, recipe, "m"))
    assert result.code == 0, result.err
    assert "no descriptions are given" in result.err
    made = tmp_path / "templates.json"
    done("descriptions", "template", "--dataset", "clips", "-o", made, "--root", root)
    done(*train(root, recipe, "t", "--guides", made))
    assert same_bits(files_of(root, "t"), files_of(root, "m"))
    assert difference(files_of(trained, "m")["head"], files_of(root, "m")["head"]) > 1e-6


def test_few_shot_and_base_to_novel_report_the_last_epoch(
    packed: Path, recipe: Path, guides: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(packed, root)
    of_base = tmp_path / "base.json"
    for name, more in {
        "few": ("--shots", "1", "--guides", guides),
        "base": ("--shots", "1", "--classes", "base", "--guides", guides),
        "half": ("--shots", "1", "--classes", "base", "--guides", of_base),
        "whole-half": ("--classes", "base"),
    }.items():
        summary = done(*train(root, recipe, name, *more))
        if name == "half":  # a file of these classes is as good as one of all
            assert same_bits(files_of(root, "half"), files_of(root, "base"))
            continue
        run_printed(summary["next"])
        value = run_printed(summary["then"])
        if name == "whole-half":  # belongs to no protocol with a number of shots
            assert " --zeroshot clips " in summary["then"]
            assert value["n_evaluated"] == 6
            continue
        wanted = "--fewshot" if name == "few" else "--base-to-novel"
        assert f" {wanted} clips " in summary["then"]
        (run,) = value["runs"]
        metrics = files_of(root, name)["metrics"]
        found = [record["evaluation"]["top1"] for record in metrics]
        assert (run["run"], run["shots"], run["best"]) == (name, 1, None)
        assert (run["last"]["epoch"], run["last"]["epoch_choice"]) == (2, "last")
        assert run["best_in_training"]["top1"] == max(found)
        assert run["best_in_training"]["epoch_choice"] == "best on val"
        if name == "few":
            assert run["last"]["top1"] == pytest.approx(found[-1], abs=1e-6)
        else:
            assert [part["split"] for part in run["last"]["per_split"]] == ["base", "novel"]
            assert [part["n_classes"] for part in run["last"]["per_split"]] == [3, 3]
        if name == "base":
            classes = load_head(root / "heads/base").origin.class_names  # type: ignore[union-attr]
            every = json.loads(guides.read_text())
            of_base.write_text(json.dumps({each: every[each] for each in classes or ()}))


@pytest.mark.slow
def test_a_viclip_is_adapted_too(root: Path, recipe: Path, tmp_path: Path) -> None:
    spec = f"viclip:{make_viclip(tmp_path / 'v.safetensors')}"
    summary = done(*train(root, recipe, "v", "--encoder", spec))
    made = run_printed(summary["next"])
    assert open_store(made["store"]).provenance.clip_frames == 4
    result = run_printed(summary["then"])
    assert result["top1"] == pytest.approx(summary["top1"], abs=1e-6)
    said = refused(2, *train(root, recipe, "w", "--encoder", spec, "--frames", "8"))
    assert "clips of 8 frames do not fit v, which looks at 4 together: use --frames 4" in said
    out = tmp_path / "v.st"
    done("export", "v", "--format", "official", "--out", out, "--root", root)
    back = ("import-checkpoint", out, "--clip", spec, "--name", "back", "--root", root)
    assert "8 frames do not fit v, which looks at 4 together" in refused(2, *back, "--frames", "8")
    assert not (root / "heads/back").exists()
    assert done(*back)["encoder"] == "head:back"


def test_adapters_go_out_and_come_in(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    out = tmp_path / "adapters.st"  # what is in it counts, not its name
    done("export", "m", "--format", "official", "--out", out, "--root", root)
    head = load_head(root / "heads/m")
    checkpoint = read(out)
    assert checkpoint.told
    assert checkpoint.config == head.config
    names = tmp_path / "names.csv"
    classes = head.origin.class_names if head.origin else ()
    names.write_text("id,name\n" + "".join(f"{i},{n}\n" for i, n in enumerate(classes or ())))
    made = done(
        *("import-checkpoint", out, "--name", "back", "--clip", "tiny"),
        *("--class-names", names, "--root", root),
    )
    assert (made["encoder"], made["scale"]) == ("head:back", 0.1)
    a, b = (load_file(root / "heads" / name / "head.safetensors") for name in ("m", "back"))
    assert difference(a, b) < 1e-6
    # As MMA's own code writes it: a dictionary of torch, in it a prefix and two more buffers.
    state = {f"module.{k}": v for k, v in checkpoint.state.items() if "temporal" not in k}
    state |= {"token_prefix": torch.zeros(6, 1, 32), "token_suffix": torch.zeros(6, 60, 32)}
    torch.save({"state_dict": state, "epoch": 5}, tmp_path / "model.pth.tar-5")
    made = done(
        *("import-checkpoint", tmp_path / "model.pth.tar-5", "--name", "mma", "--clip", "tiny"),
        *("--root", root),
    )
    assert "temporal form none, lambda 0.005 (assumed" in made["parts"]
    said = refused(2, "import-checkpoint", out, "--name", "x", "--root", root)
    assert "holds adapters alone: name the CLIP" in said
    more = ("--clip", "tiny", "--blend", "0.5", "--root", root)
    assert "--blend means nothing" in refused(2, "import-checkpoint", out, "--name", "x", *more)
    said = refused(2, "export", "m", "--format", "onnx", "--out", tmp_path / "x", "--root", root)
    assert "only its adapters can be exported" in said


def untouched(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--layers", "1"), "layers is no setting of MSTA: leave it out"),
        (("--train", "tower"), "--train tower is not possible"),
        (("--class-weights", "balanced"), "MSTA cannot be trained with class weights"),
        (("--shard", "fsdp"), "--shard fsdp spreads a trained tower"),
        (
            ("--recipe", "msta-few-shot"),
            "there is no block 12 for an adapter: the image tower has 2 blocks",
        ),
        (("--method", "mote", "--train", "head", "--guides", "x.json"), "leave them out"),
        (("--guides", "x.json"), "x.json"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_nothing(
    root: Path, recipe: Path, more: tuple[str, ...], words: str
) -> None:
    before = untouched(root)
    assert words in refused(2, *train(root, recipe, "m", *more)).replace(" --json", "")
    assert untouched(root) == before


GOOD = {name: {"spatial": ["a {}"], "temporal": ["b {}"]} for name in WORDS}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "holds no object with classes"),
        (GOOD | {"run": ["x"]}, "class 'run': its value is of type list"),
        (GOOD | {"run": {"spatial": [], "temporal": ["x"]}}, "spatial has 0 sentences"),
        (GOOD | {"run": {"spatial": [" "], "temporal": ["x"]}}, "spatial sentence 1 is ' '"),
        (GOOD | {"run": {"spatial": ["x", "y"], "temporal": ["x"]}}, "spatial has 2 sentences"),
        (GOOD | {"fly": GOOD["run"]}, "class 'fly': it is no class of these"),
        ({k: v for k, v in GOOD.items() if k != "run"}, "class 'run': it has no sentences"),
        (
            GOOD | {"run": {"spatial": ["word " * 90], "temporal": ["x"]}},
            "spatial sentence 1 has 90 tokens, tiny takes 75",
        ),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    root: Path, recipe: Path, tmp_path: Path, content: Any, words: str
) -> None:
    (tmp_path / "own.json").write_text(json.dumps(content))
    before = untouched(root)
    assert words in refused(2, *train(root, recipe, "m", "--guides", tmp_path / "own.json"))
    assert untouched(root) == before


def test_only_such_heads_bring_an_encoder(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "heads/m", tmp_path / "heads/cut")
    file = tmp_path / "heads/cut/head.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    said = refused(1, "extract", "--dataset", "clips", "--head", "cut", "--root", tmp_path)
    assert "head.safetensors is damaged, or does not say what it was made for" in said
    both = ("extract", "--dataset", "clips", "--head", "m", "--encoder", "tiny", "--root", trained)
    assert "brings its own encoder, without --encoder" in refused(2, *both)
    said = refused(2, "extract", "--dataset", "clips", "--head", "x", "--root", trained)
    assert "x" in said
    inner = ("--tier", "tokens:0", "--root", trained)
    said = refused(2, "extract", "--dataset", "clips", "--head", "m", *inner)
    assert "gives embeddings of clips only: leave --tier out" in said
    odd = ("--sampling", "uniform:6", "--root", trained)
    said = refused(2, "extract", "--dataset", "clips", "--head", "m", *odd)
    assert "6 frames are no whole clips" in said


def test_the_rates_are_those_of_the_authors_logs() -> None:
    from heads.recipes import load_recipe
    from heads.training.schedule import learning_rates

    rates = learning_rates(load_recipe("msta-few-shot").finetune_config(), 1)[:, 0, 1]
    logged = {0: 0.0, 1: 2e-4, 5: 9.7577e-4, 6: 9.6524e-4, 10: 9.0546e-4}
    assert {epoch: round(float(rates[epoch]), 8) for epoch in logged} == pytest.approx(logged)
    assert np.all(rates[5:] > 1e-5)
