"""compare, tradeoff, and prompt sets from files, through the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore import open_store
from featstore.checking.verify import verify
from featstore.format.class_texts import class_text_checksum
from featstore.format.metadata import read_metadata
from featstore.reading.repair import repair_command
from heads import load_head
from heads.evaluation.outcomes import write_outcomes
from pipeline.encoders.specs import local_architecture
from tests.support.processes.command_line import done, mote, refused
from tests.support.stores.result_files import write_result
from tests.support.worlds.tiny_world import SHORT_TRAINING, WORDS, World, make_encoder


def evaluated(own: World, kind: str, *options: str) -> Any:
    return done("eval", f"--{kind}", "clips", "--split", "val", "--root", own.root, *options)


def test_two_runs_are_compared(own: World) -> None:
    first = evaluated(own, "zeroshot", "--head", "clips-mote")
    second = evaluated(own, "zeroshot", "--head", "clips-transformer", "--no-modulate")
    found = done("compare", "clips-mote", "clips-transformer", "--root", own.root)
    assert (found["a"], found["b"]) == (first["file"], second["file"])
    assert found["incomparable"] == []
    told = {d["name"] for d in found["differences"] if not d["unknown"]}
    assert {"head", "kind", "modulate", "head_fingerprint"} <= told
    (top1,) = [n for n in found["numbers"] if n["measure"] == "top1"]
    assert top1["difference"] == pytest.approx(second["top1"] - first["top1"])
    (pair,) = found["paired"]  # eval keeps the outcome of every video
    assert pair["n"] == 6
    points = 100 * (pair["only_b"] - pair["only_a"]) / pair["n"]
    assert points == pytest.approx(top1["difference"])
    other = evaluated(own, "closeset", "--head", "clips-mote", "--fusion", "features")
    text = mote("compare", first["file"], other["file"], "--root", own.root).out
    differing, verdict = text.index("Different: what was tested"), text.index("not comparable:")
    assert differing < verdict < text.index("Accuracy in per cent")
    assert "fusion" in text[verdict : verdict + 200]
    # Of a run its newest, but on the data set of A where it has one.
    newest = done("compare", other["file"], "clips-mote", "--root", own.root)
    assert newest["b"] == other["file"]


def test_old_files_and_outcomes(tmp_path: Path) -> None:
    old = write_result(tmp_path / "old.json", old=True)
    new = write_result(tmp_path / "new.json", splits=(53.0,))
    text = mote("compare", old, new).out
    assert "unknown: A does not say protocol_name" in text
    assert "perhaps not comparable: " in text
    assert "+3.00" in text
    for file, place in ((old, 0), (new, 1)):
        write_outcomes(file, {"test1": {"x": place, "y": 0}})
    text = mote("compare", old, new).out
    assert "test1, 2 videos: 0 videos only B gets right, 1 only A: p = 1" in text


def test_the_draws_of_half_class_are_told_in_one_line(tmp_path: Path) -> None:
    files = [write_result(tmp_path / f"{n}.json", splits=(50.0,) * 10) for n in "ab"]
    for file, place in zip(files, (0, 1), strict=True):
        sets = {f"test{i}": {"x": place, "y": 0, "z": int(i == 3)} for i in range(1, 11)}
        write_outcomes(file, sets)
    text = mote("compare", *files).out
    line = (
        "10 test sets of 3 videos: 0 videos only B gets right, 1 only A: p = 1 (exact McNemar "
        "tests, one each; --json has them all)"
    )
    assert text.count("McNemar") == text.count(line) == 1
    assert len(done("compare", *files)["paired"]) == 10


def test_published_figures_stand_beside_a_result(tmp_path: Path) -> None:
    file = write_result(tmp_path / "r.json", splits=(50.0, 51.0, 52.0))
    found = done("compare", file, "--published", "--root", tmp_path)
    assert [f["value"] for f in found["published"]] == [55.8]
    assert found["nearest"] == []
    text = mote("compare", file, "--published", "--root", tmp_path).out
    assert "MoTE ViT-B/16" in text
    assert "1,530 listed, 1,528" in text
    other = write_result(tmp_path / "o.json", views="1x1", encoder="mine")
    text = mote("compare", other, "--published", "--root", tmp_path).out
    assert "no published figure has this protocol; the nearest ones differ in:" in text
    assert "views: published 3x1, ours 1x1" in text
    make_encoder(tmp_path / "encoders" / "mine")  # a tower that has no name
    assert local_architecture("mine", tmp_path / "encoders") is None
    named = done("compare", file, "--published", "--backbone", "ViT-L/14", "--root", tmp_path)
    assert [f["value"] for f in named["published"]] == [61.4]


def test_what_compare_refuses(tmp_path: Path, own: World) -> None:
    file = write_result(tmp_path / "r.json")
    assert "two results, or one with --published" in refused(2, "compare", file)
    error = refused(2, "compare", file, "nothing", "--root", own.root)
    assert "neither a result file nor a run with results (runs with results: none)" in error
    head = own.root / "heads/unseen"  # it has a head, and nothing was measured with it
    head.mkdir(parents=True)
    (head / "head.safetensors").write_bytes(b"weights")
    error = refused(2, "compare", file, "unseen", "--root", own.root)
    assert error.startswith("error: head unseen has no result yet: make one with `mote-cli ")
    assert "is not a result" in refused(2, "compare", file, own.store / "zarr.json")


def test_the_architecture_of_a_folder(tmp_path: Path) -> None:
    for name, layers, width, patch in (("b", 12, 768, 16), ("l", 24, 1024, 14), ("x", 3, 64, 8)):
        (tmp_path / name).mkdir()
        vision = {"layers": layers, "width": width, "patch_size": patch}
        config = {"model_cfg": {"vision_cfg": vision}}
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps(config))
    found = [local_architecture(name, tmp_path) for name in ("b", "l", "x", "none")]
    assert found == ["ViT-B/16", "ViT-L/14", None, None]


def test_the_tradeoff_of_heads(own: World, tmp_path: Path) -> None:
    close = evaluated(own, "closeset", "--head", "clips-mote")
    error = refused(2, "tradeoff", "--root", own.root)
    assert "nothing here has other classes than clips: name a data set" in error
    zero = evaluated(own, "zeroshot", "--head", "clips-mote")
    table = done("tradeoff", "--root", own.root, "--out", tmp_path / "t.svg")
    (row,) = table["rows"]
    assert (row["head"], row["closeset_top1"]) == ("clips-mote", close["top1"])
    expected = 2 * close["top1"] * zero["top1"] / ((close["top1"] + zero["top1"]) or 1)
    assert row["tradeoff"] == pytest.approx(expected)
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")
    evaluated(own, "closeset", "--head", "clips-transformer")
    result = mote("tradeoff", "--root", own.root)
    assert result.code == 0, result.err
    assert "clips-transformer has no zeroshot result on clips" in result.err
    assert (own.root / "tradeoff.png").is_file()
    error = refused(2, "tradeoff", "nobody", "--root", own.root)
    assert "run 'nobody' has no results" in error


def test_template_files_through_the_commands(own: World, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("a clip of {}\n{} seen twice\n")
    place = ("--root", own.root)
    added = done("store", "add-texts", own.store, "--prompts", file, *place)
    assert (added["added"], added["prompt_sets"]) == (True, {"mine": True})
    assert not done("store", "add-texts", own.store, "--prompts", file, *place)["added"]
    text = open_store(own.store).class_text("mine")
    assert text.templates == ("a clip of {}", "{} seen twice")
    assert text.encoder_fingerprint == open_store(own.store).provenance.encoder_fingerprint
    assert verify(own.store, deep=True).ok
    result = evaluated(own, "closeset", "--head", "mean", "--prompts", str(file))
    assert (result["prompt_set"], result["prompt_templates"]) == ("mine", list(text.templates))
    done(
        *("train-head", "--dataset", "clips", "--head", "mote", "--frames", "4", "--name", "own"),
        *(*SHORT_TRAINING, "--precision", "fp32", "--prompts", "mine", *place),
    )
    origin = load_head(own.root / "heads" / "own").origin
    assert origin is not None
    assert origin.prompt_templates == text.templates
    video = next((own.videos / "val").rglob("*.mp4"))
    said = ("--encoder", own.encoder, "--classes", "a, b, c, d, e", *place)
    assert done("predict", video, "--head", "own", *said)["videos"][0]["predictions"]
    # The same name with other sentences is neither extracted, added, nor tested.
    file.write_text("a film of {}\n")
    for words in (
        ("store", "add-texts", own.store, "--prompts", file),
        ("eval", "--closeset", "clips", "--head", "mean", "--prompts", file),
        ("extract", "--dataset", "clips", "--encoder", own.encoder, "--sampling", "uniform:4",
         "--precision", "fp32", "--prompts", file),
    ):  # fmt: skip
        error = refused(2, *words, *place)
        assert "made from other sentences" in error
        assert "--prompt-set-name" in error
    other = ("--prompts", file, "--prompt-set-name", "films")
    done("store", "add-texts", own.store, *other, *place)
    error = refused(2, "extract", "--dataset", "clips", "--encoder", own.encoder, "--sampling",
                    "uniform:4", "--precision", "fp32", "--prompts", file, "--prompt-set-name",
                    "more", *place)  # fmt: skip
    assert f"add-texts {own.store} --prompts {file} --prompt-set-name more" in error


def test_a_head_is_not_tested_on_a_set_of_the_same_name(own: World, tmp_path: Path) -> None:
    """Classes that the head does not know cannot show it: the templates do."""
    file = tmp_path / "mine.txt"
    place = ("--root", own.root)
    file.write_text("a clip of {}\n")
    done("store", "add-texts", own.store, "--prompts", file, *place)
    done(
        *("train-head", "--dataset", "clips", "--head", "mote", "--frames", "4", "--name", "own"),
        *(*SHORT_TRAINING, "--precision", "fp32", "--prompts", "mine", *place),
    )
    shutil.rmtree(own.store / "class_text" / "mine")
    file.write_text("a film of {}\n")
    done("store", "add-texts", own.store, "--prompts", file, *place)
    error = refused(2, "eval", "--zeroshot", "clips", "--split", "val", "--head", "own", *place)
    assert "has other sentences ('a film of {}', ...) than the prompt set of the same name" in error


def test_descriptions_through_the_commands(own: World, tmp_path: Path) -> None:
    file = tmp_path / "gpt.json"
    lines = {name: [f"Somebody is doing {name}.", f"Look, {name}!"] for name in WORDS}
    lines[WORDS[0]].append("Once more.")
    file.write_text(json.dumps(lines))
    place = ("--root", own.root)
    added = done("store", "add-texts", own.store, "--descriptions", file, *place)
    assert added["prompt_sets"] == {"gpt": True}
    store = open_store(own.store)
    text = store.class_text("gpt")
    assert text.templates == ()
    np.testing.assert_allclose(np.linalg.norm(text.embeddings, axis=1), 1, atol=1e-5)
    result = evaluated(own, "closeset", "--head", "mean", "--prompts", str(file))
    assert (result["prompt_set"], result["prompt_templates"]) == ("gpt", None)
    file.write_text(json.dumps({str(i): v for i, v in enumerate(lines.values())}))
    error = refused(2, "store", "add-texts", own.store, "--descriptions", file, *place)
    assert "its keys are numbers" in error
    del lines[WORDS[1]]
    file.write_text(json.dumps(lines))
    error = refused(2, "extract", "--dataset", "clips", "--encoder", own.encoder, "--sampling",
                    "uniform:4", "--descriptions", file, *place)  # fmt: skip
    assert f"it lacks {WORDS[1]!r}, 1 of 6 classes" in error
    assert "needs --prompts" in refused(2, "store", "add-texts", own.store, *place)


def test_extract_keeps_what_it_was_given(own: World, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("{}, again\n")
    lines = {name: [name] for name in WORDS}
    (tmp_path / "own.json").write_text(json.dumps(lines))
    words = ("extract", "--dataset", "clips", "--encoder", own.encoder, "--sampling", "uniform:2",
             "--precision", "fp32", "--prompts", "name", "--prompts", file, "--descriptions",
             tmp_path / "own.json", "--root", own.root)  # fmt: skip
    store = open_store(Path(done(*words)["store"]))
    assert store.prompt_sets == ["mine", "name", "own"]
    # One sentence, which is the name: the three ways to say it agree.
    np.testing.assert_array_equal(
        store.class_text("own").embeddings, store.class_text("name").embeddings
    )
    assert done(*words)["partitions_done"] == 0
    # The command that repairs a store names a set it has, whose file may be gone.
    command = repair_command(store.path, read_metadata(store.path))
    assert "--prompts mine" in command
    assert done(*command.split()[1:], "--precision", "fp32")["partitions_done"] == 0


def test_class_texts_of_another_encoder_are_refused(own: World) -> None:
    """A folder copied from another store looks right and is of another text tower."""
    node = own.store / "class_text" / "mote28" / "zarr.json"
    value = json.loads(node.read_text())
    value["attributes"]["encoder_fingerprint"] = "f" * 64
    value["attributes"]["checksum"] = class_text_checksum(value["attributes"])
    node.write_text(json.dumps(value))
    error = refused(2, "eval", "--closeset", "clips", "--head", "mean", "--root", own.root)
    assert "text tower of another encoder (weights ffffffffffffffff)" in error
    assert "mote-cli store add-texts" in error
    assert not verify(own.store).ok
    for name in ("encoder_fingerprint", "templates", "embeddings_checksum", "checksum"):
        del value["attributes"][name]
    node.write_text(json.dumps(value))  # as earlier stores are
    assert evaluated(own, "closeset", "--head", "mean")["prompt_templates"] is None
