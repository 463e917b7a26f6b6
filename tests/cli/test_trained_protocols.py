"""Few-shot, base-to-novel and Kinetics-600 through the command line, with answers known by hand.

Features point at the class a video is to be taken for, so CLIP's mean of frames scores what the
test says; a trained head of a small learning rate agrees with it.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest

from featstore import open_store
from heads import load_head
from pipeline.annotations.listing import name_from_key
from pipeline.annotations.unseen_classes import unseen_classes
from tests.support.processes.command_line import done, mote, refused
from tests.support.stores.one_hot_stores import one_hot_store
from tests.support.worlds.official_trees import (
    HMDB51,
    K600,
    K600_UNSEEN,
    TREES,
    UCF101,
    Tree,
    hmdb51_lists,
)

RECIPE = """
[head]
kind = "transformer"
layers = 1
[training]
warmup_epochs = 0
lr = 1e-4
batch_size = 8
frames = 4
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tree, Path]]:
    """Every tree with the workspace it is packed in, without stores; never changed."""
    return {
        name: _packed(name, tmp_path_factory.mktemp(name))
        for name in ("hmdb51", "ucf101", "k400", "k600", "ssv2")
    }


def _packed(name: str, folder: Path) -> tuple[Tree, Path]:
    tree = TREES[name](folder / "source")
    done(*tree.pack, "--root", folder / "root")
    return tree, folder / "root"


def workspace(
    packed: Mapping[str, tuple[Tree, Path]],
    name: str,
    folder: Path,
    taken_for: Mapping[str, str] | None = None,
) -> tuple[Tree, Path]:
    """A workspace of one's own with a one-hot store of the data set."""
    tree, root = packed[name]
    shutil.copytree(root, folder / "root", dirs_exist_ok=True)
    one_hot_store(folder / "root", tree, taken_for)
    (folder / "recipe.toml").write_text(RECIPE)
    return tree, folder / "root"


def videos_of(tree: Tree, split: str, class_name: str) -> list[str]:
    return sorted(stem for stem in tree.splits[split] if tree.truth[stem] == class_name)


def wrong_videos(tree: Tree, split: str, pairs: Mapping[str, str]) -> dict[str, str]:
    """The first test video of each class is taken for another class."""
    return {videos_of(tree, split, name)[0]: other for name, other in pairs.items()}


def test_few_shot_counts_and_accuracy(packed: dict[str, tuple[Tree, Path]], tmp_path: Path) -> None:
    tree, _ = packed["hmdb51"]
    wrong = wrong_videos(tree, "test1", {"kick": "sword", "sword": "kick", "brush hair": "kick"})
    tree, root = workspace(packed, "hmdb51", tmp_path, wrong)
    listed = len(tree.splits["test1"])
    per_class = {c: sum(tree.truth[s] == c for s in tree.splits["train1"]) for c in HMDB51}
    arguments = ("eval", "--fewshot", "hmdb51", "--shots", "2,4", "--root", root)
    training = ("--recipe", tmp_path / "recipe.toml", "--epochs", "2", "--repeat", "3")
    learned = done(*arguments, *training)
    mean = done(*arguments, "--head", "mean")
    for value in (learned, mean):
        assert (value["protocol"], value["protocol_name"]) == ("fewshot", "hmdb51-fewshot")
        assert [run["shots"] for run in value["runs"]] == [2, 4]
        assert [run["n_trained"] for run in value["runs"]] == [
            sum(min(count, shots) for count in per_class.values()) for shots in (2, 4)
        ]
        for run in value["runs"]:
            last = run["last"]
            assert (last["n_listed"], last["n_evaluated"], last["n_failed"]) == (listed, listed, 0)
            assert last["top1"] == pytest.approx(100 * (listed - 3) / listed)
            assert last["per_split"][0]["split"] == "test1"
            assert last["training_videos"] == run["trained_on"]
    words = [run["trained_on"] for run in learned["runs"]]
    assert words == [
        "train1, 2 videos per class (draw 1), repeated 3 times",
        "train1, 4 videos per class (draw 1; 6 classes have fewer), repeated 3 times",
    ]
    run = learned["runs"][0]
    assert (run["last"]["epoch"], run["last"]["epoch_choice"]) == (2, "last")
    assert run["best"]["epoch_choice"] == "best on the test set"
    assert mean["runs"][0]["best"] is None
    folder = root / "heads" / run["run"]
    assert sorted(p.stat().st_size > 0 for p in (folder / "eval").glob("*.json")) == [True, True]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["test_top1"] for line in lines] == [pytest.approx(run["last"]["top1"])] * 2
    assert (run["last"]["shots"], learned["runs"][1]["last"]["shots"]) == (2, 4)
    assert {near["shots"] for near in run["nearest"]} == {2}  # figures on the data set
    assert all(near["differs"] for near in run["nearest"])
    again = mote(*arguments, *training, "--json")
    assert again.json == learned  # nothing is trained a second time
    assert again.err.count("published lists have 1,530") == 2  # once for each run


