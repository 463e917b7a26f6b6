"""Frames and tokens out of videos: exact values, memory and disk in bounds, nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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

from featstore import Store, UserError, WorkError, open_store, verify
from featstore.checking.verify import reencode
from featstore.files.disk import SPARE_BYTES
from featstore.format.tiers import Tier
from pipeline.annotations.listing import name_from_key
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.extraction.cluster.worker import TarWorker
from pipeline.extraction.estimate import estimate
from pipeline.extraction.job import code_versions
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.reencode import reencoder
from pipeline.extraction.request import ExtractionRequest, Share, Totals
from pipeline.extraction.run import extract
from pipeline.extraction.tiers import frame_output
from pipeline.sampling import parse_sampling
from pipeline.tars.packing import pack
from tests.support.stores.store_files import store_files
from tests.support.worlds.tiny_world import CLIP, make_clip, make_clips, make_encoder

REPOSITORY = Path(__file__).parents[3]
FRAMES, TOKENS = Tier("frames"), Tier("tokens", 1)
TIERS = pytest.mark.parametrize("tier", [FRAMES, TOKENS], ids=["frames", "tokens"])


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with mock.patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips, one of them broken and one short, in tars of three."""
    folder = tmp_path_factory.mktemp("tiers")
    make_encoder(folder / "encoders/tiny")
    videos = make_clips(folder / "videos", ("jump", "run"))
    (videos / "train/run/broken.mp4").write_bytes(b"no video")
    make_clip(videos / "val/run/short.mp4", 50, frames=2)
    pack(videos, "clips", folder / "datasets/clips", samples_per_shard=3)
    return folder


@pytest.fixture(scope="module")
def encoder(world: Path) -> Encoder:
    return load_encoder(world / "encoders/tiny", "fp32")


Request = Callable[..., ExtractionRequest]


@pytest.fixture
def request_for(world: Path, tmp_path: Path) -> Request:
    def make(tier: Tier, sampling: str = "uniform:4", **changes: Any) -> ExtractionRequest:
        request = ExtractionRequest(
            world / "datasets/clips",
            tmp_path / "store.zarr",
            str(world / "encoders/tiny"),
            parse_sampling(sampling),
            precision="fp32",
            workers=2,
            tier=tier,
        )
        return replace(request, **changes)

    return make


