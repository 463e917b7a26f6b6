"""pack -> extract -> train-head -> eval -> predict -> inspect -> doctor, as a user sees them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from featstore import open_store
from heads import load_head
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import CLASSES, SHORT_TRAINING, TRAIN, VAL, WORDS, World

VIDEOS = len(CLASSES) * (TRAIN + VAL)
EVAL_FIELDS = {
    *("protocol", "dataset", "head", "n_listed", "n_evaluated", "n_failed", "top1", "top5"),
    *("views", "sampling", "prompt_set", "encoder_fingerprint", "per_split", "mean", "std"),
}


def test_pack(world: World) -> None:
    summary = world.printed["pack"]
    assert summary["dataset"] == "clips"
    assert (summary["videos_listed"], summary["videos_packed"]) == (VIDEOS, VIDEOS)
    assert summary["videos_failed"] == 0
    assert summary["classes"] == len(CLASSES)
    # Disjoint splits get tars of their own: 12 clips in 3 tars, 6 in 2.
    assert (summary["shards"], summary["shards_written"], summary["shards_skipped"]) == (5, 5, 0)


def test_extract(world: World) -> None:
    summary = world.printed["extract"]
    assert summary["dataset"] == "clips"
    assert (summary["rows_ok"], summary["rows_failed"]) == (VIDEOS, 0)
    assert (summary["partitions_done"], summary["partitions_skipped"]) == (5, 0)
    assert summary["videos_per_second"] * summary["seconds"] == pytest.approx(VIDEOS)
    assert summary["frames_per_second"] * summary["seconds"] == pytest.approx(4 * VIDEOS)
    assert world.store == world.root / "features" / "clips" / "tiny--uniform-4.zarr"
    assert open_store(world.store).class_names == list(WORDS)


@pytest.mark.parametrize("head", ["mean", "transformer", "mote"])
def test_train_head(world: World, head: str) -> None:
    summary = world.printed[f"train-head {head}"]
    assert summary["run"] == f"clips-{head}"
    assert (summary["n_listed"], summary["n_trained"]) == (len(CLASSES) * TRAIN,) * 2
    assert summary["epochs"] == (0 if head == "mean" else 2)
    assert (summary["loss"] is None) == (head == "mean")
    origin = load_head(world.root / "heads" / f"clips-{head}").origin
    assert origin is not None
    assert list(origin.class_names) == list(WORDS)


@pytest.mark.parametrize("head", ["mean", "clips-mean", "clips-transformer", "clips-mote"])
@pytest.mark.parametrize("protocol", ["closeset", "zeroshot"])
def test_eval(own: World, head: str, protocol: str) -> None:
    arguments = ("eval", f"--{protocol}", "clips", "--head", head, "--root", own.root)
    if protocol == "zeroshot" and head in ("clips-transformer", "clips-mote"):
        arguments += ("--allow-overlap",)
    result = done(*arguments)
    assert result.keys() >= EVAL_FIELDS
    listed = len(CLASSES) * (VAL if protocol == "closeset" else VAL + TRAIN)
    assert (result["n_listed"], result["n_evaluated"], result["n_failed"]) == (listed, listed, 0)
    assert (result["protocol"], result["dataset"]) == (protocol, "clips")
    assert (result["views"], result["sampling"], result["head"]) == ("1x1", "uniform:4", head)
    assert [part["split"] for part in result["per_split"]] == [
        "val" if protocol == "closeset" else "all"
    ]
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert result["encoder_fingerprint"] == own.printed["extract"]["encoder_fingerprint"]
    file = Path(result["file"])
    assert file.parent == own.root / "heads" / head / "eval"
    assert json.loads(file.read_text())["top1"] == result["top1"]
    again = done(*arguments)
    assert again == result


def test_eval_of_a_named_split(own: World) -> None:
    result = done(
        *("eval", "--zeroshot", "clips", "--split", "train", "--allow-overlap"),
        *("--root", own.root),
    )
    assert result["n_listed"] == len(CLASSES) * TRAIN
    assert result["head"] == "clips-mote"  # the newest


def test_predict(world: World) -> None:
    clips = [next((world.videos / "val" / name).iterdir()) for name in ("run", "wave")]
    result = done("predict", *clips, "--root", world.root, "--top", "6", "--precision", "fp32")
    assert [video["path"] for video in result["videos"]] == list(map(str, clips))
    first, second = result["videos"]
    assert first != second
    assert {"path", "num_frames", "predictions"} <= first.keys()
    assert {p["class_name"] for p in first["predictions"]} == set(WORDS)
    scores = [p["score"] for p in first["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert math.fsum(scores) == pytest.approx(1.0)


def test_predict_without_a_head(world: World, tmp_path: Path) -> None:
    clip = next((world.videos / "val" / "run").iterdir())
    arguments = ("predict", clip, "--classes", "run, a dog", "--encoder", world.encoder)
    empty = done(*arguments, "--root", tmp_path)
    chosen = done(*arguments, "--root", world.root, "--head", "mean")
    assert empty["videos"] == chosen["videos"]
    assert (empty["head"], chosen["head"]) == ("mean", "mean")


def test_predict_agrees_with_the_store(own: World) -> None:
    """The same preprocessing: the mean of the stored frames gives the scores that predict gives."""
    store = open_store(own.store)
    path = own.videos / "val" / "sit"
    clip = next(path.iterdir())
    row = next(
        r for r, key in zip(store.rows, store.keys, strict=True) if clip.stem in key_name(key)
    )
    video = store.features([row])[0, 0].astype("float64").mean(0)
    text = store.class_text("mote28").embeddings
    cosines = text @ (video / (video @ video) ** 0.5)
    best = WORDS[int(cosines.argmax())]
    answer = done(
        *("predict", clip, "--classes", ",".join(WORDS), "--head", "mean", "--frames", "4"),
        *("--encoder", own.encoder, "--precision", "fp32", "--root", own.root),
    )
    assert answer["videos"][0]["predictions"][0]["class_name"] == best


def key_name(key: str) -> str:
    from pipeline.annotations.listing import name_from_key

    return name_from_key(key)


def test_inspect(world: World) -> None:
    dataset = done("inspect", world.root / "datasets" / "clips")
    assert (dataset["kind"], dataset["videos_packed"], dataset["classes"]) == ("dataset", VIDEOS, 6)
    assert dataset["splits"] == {"train": 12, "val": 6}
    store = done("inspect", world.store)
    assert (store["kind"], store["rows_ok"], store["complete"]) == ("store", VIDEOS, True)
    assert (store["views"], store["frames"], store["dim"]) == (1, 4, 32)
    assert store["provenance"]["encoder"] == str(world.encoder.resolve())
    run = done("inspect", world.root / "heads" / "clips-mote")
    assert (run["kind"], run["finished"], run["epochs_done"]) == ("run", True, 2)


def test_doctor(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.encoders.sources.hub_reachable", lambda: False)
    report = done("doctor", "--root", world.root)
    assert {"versions", "cpu", "cpu_bf16", "gpu", "nvdec", "dali", "hub", "free_disk_gib"} <= (
        report.keys()
    )
    assert "not reachable" in report["hub"]
    text = mote("doctor", "--root", world.root)
    assert text.code == 0
    assert "free_disk_gib" in text.out


def test_every_command_also_speaks_to_people(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --json: plain words on stdout, no traceback, the next command named."""
    place = ("--root", own.root)
    clip = next((own.videos / "val" / "run").iterdir())
    pack = mote("pack", "--dataset", "clips", "--videos", own.videos, *place)
    assert pack.code == 2  # other --samples-per-shard than before
    for words, arguments in (
        ("extract --dataset", ("pack", "--dataset", "c2", "--videos", own.videos)),
        (
            "eval --closeset clips --head clips-mote",
            ("extract", "--dataset", "clips", "--encoder", own.encoder, "--sampling", "uniform:4"),
        ),
        ("eval --closeset", ("train-head", "--dataset", "clips", "--head", "mean", "--name", "m")),
        ("top-1", ("eval", "--closeset", "clips", "--head", "clips-mote")),
        ("score", ("predict", clip, "--head", "clips-mote")),
    ):
        result = mote(*arguments, *place)
        assert result.code == 0, result.err
        assert words in result.out
    for path in ("datasets/clips", "features/clips/tiny--uniform-4.zarr", "heads/clips-mote"):
        assert mote("inspect", own.root / path).code == 0


