"""Commands that messages name: every one is typed as it stands there, in the same workspace."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from unittest import mock

import pytest

from featstore import open_store
from featstore.commands import command
from featstore.format.class_texts import PROMPT_SET_NAMES
from featstore.workspace import Workspace
from pipeline.decoding.contract import DecodeError
from pipeline.prompts import PROMPT_SETS
from tests.support.processes.command_line import Result, done, mote, refused
from tests.support.worlds.official_trees import hmdb51
from tests.support.worlds.tiny_world import (
    SHORT_TRAINING,
    World,
    make_clip,
    make_encoder,
    rewrite_origin,
)

SMALL = ("--precision", "fp32", "--workers", "1")


def typed(words: str, *more: str | Path) -> Result:
    """Run a command that was printed; each may be printed once only in what follows."""
    program, *arguments = shlex.split(words)
    assert program == "mote-cli"
    result = mote(*arguments, *(SMALL if arguments[0] == "extract" else ()), *more)
    assert result.code == 0, f"{words}: {result.err}"
    return result


def next_of(result: Result) -> str:
    """The command behind "next"; it stands nowhere else."""
    (line,) = [line for line in result.out.splitlines() if line.split()[:1] == ["next"]]
    words = line.removeprefix("next").strip()
    assert (result.out + result.err).count(words) == 1
    return words


def named_in(error: str) -> list[str]:
    """The commands in an error, which names each once."""
    found = re.findall(r"`(mote-cli [^`]+)`", error)
    assert len(set(found)) == len(found)
    return found


@pytest.fixture
def place(own: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A workspace with the data set clips, one store and three heads; its root must be named."""
    monkeypatch.chdir(own.root.parent)
    root = own.root.rename(own.root.parent / "a root")
    printed = {"extract": {"store": str(root / own.store.relative_to(own.root))}}
    return World(own.videos, own.encoder, root, printed)


def more_clips(folder: Path, splits: tuple[str, ...], classes: tuple[str, ...]) -> Path:
    """A folder data set of classes that no head knows."""
    for number, name in enumerate(classes):
        for split in splits:
            for i in range(2):
                make_clip(folder / split / name / f"{split}{i} {name}.mp4", 10 * number + i)
    return folder


def extracted(place: World, dataset: str, *more: str) -> Result:
    """An extraction with the world's encoder."""
    result = mote(
        *("extract", "--dataset", dataset, "--encoder", place.encoder, *SMALL, *more),
        *("--root", place.root),
    )
    assert result.code == 0, result.err
    return result


def test_commands_are_quoted_and_name_what_is_not_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "my data"
    assert command("inspect", inside / "x") == "mote-cli inspect 'my data/x'"
    assert command("pack", dataset="a", split=None, root="mote-data") == "mote-cli pack --dataset a"
    assert command("eval", no_modulate=True, root=inside).endswith("--no-modulate --root 'my data'")
    monkeypatch.setenv("MOTE_ROOT", "my data")
    assert command("eval", no_modulate=False, root=inside) == "mote-cli eval"
    assert command("eval", root=tmp_path / "mote-data") == "mote-cli eval --root mote-data"
    assert command("eval", root="s3://b/x") == "mote-cli eval --root s3://b/x"


def test_the_names_of_prompt_sets_are_known_below_their_sentences() -> None:
    assert tuple(PROMPT_SETS) == PROMPT_SET_NAMES