def test_heads_of_an_evaluation_are_nobodys_newest(
    packed: dict[str, tuple[Tree, Path]], tmp_path: Path
) -> None:
    _, root = workspace(packed, "ssv2", tmp_path)
    recipe = ("--recipe", tmp_path / "recipe.toml", "--epochs", "1", "--root", root)
    few = ("eval", "--fewshot", "ssv2", "--shots", "2", *recipe)
    (run,) = done(*few)["runs"]
    tested = ("eval", "--closeset", "ssv2", "--no-modulate", "--root", root)
    error = refused(2, *tested)
    assert f"was trained by an evaluation: name one with --head ({run['run']})" in error
    assert done(*tested, "--head", run["run"])["head"] == run["run"]
    done("train-head", "--dataset", "ssv2", "--name", "mine", *recipe)
    done(*few, "--draw-seeds", "2")
    assert done(*tested)["head"] == "mine"


def test_novel_classes_that_the_first_head_knows(
    packed: dict[str, tuple[Tree, Path]], tmp_path: Path
) -> None:
    _, root = workspace(packed, "ucf101", tmp_path)
    place = ("--recipe", tmp_path / "recipe.toml", "--epochs", "1", "--root", root)
    done("train-head", "--dataset", "ucf101", "--split", "train1", "--name", "all", *place)
    seen = mote(
        *("eval", "--base-to-novel", "ucf101", "--head", "all", "--shots", "1", "--no-modulate"),
        *("--draw-seeds", "1", *place),
    )
    assert seen.code == 0, seen.err
    assert "was trained on 3 of the 3 novel classes ('tai chi', 'wall pushups', 'yo" in seen.err


def test_a_training_goes_on_with_the_sentences_of_its_head(
    packed: dict[str, tuple[Tree, Path]], tmp_path: Path
) -> None:
    _, root = workspace(packed, "ssv2", tmp_path)
    (store,) = (root / "features/ssv2").glob("*.zarr")
    for name in ("aaa", "zzz"):
        shutil.copytree(store / "class_text/mote28", store / "class_text" / name)
    recipe = ("--recipe", tmp_path / "recipe.toml", "--epochs", "1", "--root", root)
    train = ("train-head", "--dataset", "ssv2", *recipe)
    done(*train, "--name", "usual")
    done(*train, "--name", "own", "--prompts", "zzz")
    done(*train, "--name", "next", "--from-head", "own")
    few = ("eval", "--fewshot", "ssv2", "--shots", "2", "--head", "own", "--no-modulate", *recipe)
    assert done(*few)["runs"][0]["last"]["prompt_set"] == "zzz"
    found = []
    for name in ("usual", "own", "next"):
        origin = load_head(root / "heads" / name).origin
        assert origin is not None
        found.append(origin.prompt_set)
    assert found == ["mote28", "zzz", "zzz"]
    shutil.rmtree(store / "class_text/mote28")
    error = refused(2, *train, "--name", "other")
    assert "has class texts for aaa, zzz: name one with --prompts" in error


