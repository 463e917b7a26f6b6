"""import-checkpoint and export as a user sees them; the golden checkpoint has a test of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from featstore import open_store
from heads import HeadConfig, build_head, load_head, official_checkpoint
from pipeline.clip_encoder import load_encoder
from pipeline.encoders.tuned import original_clip, tower_of
from tests.support.processes.command_line import done, mote, refused
from tests.support.worlds.tiny_world import WORDS, World, make_encoder

PARTS = ("model_state_dict", "fusion_model_state_dict")


@pytest.fixture(scope="module")
def checkpoint(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released format, tuned from the world's CLIP on the world's classes."""
    generator = torch.Generator().manual_seed(5)
    clip = load_encoder(world.encoder, "fp32")
    text = clip.class_embeddings(WORDS, "mote28")
    head = build_head(HeadConfig(dim=32, layers=2, experts=3), text, generator=generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.2, generator=generator)
    tower = {
        name: value * (1 + 0.1 * torch.randn(value.shape, generator=generator))
        for name, value in tower_of(original_clip(str(world.encoder))).items()
    }
    file = tmp_path_factory.mktemp("checkpoint") / "MoTE_toy.pt"
    found = official_checkpoint(head, tower, 29)
    for part in PARTS:
        found[part] = {f"module.{name}": value for name, value in found[part].items()}
    torch.save({**found, "optimizer_state_dict": {"state": {0: {"step": 3}}}}, file)
    return file


@pytest.fixture(scope="module")
def names(checkpoint: Path) -> Path:
    file = checkpoint.with_name("labels.csv")
    lines = [f"{number},{name}" for number, name in enumerate(WORDS)]
    file.write_text("\n".join(["id,name", *lines]) + "\n")
    return file


