"""Tars that lie elsewhere, videos without labels and lists of URLs, through all commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from featstore import open_store
from featstore.remote.objects import ObjectFolder
from tests.support.processes.command_line import done, mote, refused
from tests.support.servers.s3_server import FailingProxy
from tests.support.servers.web_server import web_server
from tests.support.worlds.foreign_tars import clip, labelled_tars, webdataset_tar
from tests.support.worlds.tiny_world import SHORT_TRAINING

FRAMES = ("--sampling", "uniform:4", "--precision", "fp32", "--workers", "2")


def splits_of(folder: Path | str) -> list[str]:
    return [
        *("--tars", f"train={folder}/t/clips-{{000000..000001}}.tar"),
        *("--tars", f"val={folder}/v/clips-000000.tar"),
    ]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tars with splits; never changed."""
    folder = tmp_path_factory.mktemp("tars")
    labelled_tars(folder / "t")
    labelled_tars(folder / "v", tars=1, first=20)
    return folder


@pytest.fixture(scope="module")
def encoder(inputs: tuple[Path, Path]) -> Path:
    return inputs[1]


@pytest.fixture(scope="module")
def root(tars: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the tars as a data set and its store; tests only add to it."""
    folder = tmp_path_factory.mktemp("root")
    packed = done("pack", "--dataset", "own", *splits_of(tars), "--root", folder)
    assert (packed["videos_packed"], packed["classes"], packed["shards"]) == (18, 3, 3)
    extracted(folder, encoder)
    return folder


def extracted(root: Path | str, encoder: Path, *more: str | Path) -> dict[str, Any]:
    printed: dict[str, Any] = done(
        *("extract", "--dataset", "own", "--encoder", encoder, *FRAMES, "--root", root, *more)
    )
    return printed


def rows(store: str | Path) -> dict[str, Any]:
    found = open_store(store)
    return {
        key: (int(label), features.tobytes())
        for key, label, features in zip(
            found.keys, found.labels, found.features(found.rows), strict=True
        )
    }


def test_every_later_command_treats_them_like_packed_ones(
    tars: Path, encoder: Path, root: Path, tmp_path: Path
) -> None:
    place = ("--root", root)
    words = mote("pack", "--dataset", "own", *splits_of(tars), *place)
    assert words.code == 0
    assert "mote-cli extract --dataset own" in words.out

    store = extracted(root, encoder)["store"]
    assert open_store(store).class_names == ["class 2", "class 10", "wave hand"]
    assert done("verify", store, "--deep", "--reencode", "2", *place)["ok"]
    trained = done(
        *("train-head", "--dataset", "own", "--head", "transformer", "--frames", "4"),
        *(*SHORT_TRAINING[:-2], "--precision", "fp32", *place),
    )
    assert trained["n_trained"] == 12
    assert done(*("eval", "--closeset", "own", "--head", trained["run"], "--no-modulate", *place))
    facts = done("inspect", root / "datasets/own")
    assert (facts["kind"], facts["videos_packed"], facts["splits"]) == (
        *("dataset", 18),
        {"train": 12, "val": 6},
    )

    # The same videos, packed from class folders, give the same features.
    for n in (*range(12), *range(20, 26)):
        part = "val" if n >= 20 else "train"
        target = (
            tmp_path / f"videos/{part}/{('class 10', 'class 2', 'wave_hand')[n % 3]}/{n:05d}.mp4"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(clip(n))
    again = ("--root", tmp_path / "again")
    done("pack", "--dataset", "own", "--videos", tmp_path / "videos", *again)
    other = rows(extracted(tmp_path / "again", encoder)["store"])
    assert sorted(f for _, f in rows(store).values()) == sorted(f for _, f in other.values())


def test_a_changed_tar_is_one_line(tars: Path, encoder: Path, tmp_path: Path) -> None:
    own, root = shutil.copytree(tars, tmp_path / "tars"), tmp_path / "root"
    done("pack", "--dataset", "own", *splits_of(own), "--root", root)
    changed = own / "v/clips-000000.tar"
    changed.write_bytes(changed.read_bytes()[:-512])
    line = refused(1, "extract", "--dataset", "own", "--encoder", encoder, *FRAMES, "--root", root)
    assert f"{changed} is damaged: it has" in line
    assert "1 of 3 tars cannot be used, the others are done" in line
    shutil.copy(tars / "v/clips-000000.tar", changed)
    assert extracted(root, encoder)["partitions_done"] == 1


def test_tars_on_a_web_server(tars: Path, encoder: Path, root: Path, tmp_path: Path) -> None:
    local = extracted(root, encoder)["store"]
    own, root = shutil.copytree(tars, tmp_path / "a folder"), tmp_path / "root"
    place = ("--root", root)
    with web_server(tmp_path) as (url, requests):
        at = f"{url}/a%20folder"
        packed = done("pack", "--dataset", "own", *splits_of(at), *place)
        assert packed["videos_packed"] == 18
        value = json.loads((root / "datasets/own/dataset.json").read_text())
        assert value["shards"][2]["source"] == f"{at}/v/clips-000000.tar"
        store = extracted(root, encoder)["store"]
        assert rows(store) == rows(local)

        # Fine-tuning and encoding again read single videos by ranges.
        requests.clear()
        assert done("verify", store, "--reencode", "2", *place)["ok"]
        assert len(requests) == 2
        assert all("-" in request for request in requests)
        assert done(
            *("finetune", "--dataset", "own", "--encoder", encoder, "--epochs", "1"),
            *("--frames", "4", "--batch-size", "4", "--layers", "1", "--experts", "2"),
            *("--precision", "fp32", *place),
        )
        assert not list((tmp_path / "root").rglob("*.tar"))

        requests.clear()
        again = done("pack", "--dataset", "own", *splits_of(at), *place)
        assert requests == []  # HEAD shows that nothing has changed
        assert any("packed already" in note for note in again["notes"])

        changed = own / "t/clips-000001.tar"
        changed.write_bytes(b"X" + changed.read_bytes()[1:-1] + b"X")
        shutil.rmtree(store)
        (own / "v/clips-000000.tar").unlink()
        line = refused(1, "extract", "--dataset", "own", "--encoder", encoder, *FRAMES, *place)
        assert "2 of 3 tars cannot be used" in line
        assert "clips-000001.tar is damaged: its sha256 differs" in line
        line = refused(1, "pack", "--dataset", "new", *splits_of(at), *place)
        assert "2 of 3 tars cannot be used" in line
        assert "clips-000001.tar is no tar" in line
        assert f"{url}/a folder/v/clips-000000.tar does not exist" in line


def test_tars_in_a_bucket(
    tars: Path, encoder: Path, root: Path, tmp_path: Path, bucket: str, proxy: FailingProxy
) -> None:
    local = extracted(root, encoder)["store"]
    objects = ObjectFolder(f"{bucket}/data")
    for path in sorted(tars.rglob("*.tar")):
        objects.put(path.relative_to(tars).as_posix(), path)
    objects.put("t/notes.txt", b"x")
    root = tmp_path / "root"
    proxy.fail = ["ok", "503", "ok", "drop", "ok", 5000]
    done(
        *("pack", "--dataset", "own", "--tars", f"train={bucket}/data/t/*.tar"),
        *("--tars", f"val={bucket}/data/v/clips-00000{{0..0}}.tar", "--root", root),
    )
    store = extracted(root, encoder)["store"]
    assert rows(store) == rows(local)
    assert "no object matches" in refused(
        2, "pack", "--dataset", "x", "--tars", f"{bucket}/data/q/*.tar", "--root", root
    )

    # The data set itself may lie in the bucket, too; its tars stay where they are.
    work = ObjectFolder(f"{bucket}/work")
    for path in (root / "datasets/own").rglob("*"):
        if path.is_file() and ".packing" not in path.parts:
            work.put(path.relative_to(root).as_posix(), path)
    there = extracted(work.url, encoder, "--store", tmp_path / "there.zarr")["store"]
    assert rows(there) == rows(store)


def test_videos_without_labels(encoder: Path, root: Path, tmp_path: Path) -> None:
    place = ("--root", tmp_path / "root")
    for n in range(4):
        path = tmp_path / f"videos/clip {n}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(clip(n))
    pack = ("pack", "--dataset", "own", "--videos", tmp_path / "videos", *place)
    packed = done(*pack)
    assert (packed["classes"], packed["videos_packed"]) == (0, 4)
    assert "no classes: 4 videos without labels" in packed["notes"]
    assert "none: the videos have no labels" in mote(*pack).out
    result = mote("extract", "--dataset", "own", "--encoder", encoder, *FRAMES, *place)
    assert result.code == 0
    assert "mote-cli inspect" in result.out
    store = extracted(tmp_path / "root", encoder)["store"]
    opened = open_store(store)
    assert (opened.class_names, set(opened.labels.tolist())) == ([], {-1})
    assert done("verify", store, "--deep", "--reencode", "2", *place)["ok"]
    assert done("inspect", store)["classes"] == 0

    for command in (
        ("train-head", "--dataset", "own", "--head", "transformer"),
        ("eval", "--closeset", "own", "--head", "mean"),
        ("eval", "--zeroshot", "own", "--head", "mean"),
        ("finetune", "--dataset", "own", "--encoder", encoder),
    ):
        line = refused(2, *command, *place)
        assert "videos of data set 'own' have no labels" in line
        assert "--label-field" in line
    predicted = done(
        *("predict", tmp_path / "videos/clip 1.mp4", "--classes", "jump, run"),
        *("--encoder", encoder, *place),
    )
    assert len(predicted["videos"][0]["predictions"]) == 2

    # Labels and none do not mix.
    labelled = extracted(root, encoder)["store"]
    line = refused(2, "store", "merge", store, labelled, "--out", tmp_path / "both.zarr")
    assert "was packed without labels and other stores have classes" in line

    # More of them, and out of the store again.
    (tmp_path / "videos/later.mp4").write_bytes(clip(7))
    done(*pack, "--append")
    assert done("store", "add-tars", store, "--dataset", "own", *place)["tars_added"] == 1
    assert extracted(tmp_path / "root", encoder)["rows_ok"] == 5
    exported = done("store", "export", store, "--to", "npy", "--out", tmp_path / "export")
    assert exported["rows"] == 5


def test_an_unlabelled_list_and_class_folders_that_are_none(tmp_path: Path) -> None:
    for n in range(4):
        path = tmp_path / f"videos/{'ab'[n % 2]}/{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip(n))
    place = ("--root", tmp_path / "root")
    folders = done(
        *("pack", "--dataset", "a", "--videos", tmp_path / "videos", "--unlabelled", *place)
    )
    assert (folders["classes"], folders["videos_packed"]) == (0, 4)
    for name, text in (
        ("paths.txt", "a/0.mp4\nb/1.mp4\na/missing.mp4\n"),
        ("table.csv", "path,split\na/0.mp4,train\nb/1.mp4,val\nb/missing.mp4,val\n"),
    ):
        (tmp_path / name).write_text(text)
        listed = done(
            *("pack", "--dataset", name, "--videos", tmp_path / "videos"),
            *("--annotations", tmp_path / name, "--max-failures", "1", *place),
        )
        assert (listed["classes"], listed["videos_packed"], listed["videos_failed"]) == (0, 2, 1)
    (tmp_path / "labels.txt").write_text("a/0.mp4 0\nb/1.mp4 1\n")
    listed = done(
        *("pack", "--dataset", "l", "--videos", tmp_path / "videos", "--unlabelled"),
        *("--annotations", tmp_path / "labels.txt", *place),
    )
    assert (listed["classes"], listed["videos_packed"]) == (0, 2)


def test_lists_of_urls(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched while packing; what cannot be fetched is listed, the rest is packed."""
    monkeypatch.setenv("MOTE_RETRY_SECONDS", "0.2")
    (tmp_path / "web").mkdir()
    for n in range(2):
        (tmp_path / f"web/v {n}.mp4").write_bytes(clip(n))
    (tmp_path / "web/page.mp4").write_bytes(b"<html>")
    ObjectFolder(f"{bucket}/x").put("s.mp4", clip(2))
    (tmp_path / "here.mp4").write_bytes(clip(3))
    with web_server(tmp_path / "web") as (url, _):
        (tmp_path / "list.csv").write_text(
            "path,class_name\n"
            f"{url}/v%200.mp4,nod\n{url}/v%201.mp4,wave\n{bucket}/x/s.mp4,nod\nhere.mp4,wave\n"
            f"{url}/gone.mp4,nod\n{url}/page.mp4,nod\n{bucket}/x/gone.mp4,nod\n"
            "http://127.0.0.1:9/a.mp4,wave\nhttp://127.0.0.1:9/b.mp4,wave\n"
            "https://host/c.mp4?key=secret,wave\nfile:///etc/passwd.mp4,wave\n"
        )
        pack = (
            *("pack", "--dataset", "own", "--annotations", tmp_path / "list.csv"),
            *("--root", tmp_path / "root"),
        )
        result = mote(*pack, "--json")
        assert result.code == 1
        assert (result.json["videos_packed"], result.json["videos_failed"]) == (4, 7)
        text = (tmp_path / "root/datasets/own/failures.csv").read_text()
        assert text.count("does not exist") == 2
        assert text.count("cannot be reached") == 2
        assert "not a readable video file" in text
        assert "holds a password" in text
        assert "a URL with file does not name a file" in text
        again = mote(*pack, "--json", "--max-failures", "1")
        assert (again.code, again.json["shards_written"]) == (0, 0)


def test_options_that_contradict_each_other(tars: Path, tmp_path: Path) -> None:
    place = ("--dataset", "own", "--root", tmp_path / "root")
    pattern = f"{tars}/t/*.tar"
    for words, command in {
        "exclude each other": ("--tars", pattern, "--videos", tars),
        "--samples-per-shard and --seed": ("--tars", pattern, "--seed", "3"),
        "--label-field is for --tars": ("--videos", tars, "--label-field", "label"),
        "give --videos DIR, --annotations LIST or --tars": (),
        "--label-field and --unlabelled": (
            *("--tars", pattern, "--label-field", "x", "--unlabelled"),
        ),
        "do not exist: name a CSV": ("--tars", pattern, "--annotations", tmp_path / "x.csv"),
    }.items():
        assert words in refused(2, "pack", *command, *place)
    for name in "ab":
        sample = {"__key__": name, "mp4": clip(0), "cls": b"x"}
        webdataset_tar(tmp_path / f"{name}.tar", [sample])
    # As a shell gives a glob that is not in quotes.
    made = done("pack", "--tars", tmp_path / "a.tar", tmp_path / "b.tar", *place)
    assert made["videos_packed"] == 2
    assert "belongs to no option" in refused(2, "pack", "x.tar", *place)
    line = refused(2, "pack", "--videos", tars, *place)
    assert "no videos under" in line
