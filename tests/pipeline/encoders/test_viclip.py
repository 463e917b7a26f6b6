"""ViCLIP as an encoder: the published numbers, its files, and stores of clip embeddings."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featstore import open_store
from featstore.errors import UserError
from pipeline.clip_encoder import load_encoder
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.encoders.specs import encoder_label, lasting_spec
from pipeline.extraction.cpu_pool import encode_video
from pipeline.sampling import parse_sampling
from tests.support.golden.checks import check_folder
from tests.support.golden.viclip import VICLIP_KINDS
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import make_clip, make_encoder, make_viclip

GOLDEN = Path(__file__).parents[2] / "data" / "golden_viclip"
Weights = dict[str, torch.Tensor]


def test_every_published_number_holds() -> None:
    checked = set()
    for file, check in check_folder(GOLDEN, VICLIP_KINDS):
        checked.add(next(kind for kind in VICLIP_KINDS if file.match(kind)))
        assert check.holds, f"{file.name}: {check}"
    assert checked == set(VICLIP_KINDS)


def test_both_layouts_are_the_same_encoder(tmp_path: Path) -> None:
    files = [make_viclip(tmp_path / name) for name in ("a.pth", "hub/model.safetensors")]
    specs = [f"viclip:{file}" for file in files]
    pth, packed = (load_encoder(spec, "fp32") for spec in specs)
    assert pth.fingerprint == packed.fingerprint
    assert (pth.name, packed.name) == ("a", "hub")
    assert [encoder_label(spec) for spec in specs] == ["a", "hub"]
    assert lasting_spec(specs[0]) == specs[0]
    assert (pth.clip_frames, pth.dim, pth.context_length) == (4, 32, 32)
    assert pth.logit_scale == pytest.approx(100)
    other = load_encoder(f"viclip:{make_viclip(tmp_path / 'b.pth', seed=1)}", "fp32")
    assert other.fingerprint != pth.fingerprint


def test_clips_are_looked_at_whole_and_in_order(tmp_path: Path) -> None:
    encoder = load_encoder(f"viclip:{make_viclip(tmp_path / 'a.pth')}", "fp32")
    frames = torch.randn(2, 4, 3, 32, 32)
    found = encoder.encode_clips(frames)
    assert found.shape == (2, 32)
    assert torch.allclose(encoder.encode_pixels(frames.flatten(0, 1)), found)
    assert not torch.allclose(encoder.encode_clips(frames.flip(1)), found, atol=1e-3)
    assert torch.allclose(encoder.encode_clips(frames[:, :1]), encoder.image_tower(frames[:, 0]))
    for wrong in (frames[:, :3], frames[0], frames[..., :16]):
        with pytest.raises(ValueError, match="takes clips"):
            encoder.encode_clips(wrong)
    with pytest.raises(UserError, match=r"6 frames are no whole clips.* takes 4 frames"):
        encoder.encode_pixels(torch.zeros(6, 3, 32, 32))
    with pytest.raises(ValueError, match="single frames"):
        load_encoder(make_encoder(tmp_path / "clip"), "fp32").encode_clips(frames)


def changed(change: Callable[[Weights], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = load_file(make_viclip(folder / "whole.safetensors"))
        change(state)
        save_file(state, folder / "changed.safetensors")
        return folder / "changed.safetensors"

    return make


def pth_with(content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "x.pth")
        return folder / "x.pth"

    return make


def cut(folder: Path) -> Path:
    file = make_viclip(folder / "a.pth")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


def hostile(folder: Path) -> Path:
    (folder / "x.pth").write_bytes(pickle.dumps(Hostile()))
    return folder / "x.pth"


PLACES = "text_encoder.positional_embedding"
BLOCK = "vision_encoder.transformer.resblocks.1.ln_1.weight"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder / "no.pth", "does not exist: viclip:FILE takes a weight file"),
        (lambda folder: make_encoder(folder / "clip"), "is a folder"),
        (changed(lambda state: state.pop(BLOCK)), f"missing: {BLOCK}"),
        (changed(lambda state: state.update(extra=torch.zeros(1))), "not in the model: extra"),
        (
            changed(lambda state: state.update({BLOCK: torch.zeros(3)})),
            rf"wrong shape: {BLOCK} \[3\] instead of \[64\]",
        ),
        (changed(lambda state: state[BLOCK].fill_(torch.nan)), f"{BLOCK} holds NaN"),
        (changed(lambda state: state.pop("vision_encoder.proj")), "holds no ViCLIP"),
        (
            changed(
                lambda s: s.update({"text_encoder.positional_embedding": torch.zeros(9999, 1)})
            ),
            "context_length is 9999, and no CLIP has more than 4096",
        ),
        (pth_with({"state_dict": {}}), "no entry 'model'"),
        (pth_with({"model": {"logit_scale": torch.ones(())}}), "holds no ViCLIP"),
        (pth_with({"model": {"temp": 1.0}}), "is no tensor that it holds in full"),
        (pth_with({"model": {"big": torch.zeros(1).expand(1 << 40)}}), "holds in full"),
        (cut, "cannot be read as weights"),
        (hostile, "cannot be read as weights"),
        (pth_with({"model": {}, "config": Hostile()}), "cannot be read as weights"),
    ],
)
def test_other_files_are_refused_in_one_line(
    make: Callable[[Path], Path], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as error:
        load_encoder(f"viclip:{make(tmp_path)}")
    assert "\n" not in str(error.value)
    assert not Path("was_run").exists()


def test_a_store_of_clip_embeddings_serves_every_command(tmp_path: Path) -> None:
    videos, root = tmp_path / "videos", tmp_path / "root"
    for number in range(8):
        make_clip(videos / "train" / "ab"[number % 2] / f"{number}.mp4", number)
        make_clip(videos / "val" / "ab"[number % 2] / f"{number}.mp4", 20 + number)
    spec = f"viclip:{make_viclip(tmp_path / 'hub/model.safetensors')}"
    place = ("--root", root)
    done("pack", "--dataset", "clips", "--videos", videos, *place)
    ask = ("extract", "--dataset", "clips", "--encoder", spec, "--precision", "fp32", *place)
    line = refused(2, *ask, "--sampling", "uniform:6")
    assert "6 frames are no whole clips: hub takes 4 frames at a time" in line
    path = Path(done(*ask, "--sampling", "clips:8x2")["store"])
    store = open_store(path)
    assert (store.schema.views, store.schema.frames, store.schema.item) == (2, 2, (32,))
    assert store.provenance.clip_frames == 4
    # A clip of 4 frames is named by its first, and is what the encoder makes of all of them.
    key, row = store.keys[0], store.rows[:1]
    sampling, encoder = parse_sampling("clips:8x2"), load_encoder(spec, "fp32")
    video = next(videos.rglob(f"{key.rsplit('%2F')[-1].rsplit('/')[-1]}.mp4"))
    whole = encode_video(video.read_bytes(), PyAVDecoder(), encoder, sampling)
    taken = sampling.indices(whole.info.num_frames)
    assert np.array_equal(store.frame_index(row)[0], taken[:, ::4])
    frames = frames_of(PyAVDecoder(), video.read_bytes(), taken.reshape(-1))
    pixels = encoder.preprocessing.crops(frames, 1)[0].unflatten(0, (4, 4))
    wanted = encoder.encode_clips(pixels).unflatten(0, (2, 2))
    assert np.allclose(store.features(row)[0], wanted, rtol=2e-3, atol=2e-3)
    assert np.allclose(whole.features, wanted, rtol=1e-4, atol=1e-4)
    assert done(*ask, "--sampling", "clips:8x2")["partitions_done"] == 0
    assert done("verify", path, "--deep", "--reencode", "3", *place)["reencoded"]["equal"] == 3
    assert "clip_frames 4" in " ".join(mote("inspect", path, *place).out.split())
    done("eval", "--head", "mean", "--zeroshot", "clips", *place)
    done("train-head", "--dataset", "clips", "--name", "h", "--epochs", "2", *place)
    make_video(tmp_path / "new.mp4", frames=20)
    said = done(
        "predict",
        tmp_path / "new.mp4",
        "--head",
        "mean",
        "--encoder",
        spec,
        "--classes",
        "a,b",
        *place,
    )
    scores = [entry["score"] for entry in said["videos"][0]["predictions"]]
    assert np.isclose(sum(scores), 1)
    said = done("predict", tmp_path / "new.mp4", "--head", "h", *place)
    assert len(said["videos"][0]["predictions"]) == 2
    line = refused(2, "finetune", "--dataset", "clips", "--encoder", spec, *place)
    assert "encodes clips, and MoTE trains with towers of single frames" in line
    line = refused(2, *ask, "--tier", "tokens:0")
    assert "tokens are taken from open_clip's vision transformers only" in line
    line = refused(2, *ask, "--decoder", "dali")
    assert "gives single frames" in line or "cannot be used" in line