# Again


def test_pack_again_has_nothing_to_do(own: World) -> None:
    arguments = ("pack", "--dataset", "clips", "--videos", own.videos, "--root", own.root)
    again = mote(*arguments, "--samples-per-shard", "4", "--json")
    assert again.code == 0
    assert (again.json["shards_written"], again.json["shards_skipped"]) == (0, 5)
    assert "nothing to do" in again.err


def test_extract_again_has_nothing_to_do(own: World) -> None:
    before = contents(own.store)
    again = mote(*EXTRACT, "--encoder", own.encoder, "--root", own.root, "--json")
    assert again.code == 0
    assert (again.json["partitions_done"], again.json["partitions_skipped"]) == (0, 5)
    assert (again.json["rows_ok"], again.json["rows_failed"]) == (VIDEOS, 0)
    assert again.json["precision"] == "fp32"  # a store once begun stays with its precision
    assert "nothing to do" in again.err
    assert contents(own.store) == before


EXTRACT = ("extract", "--dataset", "clips", "--sampling", "uniform:4")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_train_again_is_refused_or_continued(own: World) -> None:
    arguments = ("train-head", "--dataset", "clips", "--head", "mote", "--frames", "4")
    arguments += (*SHORT_TRAINING, "--precision", "fp32", "--root", str(own.root))
    head = (own.root / "heads/clips-mote/head.safetensors").read_bytes()
    assert "--resume" in refused(2, *arguments)
    again = mote(*arguments, "--resume", "--json")
    assert again.code == 0
    assert again.json["resumed_from"] == again.json["epochs"] == 2
    assert "finished already" in again.err
    other = refused(2, *arguments, "--resume", "--seed", "7")
    assert "training.seed is 1024 in the run, asked for 7" in other
    assert (own.root / "heads/clips-mote/head.safetensors").read_bytes() == head


