"""The official annotation files in miniature, with the traps of the copies people have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from featstore.errors import UserError
from pipeline.annotations.known_sets import read_listing
from pipeline.annotations.listing import Listing, VideoRecord


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def by_name(listing: Listing) -> dict[str, VideoRecord]:
    return {record.source: record for record in listing.records}


def splits(records: Iterable[VideoRecord]) -> dict[str, tuple[str, ...]]:
    return {record.key: record.splits for record in records}


K400 = "label,youtube_id,time_start,time_end,split,is_cc\n"
ROWS = {
    "train": '"passing American football (in game)",-0abcdefghi,10,20,train,0\n'
    '"tasting, or eating food",_b_12_34_x-,9.0,19.0,train,0\n'
    "air drumming,AAAAAAAAAAA,0,10,train,0\n",
    "val": "air drumming,BBBBBBBBBBB,1,11,validate,0\n",
}


def k400(root: Path) -> Path:
    for split, rows in ROWS.items():
        write(root / f"annotations/{split}.csv", K400 + rows)
    write(
        root / "annotations/test.csv",
        "youtube_id,time_start,time_end,split\nCCCCCCCCCCC,1,11,test\n",
    )
    return root


def test_kinetics_cvdf_flat_folders(tmp_path: Path) -> None:
    root = k400(tmp_path / "k400")
    touch(
        root,
        "train/-0abcdefghi_000010_000020.mp4",
        "train/_b_12_34_x-_000009_000019.mp4",
        "train/AAAAAAAAAAA_000000_000010.mp4",
        "val/BBBBBBBBBBB_000001_000011.mp4",
        "test/CCCCCCCCCCC_000001_000011.mp4",
        "replacement/replacement_for_corrupted_k400/AAAAAAAAAAA_000000_000010.mp4",
    )
    listing = read_listing("k400", root)
    assert listing.class_names == [
        "air drumming",
        "passing American football (in game)",
        "tasting, or eating food",
    ]
    assert listing.split_names == ["train", "val"]
    assert splits(listing.records) == {
        "-0abcdefghi_000010_000020": ("train",),
        "AAAAAAAAAAA_000000_000010": ("train",),
        "BBBBBBBBBBB_000001_000011": ("val",),
        "_b_12_34_x-_000009_000019": ("train",),
    }
    replaced = by_name(listing)["AAAAAAAAAAA_000000_000010.mp4"]
    assert replaced.path.startswith("replacement/")
    assert by_name(listing)["_b_12_34_x-_000009_000019.mp4"].class_name == "tasting, or eating food"
    notes = " ".join(listing.notes)
    assert "test.csv: 1 video has no label" in notes
    assert "1 video is taken from the folder of replacements" in notes


def test_kinetics_missing_files_keep_their_place(tmp_path: Path) -> None:
    root = k400(tmp_path / "k400")
    touch(root, "train/-0abcdefghi_000010_000020.mp4", "val/BBBBBBBBBBB_000001_000011.mp4")
    # Another clip of the same video is not the one listed.
    touch(root, "train/AAAAAAAAAAA_000050_000060.mp4")
    listing = read_listing("k400", root)
    assert {video.key: video.splits for video in listing.missing} == {
        "AAAAAAAAAAA_000000_000010": ("train",),
        "_b_12_34_x-_000009_000019": ("train",),
    }
    assert listing.missing[0].reason == "no such file in the videos folder"


def test_kinetics_names_of_ids_alone(tmp_path: Path) -> None:
    root = k400(tmp_path / "k400")
    touch(root, "train_256/_b_12_34_x-.mp4", "train_256/-0abcdefghi.mp4", "val_256/BBBBBBBBBBB.mp4")
    listing = read_listing("k400", root)
    assert splits(listing.records) == {
        "-0abcdefghi": ("train",),
        "BBBBBBBBBBB": ("val",),
        "_b_12_34_x-": ("train",),
    }


@pytest.mark.parametrize("folder", ["air drumming", "air_drumming", "some other spelling"])
def test_kinetics_class_comes_from_the_file(tmp_path: Path, folder: str) -> None:
    root = k400(tmp_path)
    touch(root, f"videos_val/{folder}/BBBBBBBBBBB_000001_000011.mp4")
    listing = read_listing("k400", root / "videos_val")
    assert [(r.class_name, r.splits) for r in listing.records] == [("air drumming", ("val",))]
    assert listing.missing == []
    assert "split train: none of its 3 videos" in " ".join(listing.notes)
    named = read_listing("k400", root / "videos_val", root / "annotations")
    assert len(named.missing) == 3


def test_kinetics_links_of_the_arrange_script(tmp_path: Path) -> None:
    root = k400(tmp_path / "k400")
    touch(root, "val/BBBBBBBBBBB_000001_000011.mp4")
    link = root / "videos/val/air drumming/BBBBBBBBBBB_000001_000011.mp4"
    link.parent.mkdir(parents=True)
    link.symlink_to(root / "val/BBBBBBBBBBB_000001_000011.mp4")
    (root / "val/loop").symlink_to(root)
    arranged = read_listing("k400", root / "videos")
    assert arranged.records[0].path == "val/air drumming/BBBBBBBBBBB_000001_000011.mp4"
    both = read_listing("k400", root)
    assert both.records[0].path == "val/BBBBBBBBBBB_000001_000011.mp4"
    assert "more than once" in " ".join(both.notes)


def test_kinetics_spellings_of_one_class(tmp_path: Path) -> None:
    write(tmp_path / "a/train.csv", K400 + "air_drumming,AAAAAAAAAAA,0,10,train,0\n")
    write(tmp_path / "a/val.csv", K400 + "Air drumming,BBBBBBBBBBB,1,11,val,0\n")
    touch(tmp_path / "v", "AAAAAAAAAAA_000000_000010.mp4", "BBBBBBBBBBB_000001_000011.mp4")
    listing = read_listing("k600", tmp_path / "v", tmp_path / "a")
    assert listing.class_names == ["Air drumming"]
    assert {record.class_name for record in listing.records} == {"Air drumming"}


def test_kinetics_deepmind_json_and_csv_count_once(tmp_path: Path) -> None:
    entry = {
        "annotations": {"label": "air drumming", "segment": [1.0, 11.0]},
        "duration": 10.0,
        "subset": "validate",
        "url": "https://example.org",
    }
    write(tmp_path / "validate.json", json.dumps({"BBBBBBBBBBB": entry}))
    touch(tmp_path / "v", "BBBBBBBBBBB_000001_000011.mp4")
    alone = read_listing("k700", tmp_path / "v", tmp_path / "validate.json")
    write(tmp_path / "validate.csv", K400 + ROWS["val"])
    both = read_listing("k700", tmp_path / "v")
    for listing in (alone, both):
        assert splits(listing.records) == {"BBBBBBBBBBB_000001_000011": ("val",)}
        assert listing.class_names == ["air drumming"]


def test_kinetics_without_labels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "test.csv", "youtube_id,time_start,time_end\nAAAAAAAAAAA,1,11\n")
    touch(tmp_path / "v", "AAAAAAAAAAA_000001_000011.mp4")
    with pytest.raises(UserError, match=r"no row of test.csv has a label"):
        read_listing("k400", tmp_path / "v", path)


def test_known_set_without_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "flat", "train/AAAAAAAAAAA_000000_000010.mp4", "val/BBBBBBBBBBB.mp4")
    with pytest.raises(UserError, match=r"no Kinetics-400 annotations .* with --annotations"):
        read_listing("k400", tmp_path / "flat")
    touch(tmp_path / "sorted", "train/air_drumming/AAAAAAAAAAA_000000_000010.mp4")
    listing = read_listing("k400", tmp_path / "sorted")
    assert listing.records[0].key == "train%2Fair_drumming%2FAAAAAAAAAAA_000000_000010"
    assert "class folders are packed as they are" in caplog.text


STRANGE = "April_(x)!#;[1]&+~@ y_brush_hair_u_nm_np1_ba_goo_0"


def hmdb51(root: Path) -> Path:
    lists = root / "testTrainMulti_7030_splits"
    for number, flags in (("1", "120"), ("2", "012")):
        write(
            lists / f"brush_hair_test_split{number}.txt",
            f"{STRANGE}.avi {flags[0]} \nb.b_1.avi {flags[1]} \nc_2.avi {flags[2]} \n",
        )
        write(lists / f"kick_ball_test_split{number}.txt", "k_3.avi 2 \n")
    return root


@pytest.mark.parametrize("layout", ["{}/", ""])
def test_hmdb51(tmp_path: Path, layout: str) -> None:
    root = hmdb51(tmp_path)
    for name in (f"{STRANGE}.avi", "b.b_1.avi", "c_2.avi"):
        touch(root / "hmdb51_org", layout.format("brush_hair") + name)
    touch(root / "hmdb51_org", layout.format("kick_ball") + "k_3.mp4")
    listing = read_listing("hmdb51", root / "hmdb51_org")
    assert listing.class_names == ["brush_hair", "kick_ball"]
    assert listing.split_names == ["train1", "test1", "train2", "test2"]
    assert listing.overlapping_splits
    records = by_name(listing)
    assert records[f"{STRANGE}.avi"].splits == ("train1",)
    assert records["b.b_1.avi"].splits == ("test1", "train2")
    assert records["b.b_1.avi"].key == "b%2Eb_1"
    assert records["c_2.avi"].splits == ("test2",)
    assert records["k_3.avi"].splits == ("test1", "test2")
    assert records["k_3.avi"].class_name == "kick_ball"
    assert listing.missing == []


def test_hmdb51_bad_flag_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "s/kick_test_split1.txt", "a.avi 1 \nb.avi 3 \n")
    touch(tmp_path / "v", "a.avi")
    with pytest.raises(UserError, match=r"line 2: 'b.avi 3' is not `<file> <0\|1\|2>`"):
        read_listing("hmdb51", tmp_path / "v", path)


def ucf101(root: Path) -> Path:
    lists = root / "ucfTrainTestlist"
    write(
        lists / "classInd.txt", "1 YoYo\r\n2 ApplyEyeMakeup\r\n3 HandstandPushups\r\n4 Archery\r\n"
    )
    write(
        lists / "trainlist01.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 2\r\n"
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 3\r\n",
    )
    write(lists / "testlist01.txt", "YoYo/v_YoYo_g01_c01.avi\r\n")
    write(lists / "trainlist02.txt", "YoYo/v_YoYo_g01_c01.avi 1\r\n")
    write(lists / "testlist02.txt", "HandStandPushups/v_HandstandPushups_g08_c01.avi\r\n")
    return root


@pytest.mark.parametrize("flat", [False, True])
def test_ucf101(tmp_path: Path, flat: bool) -> None:
    root = ucf101(tmp_path)
    for name in (
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "HandstandPushups/v_HandStandPushups_g08_c01.avi",
        "YoYo/v_YoYo_g01_c01.avi",
    ):
        touch(root / "UCF-101", name.split("/")[1] if flat else name)
    listing = read_listing("ucf101", root / "UCF-101")
    assert listing.class_names == ["YoYo", "ApplyEyeMakeup", "HandstandPushups", "Archery"]
    assert splits(listing.records) == {
        "v_ApplyEyeMakeup_g08_c01": ("train1",),
        "v_HandStandPushups_g08_c01": ("train1", "test2"),
        "v_YoYo_g01_c01": ("test1", "train2"),
    }
    assert listing.overlapping_splits
    assert listing.missing == []
    assert "1 class has no videos and stays in the list: 'Archery'" in listing.notes


def test_ucf101_numbers_that_disagree(tmp_path: Path) -> None:
    root = ucf101(tmp_path)
    path = write(root / "ucfTrainTestlist/trainlist01.txt", "YoYo/v_YoYo_g01_c01.avi 0\n")
    touch(root / "UCF-101", "YoYo/v_YoYo_g01_c01.avi")
    with pytest.raises(
        UserError, match=r"line 1: class 'YoYo' has number 0, but in classInd.txt 1"
    ):
        read_listing("ucf101", root / "UCF-101", path)


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
def test_ssv2(tmp_path: Path, prefix: str) -> None:
    labels = {"Pushing something left": "1", "Holding something": "0", "Moving your hand": "2"}
    write(tmp_path / f"{prefix}labels.json", json.dumps(labels))
    entry = {"label": "pushing a cup left", "placeholders": ["a cup"]}
    write(
        tmp_path / f"{prefix}train.json",
        json.dumps([{"id": "78687", "template": "Pushing [something] left", **entry}]),
    )
    write(
        tmp_path / f"{prefix}validation.json",
        json.dumps(
            [
                {"id": "74225", "template": "Holding [something]", **entry},
                {"id": "1", "template": "Holding [something]", **entry},
            ]
        ),
    )
    write(tmp_path / f"{prefix}test.json", json.dumps([{"id": "5"}, {"id": "6"}]))
    write(tmp_path / "test-answers.csv", "6;Moving your hand\n")
    touch(tmp_path / "20bn-something-something-v2", "78687.webm", "74225.webm", "5.webm", "6.webm")
    listing = read_listing("ssv2", tmp_path / "20bn-something-something-v2")
    assert listing.class_names == [
        "Holding something",
        "Pushing something left",
        "Moving your hand",
    ]
    assert splits(listing.records) == {"6": ("test",), "74225": ("val",), "78687": ("train",)}
    assert by_name(listing)["78687.webm"].class_name == "Pushing something left"
    assert [video.source for video in listing.missing] == ["1.webm"]
    assert "1 video has no published label" in " ".join(listing.notes)


def test_ssv2_unknown_template(tmp_path: Path) -> None:
    write(tmp_path / "labels.json", json.dumps({"Holding something": "0"}))
    path = write(tmp_path / "train.json", json.dumps([{"id": 1, "template": "Eating [something]"}]))
    touch(tmp_path / "v", "1.webm")
    with pytest.raises(UserError, match=r"template 'Eating \[something\]' of video '1' is not in"):
        read_listing("ssv2", tmp_path / "v", path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("train.json", "[{"), ("a.csv", "\xff\xfe"), ("a.txt", ""), ("a.txt", "one\ntwo\n")],
)
def test_damaged_annotations_are_user_errors(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    touch(tmp_path / "v", "1.webm")
    with pytest.raises(UserError) as caught:
        read_listing("own", tmp_path / "v", path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