def test_few_shot_from_a_head(packed: dict[str, tuple[Tree, Path]], tmp_path: Path) -> None:
    tree, root = workspace(packed, "ssv2", tmp_path)
    recipe = ("--recipe", tmp_path / "recipe.toml", "--epochs", "1")
    done("train-head", "--dataset", "ssv2", "--name", "all", *recipe, "--root", root)
    arguments = ("eval", "--fewshot", "ssv2", "--shots", "2", "--head", "all", *recipe)
    value = done(*arguments, "--no-modulate", "--root", root)
    (run,) = value["runs"]
    assert (run["run"], run["n_trained"]) == ("all-ssv2-k2-s1", 12)
    assert run["last"]["per_split"][0]["split"] == "val"
    assert run["last"]["top1"] == 100
    head = load_head(root / "heads" / run["run"])
    assert head.origin is not None
    assert head.origin.initial_head
    assert head.origin.trained_on == run["trained_on"]
    config = json.loads((root / "heads" / run["run"] / "config.json").read_text())
    assert config["data"]["initial_head"] == head.origin.initial_head
    assert config["data"]["repeats"] == len(tree.splits["train"]) // 12


def test_shots_of_train_head(packed: dict[str, tuple[Tree, Path]], tmp_path: Path) -> None:
    _, root = workspace(packed, "ucf101", tmp_path)
    place = ("--recipe", tmp_path / "recipe.toml", "--epochs", "1", "--root", root)
    arguments = ("train-head", "--dataset", "ucf101", "--split", "train1", *place)
    summary = done(*arguments, "--shots", "3", "--classes", "novel")
    assert summary["run"] == "ucf101-novel-k3-s1-transformer"
    assert summary["n_trained"] == 9
    head = load_head(root / "heads" / summary["run"])
    assert head.origin is not None
    assert head.origin.class_names == ("tai chi", "wall pushups", "yo yo")
    assert head.training_class_embeddings.shape[0] == 3
    other = done(*arguments, "--from-head", summary["run"], "--name", "next", "--shots", "1")
    assert other["n_trained"] == len(UCF101)
    error = refused(2, *arguments, "--from-head", "next", "--layers", "2", "--name", "x")
    assert "--from-head sets the shape of the head" in error


def test_base_to_novel_by_hand(packed: dict[str, tuple[Tree, Path]], tmp_path: Path) -> None:
    tree, _ = packed["ucf101"]
    wrong = wrong_videos(
        tree,
        "test1",
        {
            # A tie among base names, for no base class is in the picture: the first one wins.
            "jumping jack": "tai chi",
            "apply eye makeup": "yo yo",  # the first one is right here
            "tai chi": "yo yo",
            "yo yo": "jumping jack",
        },
    )
    tree, root = workspace(packed, "ucf101", tmp_path, wrong)
    arguments = ("eval", "--base-to-novel", "ucf101", "--head", "mean", "--root", root)
    value = done(*arguments, "--shots", "2")
    assert [run["draw"] for run in value["runs"]] == [1, 2, 3]
    for run in value["runs"]:
        base, novel = run["last"]["per_split"]
        assert (base["split"], novel["split"]) == ("base", "novel")
        assert (base["n_listed"], novel["n_listed"]) == (6, 6)
        assert (base["n_classes"], novel["n_classes"]) == (3, 3)
        assert run["n_trained"] == 6
    assert value["base"] == pytest.approx(100 * 5 / 6)
    assert value["novel"] == pytest.approx(100 * 4 / 6)
    assert value["harmonic_mean"] == pytest.approx(200 / (6 / 5 + 6 / 4))
    assert value["mean_of_harmonic_means"] == pytest.approx(value["harmonic_mean"])
    assert (value["base_std"], value["novel_std"]) == (0, 0)
    assert json.loads(Path(value["file"]).read_text())["base"] == value["base"]
    seen = mote(*arguments, "--shots", "2")
    assert "74.07" in seen.out
    assert "mean of the draws' HMs" in seen.out


