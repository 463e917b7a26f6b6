"""`mote-cli store ...` on stores that the other commands made and go on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featstore import StoreWriter, UserError, open_store, verify
from featstore.format.metadata import attributes_checksum
from pipeline.annotations.class_names import class_list
from pipeline.extraction import grow
from pipeline.tars.dataset import load_dataset
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import SHORT_TRAINING, World, make_clip


@pytest.fixture
def parts(inputs: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """(root, videos): a data set of a train folder, packed and extracted."""
    videos, encoder = inputs
    folder, root = tmp_path / "videos", tmp_path / "mote-data"
    shutil.copytree(videos / "train", folder / "train")
    pack(root, folder)
    extract(root, encoder)
    return root, folder


def pack(root: Path, videos: Path, *more: str) -> None:
    done(
        *("pack", "--dataset", "clips", "--videos", videos, "--samples-per-shard", "4"),
        *("--root", root, *more),
    )


def extract(root: Path, encoder: Path, *more: str, code: int = 0) -> dict[str, object]:
    summary: dict[str, object] = done(
        *("extract", "--dataset", "clips", "--encoder", encoder, "--sampling", "uniform:4"),
        *("--precision", "fp32", "--workers", "1", "--root", root, *more),
        code=code,
    )
    return summary


def pack_again(root: Path, videos: Path) -> None:
    shutil.rmtree(root / "datasets" / "clips")
    pack(root, videos)


def the_store(root: Path) -> Path:
    (path,) = (root / "features" / "clips").glob("*.zarr")
    return path


def test_a_split_that_came_later_is_all_that_is_extracted(
    parts: tuple[Path, Path], inputs: tuple[Path, Path]
) -> None:
    root, folder = parts
    before = open_store(the_store(root))
    kept = before.features(before.rows).tobytes()
    shutil.copytree(inputs[0] / "val", folder / "val")
    pack_again(root, folder)
    error = refused(2, *("extract", "--dataset", "clips", "--encoder", inputs[1], "--sampling"),
                    *("uniform:4", "--precision", "fp32", "--root", root))  # fmt: skip
    assert f"mote-cli store add-tars {the_store(root)} --dataset clips" in error
    name = the_store(root).name.removesuffix(".zarr")
    grown = done("store", "add-tars", name, "--dataset", "clips", "--root", root)
    assert (grown["tars_added"], grown["rows_added"], grown["pending"]) == (2, 6, 2)
    summary = extract(root, inputs[1])
    assert (summary["partitions_done"], summary["partitions_skipped"]) == (2, 3)
    store = open_store(the_store(root))
    assert store.features(before.rows).tobytes() == kept
    assert store.split_names == ["train", "val"]
    assert (len(store.split("train")), len(store.split("val"))) == (12, 6)
    assert verify(store.path, deep=True).ok
    again = done("store", "add-tars", the_store(root), "--dataset", "clips", "--root", root)
    assert (again["tars_added"], again["pending"]) == (0, 0)
    assert not extract(root, inputs[1])["partitions_done"]


def test_a_new_class_gets_its_text_from_the_stores_encoder(
    parts: tuple[Path, Path], inputs: tuple[Path, Path]
) -> None:
    root, folder = parts
    templates = folder.with_name("mine.txt")
    templates.write_text("a clip of {}\n")
    done("store", "add-texts", the_store(root), "--prompts", templates)
    templates.unlink()  # the store keeps them
    before = open_store(the_store(root)).class_text("mote28")
    shutil.copytree(inputs[0] / "val", folder / "val")
    for i in range(2):
        path = folder / "val" / "zoom in" / f"z{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        make_clip(path, 40 + i)
    pack_again(root, folder)
    done("store", "add-tars", the_store(root), "--dataset", root / "datasets" / "clips")
    assert extract(root, inputs[1])["partitions_done"] == 2
    store = open_store(the_store(root))
    assert store.class_names[-1] == "zoom in"
    text = store.class_text("mote28")
    np.testing.assert_array_equal(text.embeddings[:-1], before.embeddings)
    assert text.templates == before.templates
    assert store.class_text("mine").templates == ("a clip of {}",)
    assert store.class_text("mine").names == text.names
    assert verify(store.path, deep=True).ok


def test_descriptions_do_not_stretch_to_new_classes(
    parts: tuple[Path, Path], inputs: tuple[Path, Path]
) -> None:
    root, folder = parts
    names = open_store(the_store(root)).class_names
    file = folder.with_name("own.json")
    file.write_text(json.dumps({name: [name] for name in names}))
    done("store", "add-texts", the_store(root), "--descriptions", file)
    for i in range(2):
        (folder / "val" / "zoom in").mkdir(parents=True, exist_ok=True)
        make_clip(folder / "val" / "zoom in" / f"z{i}.mp4", 40 + i)
    pack_again(root, folder)
    words = ("store", "add-tars", the_store(root), "--dataset", root / "datasets" / "clips")
    error = refused(2, *words)
    assert "does not keep the sentences of its class texts 'own'" in error
    shutil.rmtree(the_store(root) / "class_text" / "own")
    assert done(*words)["classes_added"] == 1


def test_what_does_not_continue_the_store(
    parts: tuple[Path, Path], inputs: tuple[Path, Path]
) -> None:
    root, folder = parts
    make_clip(folder / "train" / "a first class" / "a.mp4", 77)
    pack_again(root, folder)
    store = the_store(root)
    error = refused(2, "store", "add-tars", store, "--dataset", "clips", "--root", root)
    assert "extract the data set as a new store" in error
    dataset = load_dataset(root / "datasets" / "clips")
    replace(dataset, name="others", fingerprint="").write()
    error = refused(2, "store", "add-tars", store, "--dataset", "clips", "--root", root)
    assert "was made from data set 'clips', not 'others'" in error
    with StoreWriter.open(store).claim([0]):
        error = refused(1, "store", "add-texts", store, "--prompts", "video", "--root", root)
    assert "is writing partition 0" in error


def test_tars_of_other_videos_are_told_as_such(parts: tuple[Path, Path]) -> None:
    """And not by the videos that could not be packed, of which there are others, too."""
    root, folder = parts
    for path in (folder / "train").glob("*/*.mp4"):
        path.write_bytes(b"no video")
        break
    shutil.rmtree(root / "datasets" / "clips")
    pack(root, folder, "--max-failures", "1")
    error = refused(
        2, "store", "add-tars", the_store(root), "--dataset", root / "datasets" / "clips"
    )
    assert "was changed: a store grows only by new tars" in error


def test_a_store_that_is_exchanged_meanwhile(
    parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = parts
    store = the_store(root)

    def other_was_faster(*arguments: object) -> None:
        shutil.copytree(store, store.with_name("longer"))
        store.rename(store.with_name("gone"))
        store.with_name("longer").rename(store)
        raise UserError("class texts are of other classes")

    monkeypatch.setattr(grow, "add_class_text", other_was_faster)
    error = refused(1, "store", "add-texts", store, "--prompts", "video", "--root", root)
    assert f"another process changed {store} in the meantime" in error
    monkeypatch.undo()
    assert done("store", "add-texts", store, "--prompts", "video", "--root", root)["added"]


def test_what_a_new_store_is_good_for(own: World, tmp_path: Path) -> None:
    merging = ("store", "convert", own.store, "--codec", "lz4", "--out")
    place = own.root / "features" / "both" / "both.zarr"
    words = mote(*merging, place)
    assert "next      mote-cli train-head --dataset both --store both" in words.out
    done("eval", "--closeset", "both", "--head", "mean", "--root", own.root)
    assert "move it there" in mote(*merging, tmp_path / "far.zarr").out
    shutil.rmtree(place / "class_text" / "mote28")
    words = mote("store", "quantize", place, "--out", tmp_path / "half.zarr")
    assert "accuracy      not measured: no class texts" in words.out


def test_a_class_name_may_hold_a_comma() -> None:
    assert class_list('"cut, chop", run,,wave') == ("cut, chop", "run", "wave")
    assert class_list('a \n b,5" disk') == ("a b", '5" disk')
    for text, message in (("", "names no class"), (' , ""', "names no class"), ("a,a", "twice")):
        with pytest.raises(UserError, match=message):
            class_list(text)


def test_a_prompt_set_that_is_missing_is_added(own: World) -> None:
    more = ("--prompts", "video")
    extracting = ("extract", "--dataset", "clips", "--encoder", own.encoder, "--sampling")
    error = refused(2, *extracting, "uniform:4", "--precision", "fp32", *more, "--root", own.root)
    command = f"mote-cli store add-texts {own.store} --prompts video --root {own.root}"
    assert f"run `{command}`" in error
    words = command.split()[1:]
    assert done(*words)["added"]
    assert not done(*words)["added"]
    assert open_store(own.store).prompt_sets == ["mote28", "video"]
    summary = done(*extracting, "uniform:4", "--precision", "fp32", *more, "--root", own.root)
    assert summary["partitions_done"] == 0
    done("eval", "--closeset", "clips", "--head", "mean", *more, "--root", own.root)
    assert verify(own.store, deep=True).ok


def test_another_encoder_may_not_make_class_texts(own: World, tmp_path: Path) -> None:
    from tests.support.worlds.tiny_world import make_encoder

    other = make_encoder(tmp_path / "other", seed=1)
    words = ("store", "add-texts", own.store, "--prompts", "video", "--root", own.root)
    error = refused(2, *words, "--encoder", other)
    assert "is not the encoder of" in error
    assert "unknown prompt set 'rhymes'" in refused(2, *words[:4], "rhymes", *words[5:])


def test_heads_train_on_what_was_converted_or_quantised(own: World) -> None:
    """Every command that takes a store takes these, too."""
    store, folder = own.store, own.store.parent
    converted = done("store", "convert", store, "--codec", "zstd", "--out", folder / "z.zarr")
    assert converted["bytes_before"] > 0
    quantised = done("store", "quantize", store, "--out", folder / "q.zarr")
    assert quantised["agreement"][0]["prompt_set"] == "mote28"
    assert quantised["cosine_error_max"] < 1e-3
    for name in ("z", "q"):
        done(
            *("train-head", "--dataset", "clips", "--head", "mote", "--frames", "4", "--store"),
            *(name, "--name", f"on-{name}", *SHORT_TRAINING, "--precision", "fp32"),
            *("--root", own.root),
        )
        done(*("eval", "--closeset", "clips", "--head", f"on-{name}", "--store", name),
             *("--root", own.root))  # fmt: skip
        assert verify(folder / f"{name}.zarr", deep=True).ok
    assert done("inspect", folder / "q.zarr")["features"] == "int8 per dimension"
    text = mote("store", "quantize", store, "--out", folder / "again.zarr")
    assert "cosine error" in text.out
    assert "same answer %" in text.out


def test_merging_and_exporting(own: World, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(own.store, copy)
    node = json.loads((copy / "zarr.json").read_text())
    node["attributes"]["provenance"]["dataset"] = "more"
    node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    (copy / "zarr.json").write_text(json.dumps(node))
    both = tmp_path / "both.zarr"
    words = ("store", "merge", own.store, copy, "--out", both)
    assert "--prefix-keys" in refused(2, *words)
    merged = done(*words, "--prefix-keys")
    assert (merged["tars_linked"], merged["rows"]) == (merged["tars"], 2 * 18)
    assert verify(both, deep=True).ok
    for format in ("safetensors", "parquet", "npy"):
        exported = done(
            *("store", "export", both, "--to", format, "--out", tmp_path / format),
            *("--split", "val", "--classes", "run, wave"),
        )
        assert (exported["rows"], exported["failed_left_out"]) == (4, 0)
    text = mote("store", "export", both, "--to", "npy", "--out", tmp_path / "all")
    assert "36, 0 failed left out" in text.out


def test_a_store_is_found_by_name_or_path(own: World, tmp_path: Path) -> None:
    out = ("--to", "npy", "--out", tmp_path / "rows", "--root", own.root)
    error = refused(2, "store", "export", "nothing", *out)
    assert own.store.name in error
    done("store", "export", own.store.name, *out)
    shutil.copytree(own.store, own.root / "features" / "other" / own.store.name)
    error = refused(2, "store", "export", own.store.name, *out)
    assert f"fits 2 stores: name clips/{own.store.stem} or other/{own.store.stem}" in error
    for name in (f"other/{own.store.name}", f"clips/{own.store.stem}"):  # as `status` shows it
        done("store", "export", name, *out[:3], tmp_path / name.replace("/", "-"), *out[4:])
    assert "exists already" in refused(2, "store", "export", own.store, *out)


@pytest.mark.parametrize(
    "command", ["add-tars", "merge", "export", "convert", "quantize", "add-texts"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = mote("store", command, "--help")
    assert result.code == 0
    assert f"Example: mote-cli store {command}" in result.out