def test_a_head_may_not_be_called_mean(own: World) -> None:
    line = refused(2, "train-head", "--name", "mean", "--root", own.root)
    assert "use another name" in line


# What was chosen


def test_the_choice_is_said(own: World) -> None:
    result = mote("eval", "--closeset", "clips", "--root", own.root)
    assert "head: clips-mote, the newest run" in result.err
    assert "tiny--uniform-4.zarr" in result.err
    trained = mote(
        *("train-head", "--head", "mean", "--name", "again", "--frames", "4", "--root", own.root)
    )
    assert "data set: clips, the only one with features" in trained.err


def test_several_stores_are_told_apart_by_name(own: World) -> None:
    other = own.store.with_name("copy.zarr")
    shutil.copytree(own.store, other)
    train = (
        "train-head",
        "--head",
        "mean",
        "--name",
        "chosen",
        "--frames",
        "4",
        "--root",
        own.root,
    )
    line = refused(2, *train)
    assert "2 stores" in line
    assert "copy.zarr" in line
    assert "--store NAME" in line
    assert "choose one of copy, tiny--uniform-4" in refused(2, *train, "--store", "none")
    assert done(*train, "--store", "copy")["n_trained"] == 12
    evaluated = done("eval", "--closeset", "clips", "--store", "copy.zarr", "--root", own.root)
    assert evaluated["n_listed"] == 6


def test_views_of_several_clips_and_crops(own: World) -> None:
    clips = done(
        *("extract", "--dataset", "clips", "--split", "val", "--sampling", "clips:4x2"),
        *("--crops", "3", "--encoder", own.encoder, "--precision", "fp32", "--root", own.root),
    )
    assert Path(clips["store"]).name == "tiny--clips-4x2--crops3--val.zarr"
    assert clips["rows_ok"] == 6
    evaluate = ("eval", "--closeset", "clips", "--root", own.root)
    assert done(*evaluate)["views"] == "1x1"  # as the head was trained
    assert done(*evaluate, "--views", "2x3")["views"] == "2x3"
    assert done(*evaluate, "--sampling", "uniform:4")["views"] == "1x1"
    assert "9 views" not in refused(2, *evaluate, "--views", "4x3")
    assert "CLIPSxCROPS" in refused(2, *evaluate, "--views", "many")


def test_without_words_the_help_is_shown() -> None:
    result = mote()
    assert result.code == 0
    assert "train-head" in result.out
    assert result.err == ""
