"""`mote-cli finetune` on data that is not as it should be, and what is said to come next."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import make_clip, make_encoder
from tests.support.worlds.tuning import finetune, tuning_workspace


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning_workspace(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


def packed_videos(folder: Path) -> Path:
    """The workspace with folder/videos packed as "clips", and the encoder "tiny"."""
    root = folder / "root"
    allowed = ("--max-failures", "0.9")
    done("pack", "--dataset", "clips", "--videos", folder / "videos", "--root", root, *allowed)
    make_encoder(root / "encoders/tiny")
    return root


def reasons(root: Path, name: str) -> dict[str, str]:
    with (root / "heads" / name / "failures.csv").open(newline="") as file:
        return {line["key"]: line["reason"] for line in csv.DictReader(file)}


def test_files_that_are_no_videos_are_named(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for number in range(6):
        make_clip(videos / f"{'abc'[number % 3]}/{number}.mp4", number)
    whole = (videos / "a/0.mp4").read_bytes()
    (videos / "a/cut.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "b/empty.mp4").write_bytes(b"")
    (videos / "c/text.mp4").write_text("no video\n" * 100)
    root = packed_videos(tmp_path)
    result = mote(*finetune(root, "r"))
    assert result.code == 1
    assert "3 of 9 videos failed, more than --max-failures 0.05 allows" in result.error
    assert (result.json["n_listed"], result.json["n_failed"]) == (9, 3)
    assert result.json["loss"] > 0
    found = reasons(root, "r")
    assert {key: reason.split(" (")[0] for key, reason in found.items()} == {
        "a%2Fcut": "not a readable video file",
        "b%2Fempty": "the file is empty",
        "c%2Ftext": "not a readable video file",
    }
    words = mote(*(word for word in finetune(root, "s") if word != "--json")).out
    assert "6 of 9 videos of clips" in words
    assert all(f"failed: {key}" in words for key in found)


def test_one_video_a_class_and_videos_of_one_class(tmp_path: Path) -> None:
    for number, name in enumerate("aab"):
        make_clip(tmp_path / f"videos/{name}/{number}.mp4", number)
    root = packed_videos(tmp_path)
    listed = tmp_path / "list.txt"
    listed.write_text("a%2F0")
    result = mote(*finetune(root, "r", "--exclude", listed))
    assert result.code == 0, result.err
    assert "a batch of 4 is more than the 2 training videos" in result.err
    assert result.json["n_listed"] == 2
    error = refused(2, *finetune(root, "s", "--exclude", listed, "--accumulation", "2"))
    assert "accumulation 2 is more than the 1 batch of an epoch" in error
    listed.write_text("b%2F2")
    error = refused(2, *finetune(root, "s", "--exclude", listed))
    assert "one class, 'a' (2 videos): there is nothing to tell apart; add videos" in error
    assert not (root / "heads/s").exists()


def test_a_list_leaves_videos_out_of_training_and_evaluation(root: Path, tmp_path: Path) -> None:
    dataset = json.loads((root / "datasets/clips/dataset.json").read_text())
    train, val = (sorted(dataset["splits"][split]) for split in ("train", "val"))
    listed = tmp_path / "list.csv"
    rows = [f"{train[0]},yes", f"{train[1]},no", f"{val[0]},yes", "nowhere,yes"]
    listed.write_text("\n".join(["key,exclude", *rows]) + "\n")
    found = mote(*finetune(root, "less", "--exclude", listed)).json
    assert (found["n_listed"], found["n_evaluated"]) == (len(train) - 1, len(val) - 1)
    assert found["excluded"] == {
        "file": str(listed), "videos": 2, "keys": [train[0], val[0]], "unknown": ["nowhere"],
    }  # fmt: skip
    keys = json.loads((root / "heads/less/training-keys.json").read_text())
    assert sorted(keys["clips"]) == train[1:]
    (evaluation, *_) = [
        json.loads(line)["evaluation"]
        for line in (root / "heads/less/metrics.jsonl").read_text().splitlines()
    ]
    assert evaluation["n_listed"] == len(val) - 1
    described = json.loads((root / "heads/less/config.json").read_text())["data"]["trained_on"]
    assert described == "train, 2 excluded by a list"
    words = list(finetune(root, "less", "--exclude", listed, "--resume"))
    words.remove("--json")
    assert "1 of its keys is not in the splits of the data set: nowhere" in mote(*words).out
    assert "data.order" in refused(2, *finetune(root, "less", "--resume"))
    for keys, what in ((train, "training videos"), (val, "videos of split val, to evaluate on")):
        listed.write_text("\n".join(keys))
        error = refused(2, *finetune(root, "none", "--exclude", listed))
        assert f"names all {len(keys)} {what}: leave some of them in" in error
    assert not (root / "heads/none").exists()


def test_a_tar_that_is_gone(root: Path) -> None:
    shard = sorted((root / "datasets/clips/shards").glob("*-train-*.tar"))[0]
    shard.unlink()
    result = mote(*finetune(root, "r"))
    assert result.code == 1
    assert result.json["n_failed"] == 4
    assert set(reasons(root, "r").values()) == {
        f"{shard} is missing; run the same `mote-cli pack` command again"
    }


def test_another_data_set_on_resume(root: Path, packed: Path) -> None:
    done(*finetune(root, "r"))
    again = ("pack", "--dataset", "others", "--videos", packed.parent / "videos", "--root", root)
    done(*again)
    error = refused(2, *finetune(root, "r", "--resume", "--dataset", "others"))
    assert 'run r was begun with other settings: data.dataset is "clips" in the run' in error
    assert json.loads((root / "heads/r/config.json").read_text())["data"]["dataset"] == "clips"


def test_what_comes_next_is_said_whole(root: Path) -> None:
    """The lines can be typed as they are, and give what training measured."""
    result = mote(*(word for word in finetune(root, "r", "--blend", "1") if word != "--json"))
    facts = dict(line.split(None, 1) for line in result.out.splitlines())
    extract, evaluate = (facts[name].split()[1:] for name in ("next", "then"))
    done(*extract, "--root", root, "--precision", "fp32", "--prompts", "name")
    trained = json.loads((root / "heads/r/metrics.jsonl").read_text().splitlines()[-1])
    # Features of a store are float16: one of the six videos may change its place.
    assert done(*evaluate, "--root", root)["top1"] == pytest.approx(
        trained["evaluation"]["top1"], abs=100 / 6 + 1e-6
    )


def test_a_batch_that_memory_does_not_hold(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heads.end_to_end.memory.available_memory", lambda: 1000)
    result = mote(*finetune(root, "r", batch_size=10**6))
    assert result.code == 0, result.err
    # The batch is no larger than the data.
    assert "a step of 12 videos takes about 0 GB of memory, 0 GB are free: lower" in result.err
    monkeypatch.undo()
    assert "of memory" not in mote(*finetune(root, "s")).err
