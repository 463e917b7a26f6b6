"""Names are compared as a person reads them: classes, listed paths, keys, files of names."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline.annotations.class_names import comparable, distinct_names
from pipeline.annotations.known_sets import read_listing
from pipeline.annotations.label_names import read_names
from pipeline.annotations.listing import key_from_name
from pipeline.annotations.published_lists import KeyIndex
from pipeline.clip_encoder import equal_texts
from pipeline.prompts import read_descriptions
from pipeline.tars.dataset import load_dataset
from pipeline.tars.packing import pack
from pipeline.tars.plan import read_plan
from tests.support.worlds.foreign_tars import clip, take, webdataset_tar
from tests.support.worlds.tiny_world import make_clip

NFC, NFD = "caf\u00e9", "cafe\u0301"
WORDS = st.text(
    st.characters(categories=["Ll", "Lu", "Lo", "Nd", "Mn"]), min_size=1, max_size=8
).filter(lambda word: comparable(word) == comparable(f"x {word}").removeprefix("x "))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    return folder


def listed(folder: Path, text: str, names: str | None = None) -> tuple[dict[str, str], str]:
    """The class of every file that a list names, and all notes."""
    (folder / "list.csv").write_text(text)
    if names is not None:
        (folder / "names.csv").write_text(names)
    found = read_listing(
        *("own", folder / "v", folder / "list.csv"), folder / "names.csv" if names else None
    )
    return {r.path: r.class_name for r in found.records}, " ".join(found.notes)


@given(st.lists(WORDS, min_size=1, max_size=3), st.sampled_from([" ", "_", "-", "\u2013", "  "]))
def test_one_form_for_all_spellings(words: list[str], between: str) -> None:
    usual = " ".join(words)
    form = comparable(usual)
    assert comparable(form) == form
    for other in (
        unicodedata.normalize("NFD", usual),
        unicodedata.normalize("NFC", usual),
        f'"{usual}"',
        f" \u201c{usual}\u2019 ",
    ):
        assert comparable(other) == form
    if all(word.isascii() and word.isalpha() for word in words):
        assert comparable(usual.upper()) == form
        assert comparable(between.join(words)) == form


@pytest.mark.parametrize(
    ("one", "other"),
    [("-1", "1"), ("c++", "c"), ("_", "-"), ("stra\u00dfe", "strasse"), ("a", "b")],
)
def test_what_reads_differently_stays_apart(one: str, other: str) -> None:
    assert comparable(one) != comparable(other)


def test_folders_that_read_the_same_are_one_class(tmp_path: Path) -> None:
    names = ("brush_hair/1.mp4", "brush hair/2.mp4", "brush hair/3.mp4", "Brush-Hair/4.mp4")
    folder = touch(tmp_path, *names, f"{NFD}/5.mp4", f"{NFC}/6.mp4", "yoga/7.mp4", "-1/8.mp4")
    found = read_listing("own", folder)
    assert found.class_names == ["-1", "brush hair", NFC, "yoga"]
    assert [r.class_name for r in found.records].count("brush hair") == 4
    assert len({r.key for r in found.records}) == 8
    (note,) = [note for note in found.notes if "read the same" in note]
    assert "'brush hair' (2 videos) and 'Brush-Hair' (1 video) and 'brush_hair' (1" in note
    assert r"'caf\xe9' (1 video) and 'cafe\u0301' (1 video)" in note


def test_camel_case_that_reads_the_same_is_refused_with_both_spellings(tmp_path: Path) -> None:
    touch(tmp_path, "TaiChi/1.mp4", "tai chi/2.mp4")
    with pytest.raises(UserError, match="'TaiChi' and 'tai chi' read the same"):
        read_listing("own", tmp_path)


def test_a_packed_data_set_keeps_its_spellings(tmp_path: Path) -> None:
    videos, packed = tmp_path / "videos", tmp_path / "packed"
    make_clip(videos / "run_fast/1.mp4", 1)
    make_clip(videos / "yoga/2.mp4", 2)
    pack(videos, "own", packed)
    before = load_dataset(packed)
    make_clip(videos / "run fast/3.mp4", 3)  # alone, this spelling would be taken
    pack(videos, "own", packed, append=True)
    after = load_dataset(packed)
    assert after.raw_class_names == before.raw_class_names == ("run_fast", "yoga")
    assert after.tars[0] == before.tars[0]
    # Earlier versions packed these as two classes: so they stay.
    plan = packed / ".packing/plan.json"
    assert read_plan(plan).class_names == ("run_fast", "yoga")
    kept = read_listing("own", videos, kept=("run fast", "run_fast", "yoga"))
    assert kept.class_names == ["run fast", "run_fast", "yoga"]


@pytest.mark.parametrize(("there", "named"), [(NFD, NFC), (NFC, NFD)])
def test_a_list_finds_files_in_the_other_form(tmp_path: Path, there: str, named: str) -> None:
    touch(tmp_path / "v", f"{there}/{there} 1.mp4", f"{there}_2.mp4", "z.mp4")
    found, notes = listed(
        tmp_path, f"path,label\n{named}/{named} 1.mp4,{named}\n{named}_2.avi,x\nz.mp4,x\n"
    )
    assert found == {f"{there}/{there} 1.mp4": named, f"{there}_2.mp4": "x", "z.mp4": "x"}
    assert "2 listed names are spelt otherwise in the folder" in notes


def test_a_name_that_reads_alike_is_found_unless_it_is_another_ones(tmp_path: Path) -> None:
    touch(tmp_path / "v", "a b.mp4", "clip-1.mp4", "run/x y.mp4", "sit/x_y.mp4")
    (tmp_path / "list.csv").write_text(
        "path,label\na_b.mp4,x\nclip-1.mp4,x\nclip_1.mp4,x\nrun/x-y.mp4,x\nsit/x-y.mp4,y\n"
    )
    found = read_listing("own", tmp_path / "v", tmp_path / "list.csv")
    assert {r.source: r.path for r in found.records} == {
        "a_b.mp4": "a b.mp4",
        "clip-1.mp4": "clip-1.mp4",
        "run/x-y.mp4": "run/x y.mp4",
        "sit/x-y.mp4": "sit/x_y.mp4",
    }
    assert [(v.source, "reads alike" in v.reason) for v in found.missing] == [("clip_1.mp4", True)]


def test_an_exact_name_comes_first(tmp_path: Path) -> None:
    touch(tmp_path / "v", f"{NFC}.mp4", f"{NFD}.mp4", "a b.mp4", "a_b.mp4", "c.mp4", "c.gif")
    found, _ = listed(tmp_path, f"{NFC}.mp4,x\n{NFD}.mp4,y\na_b.mp4,x\na b.mp4,y\nc.avi,x\n")
    assert found == {
        **{f"{NFC}.mp4": "x", f"{NFD}.mp4": "y", "a_b.mp4": "x", "a b.mp4": "y"},
        "c.mp4": "x",  # and not the preview
    }


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a.mp4,cut,  chop\nb.mp4,run\n", ["cut,  chop", "run"]),
        ('path,label\na.mp4,cut, chop\nb.mp4,say "hi", go\n', ["cut, chop", 'say "hi", go']),
        ("a.mp4,cut, chop\nb.mp4,slice, dice\n", ["cut, chop", "slice, dice"]),
        (
            'a.mp4,"cut, chop"\nb.mp4,one,two,three\n"c, d.mp4",run\n',
            ["cut, chop", "one,two,three"],
        ),
        ("a.mp4,run\nc, d.mp4,sit, down\nb.mp4,x\n", ["run", "x"]),
    ],
)
def test_a_label_keeps_its_unquoted_commas(tmp_path: Path, text: str, labels: list[str]) -> None:
    touch(tmp_path / "v", "a.mp4", "b.mp4", "c, d.mp4")
    found, _ = listed(tmp_path, text)
    assert [found["a.mp4"], found["b.mp4"]] == labels
    assert found.get("c, d.mp4") in (None, "run", "sit, down")


def test_names_of_numbers_keep_their_bytes_and_are_given_once(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_text('id,name\n0,cut,  chop\n1,"a, b"\n2, say "x", y\n')
    assert read_names(path) == {0: "cut,  chop", 1: "a, b", 2: 'say "x", y'}
    path.write_text(f"id,name\n0,{NFC}\n1,{NFD}\n")
    with pytest.raises(UserError, match=r"'caf\\xe9' and 'cafe\\u0301' to two numbers, 0 and 1"):
        read_names(path)


@pytest.mark.parametrize(
    ("labels", "first", "classes", "said"),
    [
        ((1, 2, 3), 0, ("a", "b", "c"), "begin at 1 and the numbers of the class names at 0"),
        ((0, 1, 2), 1, ("a", "b", "c"), "begin at 0 and the numbers of the class names at 1"),
        ((1, 2, 3), 1, ("a", "b", "c"), ""),
        ((0, 1, 2), 0, ("a", "b", "c"), ""),
        ((1, 2, 2), 0, ("b", "c", "c"), "no video has label 0, 'a'"),
    ],
)
def test_labels_that_begin_at_one(
    tmp_path: Path, labels: tuple[int, ...], first: int, classes: tuple[str, ...], said: str
) -> None:
    touch(tmp_path / "v", "1.mp4", "2.mp4", "3.mp4")
    text = "".join(f"{n}.mp4 {label}\n" for n, label in enumerate(labels, 1))
    names = "id,name\n" + "".join(f"{n},{name}\n" for n, name in enumerate("abc", first))
    found, notes = listed(tmp_path, text, names)
    assert tuple(found.values()) == classes
    assert said in notes
    assert ("labels of the list begin" in notes) is ("begin" in said)


def test_folders_show_that_labels_begin_at_one(tmp_path: Path) -> None:
    """Without the last class nothing is out of range."""
    touch(tmp_path / "v", "run/1.mp4", "sit/2.mp4")
    names = "id,name\n0,run\n1,sit\n2,yoga\n"
    found, notes = listed(tmp_path, "run/1.mp4 1\nsit/2.mp4 2\n", names)
    assert found == {"run/1.mp4": "run", "sit/2.mp4": "sit"}
    assert "label 1 is 'run'" in notes
    found, notes = listed(tmp_path, "1.mp4 1\n2.mp4 2\n")
    assert set(found.values()) == {"1", "2"} or set(found.values()) == {"run", "sit"}
    assert "begin at 1: label 1 is class number 0" in notes


def test_lists_and_tars_say_what_they_merge(tmp_path: Path) -> None:
    touch(tmp_path / "v", "1.mp4", "2.mp4", "3.mp4")
    found, notes = listed(tmp_path, "1.mp4,Run-Fast\n2.mp4,run fast\n3.mp4,sit\n")
    assert set(found.values()) == {"run fast", "sit"}
    assert "'run fast' (1 video) and 'Run-Fast' (1 video)" in notes
    samples = [{"__key__": f"{NFD} {n}", "mp4": clip(n), "txt": b"-"} for n in range(2)]
    tar = webdataset_tar(tmp_path / "x.tar", samples)
    mapping = tmp_path / "map.csv"
    mapping.write_text(f"key,class\n{NFC} 0,run_fast\n{NFC.upper()}_1.mp4,Run fast\n")
    summary, dataset = take(tmp_path / "out", tar, annotations=mapping)
    assert (summary.videos_packed, dataset.raw_class_names) == (2, ("Run fast",))
    assert any("'Run fast' (1 video) and 'run_fast' (1 video)" in n for n in summary.notes)


def test_keys_of_published_lists() -> None:
    index = KeyIndex([key_from_name(f"a/{NFD} x.y"), "b%2Fold%2Egif", "c-d"])
    assert index.find_listed(f"{NFC} x.y.mp4")[0] == key_from_name(f"a/{NFD} x.y")
    assert index.find_listed("old.gif")[0] == "b%2Fold%2Egif"
    assert index.find_listed("C_D.avi")[0] == "c-d"


def test_predicted_classes_and_descriptions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names 'run fast' and 'Run-fast', which read the same"):
        distinct_names("--classes", ["sit", "run fast", "Run-fast"])
    file = tmp_path / "described.json"
    file.write_text(json.dumps({"Brush-Hair": ["somebody brushes"], NFC: ["a cup"]}))
    prompts = read_descriptions(file)
    prompts.require_classes(["brush hair", NFD])
    assert prompts.sentences("brush hair") == ["somebody brushes"]
    assert prompts.sentences(NFD) == ["a cup"]
    with pytest.raises(UserError, match="lacks 'yoga'"):
        prompts.require_classes(["brush hair", NFD, "yoga"])


def test_classes_with_equal_texts_are_named() -> None:
    units = torch.nn.functional.normalize(torch.randn(6, 16, generator=torch.manual_seed(0)))
    units[4] = units[1]
    units[5] = units[1]
    near = torch.nn.functional.normalize(units[2] + 1e-4 * units[3], dim=0)
    units[3] = near  # another text, however near
    assert equal_texts(list("abcdef"), units) == [["'b'", "'e'", "'f'"]]
    assert equal_texts([], units[:0]) == []
    assert equal_texts(["a\x1b", "it's"], units[[1, 4]]) == [["'a\\x1b'", '"it\'s"']]  # once


def test_extraction_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.clip_encoder import load_encoder
    from tests.support.worlds.tiny_world import make_encoder

    encoder = load_encoder(str(make_encoder(tmp_path / "tiny")), "fp32", "cpu")
    with caplog.at_level(logging.WARNING, "pipeline"):
        encoder.class_embeddings(["jump", "sit", "Jump"], "name")
        assert "'jump' and 'Jump'" in caplog.text
        caplog.clear()
        encoder.class_embeddings(["jump", "sit"], "name")
        assert not caplog.text