def test_without_a_head_the_default_encoder_is_named(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    packing = ("pack", "--dataset", "clips", "--videos", inputs[0], "--root", tmp_path)
    assert "--encoder ViT-B-16/openai" in next_of(mote(*packing))


def test_a_new_data_set_is_extracted_as_the_newest_head_wants(place: World, tmp_path: Path) -> None:
    videos = more_clips(tmp_path / "new", ("train", "val"), ("hop", "nod", "turn"))
    packed = mote("pack", "--dataset", "moves", "--videos", videos, "--root", place.root)
    words = next_of(packed)
    assert f"--encoder {place.encoder} --sampling uniform:4 --root 'a root'" in words
    train = next_of(typed(words))
    assert "train-head --dataset moves" in train
    tested = next_of(typed(train, *SHORT_TRAINING, "--frames", "4"))
    assert "--closeset moves" in tested
    assert "--no-modulate" in tested  # three classes are too few to compare five
    typed(tested)


def test_a_set_with_only_val_is_not_told_to_train(place: World, tmp_path: Path) -> None:
    words = next_of(extracted(place, "clips", "--split", "val", "--sampling", "uniform:2"))
    assert "eval --closeset clips --head clips-mote" in words
    assert "--store" in words  # the other store has val too
    typed(words)
    shutil.rmtree(place.root / "heads")
    words = next_of(extracted(place, "clips", "--split", "val", "--sampling", "uniform:3"))
    assert "eval --closeset clips --head mean" in words
    typed(words)
    videos = more_clips(tmp_path / "new", ("val",), ("hop", "nod"))
    packed = mote("pack", "--dataset", "moves", "--videos", videos, "--root", place.root)
    words = next_of(typed(next_of(packed)))
    assert "--head mean" in words
    typed(words)


def test_videos_without_labels_are_neither_trained_on_nor_tested(
    place: World, tmp_path: Path
) -> None:
    for n in range(2):
        make_clip(tmp_path / f"found/{n}.mp4", n)
    root = ("--root", place.root)
    made = typed(next_of(mote("pack", "--dataset", "found", "--videos", tmp_path / "found", *root)))
    assert next_of(made).startswith("mote-cli inspect ")
    typed(next_of(made))
    store = next((place.root / "features/found").glob("*.zarr"))
    made = mote("store", "quantize", store, "--out", store.with_name("half.zarr"))
    assert next_of(made).startswith("mote-cli inspect ")
    result = mote("train-head", *root, *SHORT_TRAINING, "--frames", "4", "--name", "again")
    assert "data set: clips, the only one with features and labels" in result.err
    assert result.code == 0
    shutil.rmtree(place.root / "heads")
    for gone, step in (("features/clips", "extract --dataset clips"), ("datasets/clips", "pack")):
        shutil.rmtree(place.root / gone)
        assert Workspace(place.root).first_command().startswith(f"mote-cli {step} ")
    shutil.rmtree(place.root / "features")
    line = refused(2, "train-head", "--dataset", "found", *root)
    assert "data set 'found' have no labels" in line
    steps = done("status", *root)["next"]
    assert not [step for step in steps if "train-head" in str(step) and "found" in str(step)]


def test_all_videos_in_training_leave_nothing_to_test(place: World, tmp_path: Path) -> None:
    videos = more_clips(tmp_path / "new", ("",), ("hop", "nod"))
    typed(next_of(mote("pack", "--dataset", "moves", "--videos", videos, "--root", place.root)))
    training = ("train-head", "--dataset", "moves", *SHORT_TRAINING, "--frames", "4")
    words = next_of(mote(*training, "--root", place.root))
    assert "--zeroshot clips --head moves-mote --no-modulate" in words
    typed(words)
    for features in (place.root / "features").glob("clips/*.zarr"):
        shutil.rmtree(features)
    words = next_of(mote(*training, "--root", place.root, "--name", "again"))
    assert words.startswith("mote-cli inspect")
    typed(words)


def test_published_views_are_asked_for(place: World, tmp_path: Path) -> None:
    """From nothing to the three official lists, by the commands of the errors alone."""
    evaluating = ("eval", "--zeroshot", "hmdb51", "--root", place.root)
    error = refused(2, *evaluating)
    pack, extract = named_in(error)
    assert "it is not packed (there are clips)" in error
    tree = hmdb51(tmp_path / "official")
    typed(pack.replace("DIR", shlex.quote(str(tree.videos))))
    (again,) = named_in(refused(2, *evaluating))
    assert again == extract
    assert f"--encoder {place.encoder} --sampling clips:4x3 --root 'a root'" in extract
    made = typed(extract)
    assert "protocols: 3x1 views serve hmdb51-zeroshot-3splits, hmdb51-zeroshot-full, " in made.err
    assert "not for: hmdb51-fewshot, hmdb51-base-to-novel (1x1 views: --samp" in made.err
    assert "--zeroshot hmdb51 --head clips-mote" in next_of(made)
    typed(next_of(made))
    (extract,) = named_in(
        refused(2, "eval", "--fewshot", "hmdb51", "--views", "1x1", *evaluating[3:])
    )
    assert f"--encoder {place.encoder} --sampling uniform:4 --root" in extract
    # Beside a store with other views, the published ones are meant.
    made = extracted(place, "hmdb51", "--sampling", "uniform:4")
    assert "protocols: 1x1 views serve hmdb51-halfclass-full" in made.err
    result = mote(*evaluating)
    assert "with the 3x1 views of hmdb51-zeroshot-3splits; --store chooses another" in result.err
    (extract,) = named_in(
        refused(2, "eval", "--protocol", "k400-closeset-4x3", "--dataset", "clips", *evaluating[3:])
    )
    assert "--sampling clips:4x4 --crops 3" in extract
    made = typed(extract)
    plan = done(*shlex.split(extract)[1:], *SMALL, "--dry-run")
    assert "protocols" not in plan  # clips has none of its own
    other = extract.replace("clips --enc", "hmdb51 --enc").replace("--split val ", "")
    plan = done(*shlex.split(other)[1:], "--dry-run")
    assert plan["protocols"]["views"] == "4x3"
    assert "hmdb51-halfclass-test1" in plan["protocols"]["served"]
    options = plan["protocols"]["not_served"]["hmdb51-zeroshot-full"]
    assert options == "3x1 views: --sampling clips:4x3"


def test_two_stores_and_two_data_sets(place: World) -> None:
    """The newest head's own is meant; without a head there is only the list."""
    extracted(place, "clips", "--sampling", "uniform:2")
    shutil.copytree(place.root / "features/clips", place.root / "features/others")
    root = ("--root", place.root)
    for arguments in (
        ("eval", "--closeset", "clips"),
        ("eval", "--closeset", "clips", "--head", "mean"),
        ("train-head", "--name", "again", *SHORT_TRAINING, "--frames", "4"),
    ):
        result = mote(*arguments, *root)
        assert result.code == 0, result.err
        assert result.err.count("--store chooses another: tiny--uniform-2") == 1
    assert "data set: clips, which the newest head was trained on" in result.err
    assert "--store" in next_of(result) or typed(next_of(result))
    shutil.rmtree(place.root / "heads")
    assert "several data sets have features (clips, others)" in refused(2, "train-head", *root)
    error = refused(2, "train-head", "--dataset", "clips", *root)
    assert "choose one with --store NAME" in error


def test_a_missing_split_is_extracted(place: World) -> None:
    shutil.rmtree(place.store)
    root = ("--root", place.root)
    extracted(place, "clips", "--split", "val", "--sampling", "uniform:4")
    (words,) = named_in(refused(2, "train-head", "--name", "new", *root))
    assert "--split train" in words
    shutil.rmtree(place.root / "features")
    typed(words)
    (words,) = named_in(refused(2, "eval", "--closeset", "clips", *root))
    assert f"--encoder {place.encoder} --sampling uniform:4 --split val" in words
    typed(words)
    assert mote("eval", "--closeset", "clips", *root).code == 0


@pytest.mark.parametrize("gone", ["heads", "features", "datasets"])
def test_a_head_that_is_not_there(place: World, gone: str) -> None:
    """The error leads to the next thing that is missing: head, features, data set."""
    for name in ("heads", "features", "datasets"):
        shutil.rmtree(place.root / name)
        if name == gone:
            break
    (words,) = named_in(refused(2, "eval", "--closeset", "clips", "--root", place.root))
    step = {"heads": "train-head --dataset clips", "features": "extract", "datasets": "pack"}
    assert words.startswith(f"mote-cli {step[gone]}")
    if gone == "heads":
        typed(words, *SHORT_TRAINING, "--frames", "4")


def test_stores_that_were_made_from_others(place: World, tmp_path: Path) -> None:
    root, folder = ("--root", place.root), place.store.parent
    half = folder / "half.zarr"
    made = mote("store", "quantize", place.store, "--out", half)
    assert "--store half --name clips-2 --root 'a root'" in next_of(made)
    typed(next_of(made), *SHORT_TRAINING, "--frames", "4")
    both = place.root / "features/both/both.zarr"
    copy = tmp_path / "copy"
    shutil.copytree(place.videos / "val", copy / "val")
    typed(next_of(mote("pack", "--dataset", "others", "--videos", copy, *root)))
    other = next((place.root / "features/others").glob("*.zarr"))
    shutil.rmtree(half)
    made = mote("store", "merge", place.store, other, "--prefix-keys", "--out", both)
    train = next_of(made)
    assert "train-head --dataset both" in train
    tested = next_of(typed(train, *SHORT_TRAINING, "--frames", "4"))
    assert "--closeset both" in tested
    typed(tested)
    (both / "features/c/1/0/0/0").write_bytes(b"")
    repair = done("verify", both, "--deep", *root, code=1)["repair"]
    assert repair.startswith("mote-cli store merge")
    typed(repair, "--prefix-keys")
    assert open_store(both.with_name("both-2.zarr")).complete
    done("store", "quantize", place.store, "--out", half)
    (half / "features/c/1/0/0/0").write_bytes(b"")
    typed(done("verify", half, "--deep", *root, code=1)["repair"])
    assert open_store(folder / "half-2.zarr").schema.quantised


def test_damage_and_unfinished_work_name_their_repair(place: World) -> None:
    root = ("--root", place.root)
    shutil.rmtree(place.store / "commit/c/1")
    for refusing in (
        ("eval", "--closeset", "clips", "--head", "clips-mote"),
        ("store", "quantize", place.store, "--out", "x.zarr"),
    ):
        (words,) = named_in(refused(1, *refusing, *root))
        assert f"--encoder {place.encoder} --sampling uniform:4 --root 'a root'" in words
    part = extracted(place, "clips", "--sampling", "uniform:2", "--partition", "0/2")
    typed(next_of(part))
    typed(words)
    assert open_store(place.store).complete


def test_other_sentences_are_added(place: World) -> None:
    root = ("--root", place.root)
    error = refused(2, "eval", "--closeset", "clips", "--prompts", "video", *root)
    typed(*named_in(error))
    assert mote("eval", "--closeset", "clips", "--prompts", "video", *root).code == 0
    store = ("extract", "--dataset", "clips", "--encoder", place.encoder, "--sampling", "uniform:4")
    typed(*named_in(refused(2, *store, *SMALL, "--prompts", "name", *root)))
    crops = refused(2, *store, *SMALL, "--crops", "3", "--store", place.store, *root)
    typed(*named_in(crops))


def test_results_that_are_missing(place: World) -> None:
    root = ("--root", place.root)
    for refusing in (
        ("compare", "clips-mote", "clips-mote"),
        ("tradeoff", "clips-mote"),
    ):
        (words,) = named_in(refused(2, *refusing, *root))
        assert words == "mote-cli eval --closeset clips --head clips-mote --root 'a root'"
    typed(words)
    lacking = named_in(refused(2, "tradeoff", "--closeset", "clips", "--zeroshot", "clips", *root))
    assert lacking
    for words in lacking:
        assert words.endswith("--root 'a root'")


def test_an_imported_head_whose_store_is_still_to_be_made(place: World) -> None:
    """As `import-checkpoint` leaves it: no data set, no sampling, an encoder of the workspace."""
    shutil.copytree(place.encoder, place.root / "encoders/own")
    trained = place.root / "heads/clips-mote"
    run = shutil.copytree(trained, place.root / "heads/own")
    rewrite_origin(run / "head.safetensors", encoder="own", sampling="", dataset="")
    shutil.rmtree(place.root / "features")
    (words,) = named_in(
        refused(2, "eval", "--closeset", "clips", "--head", "own", "--root", place.root)
    )
    assert "--encoder own --sampling uniform:4 --split val --root 'a root'" in words
    typed(words)
    assert mote("eval", "--closeset", "clips", "--head", "own", "--root", place.root).code == 0


def test_an_encoder_of_the_same_name_gets_a_store_of_its_own(place: World, tmp_path: Path) -> None:
    root, other = ("--root", place.root), make_encoder(tmp_path / "other/tiny", seed=1)
    videos = more_clips(tmp_path / "new", ("",), ("hop", "nod"))
    typed(next_of(mote("pack", "--dataset", "moves", "--videos", videos, *root)))
    second = place.store.with_name("second.zarr")
    own = ("--encoder", str(other), "--sampling", "uniform:4", "--store", str(second))
    extracted(place, "clips", *own)
    training = ("train-head", "--dataset", "clips", "--store", "second", "--name", "second")
    assert mote(*training, *SHORT_TRAINING, "--frames", "4", *root).code == 0
    evaluating = ("eval", "--zeroshot", "moves", "--no-modulate", *root)
    (words,) = named_in(refused(2, *evaluating))
    assert "--store 'a root/features/moves/tiny--uniform-4-2.zarr'" in words
    typed(words)
    assert mote(*evaluating).code == 0


def test_too_many_failures_are_explained_once(place: World, tmp_path: Path) -> None:
    videos = more_clips(tmp_path / "new", ("train",), ("hop", "nod"))
    mote("pack", "--dataset", "moves", "--videos", videos, "--root", place.root)
    with mock.patch(
        "pipeline.extraction.cpu_pool.encode_video", side_effect=DecodeError("no frames")
    ):
        result = mote(
            *("extract", "--dataset", "moves", "--encoder", place.encoder, *SMALL),
            *("--sampling", "uniform:4", "--root", place.root),
        )
    assert result.code == 1
    assert not [line for line in result.out.splitlines() if line.startswith("next")]
    typed(*named_in(result.error))
