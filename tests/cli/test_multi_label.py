"""Real videos with several classes each, through every command; balanced fine-tuning."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featstore import open_store, verify
from heads import load_head
from pipeline.preprocessing import Preprocessing
from pipeline.tars.dataset import load_dataset
from pipeline.video_clips.stream import ClipStream
from tests.support.processes.command_line import done, mote, refused
from tests.support.processes.processes import Commands, command_starter
from tests.support.worlds.foreign_tars import as_json, webdataset_tar
from tests.support.worlds.tiny_world import (
    CLASSES,
    SHORT_TRAINING,
    make_clip,
    make_clips,
    make_encoder,
)
from tests.support.worlds.tuning import (
    difference,
    files_of,
    finetune,
    same_bits,
    start_ranks,
)

NAMES = ("run", "jump", "sit")
TRAIN, VAL = 12, 6
SHOWN = {
    f"clip{n}": [name for bit, name in enumerate(NAMES) if (n + 1) >> bit & 1] for n in range(7)
}  # of clip0 to clip6; the others show what clip n % 7 does


def shown(number: int) -> list[str]:
    return SHOWN[f"clip{number % 7}"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of two classes and more, one that is missing and one that no player opens."""
    folder = tmp_path_factory.mktemp("source")
    lines = ["path,labels,split,start,end"]
    for number in range(TRAIN + VAL):
        if number != 4:
            make_clip(folder / f"videos/clip{number}.mp4", number)
        split = "train" if number < TRAIN else "val"
        times = "0.1,0.3" if number % 2 else ","
        lines.append(f"clip{number}.mp4,{'|'.join(shown(number))},{split},{times}")
    (folder / "videos/clip5.mp4").write_bytes(b"no video")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def root(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root") / "root"
    make_encoder(root / "encoders/tiny")
    place = ("--root", root)
    packed = done(*pack(source), "--max-failures", "0.5", *place)
    assert (packed["videos_listed"], packed["videos_failed"], packed["classes"]) == (18, 2, 3)
    made = done(
        *("extract", "--dataset", "acts", "--encoder", "tiny", "--sampling", "uniform:4"),
        *("--precision", "fp32", "--workers", "2", "--max-failures", "0.5", *place),
    )
    assert made["next"].startswith("mote-cli train-head --dataset acts")
    trained = done(
        *("train-head", "--dataset", "acts", "--split", "train", "--frames", "4", "--name", "head"),
        *(*SHORT_TRAINING, "--precision", "fp32", *place),
    )
    assert trained["next"].startswith("mote-cli eval --closeset acts --head head")
    return root


def pack(source: Path) -> tuple[str | Path, ...]:
    return (
        *("pack", "--dataset", "acts", "--videos", source / "videos", "--multi-label", "|"),
        *("--annotations", source / "list.csv", "--samples-per-shard", "5"),
    )


def store_of(root: Path) -> Path:
    (path,) = (root / "features/acts").glob("*.zarr")
    return path


def test_classes_and_times_reach_the_store(root: Path, source: Path) -> None:
    store = open_store(store_of(root))
    assert store.multi_label
    assert store.class_names == ["jump", "run", "sit"]
    for key, spans, status in zip(store.keys, store.spans, store.status, strict=True):
        number = int(key.removeprefix("clip"))
        assert [store.class_names[span.label] for span in spans] == shown(number)
        times = {(0.1, 0.3) if number % 2 else (None, None)}
        assert {(span.start, span.end) for span in spans} == times
        assert status == (2 if number in (4, 5) else 1)
    assert verify(store.path, deep=True).ok
    failures = list(csv.DictReader((root / "datasets/acts/failures.csv").open()))
    assert {row["key"]: row["class_name"] for row in failures} == {
        key: "; ".join(sorted(SHOWN[key])) for key in ("clip4", "clip5")
    }
    again = done(*pack(source), "--max-failures", "0.5", "--root", root)
    assert again["shards_written"] == 0


def test_changed_classes_are_noticed(root: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "datasets", tmp_path / "root/datasets")
    text = (source / "list.csv").read_text()
    (tmp_path / "list.csv").write_text(text.replace("clip0.mp4,run,", "clip0.mp4,run|sit,"))
    words = refused(
        2, *pack(source), "--annotations", tmp_path / "list.csv", "--root", tmp_path / "root"
    )
    assert "1 video with another class (e.g. 'clip0.mp4')" in words
    one = tmp_path / "one.csv"
    one.write_text("".join(f"clip{n}.mp4,run,{'train' if n else 'val'}\n" for n in range(4)))
    words = refused(
        2, *("pack", "--dataset", "acts", "--videos", source / "videos", "--annotations", one),
        *("--samples-per-shard", "5", "--root", tmp_path / "root"),
    )  # fmt: skip
    assert "multi_label was True, is False" in words


def test_new_videos_are_appended_with_new_classes(root: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    shutil.copytree(source, tmp_path / "source")
    make_clip(tmp_path / "source/videos/new.mp4", 90)
    with open(tmp_path / "source/list.csv", "a") as lines:
        lines.write("new.mp4,swim|run,train,,\n")
    place = ("--root", tmp_path / "root")
    done(*pack(tmp_path / "source"), "--append", "--max-failures", "0.5", *place)
    store = store_of(tmp_path / "root")
    done("store", "add-tars", store, "--dataset", "acts", *place)
    done(
        *("extract", "--dataset", "acts", "--encoder", "tiny", "--sampling", "uniform:4"),
        *("--precision", "fp32", "--max-failures", "0.5", *place),
    )
    grown = open_store(store)
    assert grown.class_names == ["jump", "run", "sit", "swim"]
    rows = dict(zip(grown.keys, grown.shown(grown.rows).tolist(), strict=True))
    assert rows["new"] == [False, True, False, True]
    assert rows["clip1"] == [True, False, False, False]


def test_a_head_is_evaluated_and_predicts(root: Path, source: Path, tmp_path: Path) -> None:
    place = ("--root", root)
    value = done("eval", "--closeset", "acts", "--head", "head", "--no-modulate", *place)
    assert value["measure"] == "mAP"
    assert value["per_split"][0]["n_classes_shown"] == 3
    rows = list(csv.DictReader(Path(value["files"]["videos"]).read_text("utf-8-sig").splitlines()))
    assert {row["key"]: row["true_classes"] for row in rows} == {
        f"clip{n}": "; ".join(sorted(shown(n))) for n in range(TRAIN, TRAIN + VAL)
    }
    printed = mote(
        "eval", "--closeset", "acts", "--head", "head", "--no-modulate", *place, width=80
    ).out
    assert "mAP %" in printed
    assert max(map(len, printed.replace(str(root), "").splitlines())) <= 160
    found = done("predict", source / "videos/clip12.mp4", "--head", "head", *place)
    scores = {p["class_name"]: p["score"] for p in found["videos"][0]["predictions"]}
    alone = done(
        *("predict", source / "videos/clip12.mp4", "--head", "head", "--classes", "sit,run", *place)
    )
    for answer in alone["videos"][0]["predictions"]:  # no class takes from another
        assert answer["score"] == pytest.approx(scores[answer["class_name"]], abs=1e-6)
    zero = done("eval", "--zeroshot", "acts", "--head", "mean", *place)
    assert zero["n_failed"] == 2
    assert "mAP" in mote("status", *place).out
    assert done("inspect", store_of(root))["multi_label"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train-head", "--dataset", "acts", "--split", "train", "--shots", "2"), "--shots needs"),
        (("eval", "--fewshot", "acts"), "number of videos per class needs one class a video"),
        (("eval", "--base-to-novel", "acts"), "needs one class a video"),
        (("export", "head", "--format", "official", "--out", "x"), "a probability of its own"),
    ],
    ids=lambda words: "-".join(words[:3]) if isinstance(words, tuple) else "",
)
def test_what_cannot_be_is_refused_in_a_line(
    root: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in refused(2, *words, "--root", root)


def test_pack_refuses_wrong_words(source: Path, tmp_path: Path) -> None:
    place = ("--root", tmp_path)
    assert "choose one of rows, |, ;" in refused(
        2, *pack(source)[:-4], "--multi-label", ":", *place
    )
    tars = ("pack", "--dataset", "t", "--tars", "x.tar", *place, "--multi-label")
    assert "rows is for a CSV" in refused(2, *tars, "rows")
    assert "choose one of list, rows, |, ;" in refused(2, *tars, ":")
    assert "leave --multi-label out" in refused(2, *tars, "list", "--unlabelled")
    listed = ("--annotations", source / "list.csv")
    assert "for --annotations give rows" in refused(2, *tars, "list", *listed)
    assert "list is for --tars" in refused(2, *pack(source), "--multi-label", "list", *place)


def test_tars_whose_json_lists_classes_go_through_every_command(
    source: Path, root: Path, tmp_path: Path
) -> None:
    for split, numbers in (("train", range(TRAIN)), ("val", range(TRAIN, TRAIN + VAL))):
        webdataset_tar(
            tmp_path / f"{split}.tar",
            [
                {
                    "__key__": f"clip{n}",
                    "mp4": (source / f"videos/clip{n}.mp4").read_bytes(),
                    "json": as_json(labels=shown(n)),
                }
                for n in numbers
                if n not in (4, 5)
            ],
        )
    place = ("--root", tmp_path / "root")
    shutil.copytree(root / "encoders", tmp_path / "root/encoders")
    tars = [part for s in ("train", "val") for part in ("--tars", f"{s}={tmp_path}/{s}.tar")]
    packing = ("pack", "--dataset", "acts", *tars, "--multi-label", "list", *place)
    packed = done(*packing)
    assert (packed["videos_packed"], packed["classes"]) == (16, 3)
    done(
        *("extract", "--dataset", "acts", "--encoder", "tiny", "--sampling", "uniform:4"),
        *("--precision", "fp32", *place),
    )
    taken, written = open_store(store_of(tmp_path / "root")), open_store(store_of(root))
    assert taken.multi_label
    assert taken.class_names == written.class_names
    of_written = dict(zip(written.keys, written.shown(written.rows).tolist(), strict=True))
    found = dict(zip(taken.keys, taken.shown(taken.rows).tolist(), strict=True))
    assert found == {key: value for key, value in of_written.items() if key in found}
    assert any("nothing to do" in note for note in done(*packing)["notes"])
    words = refused(2, "pack", "--dataset", "acts", *tars, "--label-field", "labels", *place)
    assert "neither a name nor a number; --multi-label list takes lists" in words
    done(
        *("train-head", "--dataset", "acts", "--split", "train", "--head", "knn", "--frames", "4"),
        *("--name", "near", *place),
    )
    value = done("eval", "--closeset", "acts", "--head", "near", *place)
    assert value["measure"] == "mAP"
    answer = done("predict", source / "videos/clip0.mp4", "--head", "near", *place)
    scores = {p["class_name"]: p["score"] for p in answer["videos"][0]["predictions"]}
    assert all(0 <= score <= 1 for score in scores.values())


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


def test_tower_and_head_learn_several_classes(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    place = tmp_path / "root"
    line = [*finetune(place, "tuned"), "--max-failures", "0.5", "--class-weights", "sqrt"]
    line[line.index("clips")] = "acts"
    summary = done(*line[: line.index("--json")], *line[line.index("--json") + 1 :])
    assert (summary["measure"], summary["n_failed"]) == ("mAP", 2)
    assert summary["class_balance"]["classes_per_video"] > 1
    head = load_head(place / "heads/tuned")
    assert head.logit_bias is not None
    records = (place / "heads/tuned/metrics.jsonl").read_text().splitlines()
    evaluation = json.loads(records[-1])["evaluation"]
    assert evaluation["mean_ap"] == summary["top1"]
    assert evaluation["n_evaluated"] == VAL


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips to train on: four classes have one, two have two; and the encoder "tiny"."""
    folder = tmp_path_factory.mktemp("uneven")
    make_clips(folder / "videos")
    for name in CLASSES[:4]:
        (folder / f"videos/train/{name}/train1 {name}.mp4").unlink()
    done(
        *("pack", "--dataset", "clips", "--videos", folder / "videos"),
        *("--samples-per-shard", "4", "--root", folder / "root"),
    )
    make_encoder(folder / "root/encoders/tiny")
    return folder / "root"


def test_balanced_processes_are_one_with_twice_the_batch_and_repeat_it(
    commands: Commands, uneven: Path
) -> None:
    even = ("--class-sampling", "balanced", "--class-weights", "balanced")
    alone = commands.start(*finetune(uneven, "one", *even, batch_size=4))
    assert alone.end() == 0, alone.words
    assert alone.json["class_balance"]["ratio"] == 2
    running = start_ranks(commands, 2, *finetune(uneven, "two", *even, batch_size=2))
    assert [process.end() for process in running] == [0, 0], running[0].words
    one, two = files_of(uneven, "one"), files_of(uneven, "two")
    assert difference(one["head"], two["head"]) < 1e-5
    assert difference(one["tower"], two["tower"]) < 1e-5
    again = commands.start(*finetune(uneven, "three", *even, batch_size=4))
    assert again.end() == 0, again.words
    assert same_bits(files_of(uneven, "three"), one)


def test_a_balanced_stream_has_all_classes_equally_often(uneven: Path) -> None:
    stream = ClipStream(
        load_dataset(uneven / "datasets/clips"), split="train", seed=1, balanced=True, frames=2,
        batch_size=3, workers=1, preprocessing=Preprocessing(size=(32, 32)),
    )  # fmt: skip
    repeated = 0
    for epoch in range(4):
        batches = list(stream.epoch(epoch))
        labels = np.concatenate([batch.labels.numpy() for batch in batches])
        assert sorted(np.bincount(labels).tolist()) == [1, 1, 1, 1, 2, 2]
        keys = [key for batch in batches for key in batch.keys]
        repeated += len(keys) - len(set(keys))
        positions = np.concatenate([batch.positions.numpy() for batch in batches])
        assert [stream.keys[at] for at in positions] == keys
        for mine, whole in zip(stream.epoch(epoch, start=1), batches[1:], strict=True):
            assert mine.keys == whole.keys
            assert (mine.frames == whole.frames).all()
    assert repeated
