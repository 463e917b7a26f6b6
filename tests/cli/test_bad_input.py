"""Bad input: one clear line, the right exit code, nothing lost and nothing replaced."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from featstore import open_store
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import (
    CLASSES,
    SHORT_TRAINING,
    World,
    make_clip,
    make_clips,
    make_encoder,
)

FRAMES = ("--sampling", "uniform:4", "--precision", "fp32")


def with_bad_files(folder: Path) -> dict[str, str]:
    """Bad videos into train/run; returns what their reasons must say, by file name."""
    bad = folder / "train" / "run"
    whole = make_video(None, frames=60, width=72, height=48)
    front = make_video(
        None, frames=60, width=72, height=48, container_options={"movflags": "faststart"}
    )
    assert whole.index(b"moov") > whole.index(b"mdat")
    assert front.index(b"moov") < front.index(b"mdat")
    (bad / "cut at the end.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (bad / "cut faststart.mp4").write_bytes(front[: len(front) * 2 // 3])
    (bad / "text.mp4").write_text("this is no video\n" * 100)
    (bad / "empty.mp4").write_bytes(b"")
    make_video(bad / "audio.mp4", audio_only=True)
    return {
        "cut at the end.mp4": "not a readable video file",
        "cut faststart.mp4": "",
        "text.mp4": "not a readable video file",
        "empty.mp4": "empty",
        "audio.mp4": "no video stream",
    }


@pytest.fixture(scope="module")
def bad_world(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    """The clips and five bad files, a video of one frame and one of three, packed and extracted."""
    folder = tmp_path_factory.mktemp("bad")
    videos, root = folder / "videos", folder / "root"
    shutil.copytree(inputs[0], videos)
    expected = with_bad_files(videos)
    make_clip(videos / "train" / "sit" / "one frame.mp4", 40, frames=1)
    make_clip(videos / "val" / "sit" / "three frames.mp4", 41, frames=3)
    place = ("--root", str(root))
    pack = ("pack", "--dataset", "clips", "--videos", str(videos), "--samples-per-shard", "4")
    packed = mote(*pack, *place, "--json")
    assert packed.code == 1
    extract = ("extract", "--dataset", "clips", "--encoder", inputs[1], *FRAMES, *place)
    extracted = mote(*extract, "--json")
    assert extracted.code == 1
    assert mote(*extract, "--max-failures", "0.5", "--json").code == 0
    return World(
        videos,
        inputs[1],
        root,
        {
            "reasons": expected,
            "pack": packed.json,
            "pack error": packed.error,
            "extract": extracted.json,
            "extract error": extracted.error,
            "extract log": extracted.err,
        },
    )


def test_bad_files_are_counted_and_everything_else_is_packed(bad_world: World) -> None:
    summary = bad_world.printed["pack"]
    assert (summary["videos_listed"], summary["videos_packed"]) == (25, 20)
    assert summary["videos_failed"] == 5
    line = bad_world.printed["pack error"]
    assert line.startswith("error: 5 of 25 videos failed, more than --max-failures 0.05 allows")
    assert "the other videos are done" in line
    assert "failures.csv" in line
    with open(bad_world.root / "datasets/clips/failures.csv", newline="") as file:
        reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == bad_world.printed["reasons"].keys()
    for name, words in bad_world.printed["reasons"].items():
        assert words in reasons[name]
        assert len(reasons[name]) > 5


def test_bad_files_keep_their_rows(bad_world: World) -> None:
    summary = bad_world.printed["extract"]
    assert (summary["rows_ok"], summary["rows_failed"]) == (20, 5)
    assert "5 of 25 videos failed" in bad_world.printed["extract error"]
    store = open_store(summary["store"])
    assert len(store) == 25
    failed = {key: i for i, key in enumerate(store.keys) if store.status[i] == 2}
    assert len(failed) == 5
    for key, i in failed.items():
        assert store.reasons[i], key
        assert store.class_names[store.labels[i]] == "run"
        assert np.isnan(store.features([store.rows[i]])).all()
        assert (store.frame_index([store.rows[i]]) == -1).all()
    assert set(store.split("train")) >= {int(store.rows[i]) for i in failed.values()}
    ok = [i for i in range(25) if store.status[i] == 1]
    assert all(store.reasons[i] == "" for i in ok)
    assert np.isfinite(store.features(store.rows[ok])).all()


def test_short_videos_repeat_their_frames_and_that_is_said(bad_world: World) -> None:
    store = open_store(bad_world.printed["extract"]["store"])
    frames = {
        int(n): store.frame_index([row])[0, 0].tolist()
        for row, n in zip(store.rows, store.num_frames, strict=True)
        if n in (1, 3)
    }
    assert frames[1] == [0, 0, 0, 0]
    assert len(frames[3]) == 4
    assert set(frames[3]) <= {0, 1, 2}
    assert bad_world.printed["extract"]["videos_short"] == 2
    assert "2 videos have fewer than 4 frames" in bad_world.printed["extract log"]


def test_failed_videos_are_counted_by_training_and_evaluation(bad_world: World) -> None:
    place = ("--root", str(bad_world.root))
    train = mote(
        *("train-head", "--dataset", "clips", "--frames", "4", "--name", "r", *SHORT_TRAINING),
        *(*place, "--json"),
    )
    assert train.code == 0
    assert (train.json["n_listed"], train.json["n_trained"]) == (18, 13)
    assert train.json["n_failed"] == 5
    assert "5 of 18 training samples failed in extraction" in train.err
    line = refused(2, "eval", "--zeroshot", "clips", *place)
    assert "13 of 25 tested videos are in the training of r (" in line
    result = done("eval", "--zeroshot", "clips", "--allow-overlap", *place)
    assert result["n_trained_on"] == 13
    assert (result["n_listed"], result["n_evaluated"], result["n_failed"]) == (25, 20, 5)
    closeset = done("eval", "--closeset", "clips", *place)
    assert (closeset["n_listed"], closeset["n_failed"]) == (7, 0)
    inspected = done("inspect", bad_world.printed["extract"]["store"])
    assert len(inspected["failures"]) == 5
    assert all(failure["reason"] for failure in inspected["failures"])


@pytest.mark.parametrize("name", ["cut at the end", "cut faststart", "text", "empty", "audio"])
def test_predict_says_which_file_is_bad(bad_world: World, world: World, name: str) -> None:
    bad = bad_world.videos / "train" / "run" / f"{name}.mp4"
    good = next((bad_world.videos / "val" / "run").iterdir())
    arguments = ("predict", bad, good, "--root", world.root)
    result = mote(*arguments, "--json")
    assert result.code == 1
    assert "1 of 2 videos failed" in result.error
    first, second = result.json["videos"]
    assert first["error"]
    assert (first["predictions"], first["num_frames"]) == ([], None)
    assert len(second["predictions"]) == 5
    assert f"warning: {bad}: {first['error']}" in result.err
    assert mote(*arguments, "--max-failures", "0.5").code == 0


def test_predict_takes_a_video_of_one_frame(bad_world: World, world: World) -> None:
    clip = bad_world.videos / "train" / "sit" / "one frame.mp4"
    assert done("predict", clip, "--root", world.root)["videos"][0]["num_frames"] == 1


def test_all_videos_bad(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    for name in ("a", "b"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        (tmp_path / "videos" / name / "x.mp4").write_text("no")
    place = ("--root", tmp_path / "root")
    pack = ("pack", "--dataset", "d", "--videos", tmp_path / "videos", *place)
    packed = mote(*pack, "--json")
    assert (packed.code, packed.json["videos_packed"]) == (1, 0)
    assert "all 2 videos failed (the first: not a readable video file" in packed.error
    assert "next " not in mote(*pack).out  # no command can follow
    extracted = mote(
        *("extract", "--dataset", "d", "--encoder", inputs[1], *FRAMES, *place, "--json")
    )
    assert (extracted.code, extracted.json["rows_failed"]) == (1, 2)
    assert "all 2 videos failed (the first: not a readable video file" in extracted.error
    assert "none of 2 training samples" in refused(2, "train-head", "--dataset", "d", *place)
    line = refused(2, "eval", "--zeroshot", "d", "--head", "mean", *place)
    assert "but none was extracted" in line


# Folders and names


def test_a_class_without_videos_is_said_and_left_out(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    videos = make_clips(tmp_path / "videos", ("a", "b"))
    (videos / "train" / "empty class").mkdir()
    result = mote(
        *("pack", "--dataset", "d", "--videos", videos, "--root", tmp_path / "root", "--json")
    )
    assert result.code == 0
    assert "empty class" in result.err + json.dumps(result.json["notes"])


def test_a_video_with_two_classes_is_refused_by_name(tmp_path: Path) -> None:
    videos, listed = tmp_path / "videos", tmp_path / "list.csv"
    pack = ("pack", "--dataset", "d", "--videos", videos, "--root", tmp_path / "root")
    for number, folder in enumerate(("a", "b")):
        make_clip(videos / folder / "same.mp4", number)  # two classes: two keys
    listed.write_text("path,label\na/same.mp4,a\na/same.mp4,b\nb/same.mp4,b\n")
    assert "a/same" in refused(2, *pack, "--annotations", listed)
    assert not (tmp_path / "root").exists()
    listed.write_text("path,label\na/same.mp4,a\na/same.mp4,a\nb/same.mp4,b\n")
    twice = mote(*pack, "--annotations", listed, "--json")  # the same words twice are harmless
    assert (twice.code, twice.json["videos_packed"]) == (0, 2)
    assert "1 repeated mentions" in twice.err


def test_missing_and_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("--root", tmp_path / "root")
    assert "nowhere" in refused(
        2, "pack", "--dataset", "d", "--videos", tmp_path / "nowhere", *place
    )
    (tmp_path / "empty").mkdir()
    refused(2, "pack", "--dataset", "d", "--videos", tmp_path / "empty", *place)
    make_clip(tmp_path / "file.mp4", 0)
    refused(2, "pack", "--dataset", "d", "--videos", tmp_path / "file.mp4", *place)
    videos = make_clips(tmp_path / "videos", ("a", "b"))
    import os

    scandir = os.scandir

    def locked(path=".", *rest):  # as root every folder can be read
        if str(path).endswith("train/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path, *rest)

    monkeypatch.setattr(os, "scandir", locked)
    line = refused(2, "pack", "--dataset", "d", "--videos", videos, *place)
    assert "train/a" in line
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("extract", "--dataset", "nothing"), "mote-cli pack --dataset nothing"),
        (("extract", "--dataset", "../x"), "no name for a data set"),
        (("extract", "--dataset", "clips", "--split", "test"), "its splits are train, val"),
        (("extract", "--dataset", "clips", "--encoder", "ViT-B-61/openai"), "did you mean"),
        (("extract", "--dataset", "clips", "--encoder", "/no/such/folder"), "unknown encoder"),
        (("extract", "--dataset", "clips", "--encoder", "ViT-B-32"), "needs a tag"),
        (("extract", "--dataset", "clips", "--sampling", "all"), "sampling 'all'"),
        (("extract", "--dataset", "clips", "--sampling", "uniform:0"), "uniform:0"),
        (("extract", "--dataset", "clips", "--device", "tpu"), "choose auto, cpu or cuda"),
        (("extract", "--dataset", "clips", "--crops", "2", "ENCODER"), "1, 3, 5 or 10"),
        (("extract", "--dataset", "clips", "--precision", "fp8", "ENCODER"), "fp32, bf16, fp16"),
        (("extract", "--dataset", "clips", "--prompts", "poem", "ENCODER"), "poem"),
        (("extract", "--dataset", "clips", "--workers", "0"), "--workers"),
        (("extract", "--dataset", "clips", "--max-failures", "2"), "--max-failures"),
        (("extract",), "--dataset"),
        (("extract", "--dataset", "clips", "--bogus"), "--bogus"),
        (("bogus",), "bogus"),
        (("train-head", "--dataset", "nothing"), "mote-cli extract --dataset nothing"),
        (("train-head", "--dataset", "clips", "--head", "lstm"), "mote, transformer, mean"),
        (("train-head", "--dataset", "clips", "--split", "tset"), "no split 'tset': choose one of"),
        (("train-head", "--dataset", "clips", "--sampling", "uniform:9"), "uniform:9"),
        (("train-head", "--dataset", "clips", "--lr", "-1", "--name", "n"), "lr"),
        (("train-head", "--dataset", "clips", "--lr", "nan", "--name", "n"), "lr"),
        (("train-head", "--dataset", "clips", "--name", "../n"), "no name for a run"),
        (("train-head", "--dataset", "clips", "--precision", "int8", "--name", "n"), "int8"),
        (("train-head", "--dataset", "clips", "--prompts", "poem", "--name", "n"), "poem"),
        (("eval",), "--closeset"),
        (("eval", "--closeset", "clips", "--zeroshot", "clips"), "exactly one"),
        (("eval", "--closeset", "nothing"), "mote-cli extract --dataset nothing"),
        (("eval", "--closeset", "clips", "--head", "none"), "clips-mote"),
        (
            ("eval", "--closeset", "clips", "--split", "tset"),
            "has no split 'tset': choose one of train, val",
        ),
        (("eval", "--closeset", "clips", "--fusion", "max"), "softmax, cosine, features"),
        (("eval", "--closeset", "clips", "--prompts", "poem"), "poem"),
        (("eval", "--closeset", "clips", "--device", "tpu"), "choose auto, cpu or cuda"),
        (("predict",), "VIDEO"),
        (("predict", "/no/such.mp4"), "does not exist"),
        (("predict", "CLIP", "--classes", "words.txt"), "looks like a file and there is none"),
        (("predict", "CLIP", "--format", "xml"), "table, csv or jsonl"),
        (("predict", "CLIP", "--classes", " , "), "names no class"),
        (("predict", "CLIP", "--classes", "a,b,a"), "twice"),
        (("predict", "CLIP", "--head", "mean"), "--classes"),
        (("predict", "CLIP", "--head", "none"), "clips-mote"),
        (("predict", "CLIP", "--prompts", "poem"), "poem"),
        (("predict", "CLIP", "--frames", "100"), "77"),
        (("predict", "CLIP", "--classes", "run," + "long " * 100), "tokens"),
        (("inspect", "/no/such"), "does not exist"),
        (("inspect", "/"), "neither a data set"),
    ],
)
def test_wrong_names_and_values(world: World, arguments: tuple[str, ...], words: str) -> None:
    clip = next((world.videos / "val" / "run").iterdir())
    told: list[str | Path] = []
    for argument in arguments:
        told += {"ENCODER": ["--encoder", world.encoder], "CLIP": [clip]}.get(argument, [argument])
    place = [] if arguments and arguments[0] in ("inspect", "bogus") else ["--root", world.root]
    before = sorted(world.root.rglob("*"))
    assert words in refused(2, *told, *place)
    assert sorted(world.root.rglob("*")) == before


def test_a_workspace_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for root in (file, file / "below"):
        for command in (
            ("pack", "--dataset", "d", "--videos", tmp_path),
            ("extract", "--dataset", "d"),
            ("train-head",),
            ("eval", "--zeroshot", "d"),
            ("predict", file, "--classes", "a,b"),
        ):
            assert f"{file} is not a folder" in refused(2, *command, "--root", root)


def test_the_split_of_overlapping_splits_is_not_extracted_alone(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    for number, name in enumerate(("a", "b")):
        make_clip(tmp_path / "videos" / name / "x.mp4", number)
    place = ("--root", tmp_path / "root")
    done("pack", "--dataset", "d", "--videos", tmp_path / "videos", *place)
    line = refused(
        2, "extract", "--dataset", "d", "--split", "val", "--encoder", inputs[1], *FRAMES, *place
    )
    assert "its splits are none" in line


# Heads and encoders that do not belong together


def test_a_head_for_other_features(own: World, tmp_path: Path) -> None:
    """Another embedding size, and the same size from other weights."""
    narrow = make_encoder(tmp_path / "narrow", embed_dim=16)
    other = make_encoder(tmp_path / "other", seed=1)
    clip = next((own.videos / "val" / "run").iterdir())
    for encoder in (narrow, other):
        predict = ("predict", clip, "--encoder", encoder, "--root", own.root)
        assert "the head was trained on features of" in refused(2, *predict, "--head", "clips-mote")
        line = refused(2, *predict)
        assert "clips-mote, the newest head, belongs to" in line
        assert "add --head mean for that encoder alone" in line
    shutil.rmtree(own.store)
    for encoder in (narrow, other):
        done("extract", "--dataset", "clips", "--encoder", encoder, *FRAMES, "--root", own.root)
        line = refused(2, "eval", "--closeset", "clips", "--root", own.root)
        assert "was made with another encoder" in line
        assert f"--encoder {own.encoder}" in line
        assert done("eval", "--closeset", "clips", "--head", "mean", "--root", own.root)
        store = own.store.with_name(f"{encoder.name}--uniform-4.zarr")
        shutil.rmtree(store)


def test_predict_finds_the_encoder_from_anywhere(own: World, tmp_path: Path) -> None:
    """An encoder given by a relative path is recorded by its place, a name as a name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clip = next((own.videos / "val" / "run").iterdir())
    shutil.copytree(own.encoder, own.root / "encoders" / "named")
    shutil.copytree(own.encoder, tmp_path / "moving")
    train = ("train-head", "--head", "mean", "--dataset", "clips", "--root", own.root)
    for spec, recorded in (("moving", str((tmp_path / "moving").resolve())), ("named", "named")):
        shutil.rmtree(own.store.parent)
        extract = ("extract", "--dataset", "clips", "--encoder", spec, *FRAMES, "--root", own.root)
        assert mote(*extract, cwd=tmp_path).code == 0
        store = next(own.store.parent.glob("*.zarr"))
        assert open_store(store).provenance.encoder == recorded
        assert done(*train, "--name", f"run-{spec}")["n_trained"] == 12
        predict = ("predict", clip, "--head", f"run-{spec}", "--root", own.root)
        assert mote(*predict, cwd=elsewhere).code == 0
    (tmp_path / "moving").rename(tmp_path / "moved")
    predict = ("predict", clip, "--head", "run-moving", "--root", own.root)
    line = refused(2, *predict)
    assert "name its encoder with --encoder" in line
    assert mote(*predict, "--encoder", tmp_path / "moved").code == 0


