"""The linear probe and the nearest neighbours through every command, and beside other heads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import WORDS, World, make_clips

KINDS = ("linear", "knn")


@pytest.fixture
def fitted(own: World) -> World:
    """The workspace with both heads, and a second data set whose classes they do not know."""
    place = ("--root", own.root)
    for kind in KINDS:
        trained = done("train-head", "--dataset", "clips", "--head", kind, "--frames", "4", *place)
        assert (trained["run"], trained["epochs"]) == (f"clips-{kind}", 1)
    videos = make_clips(own.root.parent / "others", ("dance", "swim"))
    done("pack", "--dataset", "others", "--videos", videos, *place)
    done(
        *("extract", "--dataset", "others", "--encoder", own.encoder, "--sampling", "uniform:4"),
        *("--precision", "fp32", *place),
    )
    return own


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_head_goes_through_the_commands(fitted: World, kind: str, tmp_path: Path) -> None:
    place = ("--root", fitted.root)
    head = ("--head", f"clips-{kind}", *place)
    result = done("eval", "--closeset", "clips", *head)
    assert (result["kind"], result["modulate"]) == (kind, False)
    assert (result["epoch"], result["epoch_choice"]) == (1, "last")
    video = next((fitted.videos / "train").rglob("*.mp4"))
    (answer,) = done("predict", video, "--top", "6", *head)["videos"]
    assert {p["class_name"] for p in answer["predictions"]} == set(WORDS)
    assert sum(p["score"] for p in answer["predictions"]) == pytest.approx(1)
    (two,) = done("predict", video, "--classes", "wave, run", *head)["videos"]
    assert {p["class_name"] for p in two["predictions"]} == {"wave", "run"}
    for words in (
        ("predict", video, "--classes", "wave, swim", *head),
        ("eval", "--zeroshot", "others", *head),
        ("eval", "--closeset", "others", *head),
    ):
        error = refused(2, *words)
        assert f"a head of kind {kind} knows only the 6 classes it was trained on" in error
        assert error.endswith("such as --head mean")
    error = refused(
        *(2, "export", f"clips-{kind}", "--format", "safetensors", "--out", tmp_path / "x", *place)
    )
    assert error.endswith("cannot be used by other programs: export a run of another method")
    error = refused(
        *(2, "train-head", "--dataset", "clips", "--from-head", f"clips-{kind}"),
        *("--name", "more", *place),
    )
    assert "cannot be trained from another head's weights" in error


def test_all_heads_are_compared_in_one_table(fitted: World) -> None:
    place = ("--root", fitted.root)
    heads = ("clips-mote", "clips-linear", "clips-knn", "mean")
    made = [done("eval", "--closeset", "clips", "--head", head, *place) for head in heads]
    found = done("compare", *heads, *place)
    assert found["results"] == [result["file"] for result in made]
    assert found["comparable"] is None  # of a mean of frames no training data are known
    told = {entry["name"]: entry["values"] for entry in found["training"]}
    assert told["training"] == ["trained", "trained", "trained", "none: CLIP alone"]
    assert told["training.epochs"] == [2, 1, 1, None]
    assert told["head.kind"] == ["mote", "linear", "knn", None]
    assert "classes" not in told  # the three were trained on the same ones
    for pair, result in zip(found["comparisons"], made[1:], strict=True):
        (top1,) = [n for n in pair["numbers"] if n["measure"] == "top1"]
        assert top1["difference"] == pytest.approx(result["top1"] - made[0]["top1"])
        assert pair["paired"][0]["n"] == 6
    text = mote("compare", *heads, *place).out
    training, verdict = text.index("Different: training"), text.index("A and B: comparable")
    numbers = text.index("Accuracy in per cent (difference to A in points)")
    assert training < verdict < text.index("A and D: perhaps not") < numbers
    assert f"{made[3]['top1']:.2f} ({made[3]['top1'] - made[0]['top1']:+.2f})" in text
    assert "videos only D gets right" in text


def test_the_tradeoff_has_the_same_frames_without_a_head(fitted: World) -> None:
    place = ("--root", fitted.root)
    done("train-head", "--dataset", "clips", "--name", "two", "--frames", "2", "--epochs", "1",
         *place)  # fmt: skip
    for head in ("two", "clips-knn"):
        done("eval", "--closeset", "clips", "--head", head, *place)
    done("eval", "--zeroshot", "others", "--head", "two", "--no-modulate", *place)
    done("eval", "--closeset", "clips", "--head", "two", "--no-modulate", *place)
    result = mote("tradeoff", "two", *place)
    assert result.code == 0, result.err
    assert "no head, same frames" in result.out
    lines = [line for line in result.err.splitlines() if "CLIP's mean of the same" in line]
    commands = [line.split("`")[1].split() for line in lines]
    sets = [("--closeset", "clips"), ("--zeroshot", "others")]
    assert [tuple(command[2:4]) for command in commands] == sets
    table = done("tradeoff", "two", *place)
    (row,) = table["baselines"]
    assert (row["closeset_top1"], row["zeroshot"]) == (None, {})
    # The mean of all four frames is not that of the two; the commands make the right one.
    done("eval", "--closeset", "clips", "--head", "mean", *place)
    assert done("tradeoff", "two", *place)["baselines"] == [row]
    made = [done(*command[1:]) for command in commands]
    assert [result["frames"] for result in made] == [2, 2]
    table = done("tradeoff", "two", *place)
    (row,) = table["baselines"]
    assert row["closeset_top1"] == made[0]["top1"]
    assert row["zeroshot"]["others"]["top1"] == made[1]["top1"]
    assert not any("mean of the same" in line for line in table["missing"])
    # A head that knows no other classes has its row, and nobody is sent to measure them.
    table = done("tradeoff", "two", "clips-knn", "--allow-mixed", *place)
    assert [row["head"] for row in table["rows"]][-1] == "clips-knn"
    assert "clips-knn knows only its own classes: it has no zero-shot result" in table["missing"]
    assert [row["head"] for row in table["baselines"]] == ["mean", "mean"]
    error = refused(2, "tradeoff", "two", "clips-knn", *place)
    assert "frames is 2 for two and 4 for clips-knn" in error


def test_a_newcomer_sees_the_table_at_80_columns(fitted: World) -> None:
    heads = ("clips-mote", "clips-linear", "clips-knn", "clips-transformer")
    place = ("--root", fitted.root)
    for head in heads:
        done("eval", "--closeset", "clips", "--head", head, *place)
    command = [sys.executable, "-m", "cli.main", "compare", *heads, *map(str, place)]
    shown = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"COLUMNS": "80"}, timeout=120
    )
    tables = [line for line in shown.stdout.splitlines() if line[:1] in "┃│┏┡└"]
    assert len(tables) > 10
    assert max(map(len, tables)) <= 80