def ok_rows(store: Store, world: Path) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Array row and all frames, decoded from the start in order, of each video that is ok."""
    for row, key, status in zip(store.rows.tolist(), store.keys, store.status, strict=True):
        if status == 1:
            with av.open(str(world / "videos" / f"{name_from_key(key)}.mp4")) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            yield row, np.stack(frames)


@pytest.mark.parametrize(("sampling", "crops"), [("uniform:4", 1), ("clips:4x2", 3)])
def test_frames_are_the_pixels_before_they_are_normalised(
    request_for: Request, world: Path, encoder: Encoder, sampling: str, crops: int
) -> None:
    request = request_for(FRAMES, sampling, crops=crops)
    summary = extract(request)
    assert (summary.rows_ok, summary.rows_failed) == (7, 1)
    store = open_store(request.store_path)
    assert (store.tier, store.provenance.tier) == ("frames", "frames")
    assert store.schema.item == (32, 32, 3)
    chosen = parse_sampling(sampling)
    for row, frames in ok_rows(store, world):
        clips = chosen.indices(len(frames))
        expected = [
            encoder.preprocessing.crop_pixels(frames[clip], crops)[crop].permute(0, 2, 3, 1)
            for crop in range(crops)
            for clip in clips
        ]
        np.testing.assert_array_equal(store.features([row])[0], torch.stack(expected).numpy())
        np.testing.assert_array_equal(store.frame_index([row])[0], np.concatenate([clips] * crops))
    # What is stored is what the tower gets: embeddings of it are those of the pooled store.
    pooled = open_store(
        extract(
            replace(request, tier=Tier(), store_path=request.store_path.with_name("p.zarr"))
        ).store
    )
    row = int(store.rows[store.status == 1][0])
    pixels = torch.from_numpy(store.features([row])[0, 0]).permute(0, 3, 1, 2)
    again = encoder.encode_pixels(encoder.preprocessing.normalise(pixels))
    np.testing.assert_allclose(
        again.numpy(), pooled.features([row])[0, 0].astype(np.float32), rtol=2e-3, atol=2e-3
    )
    (failed,) = store.rows[store.status == 2]
    assert not store.features([failed]).any()
    assert store.reasons[list(store.status).index(2)].startswith("not a readable video")
    assert (store.frame_index([failed]) == -1).all()
    assert verify(store.path, deep=True).ok


def by_hand(encoder: Encoder, pixels: torch.Tensor, block: int) -> torch.Tensor:
    """Tokens [N,L,C] after block `block`, from the tower's weights."""
    tower: Any = encoder.image_tower
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
    cls = tower.class_embedding.expand(len(pixels), 1, -1)
    x = tower.ln_pre(torch.cat([cls, patches], 1) + tower.positional_embedding)
    for layer in tower.transformer.resblocks[: block + 1]:
        y = layer.ln_1(x)
        x = x + layer.attn(y, y, y, need_weights=False)[0]
        x = x + layer.mlp(layer.ln_2(x))
    return x


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1])
def test_tokens_are_those_of_the_block(
    request_for: Request, world: Path, encoder: Encoder, block: int
) -> None:
    request = request_for(Tier("tokens", block))
    extract(request)
    store = open_store(request.store_path)
    assert (store.tier, store.schema.item) == (f"tokens:{block}", (5, 32))
    pooled = open_store(
        extract(
            replace(request, tier=Tier(), store_path=request.store_path.with_name("p.zarr"))
        ).store
    )
    tower: Any = encoder.image_tower
    for row, frames in ok_rows(store, world):
        pixels = encoder.preprocessing.crops(
            frames[parse_sampling("uniform:4").indices(len(frames))[0]]
        )
        tokens = torch.from_numpy(store.features([row])[0, 0]).float()
        expected = by_hand(encoder, pixels[0], block)
        torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-3)
        if block == 1:  # the last one
            embeddings = tower.ln_post(expected)[:, 0] @ tower.proj
            stored = torch.from_numpy(pooled.features([row])[0, 0]).float()
            torch.testing.assert_close(stored, embeddings, rtol=1e-3, atol=1e-3)
            from_tokens = tower.ln_post(tokens)[:, 0] @ tower.proj
            torch.testing.assert_close(from_tokens, stored, rtol=1e-2, atol=2e-2)
    (failed,) = store.rows[store.status == 2]
    assert np.isnan(store.features([failed])).all()
    assert verify(store.path, deep=True).ok


def test_the_tower_stops_at_the_block_and_works_as_before(encoder: Encoder) -> None:
    frames = torch.randint(0, 256, (2, 40, 50, 3), dtype=torch.uint8)
    before = encoder.encode_frames(frames)
    first = frame_output(Tier("tokens", 0), encoder)
    ran: list[int] = []
    tower: Any = encoder.image_tower
    hook = tower.transformer.resblocks[1].register_forward_hook(lambda *_: ran.append(1))
    assert first(frames, 3).shape == (3, 2, 5, 32)
    assert ran == []
    assert torch.equal(encoder.encode_frames(frames), before)
    assert ran == [1]
    hook.remove()


def test_what_no_tower_gives_is_refused(
    request_for: Request, encoder: Encoder, tmp_path: Path
) -> None:
    request = request_for(Tier("tokens", 2))
    with pytest.raises(
        UserError, match=r"has 2 blocks, counted from 0: choose tokens:0 to tokens:1"
    ):
        extract(request)
    resnet = make_encoder(
        tmp_path / "resnet",
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    )
    with pytest.raises(UserError, match=r"is a ModifiedResNet: .* vision transformers only"):
        extract(replace(request, encoder=str(resnet)))
    with pytest.raises(UserError, match="use --decoder pyav"):
        extract(request_for(FRAMES, decoder="dali"))
    assert not request.store_path.exists()
    extract(request_for(FRAMES, encoder=str(resnet)))


def test_tiers_are_never_mixed(request_for: Request) -> None:
    extract(request_for(FRAMES))
    for tier, found in ((Tier(), "embeddings"), (TOKENS, "tokens:1")):
        with pytest.raises(UserError, match=f"tier: store has frames, asked for {found}"):
            extract(request_for(tier))
    assert extract(request_for(FRAMES)).partitions_done == 0


