"""Lists of published repositories, keys by what lists call them, unseen classes of Kinetics-600."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline.annotations.listing import key_from_name
from pipeline.annotations.published_lists import (
    KeyIndex,
    ListRepository,
    label_exchange,
    read_keys,
    read_published_list,
)
from pipeline.annotations.unseen_classes import (
    OWN_DRAW,
    RENAMED,
    unseen_classes,
)

# As many names as the real ones: 368 shared, 32 of Kinetics-400 alone, 12 renamed, 220 new.
SHARED = [f"shared {i}" for i in range(368)]
K400 = [*SHARED, *(f"only old {i}" for i in range(32))]
NEW = [f"new {i}" for i in range(220)]
K600 = sorted([*SHARED, *RENAMED, *NEW])


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("names", "listed", "found"),
    [
        (["v_YoYo_g01_c01"], "YoYo/v_YoYo_g01_c01.avi", 0),
        (["v_HandStandPushups_g01_c01"], "HandstandPushups/v_HandstandPushups_g01_c01.avi", 0),
        (["April (09)_#1;[x]_kick_1"], "April (09)_#1;[x]_kick_1.avi", 0),
        (["b.b_1"], "kick/b.b_1", 0),
        (["70017"], "70017.webm", 0),
        (["-_abcdefghi_000010_000020"], "abseiling/-_abcdefghi_000010_000020.mp4", 0),
        (["-_abcdefghi"], "-_abcdefghi_000010_000020.mp4", 0),
        (["-_abcdefghi_000010_000020"], "-_abcdefghi", 0),
        (["-_abcdefghi_000010_000020", "-_abcdefghi_000050_000060"], "-_abcdefghi", None),
        (["-_abcdefghi_000010_000020"], "-_abcdefghi_000050_000060.mp4", None),
        (["train/run/1", "train/walk/1"], "walk/1.mp4", 1),
        (["train/run/1", "val/run/1"], "val/run/1.mp4", 1),
        (["train/run/1", "train/walk/1"], "1.mp4", None),
        (["run/1"], "2.mp4", None),
    ],
)
def test_keys_by_what_lists_call_them(names: list[str], listed: str, found: int | None) -> None:
    keys = [key_from_name(name) for name in names]
    key, reason = KeyIndex(keys).find_listed(listed)
    assert key == (None if found is None else keys[found])
    assert bool(reason) == (found is None)


@given(st.lists(st.text("ab(1)[;]#! _-", min_size=1, max_size=12), min_size=1, unique=True))
def test_every_key_finds_itself(names: list[str]) -> None:
    names = [name for name in names if name.strip() == name]
    keys = [key_from_name(name) for name in names]
    index = KeyIndex(keys)
    assert all(index.find_listed(key)[0] == key for key in keys)


def clone(folder: Path) -> Path:
    """Lists of several data sets and protocols, called as repositories call them."""
    for place in (
        "datasets_splits/hmdb_splits/train1_few_shot_2.txt",
        "datasets_splits/hmdb_splits/train1_few_shot_16.txt",
        "datasets_splits/hmdb_splits/val1.txt",
        "datasets_splits/base2novel_splits/hmdb_splits/train_base_s1.txt",
        "datasets_splits/base2novel_splits/hmdb_splits/val_base_s1.txt",
        "datasets_splits/ucf_splits/train1_2_shot.txt",
        "datasets_splits/ssv2_splits/k=2/train.txt",
        "datasets_splits/kinetics600/val_split1.txt",
        "datasets_splits/kinetics400_splits/train_16shots_seed2.txt",
    ):
        write(folder / place, "a.avi 0\n")
    write(folder / "labels/hmdb_51_labels.csv", "id,name\n0,kick ball\n1,kick\n")
    write(folder / "labels/ucf_101_labels.csv", "id,name\n0,Yo Yo\n")
    write(folder / ".git/hmdb_train1_few_shot_2.txt", "x 0\n")
    return folder


def test_lists_are_found_by_the_words_of_their_paths(tmp_path: Path) -> None:
    root = clone(tmp_path)
    hmdb = ListRepository(root, "hmdb51")
    assert hmdb.shots(2).name == "train1_few_shot_2.txt"
    assert hmdb.shots(16).name == "train1_few_shot_16.txt"
    assert hmdb.seed(1).name == "train_base_s1.txt"
    assert hmdb.names() == root / "labels/hmdb_51_labels.csv"
    assert hmdb.names("base") is None
    assert ListRepository(root, "ucf101").shots(2).name == "train1_2_shot.txt"
    assert ListRepository(root, "ssv2").shots(2).parent.name == "k=2"
    assert ListRepository(root, "k400").seed(2).parent.name == "kinetics400_splits"
    with pytest.raises(UserError, match=r"no list for the 4 shots of hmdb51"):
        hmdb.shots(4)
    with pytest.raises(UserError, match="holds no lists of k700"):
        ListRepository(root, "k700")
    write(root / "other/hmdb/train1_few_shot_2.txt", "a.avi 0\n")
    with pytest.raises(UserError, match="2 lists for the 2 shots"):
        ListRepository(root, "hmdb51").shots(2)
    assert ListRepository(root / "other/hmdb", "hmdb51").shots(2).parent.name == "hmdb"


@pytest.mark.parametrize(
    "text",
    [
        "a.avi 0\nb.avi 1\n",
        "x/a.avi,0\nx/b.avi,1\n",
        "a.mp4\t0\nb.mp4\t1\n",
        "dir/a 30 0\ndir/b 40 1\n",
        "path,label\n/data//a.avi,0\n/data//b.avi,1\n",
        "a.avi 0\nb.avi 1\na.avi 0\n",
    ],
)
def test_formats_of_lists(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "train.txt", text)
    found = read_published_list(path, KeyIndex(["a", "b", "c"]))
    assert (found.keys, found.labels) == (("a", "b"), ("0", "1"))


def test_missing_videos_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["a.avi 0", *(f"gone {i}.avi 1" for i in range(7))]
    read_published_list(write(tmp_path / "l.txt", "\n".join(lines)), KeyIndex(["a"]))
    assert "7 of 8 videos of l.txt are not in the data set" in caplog.text
    assert "'gone 4.avi' and 2 more" in caplog.text
    with pytest.raises(UserError, match=r"gives video 'a.avi' the labels '0' and '1'"):
        read_published_list(write(tmp_path / "m.txt", "a.avi 0\na.avi 1\n"), KeyIndex(["a"]))


def test_lists_of_keys(tmp_path: Path) -> None:
    index = KeyIndex(["a", "-_abcdefghi_000010_000020", "b%20c"])
    path = write(tmp_path / "l.txt", "-_abcdefghi\na.mp4 3\nb c.mp4,4\na\n")
    found = read_keys(path, index)
    assert found.keys == ("-_abcdefghi_000010_000020", "a", "b%20c")
    with pytest.raises(UserError, match="does not exist"):
        read_keys(tmp_path / "none.txt", index)


def test_exchanges_and_what_is_none(tmp_path: Path) -> None:
    names = ("kick", "kick ball", "run")
    index = KeyIndex(["k1", "b1", "r1"])
    label_of = {"k1": 0, "b1": 1, "r1": 2}
    listed = read_published_list(write(tmp_path / "l.txt", "k1 0\nb1 1\nr1 2\n"), index)
    swapped = write(tmp_path / "n.csv", "id,name\n0,kick ball\n1,kick\n2,run\n")
    right = write(tmp_path / "r.csv", "id,name\n0,Kick\n1,kick_ball\n2,run\n")
    cycle = write(tmp_path / "c.csv", "id,name\n0,kick ball\n1,kick ball \n2,run\n")
    assert label_exchange([listed], swapped, label_of, names, "corrected") == ({}, "corrected")
    kept = label_exchange([listed], swapped, label_of, names, "as-published")
    assert kept == ({0: 1, 1: 0}, "as-published")
    for label_map in ("corrected", "as-published"):
        assert label_exchange([listed], right, label_of, names, label_map) == ({}, "")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="to two numbers"):
        label_exchange([listed], cycle, label_of, names, "corrected")
    short = write(tmp_path / "s.csv", "id,name\n0,kick\n")
    with pytest.raises(UserError, match="label 1 has no name"):
        label_exchange([listed], short, label_of, names, "corrected")
    with pytest.raises(UserError, match="needs one"):
        label_exchange([listed], None, label_of, names, "as-published")
    wrong = write(tmp_path / "w.csv", "id,name\n0,kick ball\n1,run\n2,run fast\n")
    with pytest.raises(UserError, match="'run fast' is no class"):
        label_exchange([listed], wrong, label_of, names, "corrected")


def test_the_unseen_classes_of_the_full_lists() -> None:
    assert len(K600) == 600
    assert len(set(K600) - set(K400)) == 232
    chosen = unseen_classes(K600, K400)
    assert {K600[label] for label in chosen.unseen} == set(NEW)
    assert chosen.notes == (
        "the three class splits are drawn by this program: name the published lists with "
        "--class-lists to get comparable numbers",
    )
    assert chosen.source == OWN_DRAW
    assert [len(labels) for labels in chosen.splits.values()] == [160] * 3
    assert len(set(chosen.splits.values())) == 3
    # The draw goes by names: another order of classes has the same ones.
    backwards = K600[::-1]
    again = unseen_classes(backwards, K400)
    for split, labels in chosen.splits.items():
        there = {backwards[label] for label in again.splits[split]}
        assert there == {K600[label] for label in labels}


def test_spellings_of_kinetics_names() -> None:
    k600 = ["Air_Drumming", "massaging person's head", "dyeing_hair", "playing the bagpipes"]
    assert unseen_classes(k600, ["air drumming", "massaging persons head"]).unseen == (3,)
    with pytest.raises(UserError, match="none of the 1 names of Kinetics-400"):
        unseen_classes(k600, ["swimming"])
    with pytest.raises(UserError, match="nothing to test"):
        unseen_classes(["a", "b"], ["a", "b"])


def test_class_lists_are_checked(tmp_path: Path) -> None:
    names = write(tmp_path / "1.txt", "\n".join(NEW[:160]))
    table = "id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(NEW[30:190]))
    write(tmp_path / "2.csv", table)
    write(tmp_path / "3.txt", "\n".join(str(K600.index(name)) for name in NEW[60:]))
    chosen = unseen_classes(K600, K400, [tmp_path])
    assert chosen.notes == ()
    assert chosen.source == "lists 1.txt, 2.csv, 3.txt"
    assert {K600[label] for label in chosen.splits["split3"]} == set(NEW[60:])
    fewer = unseen_classes(K600, K400, [names, write(tmp_path / "few.txt", "new 1\nnew 2\n")])
    assert fewer.notes == (
        "2 class lists given; 3 are published",
        "class list few.txt has 2 classes; the published ones have 160",
    )
    for text, message in (
        ("new 1\nshared 5\n", r"1 class that Kinetics-400 has \(such as 'shared 5'\)"),
        ("new 1\nnew 1000\n", "'new 1000', which is none of the 600 classes"),
        ("0\n600\n", "'600', which is none of the 600 classes"),
        ("new 1\nnew 1\n", "to two numbers"),
    ):
        with pytest.raises(UserError, match=message):
            unseen_classes(K600, K400, [write(tmp_path / "wrong.txt", text)])
    with pytest.raises(UserError, match="does not exist"):
        unseen_classes(K600, K400, [tmp_path / "none.txt"])