def test_base_to_novel_trains_on_base_only(
    packed: dict[str, tuple[Tree, Path]], tmp_path: Path
) -> None:
    tree, root = workspace(packed, "k400", tmp_path)
    value = done(
        *("eval", "--base-to-novel", "k400", "--shots", "2", "--draw-seeds", "5,6", "--root", root),
        *("--recipe", tmp_path / "recipe.toml", "--epochs", "1", "--no-modulate"),
    )
    assert (value["base"], value["novel"], value["harmonic_mean"]) == (100, 100, 100)
    # tasting food has most training videos; the others tie and go by name
    for run in value["runs"]:
        head = load_head(root / "heads" / run["run"])
        assert head.origin is not None
        assert head.origin.class_names == ("abseiling", "air drumming", "tasting food")
        assert run["last"]["n_failed"] == len(tree.missing)
    first, second = (run["trained_on"] for run in value["runs"])
    assert "draw 5" in first
    assert "draw 6" in second


def test_published_lists_and_their_exchanged_names(
    packed: dict[str, tuple[Tree, Path]], tmp_path: Path
) -> None:
    tree, root = workspace(packed, "hmdb51", tmp_path)
    clone = hmdb51_lists(tree, tmp_path / "clone")
    arguments = ("eval", "--fewshot", "hmdb51", "--shots", "2", "--lists-from", clone)
    place = ("--head", "mean", "--root", root)
    seen = mote(*arguments, *place, "--json")
    assert "exchanges 'kick', 'kick ball', 'sword', 'sword exercise'" in seen.err
    assert "concerns 8 of their 12 videos" in seen.err
    (run,) = seen.json["runs"]
    assert run["n_trained"] == 12
    assert "list datasets_splits/hmdb_splits/train1_few_shot_2.txt" in run["trained_on"]
    assert (run["last"]["top1"], run["last"]["label_map"]) == (100, "corrected")
    kept = done(*arguments, *place, "--label-map", "as-published")["runs"][0]
    test = tree.splits["test1"]
    right = sum(tree.truth[stem] in HMDB51[:2] for stem in test)
    assert kept["last"]["top1"] == pytest.approx(100 * right / len(test))
    assert kept["last"]["label_map"] == "as-published"
    halves = done(
        *("eval", "--base-to-novel", "hmdb51", "--lists-from", clone, *place),
    )
    assert halves["runs"][0]["last"]["per_split"][0]["n_classes"] == 3
    assert "list datasets_splits/base2novel_splits" in halves["runs"][2]["trained_on"]


def test_exchanged_names_of_the_official_set(
    packed: dict[str, tuple[Tree, Path]], tmp_path: Path
) -> None:
    tree, root = workspace(packed, "hmdb51", tmp_path)
    arguments = ("eval", "--zeroshot", "hmdb51", "--head", "mean", "--root", root)
    right = done(*arguments)
    assert (right["mean"], right["label_map"]) == (100, None)
    kept = done(*arguments, "--label-map", "as-published")
    expected = [
        100 * statistics.fmean(tree.truth[stem] in HMDB51[:2] for stem in tree.splits[split])
        for split in ("test1", "test2", "test3")
    ]
    assert [part["top1"] for part in kept["per_split"]] == pytest.approx(expected)
    assert kept["label_map"] == "as-published"
    assert kept["file"] != right["file"]