@TIERS
def test_no_number_of_workers_or_engine_changes_the_store(
    request_for: Request, tmp_path: Path, tier: Tier
) -> None:
    one = request_for(tier, workers=1, store_path=tmp_path / "one.zarr")
    extract(one)
    many = request_for(tier, workers=4, store_path=tmp_path / "many.zarr", share=Share(0, 2))
    extract(many)
    # As the Ray engine starts them.
    worker = TarWorker(replace(many, share=None, workers=1), code_versions(), 0.0)
    plan = ExtractionPlan(replace(many, share=None))
    totals = worker.do(plan.pending).result
    assert isinstance(totals, Totals)
    assert sorted(totals.done) == plan.pending
    assert store_files(one.store_path) == store_files(many.store_path)


@TIERS
def test_videos_encoded_again_are_the_same(request_for: Request, world: Path, tier: Tier) -> None:
    store = open_store(extract(request_for(tier)).store)
    with reencoder(store, world / "datasets/clips", None) as again:
        found = reencode(store, 3, again)
    assert found.ok
    assert found.equal == 3


@TIERS
def test_a_disk_without_room_is_told_before_anything_is_made(
    request_for: Request, encoder: Encoder, tier: Tier, caplog: pytest.LogCaptureFixture
) -> None:
    request = request_for(tier)
    plan = ExtractionPlan(request)
    schema = plan.schema(encoder.dim, frame_output(tier, encoder).item)
    needed = plan.bytes_needed(plan.mine, schema)
    rows = 4 * {"frames": 32 * 32 * 3, "tokens": 5 * 32 * 2}[tier.kind]
    assert schema.row_bytes == rows
    free = SPARE_BYTES + needed

    def disk(size: int) -> Any:
        return mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=size))

    with disk(free - 1):
        with pytest.raises(WorkError, match="make room"):
            extract(request)
        assert not estimate(request, seconds=0.01).fits
    assert not request.store_path.exists()
    with disk(free), caplog.at_level("INFO"):
        found = estimate(request, seconds=0.01)
        assert (found.fits, found.tier, found.bytes_per_row) == (True, tier.text, rows)
        extract(request)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("to write")]
    assert line.startswith(f"to write: 8 rows of {rows / 1e3:.2f} kB each ({tier.text}), ")
    assert line.endswith("free")
    taken = sum(file.stat().st_size for file in request.store_path.rglob("*") if file.is_file())
    assert taken * 0.5 < needed < taken * 1.25


def test_files_that_may_not_grow(request_for: Request, world: Path, tmp_path: Path) -> None:
    """The disk says no in the middle: one error, nothing half done, and the next run goes on."""
    request = request_for(FRAMES)

    def refuse(file: int, data: Any, offset: int) -> int:
        if offset > 30_000:
            raise OSError(28, "No space left on device")
        return pwrite(file, data, offset)

    pwrite = os.pwrite
    with mock.patch("os.pwrite", refuse), pytest.raises(OSError, match="No space left"):
        extract(request)
    assert not list(request.store_path.rglob("*.partial"))
    assert verify(request.store_path, deep=True).ok
    extract(request)
    other = request_for(FRAMES, store_path=tmp_path / "other.zarr")
    extract(other)
    assert store_files(request.store_path) == store_files(other.store_path)


MEASURED = """
import json, resource, sys
from dataclasses import replace
from pathlib import Path
from featstore.format.tiers import Tier
from pipeline.extraction.run import extract
from pipeline.extraction.request import ExtractionRequest
from pipeline.sampling import parse_sampling
root = Path(sys.argv[1])
request = ExtractionRequest(
    root / "many", root / "small.zarr", str(root / "wide"), parse_sampling("uniform:1"),
    precision="fp32", workers=1, tier=Tier("frames"),
)
extract(request)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
extract(replace(request, store_path=root / "large.zarr", sampling=parse_sampling("uniform:40")))
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_partition(tmp_path: Path) -> None:
    """24 rows of 6 MB in one tar: what is held is what is in the pool."""
    make_encoder(
        tmp_path / "wide",
        vision_cfg={**CLIP["vision_cfg"], "image_size": 224, "patch_size": 112},
    )
    clip = make_clip(tmp_path / "clip.mp4", 1)
    for number in range(24):
        place = tmp_path / f"videos/{'ab'[number % 2]}/{number}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(clip)
    pack(tmp_path / "videos", "many", tmp_path / "many", samples_per_shard=24)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    unit = 1 if sys.platform == "darwin" else 1024
    store = open_store(tmp_path / "large.zarr")
    partition = 24 * store.schema.row_bytes
    assert partition > 140e6
    assert json.loads(ran.stdout) * unit < 0.6 * partition
