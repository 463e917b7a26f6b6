"""CLIP encoders: the authors' numbers, one fingerprint per model, and clear refusals."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from featstore.errors import UserError, WorkError
from pipeline import clip_encoder
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.encoders import sources, specs
from pipeline.encoders.fingerprint import fingerprint
from pipeline.encoders.sources import save_open_clip_folder
from pipeline.prompts import as_prompt_set
from tests.support.golden.checks import worst

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 20, "width": 64, "heads": 4, "layers": 2},
}


def make_folder(folder: Path, preprocess: dict[str, Any] | None = None, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = {**CONFIG, **changes}
    model = sources.build_model(config, "test")
    save_open_clip_folder(model, config, preprocess or {}, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)
    monkeypatch.setattr(sources, "hub_reachable", refuse)


@pytest.mark.parametrize(
    ("weights", "numbers"),
    [
        ("clip_0_openai_state.pt", "clip_0_io.npz"),
        ("clip_0_openai_jit.pt", "clip_0_io.npz"),
        ("clip_1_openai_state.pt", "clip_1_io.npz"),
    ],
)
def test_openai_files_give_the_authors_features(weights: str, numbers: str, golden: Path) -> None:
    encoder = load_encoder(golden / weights)
    case = {
        name: torch.from_numpy(np.asarray(value))
        for name, value in np.load(golden / numbers).items()
    }
    assert worst(encoder.encode_pixels(case["images"]), case["image_features"]) <= 1e-5
    assert worst(encoder.encode_tokens(case["tokens"]), case["text_features"]) <= 1e-5
    prompts, classes, length = case["recipe_tokens"].shape
    raw = encoder.encode_tokens(case["recipe_tokens"].view(-1, length)).view(prompts, classes, -1)
    assert worst(raw, case["recipe_raw"]) <= 1e-5
    features = F.normalize(F.normalize(raw, dim=-1).mean(dim=0), dim=-1)
    assert worst(features, case["recipe_class_features"]) <= 1e-6
    assert encoder.logit_scale == pytest.approx(float(case["exp_logit_scale"]), rel=1e-6)
    assert encoder.dim == case["image_features"].shape[1]
    assert encoder.model_config["quick_gelu"] is True


def test_one_model_has_one_fingerprint(golden: Path, tmp_path: Path) -> None:
    state = load_encoder(golden / "clip_0_openai_state.pt")
    archive = load_encoder(golden / "clip_0_openai_jit.pt")
    other = load_encoder(golden / "clip_1_openai_state.pt")
    saved = tmp_path / "copy"
    save_open_clip_folder(state.model, state.model_config, state.preprocessing.to_json(), saved)
    from_folder = load_encoder(saved)
    reduced = load_encoder(saved, precision="bf16")
    assert state.fingerprint == archive.fingerprint == from_folder.fingerprint
    assert reduced.fingerprint == state.fingerprint
    assert other.fingerprint != state.fingerprint
    assert len(state.fingerprint) == 64


def test_the_fingerprint_sees_every_change_of_the_function(folder: Path) -> None:
    model = sources.load_clip(str(folder)).model
    original = fingerprint(model, CONFIG)
    spelled_out = {**CONFIG, "quick_gelu": False, "custom_text": False}
    spelled_out["vision_cfg"] = {**CONFIG["vision_cfg"], "head_width": 64, "patch_dropout": 0.5}
    assert fingerprint(model, spelled_out) == original
    assert fingerprint(model, {**CONFIG, "quick_gelu": True}) != original
    heads = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "heads": 2}}
    assert fingerprint(model, heads) != original
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(model, CONFIG) != original


def test_open_clip_itself_loads_what_is_saved(folder: Path, encoder: Encoder) -> None:
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.encode_image(images), encoder.encode_pixels(images))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a photo of juggling.", "surfing"])
    torch.testing.assert_close(
        model.encode_text(tokens), encoder.encode_text(["a photo of juggling.", "surfing"])
    )


def test_the_folder_decides_preprocessing(tmp_path: Path) -> None:
    preprocess = {"size": 224, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    encoder = load_encoder(make_folder(tmp_path / "own", preprocess))
    assert encoder.preprocessing.size == (32, 32)  # the tower's, as in open_clip
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5)
    assert encoder.preprocessing.interpolation == "bilinear"
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), np.uint8)
    torch.testing.assert_close(
        encoder.encode_frames(frames),
        encoder.encode_pixels(encoder.preprocessing.crops(frames, 1)[0]),
    )
    make_folder(tmp_path / "odd", {"interpolation": "lanczos"})
    with pytest.raises(UserError, match="interpolation 'lanczos' is not supported"):
        load_encoder(tmp_path / "odd")


def test_encoding_in_parts_or_at_once_is_the_same(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole = encoder.encode_pixels(images)
    assert whole.shape == (5, 24)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    monkeypatch.setattr(clip_encoder, "IMAGES_PER_BATCH", {"cpu": 2})
    torch.testing.assert_close(encoder.encode_pixels(images), whole)
    with pytest.raises(ValueError, match=r"pixels must be \[N,3,32,32\]"):
        encoder.encode_pixels(images[:, :, :16])


def test_short_sentences_skip_the_empty_places_without_a_difference(encoder: Encoder) -> None:
    texts = ["surfing", "a video of a person playing the long trumpet outside", ""]
    tokens = encoder.tokenize(texts)
    full = encoder.model.encode_text(tokens)  # type: ignore[operator]
    torch.testing.assert_close(encoder.encode_text(texts), full, atol=1e-6, rtol=1e-5)
    assert encoder.encode_text([]).shape == (0, 24)


def test_class_embeddings_follow_the_recipe(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["surfing", "playing trumpet", "ice skating"]
    expected = []
    for name in names:
        each = F.normalize(encoder.encode_text(as_prompt_set("mote28").sentences(name)), dim=-1)
        expected.append(F.normalize(each.mean(dim=0), dim=-1))
    monkeypatch.setattr(clip_encoder, "SENTENCES_PER_BATCH", 10)
    seen: list[tuple[float, float]] = []
    result = encoder.class_embeddings(
        names, "mote28", lambda done, total: seen.append((done, total))
    )
    torch.testing.assert_close(result, torch.stack(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.norm(dim=-1), torch.ones(3))
    assert seen[-1] == (84, 84)


def test_sentences_that_do_not_fit_are_named(encoder: Encoder, golden: Path) -> None:
    with pytest.raises(UserError, match=r"the sentence 'a photo of .*' has 2\d tokens.* takes 18"):
        encoder.encode_text(["short", "a photo of " + "very " * 20])
    cut = load_encoder(golden / "clip_0_openai_state.pt")
    with pytest.raises(UserError, match="tokens beyond the 97 of the encoder clip_0_openai_state"):
        cut.encode_text(["surfing"])


def test_precision_changes_weights_of_the_image_tower_only(folder: Path, encoder: Encoder) -> None:
    reduced = load_encoder(folder, precision="bf16")
    assert {p.dtype for p in reduced.image_tower.parameters()} == {torch.bfloat16}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    result = reduced.encode_pixels(images)
    assert result.dtype == torch.float32
    assert F.cosine_similarity(result, encoder.encode_pixels(images)).min() > 0.999
    torch.testing.assert_close(reduced.encode_text(["surfing"]), encoder.encode_text(["surfing"]))
    assert (encoder.precision, reduced.precision) == ("fp32", "bf16")
    with pytest.raises(UserError, match="unknown precision 'int8': use auto, fp32, bf16, fp16"):
        load_encoder(folder, precision="int8")


@pytest.mark.parametrize(
    ("speedup", "cosine", "instructions", "chosen"),
    [
        (3.0, 0.9999, True, "bf16"),
        (1.1, 0.9999, True, "fp32"),
        (3.0, 0.99, True, "fp32"),
        (3.0, 0.9999, False, "fp32"),
    ],
)
def test_auto_takes_bf16_only_where_it_pays_and_agrees(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    speedup: float,
    cosine: float,
    instructions: bool,
    chosen: str,
) -> None:
    monkeypatch.setattr(clip_encoder, "MIN_TIMED_PARAMETERS", 0)
    monkeypatch.setattr(clip_encoder, "cpu_has_bf16", lambda: instructions)
    monkeypatch.setattr(Encoder, "_compare_with_fp32", lambda *_: (speedup, cosine))
    assert load_encoder(folder).precision == chosen


def test_the_comparison_leaves_the_weights_as_they_were(folder: Path) -> None:
    encoder = load_encoder(folder, precision="fp32")
    before = {name: value.clone() for name, value in encoder.image_tower.state_dict().items()}
    speedup, cosine = encoder._compare_with_fp32(torch.bfloat16)
    assert speedup > 0
    assert 0.99 < cosine <= 1.00001
    for name, value in encoder.image_tower.state_dict().items():
        assert torch.equal(value, before[name])


def test_threads_may_encode_at_once(encoder: Encoder) -> None:
    batches = [
        torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for seed in range(16)
    ]
    expected = [encoder.encode_pixels(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for result, wanted in zip(pool.map(encoder.encode_pixels, batches), expected, strict=True):
            assert torch.equal(result, wanted)


def test_names_in_the_workspace(folder: Path) -> None:
    encoder = load_encoder("tiny", encoders_dir=folder.parent)
    assert encoder.name == "tiny"
    with pytest.raises(UserError, match=r"unknown encoder 'tinny'.*did you mean tiny\?"):
        load_encoder("tinny", encoders_dir=folder.parent)
    with pytest.raises(UserError, match="unknown encoder"):
        load_encoder("../tiny", encoders_dir=folder)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown encoder ''"),
        ("no-such-thing", "no name under encoders/ of the workspace and no ARCH/TAG of open_clip"),
        ("ViT-B-16", "needs a tag: for example ViT-B-16/openai"),
        ("ViT-B/16", "needs a tag: for example ViT-B-16/openai"),
        ("ViT-B-16/opnai", "did you mean ViT-B-16/openai"),
        ("VIT-B-16/openai", "did you mean ViT-B-16/openai"),
        ("openai/clip-vit-base-patch16", "did you mean ViT-B-16/openai?"),
        ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "did you mean ViT-B-16/laion2b_s34b_b88k?"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_encoder(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["ViT-B-16/openai", "ViT-B/16/openai"])
def test_weights_out_of_reach_are_one_line_with_a_remedy(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_cached_weights", lambda _: None)
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(WorkError, match=r"cannot be reached: .* pass --encoder FOLDER") as caught:
        load_encoder(spec)
    assert "\n" not in str(caught.value)


def test_a_pretrained_tag_gets_the_activation_it_was_trained_with(
    folder: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = tmp_path / "Tiny-8.json"
    architecture.write_text(json.dumps(CONFIG))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"Tiny-8": CONFIG})
    for quick_gelu in (True, False):
        pretrained = {"hf_hub": "some/where/", "quick_gelu": quick_gelu, "mean": (0.1, 0.2, 0.3)}
        monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda *_: True)
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_, p=pretrained: p)
        weights = str(folder / specs.WEIGHTS_FILE)
        monkeypatch.setattr(sources, "_cached_weights", lambda _, w=weights: w)
        loaded = load_encoder("Tiny/8/somewhere")
        assert loaded.name == "Tiny-8-somewhere"
        assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
        assert loaded.model_config.get("quick_gelu", False) is quick_gelu
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        same = torch.allclose(loaded.encode_pixels(images), encoder.encode_pixels(images))
        assert same is not quick_gelu


def test_unusable_folders_are_explained(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / specs.CONFIG_FILE).read_text())

    def broken(name: str, new_config: Any = None, weights: bytes | None = None) -> Path:
        target = tmp_path / name
        shutil.copytree(folder, target)
        if new_config is not None:
            text = new_config if isinstance(new_config, str) else json.dumps(new_config)
            (target / specs.CONFIG_FILE).write_text(text)
        if weights is not None:
            (target / specs.WEIGHTS_FILE).write_bytes(weights)
        return target

    whole = (folder / specs.WEIGHTS_FILE).read_bytes()
    (tmp_path / "empty").mkdir()
    vision = {**config["model_cfg"]["vision_cfg"], "width": 128}
    deeper = {**config["model_cfg"]["text_cfg"], "layers": 3}
    model = {**config["model_cfg"]}
    for target, message in [
        (tmp_path / "empty", "has no open_clip_config.json: a folder in open_clip's format holds"),
        (broken("json", "{"), "is not JSON"),
        (broken("other", {"a": 1}), "has no entry 'model_cfg'"),
        (
            broken("strange", {"model_cfg": {**model, "colour": 1}}),
            "is not one open_clip can build",
        ),
        (broken("part", {"model_cfg": {"embed_dim": 24}}), "has no entry 'vision_cfg'"),
        (broken("cut", weights=whole[:5000]), "cannot be read as safetensors"),
        (broken("zero", weights=b""), "cannot be read as safetensors"),
        (broken("wide", {"model_cfg": {**model, "vision_cfg": vision}}), "wrong shape: "),
        (broken("deep", {"model_cfg": {**model, "text_cfg": deeper}}), "missing: transformer.resb"),
        (
            broken("shallow", {"model_cfg": {**model, "text_cfg": {**deeper, "layers": 1}}}),
            "not in the model: transformer.resblocks.1",
        ),
    ]:
        with pytest.raises(UserError) as caught:
            load_encoder(target)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_unusable_files_are_explained_and_never_run(golden: Path, tmp_path: Path) -> None:
    state = torch.load(golden / "clip_0_openai_state.pt", weights_only=True)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    damaged = {**state, "visual.proj": torch.full_like(state["visual.proj"], torch.nan)}
    for name, content, message in [
        ("trap.pt", {"visual.proj": Trap()}, "never pickled code"),
        ("list.pt", [1, 2], "holds a list, not a state dict"),
        ("head.pt", {"weight": torch.zeros(3)}, "holds no CLIP in OpenAI's layout"),
        ("words.pt", {**state, "note": "hello"}, "entry 'note' is no tensor"),
        ("nan.pt", damaged, "tensor visual.proj holds NaN or infinity"),
        (
            "less.pt",
            {k: v for k, v in state.items() if k != "ln_final.weight"},
            "lacks the tensor 'ln_final.weight'",
        ),
        ("more.pt", {**state, "extra.weight": torch.zeros(3)}, "is not a whole CLIP"),
    ]:
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError) as caught:
            load_encoder(tmp_path / name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_encoder(tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"neither a folder in open_clip's format nor a \.pt"):
        load_encoder(golden / "clip_0_io.npz")
    wrapped = {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    plain = load_encoder(golden / "clip_0_openai_state.pt")
    assert load_encoder(tmp_path / "wrapped.pt").fingerprint == plain.fingerprint
