"""The authors' checkpoint gives the authors' numbers: through Python, and through the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from featstore import open_store
from heads import import_official_checkpoint, load_head
from heads.evaluation.protocols.half_class import half_class_accuracy
from heads.scoring.scores import fuse_views, percent, ranks, view_cosines, view_features
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.encoders.tuned import original_clip, tower_of, tuned_clip
from pipeline.sampling import parse_sampling
from tests.support.golden.checks import worst
from tests.support.golden.end_to_end import RUNS, GoldenRun
from tests.support.processes.command_line import done
from tests.support.worlds.frames import frames_of

CLIPS = [run for run in RUNS if run != "zs_test_3x1"]  # the same views as zs_3x1


@pytest.fixture(scope="module")
def run(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> GoldenRun:
    return GoldenRun(golden / "e2e", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def encoder(run: GoldenRun) -> Encoder:
    clip = original_clip(str(run.clip))
    imported = import_official_checkpoint(run.checkpoint, run.clip_state, attention_heads=2)
    return Encoder(tuned_clip(clip, imported.tower_state, "tuned"))


def test_the_tower_is_blended_as_published(run: GoldenRun) -> None:
    imported = import_official_checkpoint(run.checkpoint, run.clip_state, attention_heads=2)
    with np.load(run.folder / "blended_visual.npz") as blended:
        for name in blended.files:
            assert worst(imported.tower_state[name], blended[name]) <= 1e-7, name
        assert imported.logit_scale == pytest.approx(float(np.exp(blended["logit_scale"])))
    assert imported.epoch == run.meta["checkpoint_keys"]["epoch"]
    original = tower_of(original_clip(str(run.clip)))
    assert imported.tower_state.keys() == original.keys()


@pytest.mark.parametrize("name", RUNS)
def test_every_number_of_a_run(run: GoldenRun, encoder: Encoder, name: str) -> None:
    expected = run.result(name)
    head = import_official_checkpoint(run.checkpoint, run.clip_state, attention_heads=2).head
    text = encoder.class_embeddings(run.classes(name), "mote28")
    assert worst(text, expected["text_features"]) <= 1e-5
    trained = run.result("k400_1x1")["text_features"]
    assert worst(head.training_class_embeddings, trained) <= 1e-5

    sampling, crops = parse_sampling(RUNS[name][0]), RUNS[name][1]
    features = torch.stack([views(encoder, frames, sampling, crops) for frames in run.videos])
    assert worst(features, expected["image_features"]) <= 1e-4

    with torch.no_grad():
        cosines = view_cosines(head, features, text)
    assert worst(cosines, expected["head_logits"]) <= 1e-5
    scores = fuse_views(cosines)
    assert worst(scores.softmax(-1), expected["final_similarity"]) <= 1e-7
    labels = torch.from_numpy(expected["labels"])
    assert percent(ranks(scores, labels) < 1) == pytest.approx(float(expected["top1"]), abs=1e-4)
    printed = run.meta["runs"][name]["printed"]
    assert any(f"Prec@5 {percent(ranks(scores, labels) < 5):.3f}" in line for line in printed)

    if "split_vis" in expected:
        with torch.no_grad():
            embeddings = view_features(head, features, text)
        unit = torch.nn.functional.normalize(embeddings, dim=-1)
        assert worst(unit, expected["split_vis"]) <= 1e-5
        half = half_class_accuracy(embeddings, text, labels)
        assert worst(np.array(half.split_top1), expected["split_top1"]) <= 1e-4
        assert worst(np.array(half.split_top5), expected["split_top5"]) <= 1e-4


def views(encoder: Encoder, frames: np.ndarray, sampling: Any, crops: int) -> Tensor:
    indices = sampling.indices(len(frames))
    pixels = encoder.preprocessing.crops(frames[indices.reshape(-1)], crops)
    embeddings = encoder.encode_pixels(pixels.flatten(0, 1))
    return embeddings.reshape(crops * len(indices), indices.shape[1], -1)


@pytest.fixture(scope="module")
def workspace(run: GoldenRun) -> Path:
    """Frames as lossless videos, packed with both class lists; the checkpoint imported."""
    root = run.work / "mote-data"
    videos = run.write_videos()
    decoder = PyAVDecoder()
    for name, frames in zip(run.meta["video_names"], run.videos, strict=True):
        data = (videos / f"{Path(name).stem}.mkv").read_bytes()
        assert decoder.probe(data).num_frames == len(frames)
        assert np.array_equal(frames_of(decoder, data, np.arange(len(frames))), frames)
    for which in ("k400", "zs"):
        done(
            *("pack", "--dataset", f"golden-{which}", "--videos", videos, "--root", root),
            *("--annotations", run.write_list(which), "--class-names", run.write_names(which)),
            *("--samples-per-shard", "16"),
        )
    done(
        *("import-checkpoint", run.checkpoint, "--name", "tiny", "--clip", run.clip),
        *("--class-names", run.work / "k400_labels.csv", "--root", root),
    )
    return root


@pytest.mark.parametrize("name", CLIPS)
def test_the_commands_give_the_published_accuracies(
    run: GoldenRun, workspace: Path, name: str
) -> None:
    expected = run.result(name)
    which = run.meta["runs"][name]["classes"]
    sampling, crops = RUNS[name]
    place = ("--root", workspace)
    extracted = done(
        *("extract", "--dataset", f"golden-{which}", "--encoder", "tiny", "--sampling", sampling),
        *("--crops", str(crops), "--precision", "fp32", "--workers", "2", *place),
    )
    protocol = "--closeset" if which == "k400" else "--zeroshot"
    result = done(
        *("eval", protocol, f"golden-{which}", "--head", "tiny", "--sampling", sampling, *place)
    )
    assert (result["n_listed"], result["n_failed"]) == (len(run.videos), 0)
    assert result["top1"] == pytest.approx(float(expected["top1"]), abs=1e-4)
    printed = run.meta["runs"][name]["printed"]
    assert any(f"Prec@5 {result['top5']:.3f}" in line for line in printed)
    assert result["n_classes"] == expected["text_features"].shape[0]
    assert result["modulate"] is True

    store = open_store(extracted["store"])
    assert store.class_names == run.classes(name)
    order = np.argsort(store.keys)
    labels = store.labels[order]
    assert np.array_equal(labels, expected["labels"])
    # Half precision of the store moves features by less than 0.3 percent.
    features = store.features(store.rows[order])
    scale = np.abs(expected["image_features"]).max()
    assert worst(features, expected["image_features"]) <= 0.003 * scale
    if "split_top1" in expected:
        head = load_head(workspace / "heads" / "tiny")
        text = torch.from_numpy(cast(np.ndarray, store.class_text("mote28").embeddings))
        with torch.no_grad():
            embeddings = view_features(head, torch.from_numpy(features).float(), text)
        half = half_class_accuracy(embeddings, text, torch.from_numpy(labels))
        assert worst(np.array(half.split_top1), expected["split_top1"]) <= 1e-4
        drawn = done(
            *("eval", "--protocol", "halfclass", "--dataset", f"golden-{which}", "--head", "tiny"),
            *("--sampling", sampling, "--precision", "fp32", *place),
        )
        for measure in ("top1", "top5"):
            got = np.array([part[measure] for part in drawn["per_split"]])
            assert worst(got, expected[f"split_{measure}"]) <= 1e-4


def test_the_imported_tower_is_the_one_eval_and_predict_take(
    run: GoldenRun, workspace: Path
) -> None:
    encoder = load_encoder("tiny", "fp32", encoders_dir=workspace / "encoders")
    head = load_head(workspace / "heads" / "tiny")
    assert head.origin is not None
    assert encoder.fingerprint == head.origin.encoder_fingerprint
    assert head.config.attention_heads == run.meta["n_heads"]  # of the CLIP's text tower
    clip = run.work / "videos" / "v08.mkv"
    answer = done("predict", clip, "--head", "tiny", "--root", workspace, "--precision", "fp32")
    expected = run.result("k400_1x1")["head_logits"][8, 0]
    best = answer["videos"][0]["predictions"][0]["class_name"]
    assert best == run.classes("k400_1x1")[int(expected.argmax())]
