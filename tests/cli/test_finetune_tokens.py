"""`mote-cli finetune --tokens`: the same numbers from a store of tokens, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from featstore import open_store
from heads import load_head
from heads.methods.msta.config import MstaConfig
from heads.methods.msta.towers import AdaptedTowers
from heads.prediction.pixel_encoder import encoder_of_head
from pipeline.clip_encoder import load_encoder
from pipeline.tars.dataset import load_dataset
from pipeline.video_clips.loader import ClipLoader
from pipeline.video_clips.stream import EvaluationClips
from pipeline.video_clips.token_clips import TokenEvaluationClips
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.msta_training import SMALL_ADAPTERS, small_recipe
from tests.support.worlds.tiny_world import CLASSES, CLIP, make_clip, make_encoder, make_viclip
from tests.support.worlds.tuning import difference

FRAMES = 4  # of every video to train on, so that none can be chosen otherwise
EXTRACT = ("extract", "--dataset", "clips", "--encoder", "two", "--precision", "fp32")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 videos of 4 frames to train on, 6 of others for validation; a CLIP of 2 and 2 blocks."""
    folder = tmp_path_factory.mktemp("tokens")
    root, number = folder / "root", 0
    for name in CLASSES:
        for file in ("train/{}/a.mp4", "train/{}/b.mp4", "val/{}/c.mp4"):
            frames = FRAMES if file.startswith("train") else None
            make_clip(folder / "videos" / file.format(name), number, frames)
            number += 1
    done("pack", "--dataset", "clips", "--videos", folder / "videos", "--root", root)
    make_encoder(root / "encoders/two", text_cfg={**CLIP["text_cfg"], "layers": 2})
    small_recipe(folder, block=2)
    return root