@pytest.fixture(scope="module")
def imported(
    world: World, checkpoint: Path, names: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A copy of the world with the checkpoint imported twice, and extracted with its tower.

    Both imports hold the same tower, so one store serves both.
    """
    root = tmp_path_factory.mktemp("imported") / "mote-data"
    shutil.copytree(world.root, root)
    arguments = ("import-checkpoint", checkpoint, "--clip", world.encoder, "--root", root)
    summary = done(*arguments, "--name", "toy", "--class-names", names)
    done(*arguments, "--name", "nameless", "--frames", "4")
    done(
        *("extract", "--dataset", "clips", "--encoder", "toy", "--sampling", "uniform:8"),
        *("--precision", "fp32", "--workers", "1", "--root", root),
    )
    return root, summary


def folders(root: Path) -> set[str]:
    """What lies in the workspace and may be a leftover of an import."""
    kinds = ("encoders", "heads")
    found = {str(p.relative_to(root)) for kind in kinds for p in (root / kind).glob("*")}
    return found | {
        p.name for p in root.glob("*") if p.name not in (*kinds, "datasets", "features")
    }


def test_what_an_import_makes(
    world: World, imported: tuple[Path, dict[str, Any]], checkpoint: Path
) -> None:
    root, summary = imported
    assert (summary["epoch"], summary["blend"], summary["class_names_known"]) == (29, 0.99, True)
    assert (summary["layers"], summary["experts"], summary["n_classes"]) == (2, 3, len(WORDS))
    encoder = load_encoder("toy", "fp32", encoders_dir=root / "encoders")
    assert encoder.fingerprint == summary["encoder_fingerprint"]
    source = torch.load(checkpoint, weights_only=True)[PARTS[0]]
    original = tower_of(original_clip(str(world.encoder)))
    for name, value in encoder.model.state_dict().items():
        if name.startswith("visual."):
            expected = 0.99 * source[f"module.{name}"] + 0.01 * original[name]
            assert torch.allclose(value, expected, atol=1e-7)
    text = load_encoder(world.encoder, "fp32").encode_text(["a dog"])
    assert torch.equal(encoder.encode_text(["a dog"]), text)  # the text tower is CLIP's own
    origin = load_head(root / "heads" / "toy").origin
    assert origin is not None
    assert origin.class_names == WORDS
    assert (origin.encoder, origin.frames, origin.prompt_set) == ("toy", 8, "mote28")
    nameless = load_head(root / "heads" / "nameless").origin
    assert nameless is not None
    assert (nameless.class_names, nameless.frames) == (None, 4)
    facts = done("inspect", root / "heads" / "toy")
    assert facts["imported"]["file"] == "MoTE_toy.pt"
    assert len(facts["imported"]["sha256"]) == 64
    assert mote("inspect", root / "heads" / "nameless").code == 0
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("name", ["toy", "nameless"])
def test_an_imported_head_is_evaluated(imported: tuple[Path, dict[str, Any]], name: str) -> None:
    root, _ = imported
    place = ("--head", name, "--root", root)
    known = 6 if name == "toy" else None
    for protocol in ("--closeset", "--zeroshot"):
        result = done("eval", protocol, "clips", *place)
        assert (result["n_failed"], result["head"], result["modulate"]) == (0, name, True)
        assert result["n_classes_trained"] == known
        assert result["frames"] == (8 if name == "toy" else 4)


def test_features_of_the_untuned_tower_are_refused(imported: tuple[Path, dict[str, Any]]) -> None:
    root, _ = imported
    message = refused(
        *(2, "eval", "--zeroshot", "clips", "--head", "toy", "--root", root),
        *("--store", "tiny--uniform-4"),
    )
    assert "extract --dataset clips --encoder toy" in message


def test_what_only_dist_has_is_refused_for_mote(
    world: World, imported: tuple[Path, dict[str, Any]], checkpoint: Path
) -> None:
    root, _ = imported
    before = folders(root)
    given = (checkpoint, "--name", "layers", "--clip", world.encoder, "--root", root)
    words = refused(2, "import-checkpoint", *given, "--selected-layers", "0,1")
    assert "--selected-layers means nothing for" in words
    assert "a checkpoint of MoTE: leave it out" in words
    words = refused(
        *(2, "eval", "--zeroshot", "clips", "--head", "toy", "--root", root),
        *("--crop-style", "center-fraction"),
    )
    assert "--crop-style is for heads that look at pixels (DiST), and toy takes stored" in words
    assert folders(root) == before


def test_a_nameless_head_knows_other_classes_by_their_embeddings(
    own: World, checkpoint: Path, tmp_path: Path
) -> None:
    """Of the right number, but not those it was trained on."""
    source = torch.load(checkpoint, weights_only=True)
    table = source[PARTS[1]]["module.spe_cls_feature"]
    table[:] = torch.nn.functional.normalize(table + 0.05 * torch.randn(table.shape), dim=-1)
    torch.save(source, tmp_path / "other.pt")
    place = ("--root", own.root)
    done(
        "import-checkpoint", tmp_path / "other.pt", "--name", "other", "--clip", own.encoder, *place
    )
    done("extract", "--dataset", "clips", "--encoder", "other", "--sampling", "uniform:8", *place)
    message = refused(2, "eval", "--closeset", "clips", "--head", "other", *place)
    assert "trained on 6 classes that are not the 6 of clips" in message
    assert done("eval", "--zeroshot", "clips", "--head", "other", *place)["n_failed"] == 0


def test_an_imported_head_predicts(imported: tuple[Path, dict[str, Any]], world: World) -> None:
    root, _ = imported
    clip = next((world.videos / "val" / "run").iterdir())
    arguments = ("predict", clip, "--root", root, "--precision", "fp32")
    answer = done(*arguments, "--head", "toy", "--top", "6")
    assert {p["class_name"] for p in answer["videos"][0]["predictions"]} == set(WORDS)
    assert "no classes to choose from" in refused(2, *arguments, "--head", "nameless")
    done(*arguments, "--head", "nameless", "--classes", "run,sit")


def test_export_gives_the_checkpoint_back(
    imported: tuple[Path, dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    root, _ = imported
    file = tmp_path / "new folder" / "back.pt"
    done("export", "toy", "--format", "official", "--out", file, "--root", root)
    source, back = (torch.load(path, weights_only=True) for path in (checkpoint, file))
    assert back["epoch"] == source["epoch"]
    for part in PARTS:
        assert {f"module.{name}" for name in back[part]} == source[part].keys()
        for name, value in back[part].items():
            assert torch.equal(value, source[part][f"module.{name}"]), name


def test_a_head_trained_here_goes_out_and_comes_back(own: World, tmp_path: Path) -> None:
    place = ("--root", own.root)
    for run in ("clips-mote", "clips-transformer"):
        file = tmp_path / f"{run}.pt"
        done("export", run, "--format", "official", "--out", file, *place)
        assert torch.load(file, weights_only=True)["epoch"] == 1  # trained for two
        done(
            *("import-checkpoint", file, "--name", f"again-{run}", "--clip", own.encoder, *place),
            *("--frames", "4", "--attention-heads", "1", "--blend", "1"),
        )
        # With all of its own weights the tower is the same encoder, so the store fits.
        results = [
            done("eval", "--closeset", "clips", "--head", head, *place)
            for head in (run, f"again-{run}")
        ]
        assert results[0]["top1"] == results[1]["top1"]
        assert results[0]["encoder_fingerprint"] == results[1]["encoder_fingerprint"]
    assert "nothing to export" in refused(
        *(2, "export", "clips-mean", "--format", "official", "--out", tmp_path / "x", *place)
    )


def test_export_of_a_head_whose_encoder_has_moved(own: World, tmp_path: Path) -> None:
    place = ("--root", own.root)
    moved = tmp_path / "moved"
    shutil.copytree(own.encoder, moved)
    other = make_encoder(tmp_path / "other", seed=1)
    arguments = ("export", "clips-mote", "--format", "official", "--out", tmp_path / "o.pt", *place)
    assert "use the head's encoder" in refused(2, *arguments, "--encoder", other)
    assert "name its encoder with --encoder" in refused(2, *arguments, "--encoder", "nowhere")
    assert not (tmp_path / "o.pt").exists()
    done(*arguments, "--encoder", moved)


@pytest.mark.parametrize("run", ["toy", "clips-mote", "clips-transformer", "clips-mean"])
def test_export_of_merged_heads(
    imported: tuple[Path, dict[str, Any]], tmp_path: Path, run: str
) -> None:
    root, _ = imported
    safe, graph = tmp_path / "head.safetensors", tmp_path / "head.onnx"
    for name, file in (("safetensors", safe), ("onnx", graph)):
        summary = done("export", run, "--format", name, "--out", file, "--root", root)
        assert summary["bytes"] == file.stat().st_size
    head, merged = load_head(root / "heads" / run), load_head(safe)
    assert merged.config.experts <= 1
    assert merged.origin == head.origin
    name = "toy--uniform-8" if run == "toy" else "tiny--uniform-4"
    store = open_store(root / "features" / "clips" / f"{name}.zarr")
    features = store.features(store.rows)[:, 0].astype(np.float32)
    text = store.class_text("mote28").embeddings
    session = onnxruntime.InferenceSession(graph)
    for modulate in (True, False):
        with torch.no_grad():
            x, classes = torch.from_numpy(features), torch.from_numpy(text)
            expected = head(x, classes, modulate=modulate).numpy()
            assert np.abs(merged(x, classes, modulate=modulate).numpy() - expected).max() <= 1e-6
        inputs = {"features": features, "class_embeddings": text, "modulate": np.array(modulate)}
        assert np.abs(session.run(None, inputs)[0] - expected).max() <= 1e-6


def test_export_of_what_is_not_there(world: World, tmp_path: Path) -> None:
    place = ("--root", world.root)
    out = ("--out", tmp_path / "file")
    assert "choose one of clips-" in refused(2, "export", "none", "--format", "onnx", *out, *place)
    assert "mean of frames" in refused(2, "export", "mean", "--format", "onnx", *out, *place)
    assert "choose one of safetensors" in refused(
        2, "export", "clips-mote", "--format", "tf", *out, *place
    )
    assert "is a folder" in refused(
        *(2, "export", "clips-mote", "--format", "onnx", "--out", tmp_path, *place)
    )
    assert not list(tmp_path.iterdir())


def test_bad_input_leaves_nothing_behind(
    world: World, checkpoint: Path, names: Path, tmp_path: Path
) -> None:
    root = tmp_path / "mote-data"
    place = ("--root", root, "--name", "new", "--clip", world.encoder)

    def message(file: Path, *more: Any) -> str:
        line = refused(2, "import-checkpoint", file, *place, *more)
        assert not root.exists() or folders(root) == set()
        return line

    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoint.read_bytes()[:-1000])
    assert "cut off, damaged" in message(cut)
    assert "does not exist" in message(tmp_path / "none.pt")
    assert "lacks epoch" in message(_saved(tmp_path, {"state_dict": {}}))
    source = torch.load(checkpoint, weights_only=True)
    source[PARTS[1]]["module.spe_cls_feature"][0, 0] = float("nan")
    assert "spe_cls_feature holds NaN" in message(_saved(tmp_path, source))
    assert "5 attention heads" in message(checkpoint, "--attention-heads", "5")
    assert "2 class names for the checkpoint's 6" in message(
        checkpoint, "--class-names", _names(tmp_path, WORDS[:2])
    )
    swapped = _names(tmp_path, (WORDS[1], WORDS[0], *WORDS[2:]))
    line = message(checkpoint, "--class-names", swapped)
    assert "class 0, 'brush hair'" in line or "class 1, 'jump'" in line
    assert "does not give the class features" in line
    other = make_encoder(
        tmp_path / "other",
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    )
    wrong = refused(
        2, "import-checkpoint", checkpoint, "--root", root, "--name", "new", "--clip", other
    )
    assert "visual.transformer.resblocks.1" in wrong
    unnamed = refused(2, "import-checkpoint", checkpoint, "--root", root, "--name", "new")
    assert "none of OpenAI's CLIPs: name the CLIP it was tuned from with --clip" in unnamed
    for name in ("mean", "../x"):
        refused(2, "import-checkpoint", checkpoint, "--root", root, "--name", name)
    assert not root.exists() or folders(root) == set()


def test_a_name_is_taken_once(imported: tuple[Path, dict[str, Any]], checkpoint: Path) -> None:
    root, _ = imported
    before = folders(root)
    for name in ("toy", "clips-mote"):
        line = refused(2, "import-checkpoint", checkpoint, "--name", name, "--root", root)
        assert f"{name} exists already: choose another --name" in line
    assert folders(root) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_import_that_is_cut_short_leaves_nothing(
    error: BaseException,
    world: World,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "mote-data"
    arguments = ("import-checkpoint", checkpoint, "--name", "new", "--clip", world.encoder)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("heads.checkpoints.import_checkpoint.save_head", fail)
        result = mote(*arguments, "--root", root)
    assert result.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert folders(root) == set()
    done(*arguments, "--root", root)
    assert folders(root) == {"encoders/new", "heads/new"}


def _saved(folder: Path, value: Any) -> Path:
    torch.save(value, folder / "saved.pt")
    return folder / "saved.pt"


def _names(folder: Path, names: tuple[str, ...]) -> Path:
    file = folder / "names.csv"
    lines = [f"{number},{name}" for number, name in enumerate(names)]
    file.write_text("\n".join(["id,name", *lines]) + "\n")
    return file
