"""Extraction: the right frames in the right rows, nothing mixed, memory bounded by workers."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch

from featstore import Store, StoreWriter, UserError, WorkError, open_store
from featstore.format.metadata import attributes_checksum, read_metadata
from featstore.reading.repair import repair_command
from pipeline.annotations.listing import name_from_key
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.encoders.specs import encoder_label
from pipeline.extraction.cpu_pool import LOOKAHEAD, encode_video
from pipeline.extraction.request import ExtractionRequest, ExtractionSummary, Share
from pipeline.extraction.run import extract
from pipeline.sampling import parse_sampling
from pipeline.tars.dataset import load_dataset
from pipeline.tars.packing import pack
from pipeline.tars.reading import TarSample, open_packed
from tests.support.worlds.damage import Recipe, encoded, rewritten
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import CLASSES, WORDS, make_clip, make_clips, make_encoder


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Half of the time of these tests would be syncs; tests/featstore has those that need them."""
    with mock.patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> Encoder:
    return load_encoder(encoder_folder, "fp32")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 clips in train/ and val/, one of them broken, one with fewer frames than asked for."""
    folder = make_clips(tmp_path_factory.mktemp("videos"))
    (folder / "train" / "run" / "broken.mp4").write_bytes(b"no video")
    make_clip(folder / "val" / "run" / "short.mp4", 50, frames=2)
    return folder


@pytest.fixture(scope="module")
def dataset(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets") / "clips"
    pack(videos, "clips", folder, samples_per_shard=5)
    return folder


@pytest.fixture
def request_for(dataset: Path, encoder_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(sampling: str = "uniform:4", **changes: Any) -> ExtractionRequest:
        request = ExtractionRequest(
            dataset_dir=dataset,
            store_path=tmp_path / "store.zarr",
            encoder=str(encoder_folder),
            sampling=parse_sampling(sampling),
            precision="fp32",
            workers=2,
        )
        return replace(request, **changes)

    return make


Request = Callable[..., ExtractionRequest]


def sequential_frames(path: Path) -> npt.NDArray[np.uint8]:
    """All frames of a video, decoded from the start in order: uint8 [n,H,W,3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def path_of(key: str, videos: Path) -> Path:
    return videos / f"{name_from_key(key)}.mp4"


@pytest.mark.parametrize(("sampling", "crops"), [("uniform:4", 1), ("clips:4x2", 3)])
def test_features_are_those_of_sequentially_decoded_frames(
    request_for: Request, videos: Path, encoder: Encoder, sampling: str, crops: int
) -> None:
    request = request_for(sampling, crops=crops)
    summary = extract(request)
    assert (summary.rows_ok, summary.rows_failed, summary.videos_short) == (19, 1, 1)
    store = open_store(request.store_path)
    assert store.provenance.encoder_fingerprint == encoder.fingerprint
    chosen = parse_sampling(sampling)
    checked = 0
    for row, key, status in zip(store.rows, store.keys, store.status, strict=True):
        features = store.features([row])[0]
        if status != 1:
            continue
        path = path_of(key, videos)
        frames = sequential_frames(path)
        indices = chosen.indices(len(frames))
        assert store.num_frames[store.positions([row])[0]] == len(frames)
        # Crop-major, then clip.
        expected_index = np.concatenate([indices] * crops)
        np.testing.assert_array_equal(store.frame_index([row])[0], expected_index)
        np.testing.assert_allclose(store.pts([row])[0], expected_index / 25, atol=1e-6)
        for crop in range(crops):
            for clip, wanted in enumerate(indices):
                picked = frames[wanted]
                if crops == 1:
                    expected = encoder.encode_frames(picked)
                else:
                    pixels = encoder.preprocessing.crops(picked, crops)[crop]
                    expected = encoder.encode_pixels(pixels)
                view = features[crop * len(indices) + clip]
                np.testing.assert_allclose(
                    view.astype(np.float32), expected.numpy(), rtol=2e-3, atol=2e-3
                )
        checked += 1
    assert checked == 19


def test_views_and_videos_differ_enough_to_be_told_apart(request_for: Request) -> None:
    """Without this the test above could not see a row or a crop in another one's place."""
    request = request_for("clips:4x2", crops=3)
    extract(request)
    store = open_store(request.store_path)
    rows = store.rows[store.status == 1]
    features = store.features(rows).astype(np.float32)
    views = features.reshape(len(rows) * 6, 4, -1).mean(1)
    distance = np.linalg.norm(views[:, None] - views[None], axis=-1)
    same_video = np.kron(np.eye(len(rows)), np.ones((6, 6))).astype(bool)
    assert distance[~same_video].min() > 0.05
    assert np.median(distance[same_video]) > 0.05


def test_rows_carry_labels_splits_and_class_texts(
    request_for: Request, videos: Path, encoder: Encoder
) -> None:
    request = request_for(prompt_sets=("mote28", "name"))
    extract(request)
    store = open_store(request.store_path)
    assert store.class_names == list(WORDS)
    assert store.raw_class_names == sorted(CLASSES)
    assert store.split_names == ["train", "val"]
    by_split = {name: set(store.split(name).tolist()) for name in store.split_names}
    for row, key, label in zip(store.rows.tolist(), store.keys, store.labels, strict=True):
        split, name, _ = name_from_key(key).split("/")
        assert store.raw_class_names[label] == name
        assert {found for found, rows in by_split.items() if row in rows} == {split}
    assert set(store.prompt_sets) == {"mote28", "name"}
    for prompt_set in store.prompt_sets:
        text = store.class_text(prompt_set)
        assert list(text.names) == store.class_names
        np.testing.assert_array_equal(
            text.embeddings, encoder.class_embeddings(store.class_names, prompt_set).numpy()
        )


def test_a_failed_video_keeps_its_row_with_the_reason(request_for: Request) -> None:
    request = request_for()
    summary = extract(request)
    store = open_store(request.store_path)
    (failed,) = np.flatnonzero(store.status == 2)
    assert name_from_key(store.keys[failed]) == "train/run/broken"
    assert "not a readable video file" in store.reasons[failed]
    assert summary.failures == [{"key": store.keys[failed], "reason": store.reasons[failed]}]
    assert not summary.too_many_failures
    assert extract(replace(request, max_failures=0.04)).too_many_failures
    assert store.class_names[store.labels[failed]] == "run"
    assert store.rows[failed] in store.split("train")
    assert store.num_frames[failed] == 0
    assert np.isnan(store.features([store.rows[failed]])).all()


def test_the_store_does_not_depend_on_the_number_of_workers(
    request_for: Request, tmp_path: Path
) -> None:
    contents = []
    for workers in (1, 4):
        path = tmp_path / f"{workers}.zarr"
        extract(request_for(workers=workers, store_path=path))
        contents.append(
            {
                str(file.relative_to(path)): file.read_bytes()
                for file in sorted(path.rglob("*"))
                if file.is_file() and "commit" not in file.parts  # they hold the time
            }
        )
    assert contents[0] == contents[1]


def test_progress_counts_videos(request_for: Request) -> None:
    seen: list[tuple[float, float]] = []
    extract(request_for(), progress=lambda done, total, **details: seen.append((done, total)))
    assert seen[0] == (0, 19)
    assert seen[-1] == (19, 19)
    assert seen == sorted(seen)


def test_only_the_tars_of_one_split(request_for: Request) -> None:
    summary = extract(request_for(split="val"))
    store = open_store(summary.store)
    assert summary.rows_ok == 7
    assert len(store.split("val")) == 7
    assert len(store.split("train")) == 0
    with pytest.raises(UserError, match="its splits are train, val"):
        extract(request_for(split="test"))


# Never mixed


@pytest.mark.parametrize("share", [None, "0/2"])
def test_a_store_of_one_split_takes_no_other(
    request_for: Request, tmp_path: Path, share: str | None
) -> None:
    """Wherever it lies: the tars of two splits have the same numbers."""
    path = tmp_path / "any name.zarr"
    begun = request_for(split="val", store_path=path, share=Share.parse(share or "all"))
    extract(begun)
    other = replace(begun, share=None)
    assert "split: store has val, asked for train" in differing(replace(other, split="train"))
    assert "split: store has val, asked for none" in differing(replace(other, split=None))
    assert extract(other).rows_ok == 7


def test_a_store_that_does_not_record_its_split_is_known_by_its_tars(
    request_for: Request, tmp_path: Path
) -> None:
    request = request_for(split="val", store_path=tmp_path / "early.zarr")
    begun = replace(request, share=Share.parse("0/2"))
    extract(begun)
    group = tmp_path / "early.zarr/zarr.json"
    node = json.loads(group.read_text())
    assert node["attributes"]["provenance"].pop("split") == "val"
    node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    group.write_text(json.dumps(node))
    assert "split: store has none, asked for train" in differing(replace(request, split="train"))
    assert extract(request).rows_ok == 7
    assert extract(request).partitions_done == 0


def test_the_command_that_repairs_a_store_knows_its_split(
    request_for: Request, encoder_folder: Path, tmp_path: Path
) -> None:
    for split in (None, "val"):
        # As the store of an encoder of this name, and of a split, would be called.
        path = tmp_path / f"{split}/my--own--val--uniform-4.zarr"
        extract(request_for(split=split, store_path=path))
        command = repair_command(path, read_metadata(path))
        assert ("--split val" in command) is (split == "val")


def differing(request: ExtractionRequest) -> str:
    """The refusal, and that it changed nothing."""
    before = contents_of(request.store_path)
    with pytest.raises(UserError, match=r"never mixed|touches no features") as info:
        extract(request)
    assert contents_of(request.store_path) == before
    assert "\n" not in str(info.value)
    return str(info.value)


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_store_made_in_another_way_is_refused_with_the_difference(
    request_for: Request, dataset: Path, videos: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    request = request_for()
    extract(request)
    other = make_encoder(tmp_path / "other" / "tiny", seed=1)
    assert "encoder: store has" in differing(replace(request, encoder=str(other)))
    bilinear = shutil.copytree(encoder_folder, tmp_path / "bilinear" / "tiny")
    config = bilinear / "open_clip_config.json"
    config.write_text(
        config.read_text().replace(
            '"preprocess_cfg": {}', '"preprocess_cfg": {"interpolation": "bilinear"}'
        )
    )
    words = differing(replace(request, encoder=str(bilinear)))
    assert "preprocessing interpolation: store has bicubic, asked for bilinear" in words
    assert "encoder" not in words.partition("(")[2].partition(")")[0]
    words = differing(replace(request, sampling=parse_sampling("uniform:8")))
    assert "sampling: store has uniform:4, asked for uniform:8" in words
    words = differing(replace(request, precision="bf16"))
    assert "precision: store has fp32, asked for bf16" in words
    words = differing(replace(request, crops=3))
    assert "crops: store has 1, asked for 3" in words
    words = differing(replace(request, prompt_sets=("mote28", "video")))
    assert "has no class texts of prompt set 'video'" in words
    again = tmp_path / "again"
    changed = shutil.copytree(videos, tmp_path / "videos")
    (changed / "val" / "sit" / "val0 sit.mp4").unlink()
    pack(changed, "clips", again, samples_per_shard=5)
    assert "dataset" in differing(replace(request, dataset_dir=again))
    assert "the same" not in extract(request).store  # and the first request still fits


def test_the_same_weights_under_another_name_are_the_same_encoder(
    request_for: Request, encoder_folder: Path, tmp_path: Path
) -> None:
    request = request_for()
    extract(request)
    copy = shutil.copytree(encoder_folder, tmp_path / "copy")
    again = extract(replace(request, encoder=str(copy)))
    assert (again.partitions_done, again.partitions_skipped) == (
        0,
        len(open_store(again.store).tars),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crops": 2}, "1, 3, 5 or 10"),
        ({"prompt_sets": ("poem",)}, "poem"),
        ({"precision": "fp8"}, "fp32, bf16, fp16"),
        ({"encoder": "ViT-B-61/openai"}, "unknown encoder"),
        ({"split": "nosuch"}, "no split"),
    ],
)
def test_what_cannot_be_done_leaves_no_store(
    request_for: Request, changes: dict[str, Any], words: str
) -> None:
    request = request_for(**changes)
    with pytest.raises(UserError) as info:
        extract(request)
    assert words in str(info.value)
    assert not request.store_path.exists()


# Bounded


def tiny_tars(folder: Path, videos: list[Path]) -> Path:
    """A data set with one tar per video."""
    for number, video in enumerate(videos):
        place = folder / "videos" / "ab"[number % 2] / f"{number}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(video.read_bytes())
    pack(folder / "videos", "many", folder / "many", samples_per_shard=1)
    return folder / "many"


class Counting:
    """A decoder that counts the videos it was given."""

    name = "pyav"

    def __init__(self) -> None:
        self.inner = PyAVDecoder()
        self.begun = 0

    def decode_with_info(self, source: Any, choose: Any) -> Any:
        self.begun += 1
        return self.inner.decode_with_info(source, choose)


def test_results_wait_for_few_videos_per_worker(
    request_for: Request,
    videos: Path,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many videos: what was begun and is not written yet is bounded by the workers."""
    clip = videos / "val" / "sit" / "val0 sit.mp4"
    dataset_dir = tiny_tars(tmp_path, [clip] * 24)
    decoder = Counting()
    ahead: list[int] = []
    write = StoreWriter.write_partition

    def watched(writer: StoreWriter, tar: int, partition: Any) -> None:
        ahead.append(decoder.begun - len(ahead))
        write(writer, tar, partition)

    monkeypatch.setattr(StoreWriter, "write_partition", watched)
    request = request_for("uniform:1", dataset_dir=dataset_dir, workers=2)
    summary = extract(request, decoder=decoder, encoder=encoder)
    assert summary.rows_ok == len(ahead) == 24
    assert max(ahead) <= 2 * 2 * LOOKAHEAD  # in the pool, and done but waiting for the tar's hash


def test_tars_without_videos_are_written_and_closed(
    request_for: Request, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    dataset_dir = tiny_tars(tmp_path, [bad] * 12)
    assert all(shard.samples == 0 for shard in load_dataset(dataset_dir).tars)
    held: list[int] = []
    write = StoreWriter.write_partition

    def watched(writer: StoreWriter, tar: int, partition: Any) -> None:
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in open_files()]
        held.append(sum(name.endswith(".tar") for name in names))
        write(writer, tar, partition)

    def open_files() -> Iterator[str]:
        for fd in os.listdir("/proc/self/fd"):
            if os.path.lexists(f"/proc/self/fd/{fd}"):
                yield fd

    monkeypatch.setattr(StoreWriter, "write_partition", watched)
    summary = extract(request_for(dataset_dir=dataset_dir), encoder=encoder)
    assert (summary.rows_ok, summary.rows_failed) == (0, 12)
    assert summary.too_many_failures
    assert max(held) <= 2 * LOOKAHEAD


# When something breaks


class Broken(Counting):
    """Fails in an unforeseen way at the second video."""

    def decode_with_info(self, source: Any, choose: Any) -> Any:
        result = super().decode_with_info(source, choose)
        if self.begun == 2:
            raise IndexError("a bug in\nthe decoder")
        return result


def test_a_decoder_that_breaks_costs_one_video(
    request_for: Request, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    summary = extract(request_for(workers=1), decoder=Broken(), encoder=encoder)
    assert (summary.rows_ok, summary.rows_failed) == (18, 2)
    reasons = [failure["reason"] for failure in summary.failures]
    assert "IndexError: a bug in the decoder" in reasons
    assert "unexpected error" in caplog.text


def test_another_number_of_frames_than_packed_is_a_failure(
    request_for: Request, encoder: Encoder
) -> None:
    class Shorter(Counting):
        def decode_with_info(self, source: Any, choose: Any) -> Any:
            info, frames, seconds = super().decode_with_info(source, choose)
            return replace(info, num_frames=info.num_frames - 1), frames, seconds

    summary = extract(request_for(), decoder=Shorter(), encoder=encoder)
    assert summary.rows_ok == 0
    assert any("were packed" in failure["reason"] for failure in summary.failures)


def test_an_encoder_that_breaks_fails_no_video(
    request_for: Request, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory is no property of a video: the work stops, and goes on later."""
    request = request_for(workers=1)
    calls = 0
    encode = Encoder.encode_pixels

    def short_of_memory(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator:\nno memory")
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode_pixels", short_of_memory)
    with pytest.raises(WorkError, match=r"the encoder failed at .*no memory") as info:
        extract(request, encoder=encoder)
    assert "\n" not in str(info.value)
    done = len(list(open_store(request.store_path).partitions()))
    summary = extract(request, encoder=encoder)
    assert (summary.partitions_skipped, summary.rows_ok) == (done, 19)


def test_features_that_float16_cannot_hold_are_failures(
    request_for: Request, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Encoder.encode_pixels
    monkeypatch.setattr(Encoder, "encode_pixels", lambda self, pixels: encode(self, pixels) * 1e6)
    summary = extract(request_for(), encoder=encoder)
    assert summary.rows_ok == 0
    reasons = {failure["reason"] for failure in summary.failures}
    assert any("not finite in float16" in reason for reason in reasons)


def test_every_damaged_tar_is_left_out_and_the_rest_is_done(
    request_for: Request, dataset: Path, encoder: Encoder, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "clips")
    shards = sorted((copy / "shards").iterdir())
    shards[0].unlink()
    data = bytearray(shards[2].read_bytes())
    data[data.index(b"mdat") + 30] ^= 1
    shards[2].write_bytes(data)
    request = request_for(dataset_dir=copy)
    with pytest.raises(WorkError, match=rf"2 of {len(shards)} tars cannot be used") as info:
        extract(request, encoder=encoder)
    assert shards[0].name in str(info.value)
    store = open_store(request.store_path)
    assert list(store.partitions()) == [n for n in range(len(shards)) if n not in (0, 2)]
    for name in (shards[0].name, shards[2].name):
        (copy / "shards" / name).write_bytes((dataset / "shards" / name).read_bytes())
    assert extract(request, encoder=encoder).partitions_done == 2


def test_an_interruption_keeps_what_was_written(
    request_for: Request, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(workers=1)

    def interrupt(done: float, total: float, **details: Any) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(request, encoder=encoder, progress=interrupt)
    before: Store = open_store(request.store_path)
    assert 0 < len(list(before.partitions())) < before.schema.tars
    summary: ExtractionSummary = extract(request, encoder=encoder)
    assert summary.partitions_skipped == len(list(before.partitions()))
    assert summary.rows_ok == 19


def test_the_short_name_of_an_encoder(tmp_path: Path, encoder_folder: Path) -> None:
    assert encoder_label(str(encoder_folder)) == "tiny"
    assert encoder_label("ViT-B-16/openai") == "ViT-B-16/openai"
    (tmp_path / "x.pt").touch()
    assert encoder_label(str(tmp_path / "x.pt")) == "x"


def test_a_single_video_needs_no_store(encoder: Encoder, videos: Path) -> None:
    clip = videos / "val" / "sit" / "val0 sit.mp4"
    sampling = parse_sampling("clips:4x2")
    video = encode_video(clip, PyAVDecoder(), encoder, sampling, crops=3)
    assert video.features.shape == (6, 4, 32)
    assert video.frame_index.shape == video.pts.shape == (6, 4)
    with pytest.raises(DecodeError, match="not a readable video"):
        encode_video(b"nothing", PyAVDecoder(), encoder, sampling)


def test_a_strip_is_refused_before_it_is_blown_up(encoder: Encoder) -> None:
    """The short side becomes the encoder's: 12000x2 would be a picture of 300 million."""
    strip = make_video(container="matroska", codec="ffv1", width=12_000, height=2, frames=2)
    with pytest.raises(DecodeError, match="frames of 12000x2 pixels would be resized to"):
        encode_video(strip, PyAVDecoder(), encoder, parse_sampling("uniform:2"))


def test_cut_streams_and_changing_sizes_are_extracted_counted_and_remarked(
    tmp_path: Path, encoder: Encoder, request_for: Request
) -> None:
    folder = tmp_path / "clips" / "run"
    folder.mkdir(parents=True)
    recipe = Recipe("libx265", "mpegts", {"x265-params": "log-level=none"})
    (folder / "cut.ts").write_bytes(rewritten(encoded(recipe), "mpegts", {}, first=5))
    small = make_video(frames=10, container="mpegts")
    (folder / "sizes.ts").write_bytes(small + make_video(frames=10, width=64, container="mpegts"))
    make_video(folder / "sound.mp4", gop=4)
    pack(folder.parent, "odd", tmp_path / "odd")
    request = replace(request_for("uniform:2"), dataset_dir=tmp_path / "odd")
    summary = extract(request, encoder=encoder)
    assert (summary.rows_ok, summary.videos_cut, summary.videos_resized) == (3, 1, 1)
    store = open_store(request.store_path)
    names = [name_from_key(key).removeprefix("run/") for key in store.keys]
    said = dict(zip(names, store.remarks, strict=True))
    assert re.fullmatch(r"leading pictures skipped: \d+", said["cut"])
    assert said["sizes"] == "frames of another size than the first: 1"
    assert re.fullmatch(r"\d+ of 40 frames looked at for damage", said["sound"])
    assert set(store.reasons) == {""}
    samples = _samples(tmp_path / "odd")
    sidecars = {name_from_key(s.key).removeprefix("run/"): s.sidecar for s in samples}
    assert sidecars["cut"]["leading_pictures"] == int(said["cut"].split()[-1])
    assert "leading_pictures" not in sidecars["sound"]


def _samples(folder: Path) -> list[TarSample]:
    dataset = load_dataset(folder)
    with open_packed(dataset, dataset.tars[0]) as archive:
        return archive.samples
