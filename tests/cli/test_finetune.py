"""`mote-cli finetune` and everything that works on what it leaves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from featstore import WorkError
from heads import load_head
from heads.methods.mote.official import OfficialCheckpoint
from pipeline.clip_encoder import load_encoder
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import SHORT_TRAINING, World, make_clip, make_encoder
from tests.support.worlds.tuning import difference, files_of, finetune, same_bits, tuning_workspace


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning_workspace(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


def test_the_tuned_tower_and_head_work_everywhere(root: Path, tmp_path: Path) -> None:
    summary = done(*finetune(root, "tuned", "--blend", "1", "--lr", "1e-2"))
    place = ("--root", root)
    store = done(
        *("extract", "--dataset", "clips", "--encoder", "tuned", "--sampling", "uniform:2"),
        *("--precision", "fp32", "--prompts", "name", *place),
    )
    assert store["rows_ok"] == 18
    close = done("eval", "--closeset", "clips", "--head", "tuned", *place)
    assert close["encoder_fingerprint"] == summary["encoder_fingerprint"]
    assert close["frames"] == 2
    # What training measured on the videos is what evaluation measures on the store (features in
    # float16, so one video may change its place).
    assert close["top1"] == pytest.approx(summary["top1"], abs=100 / 6 + 1e-6)
    everything = done("eval", "--zeroshot", "clips", "--head", "tuned", "--allow-overlap", *place)
    assert (everything["n_evaluated"], everything["n_trained_on"]) == (18, 12)
    clip = make_clip(tmp_path / "new.mp4", 77)
    assert clip
    predicted = done(
        *("predict", tmp_path / "new.mp4", "--classes", "run,sit,wave,jump,swim"),
        *("--head", "tuned", *place),
    )
    assert len(predicted["videos"][0]["predictions"]) == 5
    for kind in ("safetensors", "official"):
        assert done("export", "tuned", "--format", kind, "--out", tmp_path / kind, *place)["bytes"]
    inspected = done("inspect", root / "heads/tuned")
    assert (inspected["mode"], inspected["finished"]) == ("finetune", True)
    assert inspected["top1_by_epoch"]["epoch 2"] == pytest.approx(summary["top1"], abs=0.01)
    assert inspected["failures"] == []
    assert "first_stage" not in inspected
    assert inspected["results"]


def test_a_sweep_of_blends_of_a_tuned_tower(root: Path, tmp_path: Path) -> None:
    """What is missing is made by the commands that the message gives."""
    done(*finetune(root, "tuned", "--blend", "1", "--lr", "1e-2"))
    place = ("--root", root)
    sampling = ("--sampling", "uniform:2", "--precision", "fp32", "--prompts", "name")
    done("extract", "--dataset", "clips", "--encoder", "tuned", *sampling, *place)
    sweep = ("eval", "--zeroshot", "clips", "--head", "tuned", "--prompts", "name")
    sweep += ("--sweep", "blend=0.5,1", "--no-modulate", "--allow-overlap")
    table = done(*sweep, *place)
    assert [row["blend"] for row in table["rows"]] == [1.0]
    (gap,) = table["missing"]
    exported, imported, extracted = re.findall(r"`mote-cli ([^`]*)`", gap["remedy"])
    for command in (exported, imported):
        done(*command.replace("tuned.pt", str(tmp_path / "tuned.pt")).split(), *place)
    done(*extracted.split(), *sampling, *place)
    both = done(*sweep, *place)
    assert [row["blend"] for row in both["rows"]] == [0.5, 1.0]
    assert both["missing"] == []
    assert both["rows"][1] == table["rows"][0]
    encoders = root / "encoders"
    half, whole, start = (
        load_file(encoders / name / "open_clip_model.safetensors")
        for name in ("tuned-blend50", "tuned", "tiny")
    )
    assert all(torch.equal(half[n], 0.5 * whole[n] + 0.5 * start[n]) for n in half)


def test_the_encoder_is_blended_and_the_official_export_is_not(root: Path, tmp_path: Path) -> None:
    done(*finetune(root, "half", "--blend", "0.5", "--lr", "1e-2"))
    tower = load_file(root / "heads/half/tower.safetensors")
    start = load_file(root / "encoders/tiny/open_clip_model.safetensors")
    published = load_file(root / "encoders/half/open_clip_model.safetensors")
    for name, value in published.items():
        expected = 0.5 * tower[name] + 0.5 * start[name] if name in tower else start[name]
        assert torch.equal(value, expected), name
    assert difference(tower, {name: start[name] for name in tower}) > 1e-4
    head = load_head(root / "heads/half")
    assert head.origin is not None
    assert head.origin.encoder == "half"
    encoder = load_encoder("half", "fp32", encoders_dir=root / "encoders")
    assert head.origin.encoder_fingerprint == encoder.fingerprint
    assert torch.equal(head.logit_scale, published["logit_scale"])
    out = tmp_path / "official.pt"
    done("export", "half", "--format", "official", "--out", out, "--root", root)
    exported = OfficialCheckpoint.read(out)
    assert exported.epoch == 1  # two epochs, counted from 0
    assert exported.tower_state.keys() == tower.keys()
    assert all(torch.equal(exported.tower_state[name], tower[name]) for name in tower)
    done(
        *("import-checkpoint", out, "--name", "back", "--clip", root / "encoders/tiny"),
        *("--blend", "0.5", "--attention-heads", head.config.attention_heads, "--root", root),
    )
    assert load_encoder("back", "fp32", encoders_dir=root / "encoders").fingerprint == (
        encoder.fingerprint
    )


def test_the_same_command_gives_the_same_bits_and_another_seed_others(root: Path) -> None:
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", "7"))):
        done(*finetune(root, name, *more))
    a, b, c = (files_of(root, name) for name in "abc")
    assert same_bits(a, b)
    assert not same_bits(a, c)


def test_reports_speed_waiting_memory_and_time_left(root: Path) -> None:
    summary = done(*finetune(root, "r"))
    lines = (root / "heads/r/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        assert record["clips_per_second"] > 0
        assert 0 <= record["waiting"] <= 1
        assert record["peak_rss_mb"] > 50
    assert records[0]["seconds_left"] >= 0  # rounded to tenths
    assert records[-1]["seconds_left"] == 0
    assert summary["clips_per_second"] > 0
    assert 0 <= summary["waiting"] <= 1
    assert (summary["n_listed"], summary["n_failed"]) == (12, 0)
    assert summary["resumed_from"] == 0
    again = done(*finetune(root, "r", "--resume"))
    assert again == summary | {"resumed_from": 6}


@pytest.mark.parametrize("train", ["head", "tower-last-1"])
def test_parts_of_the_tower_stay_as_they_were(root: Path, train: str) -> None:
    done(*finetune(root, "r", "--train", train, "--blend", "1", "--checkpointing"))
    tower = load_file(root / "heads/r/tower.safetensors")
    start = load_file(root / "encoders/tiny/open_clip_model.safetensors")
    changed = {name for name, value in tower.items() if not torch.equal(value, start[name])}
    assert "logit_scale" in changed
    blocks = {name.split(".")[3] for name in changed if ".resblocks." in name}
    assert blocks == (set() if train == "head" else {"1"})
    assert "visual.conv1.weight" not in changed


def test_the_best_epoch_can_be_published(root: Path) -> None:
    summary = done(*finetune(root, "r", "--save", "best", "--epochs", "4", "--blend", "1"))
    records = [
        json.loads(line) for line in (root / "heads/r/metrics.jsonl").read_text().splitlines()
    ]
    accuracies = [record["evaluation"]["top1"] for record in records]
    best = accuracies.index(max(accuracies)) + 1  # the first of equals
    assert summary["published_epoch"] == summary["best_epoch"] == best
    assert summary["top1"] == max(accuracies)
    kept = load_file(root / "heads/r/state/best.safetensors")
    tower = load_file(root / "heads/r/tower.safetensors")
    name = "conv1.weight"
    assert torch.equal(kept[f"parameter.image_tower.{name}"], tower[f"visual.{name}"])


def test_a_second_stage_in_the_same_folder(own: World) -> None:
    root, name = own.root, "stage"
    make_encoder(root / "encoders/tiny")
    shape = ("--dataset", "clips", "--name", name, "--frames", "2", "--root", root)
    done("train-head", *shape, *SHORT_TRAINING, "--precision", "fp32")
    done("eval", "--closeset", "clips", "--head", name, "--root", root)
    first = load_file(root / "heads" / name / "head.safetensors")
    second = ("finetune", *shape, "--epochs", "2", "--batch-size", "4", "--from-head", name)
    summary = done(*second)
    assert summary["head"] == "mote"
    kept = root / "heads" / name / "frozen"
    assert all(torch.equal(v, first[k]) for k, v in load_file(kept / "head.safetensors").items())
    assert {"config.json", "metrics.jsonl", "state", "eval"} <= {p.name for p in kept.iterdir()}
    assert not (root / "heads" / name / "eval").exists()
    assert done("inspect", root / "heads" / name)["first_stage"] == str(kept)
    tuned = load_head(root / "heads" / name)
    assert tuned.origin is not None
    assert tuned.origin.encoder == name
    assert done(*second, "--resume")["resumed_from"] == 6
    assert "exists in" in refused(2, *second)
    # Another run may begin with the frozen head's successor.
    third = done(*second[:3], "--name", "more", *second[5:-1], name)
    assert third["encoder"].endswith(f"encoders/{name}") or third["encoder"] == name


def test_the_first_stage_can_be_named(own: World) -> None:
    root, name = own.root, "stage"
    place = ("--root", root)
    make_encoder(root / "encoders/tiny")
    shape = ("--dataset", "clips", "--name", name, "--frames", "2", *place)
    done("train-head", *shape, *SHORT_TRAINING, "--precision", "fp32")
    closeset = ("eval", "--closeset", "clips", *place, "--head")
    before, _ = done(*closeset, name), done(*closeset, "clips-mote")
    second = ("finetune", *shape, "--epochs", "1", "--batch-size", "4", "--from-head", name)
    with mock.patch("heads.end_to_end.finetune._run", side_effect=WorkError("stopped")):
        assert "stopped" in refused(1, *second)
    clip = next((own.videos / "val" / "run").iterdir())
    export = ("--format", "safetensors", "--out", root / "head.safetensors", *place)
    for command in (
        (*closeset, name),
        ("predict", clip, *place, "--head", name),
        ("export", name, *export),
    ):
        assert f"--head {name}/frozen" in refused(2, *command)
    # What the refusal names works, and so it does once the second stage is done.
    for finished in (False, True):
        if finished:
            done(*second, "--resume")
        result = done(*closeset, f"{name}/frozen")
        assert result["per_split"] == before["per_split"]
        assert result["head"] == f"{name}/frozen"
        predicted = done("predict", clip, *place, "--head", f"{name}/frozen")
        assert predicted["head"] == f"{name}/frozen"
        assert done("export", f"{name}/frozen", *export)["run"] == f"{name}/frozen"
        done("compare", f"{name}/frozen", "clips-mote", *place)
    assert "no name for a run" in refused(2, *closeset, f"{name}/other")


def test_a_data_set_without_splits_is_trained_on_whole(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number in range(4):
        make_clip(tmp_path / f"videos/{'ab'[number % 2]}/{number}.mp4", number)
    done("pack", "--dataset", "clips", "--videos", tmp_path / "videos", "--root", root)
    make_encoder(root / "encoders/tiny")
    # A batch larger than the data is one smaller batch.
    result = mote(*finetune(root, "r", batch_size=64))
    assert result.code == 0, result.err
    assert result.json["n_listed"] == 4
    assert result.json["top1"] is None
    assert "a batch of 64 is more than the 4 training videos" in result.err
    assert "nothing is evaluated" in result.err


def test_failed_videos_are_counted_and_named(root: Path) -> None:
    shard = sorted((root / "datasets/clips/shards").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[: len(content) // 2])
    result = mote(*finetune(root, "r"))
    assert result.code == 1
    assert "videos failed, more than --max-failures 0.05 allows" in result.error
    failed = result.json["n_failed"]
    assert 0 < failed <= 4
    assert (root / "heads/r/head.safetensors").is_file()
    lines = (root / "heads/r/failures.csv").read_text().splitlines()
    assert lines[0] == "key,split,first_epoch,reason"
    assert len(lines) == 1 + failed + result.json["n_evaluated_failed"]
    allowed = done(*finetune(root, "s", "--max-failures", "0.9"))
    assert allowed["n_failed"] == failed


def test_nothing_to_train_on(root: Path) -> None:
    for shard in (root / "datasets/clips/shards").glob("*.tar"):
        shard.write_bytes(b"")
    assert "none of 12 training videos could be decoded" in refused(1, *finetune(root, "r"))


def test_mistakes(root: Path, tmp_path: Path) -> None:
    narrow = make_encoder(root / "encoders/narrow", embed_dim=16)
    done(*finetune(root, "wide"))
    taken = "encoders/tiny exists already, and the tuned tower goes there"
    for message, more in {
        taken: ("--name", "tiny"),
        "run wide exists": ("--name", "wide"),
        "was begun with other settings: training.lr is 0.001 in the run, asked for 0.5": (
            *("--name", "wide", "--resume", "--lr", "0.5"),
        ),
        "data.encoder_fingerprint is": (
            *("--name", "wide", "--resume", "--encoder", str(make_encoder(tmp_path / "o", 1))),
        ),
        "head takes embeddings of width 32": ("--from-head", "wide", "--encoder", str(narrow)),
        "was trained on features of wide": ("--from-head", "wide", "--encoder", "tiny"),
        "no trained head 'nobody'": ("--from-head", "nobody"),
        "has no head of a first stage": ("--name", "x", "--from-head", "x"),
        "split 'test' does not exist": ("--split", "test"),
        "cannot be both trained and evaluated on": ("--split", "val"),
        "accumulation 4 is more than the 3 batches": ("--accumulation", "4"),
        "precision 'fp8' is unknown": ("--precision", "fp8"),
        "train 'text' is unknown": ("--train", "text"),
        "tower-last-3: the image tower has 2 blocks": ("--train", "tower-last-3"),
        "draws 'none' is unknown": ("--draws", "none"),
        "78 frames": ("--frames", "78"),
        "save best needs evaluations": ("--save", "best", "--evaluate-every", "0"),
        "means no head": ("--name", "mean"),
        "unknown prompt set": ("--prompts", "poem"),
        "no recipe 'paper'": ("--recipe", "paper"),
        "not packed": ("--dataset", "nothing"),
        "this machine has none": ("--device", "cuda"),
    }.items():
        if more == ("--device", "cuda") and torch.cuda.is_available():
            continue
        error = refused(2, *finetune(root, "new", *more))
        assert message in error, error
        assert not (root / "heads/new/config.json").exists()


def test_a_loss_that_is_no_number(root: Path) -> None:
    more = ("--lr", "1e30", "--warmup-epochs", "0", "--checkpoint-every", "1")
    error = refused(1, *finetune(root, "r", *more))
    assert "in epoch 1, step" in error
    assert "last good checkpoint is kept" in error or "nothing is kept" in error
    noted = json.loads((root / "heads/r/state/not-finite.json").read_text())
    assert len(noted["keys"]) == 4
    assert all(key in error for key in noted["keys"])
    state = root / "heads/r/state/last.safetensors"
    if state.exists():
        assert all(value.isfinite().all() for value in load_file(state).values())
    assert not (root / "heads/r/head.safetensors").exists()
    assert not (root / "encoders/r").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions(root: Path, precision: str) -> None:
    more = ("--precision", precision)
    summary = done(*finetune(root, "whole", *more))
    assert summary["precision"] == precision
    assert summary["loss"] < 4