def test_exchanged_names_when_packing(packed: dict[str, tuple[Tree, Path]], tmp_path: Path) -> None:
    tree, _ = packed["hmdb51"]
    clone = hmdb51_lists(tree, tmp_path / "clone")
    lists = tmp_path / "lists"
    lists.mkdir()
    shutil.copy(clone / "datasets_splits/hmdb_splits/val1.txt", lists / "val.txt")
    names = clone / "labels/hmdb_51_labels.csv"
    pack = ("pack", "--videos", tree.videos, "--annotations", lists, "--class-names", names)
    for dataset, label_map in (("right", "corrected"), ("wrong", "as-published")):
        summary = done(
            *(*pack, "--dataset", dataset, "--label-map", label_map, "--root", tmp_path / "root")
        )
        assert "which concerns 8 of 12 videos" in " ".join(summary["notes"])
        packed_set = json.loads((Path(summary["folder"]) / "dataset.json").read_text())
        assert packed_set["label_map"] == label_map
        store = one_hot_store(tmp_path / "root", Tree(dataset, tree.videos, None, HMDB51))
        assert open_store(store.path).provenance.label_map == label_map
        by_stem = {
            name_from_key(key): store.class_names[label]
            for key, label in zip(store.keys, store.labels, strict=True)
        }
        agree = sum(tree.truth[stem] == name for stem, name in by_stem.items())
        assert agree == (12 if label_map == "corrected" else 4)
        result = done("eval", "--closeset", dataset, "--head", "mean", "--root", tmp_path / "root")
        assert result["label_map"] == label_map
    error = refused(2, *pack, "--dataset", "right", "--label-map", "as-published", "--root",
                    tmp_path / "root")  # fmt: skip
    assert "label_map was corrected, is as-published" in error


def test_kinetics_600(packed: dict[str, tuple[Tree, Path]], tmp_path: Path) -> None:
    k400, root400 = packed["k400"]
    wrong = {
        stem: "abseiling" for stem, name in packed["k600"][0].truth.items() if name == "packing"
    }
    tree, root = workspace(packed, "k600", tmp_path, wrong)
    arguments = ("eval", "--zeroshot", "k600", "--head", "mean", "--root", root)
    assert "--k400-names" in refused(2, *arguments)
    shutil.copytree(root400 / "datasets/k400", root / "datasets/k400")
    seen = mote(*arguments, "--json")
    assert seen.code == 0, seen.err
    assert "8 classes of Kinetics-600 are unseen here" in seen.err
    result = seen.json
    assert result["protocol_name"] == "k600-zeroshot-220"
    assert "own draw (not comparable" in result["class_names_source"]
    chosen = unseen_classes(K600, k400.classes)
    assert [K600[label] for label in chosen.unseen] == sorted(K600_UNSEEN)
    for part, labels in zip(result["per_split"], chosen.splits.values(), strict=True):
        names = [K600[label] for label in labels]
        assert (part["n_classes"], part["n_listed"]) == (6, 12)
        # abseiling is no candidate: a tie, which the first class of the split wins
        right = 12 - 2 * ("packing" in names and names[0] != "packing")
        assert part["top1"] == pytest.approx(100 * right / 12)

    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "a.txt").write_text("".join(f"{name}\n" for name in sorted(K600_UNSEEN)[:5]))
    numbers = [K600.index(name) for name in sorted(K600_UNSEEN)[3:]]
    (lists / "b.csv").write_text("id,name\n" + "".join(f"{i},{n}\n" for i, n in enumerate(numbers)))
    given = done(*arguments, "--class-lists", lists, "--k600-source", "val")
    assert [part["n_listed"] for part in given["per_split"]] == [5, 5]
    assert [part["top1"] for part in given["per_split"]] == [100, 80]
    assert "lists a.txt, b.csv; videos: split val" in given["class_names_source"]
    ids = [stem[:11] for stem in sorted(tree.splits["test"])]
    (tmp_path / "ids.txt").write_text("\n".join([*ids, "zzzzzzzzzzz"]) + "\n")
    listed = mote(*arguments, "--k600-source", tmp_path / "ids.txt", "--json")
    assert "1 of 33 videos of ids.txt are not in the data set" in listed.err
    assert listed.json["per_split"][0]["n_listed"] == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abseiling\n", "lists 1 class that Kinetics-400 has"),
        ("dancing on ice\n", "none of the 16 classes"),
        ("99\n", "none of the 16 classes"),
    ],
)
def test_wrong_class_lists(
    packed: dict[str, tuple[Tree, Path]], tmp_path: Path, text: str, message: str
) -> None:
    _, root = workspace(packed, "k600", tmp_path)
    (tmp_path / "k400.txt").write_text("\n".join(packed["k400"][0].classes))
    (tmp_path / "list.txt").write_text(text)
    names = ("--k400-names", tmp_path / "k400.txt", "--class-lists", tmp_path / "list.txt")
    assert message in refused(
        2, "eval", "--zeroshot", "k600", "--head", "mean", *names, "--root", root
    )