# Fewer than five classes


@pytest.fixture(scope="module")
def three_classes(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("three")
    videos, root = make_clips(folder / "videos", CLASSES[:3]), folder / "root"
    place = ("--root", str(root))
    done("pack", "--dataset", "few", "--videos", videos, *place)
    done("extract", "--dataset", "few", "--encoder", inputs[1], *FRAMES, *place)
    result = mote(
        *("train-head", "--dataset", "few", "--name", "r", "--frames", "4", *SHORT_TRAINING),
        *(*place, "--json"),
    )
    assert result.code == 0
    return World(videos, inputs[1], root, {"train": result.err})


def test_training_on_few_classes_warns(three_classes: World) -> None:
    warnings = [line for line in three_classes.printed["train"].splitlines() if "warning" in line]
    assert [("--no-modulate" in line) for line in warnings] == [True, False]
    assert "nothing was learnt" in warnings[1]


def test_evaluation_on_few_classes(three_classes: World) -> None:
    evaluate = ("eval", "--closeset", "few", "--root", three_classes.root)
    assert "--no-modulate" in refused(2, *evaluate)
    for more in (("--no-modulate",), ("--head", "mean")):
        result = done(*evaluate, *more)
        assert (result["n_evaluated"], result["top5"], result["modulate"]) == (3, None, False)
        assert 0 <= result["top1"] <= 100
    assert mote(*evaluate, "--no-modulate").code == 0


def test_prediction_with_few_classes_says_once_that_modulation_is_off(
    three_classes: World, world: World
) -> None:
    clips = [next(folder.iterdir()) for folder in (world.videos / "val").iterdir()][:3]
    for root, classes in (
        (world.root, ("--classes", "run, sit")),  # few named
        (three_classes.root, ("--classes", "a,b,c,d,e,f")),  # few trained on
        (three_classes.root, ()),
    ):
        result = mote("predict", *clips, *classes, "--root", root, "--json")
        assert result.code == 0
        assert len(result.json["videos"]) == 3
        assert result.err.count("modulation is off") == 1
    assert "modulation" not in mote("predict", *clips, "--root", world.root).err
    off = mote("predict", *clips, "--classes", "a,b", "--no-modulate", "--root", world.root)
    assert "modulation" not in off.err


# Damage after the fact


def test_a_damaged_head_is_said(own: World) -> None:
    file = own.root / "heads" / "clips-mote" / "head.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "clips-mote" in refused(1, "eval", "--closeset", "clips", "--root", own.root)
    file.unlink()
    line = refused(2, "eval", "--closeset", "clips", "--head", "clips-mote", "--root", own.root)
    assert "clips-transformer" in line


def test_a_damaged_store_is_said_and_mended_by_extract(own: World) -> None:
    sound = open_store(own.store)
    features = sound.features(sound.rows).copy()
    shard = own.store / "features/c/1/0/0/0"
    for damage in (lambda: shard.unlink(), lambda: shard.write_bytes(shard.read_bytes()[:-100])):
        damage()
        for command in (("train-head", "--name", "n"), ("eval", "--closeset", "clips")):
            assert "partition 1" in refused(1, *command, "--root", own.root)
        assert "partition 1" in refused(1, "inspect", own.store)
        result = done(
            *("extract", "--dataset", "clips", "--encoder", own.encoder, "--root", own.root),
            *("--sampling", "uniform:4"),
        )
        assert (result["partitions_done"], result["partitions_skipped"]) == (1, 4)
        again = open_store(own.store)
        np.testing.assert_array_equal(again.features(again.rows), features)


def test_flipped_bits_in_a_store_are_never_evaluated(own: World) -> None:
    for shard in own.store.glob("features/c/*/0/0/0"):
        data = bytearray(shard.read_bytes())
        data[64] ^= 255
        shard.write_bytes(data)
    line = refused(1, "eval", "--zeroshot", "clips", "--head", "mean", "--root", own.root)
    assert "checksum" in line
    assert "extract" in line


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "flipped", "swapped", "reordered", "lacking", "folder"]
)
def test_a_damaged_tar_costs_its_partition_only(own: World, damage: str) -> None:
    shutil.rmtree(own.store)
    shards = sorted((own.root / "datasets/clips/shards").iterdir())
    tar, other = shards[1], shards[2]
    whole = tar.read_bytes()
    if damage == "swapped":
        tar.write_bytes(other.read_bytes())
    else:
        tar.unlink()
    if damage == "cut":
        tar.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        place = whole.index(b"mdat") + 40
        tar.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    elif damage == "folder":
        tar.mkdir()
    elif damage in ("reordered", "lacking"):
        with tarfile.open(fileobj=io.BytesIO(whole)) as before, tarfile.open(tar, "w") as after:
            members = before.getmembers()
            for member in members[::-1] if damage == "reordered" else members[:-1]:
                after.addfile(member, before.extractfile(member))
    arguments = ("extract", "--dataset", "clips", "--encoder", own.encoder, "--root", own.root)
    line = refused(1, *arguments, *FRAMES)
    assert line.startswith("error: 1 of 5 tars cannot be used, the others are done: ")
    assert tar.name in line
    assert "mote-cli pack" in line
    done_now = {int(path.parent.name) for path in own.store.glob("commit/c/*/0")}
    assert len(done_now) == 4
    assert "holds 4 of 5 partitions" in refused(
        1, "eval", "--closeset", "clips", "--root", own.root
    )
    # The remedy that the line names.
    if tar.is_dir():
        tar.rmdir()
    else:
        tar.unlink(missing_ok=True)
    pack = ("pack", "--dataset", "clips", "--videos", own.videos, "--samples-per-shard", "4")
    assert done(*pack, "--root", own.root)["shards_written"] == 1
    assert tar.read_bytes() == whole
    mended = done(*arguments, *FRAMES)
    assert (mended["partitions_done"], mended["partitions_skipped"]) == (1, 4)
    assert mended["rows_ok"] == 18


def test_a_damaged_dataset_file(own: World) -> None:
    file = own.root / "datasets/clips/dataset.json"
    file.write_text(file.read_text().replace("brush hair", "brush teeth"))
    arguments = ("extract", "--dataset", "clips", "--encoder", own.encoder, "--root", own.root)
    assert "edited by hand" in refused(1, *arguments)
    file.write_text("{")
    assert "is not JSON" in refused(1, *arguments)
    assert "is not JSON" in refused(1, "inspect", file.parent)
