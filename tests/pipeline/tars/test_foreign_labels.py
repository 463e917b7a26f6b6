"""Tars whose samples show several classes each: JSON lists, texts with separators, mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featstore.errors import UserError
from pipeline.tars.dataset import Dataset
from tests.support.worlds.foreign_tars import (
    as_json,
    clip,
    entries,
    failures,
    take,
    webdataset_tar,
)


def tar_of(path: Path, samples: dict[str, dict[str, Any]]) -> Path:
    """A tar of videos with these members beside each."""
    return webdataset_tar(
        path,
        [
            {"__key__": key, "mp4": clip(number), **members}
            for number, (key, members) in enumerate(samples.items())
        ],
    )


def shown(dataset: Dataset) -> dict[str, list[str]]:
    assert dataset.multi_label
    return {
        key: [dataset.raw_class_names[span[0]] for span in entry["spans"]]
        for key, entry in entries(dataset).items()
    }


def test_a_field_that_is_a_list(tmp_path: Path) -> None:
    lists: dict[str, Any] = {
        "a": ["run", "jump", "run"],
        "b": "sit",
        "c": [],
        "d": [" jump ", ""],
        "e": None,
        "f": ["run", {"name": "sit"}],
        "g": ["run", None],
    }
    tar = tar_of(
        tmp_path / "a.tar",
        {key: {"json": as_json(meta={"acts": value})} for key, value in lists.items()},
    )
    summary, dataset = take(tmp_path / "out", tar, field="meta.acts", cells="list")
    assert dataset.raw_class_names == ("jump", "run", "sit")
    assert shown(dataset) == {"a": ["run", "jump"], "b": ["sit"], "c": [], "d": ["jump"]}
    assert {entry["label"] for entry in entries(dataset).values()} == {-1}
    reasons = failures(tmp_path / "out")
    assert set(reasons) == {"e", "f", "g"}
    assert "its JSON has no 'meta.acts'" in reasons["e"]
    assert "{'name': 'sit'}, neither a name nor a number" in reasons["f"]
    assert "None, neither a name nor a number" in reasons["g"]
    assert (summary.videos_listed, summary.videos_packed) == (7, 4)


def test_the_usual_fields_are_found_and_numbers_get_names(tmp_path: Path) -> None:
    tar = tar_of(
        tmp_path / "a.tar", {k: {"json": as_json(labels=[n, 2])} for n, k in enumerate("xyz")}
    )
    names = tmp_path / "names.csv"
    names.write_text("id,name\n0,run\n1,jump\n2,sit\n")
    summary, dataset = take(tmp_path / "out", tar, cells="list", names_file=names)
    assert dataset.raw_class_names == ("run", "jump", "sit")
    assert shown(dataset) == {"x": ["run", "sit"], "y": ["jump", "sit"], "z": ["sit"]}
    assert any("classes come from 'labels'" in note for note in summary.notes)
    before, fingerprint = shown(dataset), dataset.fingerprint
    more = tar_of(tmp_path / "b.tar", {"w": {"json": as_json(labels=[0])}})
    _, grown = take(
        tmp_path / "out", tmp_path / "[ab].tar", append=True, cells="list", names_file=names
    )
    assert shown(grown) == {**before, "w": ["run"]}
    assert grown.fingerprint != fingerprint
    with pytest.raises(UserError, match="multi_label was True, is False"):
        take(tmp_path / "out", tar, more, unlabelled=True)


@pytest.mark.parametrize("between", ["|", ";"])
def test_a_text_with_separators(between: str, tmp_path: Path) -> None:
    texts = {"a": f"run{between} jump", "b": "", "c": "sit", "d": f"{between}run{between}"}
    tar = tar_of(tmp_path / "a.tar", {k: {"cls": text.encode()} for k, text in texts.items()})
    _, dataset = take(tmp_path / "out", tar, cells=between)
    assert shown(dataset) == {"a": ["run", "jump"], "b": [], "c": ["sit"], "d": ["run"]}
    _, one = take(tmp_path / "one", tar)
    assert not one.multi_label


def test_a_member_that_is_a_json_list(tmp_path: Path) -> None:
    texts = {"a": '["run", "jump"]', "b": "[]", "c": "sit", "d": '["run"'}
    tar = tar_of(tmp_path / "a.tar", {k: {"acts": text.encode()} for k, text in texts.items()})
    _, dataset = take(tmp_path / "out", tar, field=".acts", cells="list")
    assert shown(dataset) == {"a": ["run", "jump"], "b": [], "c": ["sit"]}
    assert "is no JSON list" in failures(tmp_path / "out")["d"]


def test_a_mapping_with_rows_or_cells_and_times(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar", {key: {} for key in "abc"})
    rows = tmp_path / "rows.csv"
    rows.write_text(
        "key,class,split,start,end\na,run,train,0.5,1\na,jump,train,,\nb.mp4,,val,,\nz,run,val,,\n"
    )
    summary, dataset = take(tmp_path / "out", tar, annotations=rows, cells="rows")
    found = {key: entry["spans"] for key, entry in entries(dataset).items()}
    assert dataset.raw_class_names == ("jump", "run")
    assert found == {"a": [[1, 0.5, 1.0], [0]], "b": []}
    assert dataset.splits_of("a") == ("train",)
    assert dataset.splits_of("b") == ("val",)
    assert "it is not in rows.csv" in failures(tmp_path / "out")["c"]
    assert any("1 row names no" in note for note in summary.notes)
    cells = tmp_path / "cells.csv"
    cells.write_text("key,labels\na,run|jump\nb,\nc,sit\n")
    _, other = take(tmp_path / "cells", tar, annotations=cells, cells="|")
    assert shown(other) == {"a": ["run", "jump"], "b": [], "c": ["sit"]}
    rows.write_text("key,class\na,run\na,jump\n")
    with pytest.raises(UserError, match=r"two classes, 'run' and 'jump'.*--multi-label rows"):
        take(tmp_path / "single", tar, annotations=rows)


def test_sets_without_any_class_are_refused(tmp_path: Path) -> None:
    plain = tar_of(tmp_path / "a.tar", {"a": {"json": as_json(fps=25)}})
    with pytest.raises(UserError, match=r"none of 1 samples has a class .a: no usual field"):
        take(tmp_path / "out", plain, cells="list")
    empty = tar_of(tmp_path / "b.tar", {"a": {"json": as_json(labels=[])}})
    with pytest.raises(UserError, match="no sample shows a class"):
        take(tmp_path / "out", empty, cells="list")


def test_the_same_bytes_with_other_classes_are_named(tmp_path: Path) -> None:
    video = clip(1)
    labels = {"a": ["run", "jump"], "b": ["jump", "run"], "c": ["sit"]}
    tar = webdataset_tar(
        tmp_path / "a.tar",
        [{"__key__": k, "mp4": video, "json": as_json(labels=v)} for k, v in labels.items()],
    )
    summary, _ = take(tmp_path / "out", tar, cells="list")
    (group,) = summary.identical.groups
    assert group.across_classes
    assert {v.key: v.class_name for v in group.videos} == {
        "a": "jump; run", "b": "jump; run", "c": "sit",
    }  # fmt: skip
    assert group.excluded == {"a", "b", "c"}