def test_wrong_input_of_few_shot(packed: dict[str, tuple[Tree, Path]], tmp_path: Path) -> None:
    tree, root = workspace(packed, "hmdb51", tmp_path)
    few = ("eval", "--fewshot", "hmdb51", "--head", "mean", "--root", root)
    clone = tmp_path / "clone"
    path = clone / "train_few_shot_2.txt"
    path.parent.mkdir()
    given = (*few, "--shots", "2", "--lists-from", clone)

    def listed(stems: list[str]) -> None:
        path.write_text("".join(f"{stem}.avi {HMDB51.index(tree.truth[stem])}\n" for stem in stems))

    train, test = sorted(tree.splits["train1"]), sorted(tree.splits["test1"])
    listed([*train[:4], test[0]])
    assert "1 video is trained on and tested" in refused(2, *given)
    leaky = mote(*given, "--allow-overlap", "--json")
    assert leaky.json["runs"][0]["n_trained"] == 5
    last = leaky.json["runs"][0]["last"]
    assert last["n_trained_on"] - last["n_copied"] == 1  # the clips of a tree repeat
    assert "does not show how the head does on new videos" in leaky.err
    nowhere = next(
        stem for stem in tree.truth if not any(stem in names for names in tree.splits.values())
    )
    listed([*train[4:8], nowhere])
    path.write_text(path.read_text() + "gone.avi 0\n")
    seen = mote(*given, "--name", "other", "--json")
    assert "1 of 6 videos of train_few_shot_2.txt are not in the data set" in seen.err
    assert "not in split train1: 1 of the 5 videos of train_few_shot_2.txt" in seen.err
    assert seen.json["runs"][0]["n_trained"] == 5
    path.write_text("gone.avi 0\n")
    assert "none of the 1 videos" in refused(2, *given)
    assert "no list for the 4 shots" in refused(2, *few, "--shots", "4", "--lists-from", clone)
    assert "is not a folder" in refused(2, *few, "--shots", "4", "--lists-from", path)
    assert "--shots '2,x'" in refused(2, *few, "--shots", "2,x")
    assert "choose one of corrected, as-published" in refused(2, *few, "--label-map", "wrong")
    assert "exactly one of --closeset" in refused(2, *few, "--zeroshot", "hmdb51")
    unused = (*few, "--k600-source", "val")
    only = "can be used only with"
    assert f"--k600-source {only} --zeroshot k600, not with fewshot" in refused(2, *unused)
    other = ("eval", "--zeroshot", "hmdb51", "--head", "mean", "--root", root)
    assert f"--shots {only} --fewshot" in refused(2, *other, "--shots", "2")
    assert f"--class-lists {only} --zeroshot k600" in refused(2, *other, "--class-lists", clone)
    names = clone / "names.csv"
    names.write_text("id,name\n" + "".join(f"{i},class {i}\n" for i in range(6)))
    listed(train)
    assert "is no class" in refused(2, *given)
