"""Tars that somebody else wrote become a data set where they lie; whatever a sample says."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from featstore.errors import UserError
from pipeline.annotations.listing import key_from_name
from pipeline.tars.dataset import Dataset, FailedVideo, Tar, load_dataset
from pipeline.tars.reading import DamagedTar, open_packed, read_video
from tests.support.worlds.foreign_tars import (
    CLASSES,
    as_json,
    clip,
    entries,
    failures,
    labelled_tars,
    raw_tar,
    take,
    webdataset_tar,
)


def classes(dataset: Dataset) -> dict[str, str]:
    return {k: dataset.raw_class_names[e["label"]] for k, e in entries(dataset).items()}


def test_what_webdataset_writes_is_taken_without_copying(tmp_path: Path) -> None:
    tars = labelled_tars(tmp_path / "tars")
    summary, dataset = take(tmp_path / "out", tmp_path / "tars" / "clips-{000000..000001}.tar")
    assert (summary.videos_listed, summary.videos_packed, summary.videos_failed) == (12, 12, 0)
    assert dataset.raw_class_names == ("class 2", "class 10", "wave_hand")  # 2 comes before 10
    assert dataset.class_names == ("class 2", "class 10", "wave hand")
    assert [tar.source for tar in dataset.tars] == [str(tar) for tar in tars]
    assert [tar.sha256 for tar in dataset.tars] == [
        hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars
    ]
    found = entries(dataset)
    for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False):
        entry = found.pop(sample["__key__"])
        assert entry["bytes"] == sample["mp4"]
        assert entry["sha256"] == hashlib.sha256(sample["mp4"]).hexdigest()
        assert dataset.raw_class_names[entry["label"]] == sample["cls"].decode()
        assert entry["num_frames"] == 8 + int(sample["__key__"]) % 4
        assert (entry["width"], entry["height"], entry["codec"]) == (72, 48, "h264")
    assert not found
    assert not list((tmp_path / "out").rglob("*.tar"))
    entry = entries(dataset)["00003"]
    tar = dataset.tars[0]
    assert read_video(dataset, tar, "00003", entry["offset"], entry["size"]) == clip(3)


def test_video2dataset_with_captions(tmp_path: Path) -> None:
    """Its JSON holds much and no class; the caption is in .txt and in the JSON."""
    webdataset_tar(
        tmp_path / "00000.tar",
        [
            {
                "__key__": f"00000_{n:04d}",
                "mp4": clip(n),
                "txt": f"a man\nnumber {n} 👋".encode(),
                "json": as_json(
                    key=f"00000_{n:04d}",
                    caption="other",
                    status="success",
                    meta={"act": CLASSES[n % 2]},
                ),
            }
            for n in range(4)
        ],
    )
    summary, dataset = take(tmp_path / "plain", tmp_path / "*.tar")
    assert dataset.class_names == ()
    assert any("no classes: 4 videos without labels" in note for note in summary.notes)
    assert any("caption, " in note and "--label-field" in note for note in summary.notes)
    found = entries(dataset)
    assert {entry["label"] for entry in found.values()} == {-1}
    assert found["00000_0002"]["caption"] == "a man\nnumber 2 👋"

    _, nested = take(tmp_path / "nested", tmp_path / "*.tar", field="meta.act")
    assert set(classes(nested).values()) == {"class 10", "class 2"}
    _, texts = take(tmp_path / "texts", tmp_path / "*.tar", field=".txt")
    assert "a man number 3 👋" in texts.raw_class_names
    for field, words in (
        ("meta.nothing", "its JSON has no 'meta.nothing'"),
        ("meta", "neither a name nor a number"),
        (".cls", "it has no .cls"),
    ):
        with pytest.raises(UserError, match=f"--label-field {field}: none of 4 samples") as error:
            take(tmp_path / field, tmp_path / "*.tar", field=field)
        assert words in str(error.value)


def test_hugging_face_folders_and_mixed_kinds(tmp_path: Path) -> None:
    """Nested names, several members a key, mixed extensions, labels in the JSON."""
    members: list[tuple[str, bytes]] = []
    for n, kind in enumerate(("mp4", "webm", "avi", "MP4")):
        stem = f"./train/{CLASSES[n % 2]}/v{n}"
        members += [
            (f"{stem}.thumbnail.jpg", b"picture"),
            (f"{stem}.{kind}", clip(n, kind.lower())),
            (f"{stem}.json", as_json(label=CLASSES[n % 2], fps=25)),
            (f"{stem}.pyd", b"cos\nsystem\n(S'touch pickled'\ntR."),
        ]
    raw_tar(tmp_path / "a.tar", members)
    summary, dataset = take(tmp_path / "out", tmp_path / "a.tar")
    assert classes(dataset) == {
        key_from_name(f"train/{CLASSES[n % 2]}/v{n}"): CLASSES[n % 2] for n in range(4)
    }
    assert [entry["codec"] for entry in entries(dataset).values()] == [
        "h264",
        "vp8",
        "mpeg4",
        "h264",
    ]
    assert summary.notes == ("classes come from 'label' of every sample",)
    assert not (tmp_path / "pickled").exists()


def test_numbers_get_names(tmp_path: Path) -> None:
    webdataset_tar(
        tmp_path / "a.tar",
        [{"__key__": str(n), "mp4": clip(n), "cls": n % 3 + 9} for n in range(6)],
    )
    summary, dataset = take(tmp_path / "plain", tmp_path / "a.tar")
    assert dataset.raw_class_names == ("9", "10", "11")
    assert any("class names are the numbers" in note for note in summary.notes)
    names = tmp_path / "names.csv"
    names.write_text("id,name\n9,nod\n10,wave\n11,bow\n12,never\n")
    _, dataset = take(tmp_path / "named", tmp_path / "a.tar", names_file=names)
    assert dataset.raw_class_names == ("nod", "wave", "bow", "never")
    assert classes(dataset)["4"] == "wave"
    names.write_text("id,name\n9,nod\n")
    with pytest.raises(UserError, match="label 10 has no name"):
        take(tmp_path / "few", tmp_path / "a.tar", names_file=names)


def test_a_mapping_gives_classes_and_splits(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", [(f"x/{n}.mp4", clip(n)) for n in range(5)])
    table = tmp_path / "map.csv"
    table.write_text(
        "key,class,split\nx/0,nod,train\nx/1.mp4,wave,val\n2,nod,train\nx%2F3,wave,test\nz,nod,test\n"
    )
    summary, dataset = take(tmp_path / "out", tmp_path / "a.tar", annotations=table)
    assert classes(dataset) == {"x%2F0": "nod", "x%2F1": "wave", "x%2F2": "nod", "x%2F3": "wave"}
    assert (dataset.split_names, dataset.splits_disjoint) == (("train", "val", "test"), False)
    assert dataset.keys_by_split["train"] == ("x%2F0", "x%2F2")
    assert failures(tmp_path / "out") == {"x%2F4": "it has no class: it is not in map.csv"}
    assert (summary.videos_listed, summary.videos_failed) == (5, 1)
    assert any("1 row names no" in note and "'z'" in note for note in summary.notes)
    table.write_text("key,class\nx/0,nod\nx/0,wave\n")
    with pytest.raises(UserError, match="two classes"):
        take(tmp_path / "two", tmp_path / "a.tar", annotations=table)
    table.write_text("key,class\nq,nod\n")
    with pytest.raises(UserError, match="names none of the 5 samples"):
        take(tmp_path / "none", tmp_path / "a.tar", annotations=table)
    with pytest.raises(UserError, match="--annotations and --label-field"):
        take(tmp_path / "both", tmp_path / "a.tar", annotations=table, field="label")


def test_splits_of_tars(tmp_path: Path) -> None:
    labelled_tars(tmp_path / "t")
    labelled_tars(tmp_path / "v", tars=1, first=20)
    _, dataset = take(
        tmp_path / "out", f"train={tmp_path}/t/*.tar", f"validation={tmp_path}/v/*.tar"
    )
    assert (dataset.split_names, dataset.splits_disjoint) == (("train", "val"), True)
    assert [tar.split for tar in dataset.tars] == ["train", "train", "val"]
    assert [tar.file for tar in dataset.tars] == [
        *("clips-000000.tar", "clips-000001.tar"),
        "v-clips-000000.tar",
    ]
    assert dataset.keys_by_split["val"] == tuple(f"{n:05d}" for n in range(20, 26))
    with pytest.raises(UserError, match="belongs to one split"):
        take(tmp_path / "x", f"train={tmp_path}/t/*.tar", f"val={tmp_path}/t/*.tar")


def test_no_sample_is_lost(tmp_path: Path) -> None:
    """Every way in which a sample cannot be used is listed by its key, with the reason."""
    good = {"mp4": clip(0), "cls": b"nod"}
    webdataset_tar(
        tmp_path / "a.tar",
        [
            {"__key__": "good", **good},
            {"__key__": "no video", "txt": b"words", "cls": b"nod"},
            {"__key__": "two", "mp4": clip(1), "left.webm": clip(2, "webm"), "cls": b"nod"},
            {"__key__": "no class", "mp4": clip(3)},
            {"__key__": "minus", "mp4": clip(4), "cls": -1},
            {"__key__": "broken", "mp4": b"no video at all", "cls": b"wave"},
            {"__key__": "empty", "mp4": b"", "cls": b"wave"},
            {"__key__": "k" * 201, "mp4": clip(5), "cls": b"wave"},
        ],
    )
    webdataset_tar(tmp_path / "b.tar", [{"__key__": "good", **good}, {"__key__": "more", **good}])
    summary, dataset = take(tmp_path / "out", tmp_path / "?.tar")
    told = failures(tmp_path / "out")
    for key, words in {
        "good": f"its key is already in {tmp_path}/a.tar",
        "no%20video": "it has no video (members: cls, txt)",
        "two": "it has 2 videos (members: cls, left.webm, mp4)",
        "no%20class": "it has no class",
        "minus": "it has no class: .cls is -1",
        "broken": "not a readable video file",
        "empty": "the file is empty (zero bytes)",
        "k" * 201: "its name has 201 characters",
    }.items():
        assert words in told.pop(key)
    assert not told
    assert (summary.videos_listed, summary.videos_packed, summary.videos_failed) == (10, 2, 8)
    assert summary.too_many_failures
    assert dataset.facts()["videos_failed"] == 8
    # Those with a class and a key of their own keep a row.
    assert [tar.rows for tar in dataset.tars] == [6, 1]
    assert load_dataset(tmp_path / "out").fingerprint == dataset.fingerprint


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_other_alphabets(tmp_path: Path, kind: int) -> None:
    names = [f"{'d' * 90}/{'e' * 90}/é{n}" for n in range(2)]
    raw_tar(
        tmp_path / "a.tar",
        [m for n in range(2) for m in ((f"{names[n]}.mp4", clip(n)), (f"{names[n]}.cls", b"x"))],
        kind,
    )
    _, dataset = take(tmp_path / "out", tmp_path / "a.tar")
    assert {entry["member"] for entry in entries(dataset).values()} == {f"{n}.mp4" for n in names}
    assert [e["bytes"] for e in entries(dataset).values()] == [clip(0), clip(1)]


def test_again_and_more(tmp_path: Path) -> None:
    """The same command does nothing; new tars come behind the others, with --append only."""
    labelled_tars(tmp_path, tars=1)
    _, first = take(tmp_path / "out", tmp_path / "clips-*.tar")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("[di]*/*")}
    summary, same = take(tmp_path / "out", tmp_path / "clips-*.tar")
    assert any("packed already" in note for note in summary.notes)
    assert same.fingerprint == first.fingerprint
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("[di]*/*")}

    webdataset_tar(
        tmp_path / "clips-0.tar", [{"__key__": "new", "mp4": clip(9), "cls": b"a new class"}]
    )
    with pytest.raises(UserError, match=r"1 tar that data set 'own' does not have .*--append"):
        take(tmp_path / "out", tmp_path / "clips-*.tar")
    _, grown = take(tmp_path / "out", tmp_path / "clips-*.tar", append=True)
    assert [tar.file for tar in grown.tars] == ["clips-000000.tar", "clips-0.tar"]
    assert grown.tars[0] == first.tars[0]
    assert grown.raw_class_names == (*first.raw_class_names, "a new class")
    (tmp_path / "clips-0.tar").unlink()
    with pytest.raises(UserError, match="1 tar is not named any more"):
        take(tmp_path / "out", tmp_path / "clips-*.tar")


def test_a_tar_that_changes_is_noticed(tmp_path: Path) -> None:
    path = labelled_tars(tmp_path, tars=1)[0]
    out = tmp_path / "out"
    _, dataset = take(out, path)
    content, times = path.read_bytes(), path.stat()
    tar = dataset.tars[0]
    changed = bytearray(content)
    changed[700] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with (
        open_packed(dataset, tar) as archive,
        pytest.raises(DamagedTar, match="its sha256 differs") as error,
    ):
        archive.require(tar.sha256)
    assert f"or delete {out} and run" in str(error.value)  # the data set, never the user's tar
    path.write_bytes(changed)
    with pytest.raises(UserError, match="1 tar with other content"):
        take(out, path)
    path.write_bytes(content + b"\0" * 512)
    with (
        pytest.raises(DamagedTar, match=r"it has \d+ bytes, but"),
        open_packed(dataset, tar),
    ):
        pass
    path.write_bytes(content)
    _, again = take(out, path)  # only the time is another
    assert again.fingerprint == dataset.fingerprint
    path.unlink()
    with pytest.raises(DamagedTar, match=f"{path} is missing"), open_packed(dataset, tar):
        pass


def test_a_damaged_index_is_noticed_and_made_anew(tmp_path: Path) -> None:
    path, out = labelled_tars(tmp_path, tars=1)[0], tmp_path / "out"
    _, dataset = take(out, path)
    index = dataset.index_path(dataset.tars[0])
    content = index.read_bytes()
    for harm in (b"[]", content.replace(b'"label": 0', b'"label": 1'), None):
        index.write_bytes(harm) if harm is not None else index.unlink()
        with (
            pytest.raises(DamagedTar, match=r"run the same `mote-cli pack --tars`"),
            open_packed(dataset, dataset.tars[0]),
        ):
            pass
        take(out, path)
        assert index.read_bytes() == content


def test_data_sets_of_other_kinds_are_not_mixed(tmp_path: Path) -> None:
    path, out = labelled_tars(tmp_path, tars=1)[0], tmp_path / "out"
    take(out, path)
    with pytest.raises(UserError, match="has changed since it was packed: there were 3 classes"):
        take(out, path, unlabelled=True)
    value = json.loads((out / "dataset.json").read_text())
    assert value["format_version"] == 2
    for tar in value["shards"]:
        del tar["source"], tar["index_sha256"]
    plain = Dataset(out, "own", ("a",), ("a",), (), False, (), {}, label_map="")
    plain.write()
    assert json.loads((out / "dataset.json").read_text())["format_version"] == 1


def test_data_sets_of_earlier_versions_keep_file_and_fingerprint(tmp_path: Path) -> None:
    """The fingerprint is what version 0.2.0 gave."""
    failed = FailedVideo("b", 1, "wave hand", ("val",), "empty")
    dataset = Dataset(
        tmp_path,
        "own",
        ("nod", "wave hand"),
        ("nod", "wave_hand"),
        ("train", "val"),
        True,
        (
            Tar("own-train-000000.tar", "train", 1, (), 10240, "ab" * 32),
            Tar("own-val-000000.tar", "val", 0, (failed,), 10240, "cd" * 32),
        ),
        {"train": ("a",), "val": ("b",)},
    )
    assert dataset.fingerprint == "292b699c5d5847ba9c2fbe5a7ce1eeac83c8f3d38ae20c926fea572ad36a498a"
    dataset.write()
    digest = hashlib.sha256((tmp_path / "dataset.json").read_bytes()).hexdigest()
    assert digest == "c799f6948080ed3067595d8536d87dee1623ae8335b4bc0e867de4bf40e56384"
    assert load_dataset(tmp_path) == dataset