@pytest.fixture(scope="module")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a store of tokens, and the runs "pixels" and "tokens"."""
    root = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(packed, root)
    done(*train(root, packed, "pixels"))
    done(*EXTRACT, "--sampling", "uniform:4", "--tier", "tokens:0", "--root", root)
    with mock.patch.object(ClipLoader, "_load", side_effect=AssertionError("a video is read")):
        summary = done(*train(root, packed, "tokens", "--tokens"))
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def train(root: Path, packed: Path, name: str, *more: str) -> tuple[str, ...]:
    recipe = str(packed.parent / "small.toml")
    command = ("finetune", "--dataset", "clips", "--encoder", "two", "--recipe", recipe)
    shape = ("--name", name, "--batch-size", "4", "--no-augment", "--root", str(root))
    return (*command, *shape, *more)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / "heads" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_from_tokens_is_the_run_from_videos(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["n_listed"], summary["n_failed"], summary["n_evaluated"]) == (12, 0, 6)
    assert summary["tokens"] == "two--uniform-4--tokens-0.zarr"
    # bfloat16 has 8 bits; what the store keeps has 11.
    pairs = zip(metrics(trained, "pixels"), metrics(trained, "tokens"), strict=True)
    for videos, kept in pairs:
        assert kept["loss"] == pytest.approx(videos["loss"], rel=2**-8)
        assert kept["evaluation"]["n_evaluated"] == videos["evaluation"]["n_evaluated"] == 6
    heads = {name: load_head(trained / "heads" / name) for name in ("pixels", "tokens")}
    frames = torch.randn(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = [
        encoder_of_head(h, f"head:{name}", "fp32", "cpu", trained / "encoders").encode_clips(frames)
        for name, h in heads.items()
    ]
    assert torch.cosine_similarity(*found).min() > 0.999
    data = json.loads((trained / "heads/tokens/config.json").read_text())["data"]
    assert data["tokens"] == "tokens:0 in fp32"


def test_in_bfloat16_tokens_and_videos_teach_the_same(trained: Path, packed: Path) -> None:
    low = ("--precision", "bf16")
    done(*train(trained, packed, "low-pixels", *low))
    done(*train(trained, packed, "low-tokens", "--tokens", *low))
    names = ("low-pixels", "low-tokens", "pixels")
    for videos, kept, full in zip(*(metrics(trained, name) for name in names), strict=True):
        assert kept["loss"] == pytest.approx(videos["loss"], rel=2**-6)
        assert videos["loss"] == pytest.approx(full["loss"], rel=2**-5)
        found = [line["evaluation"]["top1"] for line in (videos, kept, full)]
        assert max(found) - min(found) <= 100 / 6 + 1e-6  # one of six videos


def test_clips_from_tokens_are_those_of_videos(trained: Path) -> None:
    """Key by key, in videos of any length: the store has the frames of evaluation."""
    encoder = load_encoder("two", "fp32", encoders_dir=trained / "encoders")
    towers = AdaptedTowers(encoder.model, MstaConfig(dim=32, first=2, last=2, width=8))
    store = open_store(trained / "features/clips/two--uniform-4--tokens-0.zarr")
    loading: dict[str, Any] = {"split": None, "frames": 4, "batch_size": 5, "workers": 2}
    loading["preprocessing"] = encoder.preprocessing
    dataset = load_dataset(trained / "datasets/clips")
    pairs = zip(
        EvaluationClips(dataset, **loading).batches(),
        TokenEvaluationClips(dataset, store=store, **loading).batches(),
        strict=True,
    )
    for videos, kept in pairs:
        assert videos.keys == kept.keys
        assert torch.equal(videos.labels, kept.labels)
        tokens = towers.tokens_before(videos.frames)
        assert torch.allclose(tokens, kept.frames, rtol=2**-10, atol=1e-4)


def test_a_run_from_tokens_continues_to_the_same_bits(trained: Path, packed: Path) -> None:
    before = load_file(trained / "heads/tokens/head.safetensors")
    (trained / "heads/tokens/head.safetensors").unlink()
    done(*train(trained, packed, "tokens", "--tokens", "--resume"))
    assert difference(before, load_file(trained / "heads/tokens/head.safetensors")) == 0
    said = refused(2, *train(trained, packed, "tokens", "--resume"))
    assert "tokens" in said


def test_videos_that_the_store_could_not_take_are_counted(trained: Path, packed: Path) -> None:
    """A video that failed in the extraction, and one whose row is damaged."""
    store = open_store(trained / "features/clips/two--uniform-4--tokens-0.zarr")
    broken = store.keys[0]
    kept = type(store).features

    def damaged(self: Any, rows: Any, frames: Any = None) -> Any:
        from featstore import WorkError

        if self.keys[int(self.positions(rows)[0])] == broken:
            raise WorkError("row 0 fails its checksum")
        return kept(self, rows, frames)

    with mock.patch.object(type(store), "features", damaged):
        result = mote(*train(trained, packed, "d", "--tokens", "--max-failures", "0.5", "--json"))
    assert result.code == 0, result.err
    assert result.json["n_failed"] + result.json["n_evaluated_failed"] == 1
    assert (broken, "row 0 fails its checksum") in {
        (failure["key"], failure["reason"]) for failure in result.json["failures"]
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--augment",), "cannot be augmented any more: add --no-augment"),
        (("--frames", "2"), "has tokens:0 of uniform:4): make it with `mote-cli extract --dataset"),
        (("--recipe", "end-to-end"), "--tokens is for --method msta, not for MoTE: leave it out"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    trained: Path, packed: Path, more: tuple[str, ...], words: str
) -> None:
    assert words in refused(2, *train(trained, packed, "x", "--tokens", *more))
    assert not (trained / "heads/x").exists()


def test_what_lies_below_must_be_in_a_store(packed: Path, trained: Path, tmp_path: Path) -> None:
    said = refused(2, *train(packed, packed, "x", "--tokens"))
    made = said.partition("make it with `")[2].partition("`")[0]
    assert "tokens:0 of uniform:4 (block 1 of the image tower, which --tier counts from 0)" in said
    assert "--sampling uniform:4 --tier tokens:0" in made
    early = tmp_path / "early.toml"
    early.write_text(SMALL_ADAPTERS.format(block=2).replace("first = 2", "first = 1"))
    said = refused(2, *train(trained, packed, "x", "--tokens", "--recipe", str(early)))
    assert "below which there are only pixels" in said
    early.write_text(SMALL_ADAPTERS.format(block=1))
    spec = f"viclip:{make_viclip(tmp_path / 'v.safetensors')}"
    more = ("--tokens", "--recipe", str(early), "--encoder", spec)
    assert "looks at all frames of a clip together" in refused(
        2, *train(trained, packed, "x", *more)
    )
