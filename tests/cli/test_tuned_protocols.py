"""Few-shot and base to novel with towers that `finetune` trains on the chosen videos."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest

from heads import load_head
from heads.evaluation.next_steps import after_finetuning
from tests.support.processes.command_line import done, refused
from tests.support.worlds.tiny_world import WORDS
from tests.support.worlds.tuning import finetune, tuning_workspace


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with runs: few (1 shot), base-1 and base-2, full, and best, with their stores."""
    folder = tuning_workspace(tmp_path_factory.mktemp("tuned"))
    plain = ("--epochs", "2")
    lists = folder / "lists"
    lists.mkdir()
    listed = [f"train1 {name}.mp4 {label}\n" for label, name in enumerate(WORDS)]
    (lists / "train_few_shot_1.txt").write_text("".join(listed))
    for name, more in {
        "few": ("--shots", "1"),
        "base-1": ("--shots", "1", "--classes", "base"),
        "base-2": ("--shots", "1", "--classes", "base", "--draw-seed", "2"),
        "full": (),
        "best": ("--shots", "1", "--save", "best"),
        "listed": ("--shots", "1", "--lists-from", str(lists)),
    }.items():
        done(*finetune(folder, name, *plain, *more))
        done(
            *("extract", "--dataset", "clips", "--encoder", name, "--sampling", "uniform:2"),
            *("--prompts", "name", "--precision", "fp32", "--workers", "1", "--root", folder),
        )
    return folder


def settings(root: Path, run: str) -> Any:
    return json.loads((root / "heads" / run / "config.json").read_text())


def test_runs_learn_from_the_chosen_videos_and_classes_only(root: Path) -> None:
    keys = {
        run: json.loads((root / "heads" / run / "training-keys.json").read_text())["clips"]
        for run in ("few", "base-1", "base-2", "full")
    }
    assert {run: len(found) for run, found in keys.items()} == {
        "few": 6,
        "base-1": 3,
        "base-2": 3,
        "full": 12,
    }
    assert set(keys["base-1"]) < set(keys["few"]) < set(keys["full"])
    origin = load_head(root / "heads/base-1").origin
    assert origin is not None
    assert len(origin.class_names or ()) == 3
    assert origin.trained_on == "train, 1 video per class (draw 1), the 3 base classes"
    data = settings(root, "base-2")["data"]
    assert (data["shots"], data["draw_seed"], data["half"]) == (1, 2, "base")
    assert "half" not in settings(root, "full")["data"]


def test_few_shot_reports_the_last_epoch_and_names_the_best_in_training(root: Path) -> None:
    value = done("eval", "--fewshot", "clips", "--head", "few", "--no-modulate", "--root", root)
    (run,) = value["runs"]
    assert (run["run"], run["shots"], run["n_trained"], run["best"]) == ("few", 1, 6, None)
    assert (run["last"]["epoch"], run["last"]["epoch_choice"]) == (2, "last")
    assert run["last"]["shots"] == 1
    assert run["last"]["n_trained_on"] == 0
    assert run["last"]["n_evaluated"] == 6
    metrics = [
        json.loads(line)["evaluation"]["top1"]
        for line in (root / "heads/few/metrics.jsonl").read_text().splitlines()
    ]
    assert run["best_in_training"]["top1"] == max(metrics)
    assert run["best_in_training"]["epoch"] == 1 + metrics.index(max(metrics))
    assert run["best_in_training"]["epoch_choice"] == "best on val"
    assert Path(value["files"][0]).is_file()


def test_a_run_on_a_published_list_is_tested(root: Path) -> None:
    trained = json.loads((root / "heads/listed/training-keys.json").read_text())["clips"]
    assert len(trained) == 6
    assert all("train1" in key for key in trained)
    value = done("eval", "--fewshot", "clips", "--head", "listed", "--no-modulate", "--root", root)
    (run,) = value["runs"]
    assert (run["run"], run["shots"], run["n_trained"]) == ("listed", 1, 6)
    assert "list train_few_shot_1.txt" in run["trained_on"]


def test_base_to_novel_is_the_mean_of_the_runs(root: Path) -> None:
    names = ["base-1", "base-2"]
    value = done(
        *("eval", "--base-to-novel", "clips", "--head", ",".join(names)),
        *("--no-modulate", "--root", root),
    )
    assert [run["run"] for run in value["runs"]] == names
    assert [run["draw"] for run in value["runs"]] == [1, 2]
    for run in value["runs"]:
        base, novel = run["last"]["per_split"]
        assert (base["split"], base["n_classes"], base["n_listed"]) == ("base", 3, 3)
        assert (novel["split"], novel["n_classes"], novel["n_listed"]) == ("novel", 3, 3)
    bases = [run["last"]["per_split"][0]["top1"] for run in value["runs"]]
    assert value["base"] == statistics.fmean(bases)
    assert value["best"] is None


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("few", "--fewshot clips --head few"),
        ("base-1", "--base-to-novel clips --head base-1"),
        ("full", "--closeset clips --head full"),
        ("best", "--closeset clips --head best"),  # few-shot reports the last epoch
    ],
)
def test_the_printed_command_names_the_protocol(root: Path, run: str, words: str) -> None:
    printed = after_finetuning(root / "heads" / run, "clips", "val", "name")["then"]
    assert words in printed
    value = done(*shlex.split(printed)[1:])
    assert "runs" in value if run in ("few", "base-1") else value["n_evaluated"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fewshot", "clips", "--head", "base-1"), "trained on base classes"),
        (("--base-to-novel", "clips", "--head", "few"), "trained on all classes"),
        (("--fewshot", "clips", "--head", "best"), "--save last"),
        (("--fewshot", "clips", "--head", "few,full"), "full is not"),
        (("--fewshot", "clips", "--head", "few", "--shots", "2"), "--shots can be used only"),
        (("--fewshot", "clips", "--head", "few,nothere"), "nothere"),
    ],
)
def test_runs_that_do_not_fit_the_protocol(
    root: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in refused(2, "eval", *words, "--root", root)
