"""Videos that come later: new tars, while earlier tars, labels and rows stay as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from featstore import open_store, verify
from featstore.errors import UserError
from pipeline.tars.dataset import load_dataset
from pipeline.tars.packing import pack
from tests.support.processes.command_line import done, refused
from tests.support.worlds.tiny_world import make_clip, make_encoder


def add(folder: Path, names: str, first: int) -> None:
    """Clips "class/name" whose pictures are their own."""
    for number, name in enumerate(names.split(), start=first):
        make_clip(folder / f"{name}.mp4", number)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    add(tmp_path / "videos", "sit/a sit/b throw/c throw/d throw/e", 0)
    return tmp_path / "videos"


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def test_new_videos_go_into_new_tars(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    pack(videos, "clips", out, samples_per_shard=2)
    before, first = tars(out), load_dataset(out)
    add(videos, "run/f sit/g", 10)  # "run" comes before the other classes in the alphabet
    with pytest.raises(UserError, match="there were 2 classes and are 3 now"):
        pack(videos, "clips", out, samples_per_shard=2)
    summary = pack(videos, "clips", out, samples_per_shard=2, append=True)
    assert (summary.shards_written, summary.shards_skipped) == (1, 3)
    after = load_dataset(out)
    assert {name: tars(out)[name] for name in before} == before
    assert after.class_names == (*first.class_names, "run")
    assert [shard.file for shard in after.tars] == [*before, "clips-000003.tar"]
    assert after.packed == 7
    # The same command again, with and without the option, and in fresh processes.
    for append in (True, False):
        assert pack(videos, "clips", out, samples_per_shard=2, append=append).shards_written == 0
    assert load_dataset(out).fingerprint == after.fingerprint
    add(videos, "throw/h", 20)
    with pytest.raises(UserError, match=r"1 video added .* with --append"):
        pack(videos, "clips", out, samples_per_shard=2)
    assert pack(videos, "clips", out, samples_per_shard=2, append=True).shards_written == 1
    assert len(tars(out)) == 5


def test_what_was_packed_must_still_be_there(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    pack(videos, "clips", out)
    (videos / "sit/a.mp4").unlink()
    add(videos, "sit/g", 10)
    with pytest.raises(UserError, match="1 video removed"):
        pack(videos, "clips", out, append=True)


def test_an_appended_tar_that_was_lost_is_made_again(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    pack(videos, "clips", out, samples_per_shard=3)
    add(videos, "run/f sit/g", 10)
    pack(videos, "clips", out, samples_per_shard=3, append=True)
    whole = tars(out)
    (out / "shards" / max(whole)).unlink()
    pack(videos, "clips", out, samples_per_shard=3)
    assert tars(out) == whole


def test_a_store_grows_with_its_data_set(videos: Path, tmp_path: Path) -> None:
    """pack --append, store add-tars, extract: only the new videos are encoded."""
    root = tmp_path / "root"
    make_encoder(root / "encoders" / "tiny")
    of_set = ("--dataset", "clips", "--root", root)
    packing = ("pack", *of_set, "--videos", videos, "--samples-per-shard", "2")
    extracting = ("extract", *of_set, "--encoder", "tiny", "--sampling", "uniform:4",
                  "--precision", "fp32")  # fmt: skip
    done(*packing)
    store = Path(done(*extracting)["store"])
    before = open_store(store)
    features = dict(zip(before.keys, before.features(before.rows), strict=True))
    add(videos, "sit/f sit/g throw/h", 10)
    assert "--append" in refused(2, *packing)
    done(*packing, "--append")
    assert "store add-tars" in refused(2, *extracting)
    done("store", "add-tars", store, "--dataset", "clips", "--root", root)
    grown = done(*extracting)
    assert (grown["partitions_done"], grown["partitions_skipped"], grown["rows_ok"]) == (2, 3, 8)
    after = open_store(store)
    for key, row in features.items():
        assert (after.features([after.row(key)])[0] == row).all()
    assert verify(store, deep=True).ok
    # The same as if everything had been there from the start.
    shutil.rmtree(store)
    done(*extracting)
    fresh = open_store(store)
    assert (fresh.features(fresh.rows) == after.features(after.rows)).all()
