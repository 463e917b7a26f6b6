"""`mote-cli finetune --train both-towers`: the text tower trains too, and everything follows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from heads import load_head
from pipeline.clip_encoder import Encoder, load_encoder
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import WORDS
from tests.support.worlds.tuning import difference, files_of, finetune, same_bits, tuning_workspace

BOTH = ("--train", "both-towers", "--lr", "1e-2")
TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "text_projection")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning_workspace(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


@pytest.mark.parametrize("method", ["mote", "transformer", "mean"])
def test_both_towers_are_tuned_blended_and_published(root: Path, method: str) -> None:
    result = mote(*finetune(root, "r", *BOTH, "--blend", "0.5", "--method", method))
    assert result.code == 0, result.err
    assert "training both towers and head:" in result.err
    assert "class texts: 6 classes, 6 sentences of up to" in result.err
    tower = load_file(root / "heads/r/tower.safetensors")
    start = load_file(root / "encoders/tiny/open_clip_model.safetensors")
    published = load_file(root / "encoders/r/open_clip_model.safetensors")
    assert tower.keys() == start.keys() == published.keys()
    for name, value in published.items():
        assert torch.equal(value, 0.5 * tower[name] + 0.5 * start[name]), name
    texts = [name for name in tower if name.startswith(TEXT_PARTS)]
    assert len(texts) > 10
    assert all(not torch.equal(tower[name], start[name]) for name in texts)
    head, encoder = load_head(root / "heads/r"), load_encoder(root / "encoders/r", "fp32")
    assert head.origin is not None
    assert head.origin.encoder_fingerprint == encoder.fingerprint
    assert encoder.fingerprint == result.json["encoder_fingerprint"]
    classes = encoder.class_embeddings(WORDS, "name")
    torch.testing.assert_close(head.training_class_embeddings, classes, rtol=0, atol=1e-6)
    first = load_encoder(root / "encoders/tiny").class_embeddings(WORDS, "name")
    assert (first - classes).abs().max() > 1e-3


def test_what_training_measured_is_what_evaluation_measures(root: Path) -> None:
    """With texts of that moment: those of the start have other places among the classes."""
    summary = done(*finetune(root, "r", *BOTH, "--blend", "1", "--epochs", "3"))
    place = ("--root", root)
    done(
        *("extract", "--dataset", "clips", "--encoder", "r", "--sampling", "uniform:2"),
        *("--precision", "fp32", "--prompts", "name", *place),
    )
    close = done("eval", "--closeset", "clips", "--head", "r", *place)
    assert close["encoder_fingerprint"] == summary["encoder_fingerprint"]
    assert close["top1"] == pytest.approx(summary["top1"], abs=100 / 6 + 1e-6)


def test_a_tuned_mean_of_frames_knows_what_it_saw(root: Path) -> None:
    """It has no parameters of its own, and its tower was trained all the same."""
    place = ("--root", root)
    for name, more in (("r", BOTH), ("s", ("--lr", "1e-2"))):
        done(*finetune(root, name, *more, "--method", "mean"))
        done(
            *("extract", "--dataset", "clips", "--encoder", name, "--sampling", "uniform:2"),
            *("--precision", "fp32", "--prompts", "name", *place),
        )
        done("eval", "--closeset", "clips", "--head", name, *place)
    everything = ("eval", "--zeroshot", "clips", "--head", "r", *place)
    assert "12 of 18 tested videos are in the training of r" in refused(2, *everything)
    compared = done("compare", "r", "s", *place)
    assert "training.train" in json.dumps(compared)


def test_a_finished_run_is_the_same_bit_for_bit_and_begins_another(root: Path) -> None:
    more = (*BOTH, "--save", "best", "--accumulation", "2")
    for name in "ab":
        done(*finetune(root, name, *more))
    a, b = files_of(root, "a"), files_of(root, "b")
    assert same_bits(a, b)
    assert any(name.startswith("parameter.texts.") for name in a["best"])
    assert any(name.startswith("exp_avg.texts.") for name in a["state"])
    done(*finetune(root, "c", *BOTH, "--from-head", "a", "--encoder", "a"))
    assert difference(files_of(root, "c")["tower"], a["tower"]) > 1e-4


def test_texts_of_the_start_are_encoded_once(root: Path) -> None:
    """A run that continues reads them from its folder, and notices if they are damaged."""
    done(*finetune(root, "r", "--prompts", "mote28"))
    (kept,) = (root / "heads/r/state").glob("texts-*.safetensors")
    assert torch.equal(
        load_file(kept)["embeddings"],
        load_encoder(root / "encoders/tiny").class_embeddings(WORDS, "mote28"),
    )
    again = finetune(root, "r", "--prompts", "mote28", "--resume")
    with mock.patch.object(Encoder, "class_embeddings", side_effect=AssertionError):
        done(*again)
    kept.write_bytes(kept.read_bytes()[:-40])
    result = mote(*again)
    assert result.code == 0, result.err
    assert "the class texts are encoded again" in result.err


def test_what_cannot_be_done_with_it(root: Path, tmp_path: Path) -> None:
    assert "use --shard ddp" in refused(2, *finetune(root, "r", *BOTH, "--shard", "fsdp"))
    beside = ("finetune", "--dataset", "clips", "--encoder", "tiny", "--name", "r", "--root", root)
    assert "keeps the tower as it is" in refused(2, *beside, "--method", "dist", *BOTH)
    meant = refused(2, *finetune(root, "r", "--train", "both-tower"))
    assert "did you mean both-towers" in meant
    done(*finetune(root, "r", *BOTH))
    place = ("--root", root)
    out = tmp_path / "r.pt"
    words = refused(2, "export", "r", "--format", "official", "--out", out, *place)
    assert "run r trained its text tower too" in words
    assert not out.exists()
    done("export", "r", "--format", "safetensors", "--out", out.with_suffix(".st"), *place)
