"""MSTA's adapters: the published numbers of their parent, counts, gradients, time, and losses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from featstore import UserError
from heads import build_head, load_head, save_head
from heads.methods.msta import (
    AdaptedTowers,
    Adapters,
    consistency_loss,
    msta_losses,
)
from heads.methods.msta.config import MstaConfig
from heads.methods.msta.costs import msta_costs
from pipeline.clip_encoder import Encoder, load_encoder
from tests.support.golden.checks import check_folder
from tests.support.golden.msta import MSTA_KINDS
from tests.support.worlds.tiny_towers import tiny_tower
from tests.support.worlds.tiny_world import CLIP, VICLIP, make_encoder, make_viclip

DATA = Path(__file__).parents[2] / "data" / "golden_msta"
PAGE = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
BASE: dict[str, Any] = {"dim": 512, "visual_width": 768, "text_width": 512}
TINY: dict[str, Any] = {"dim": 32, "first": 1, "last": 1, "width": 8, "scale": 0.1}
TEXTS = ["jump", "brush hair twice", "run"]


def test_every_published_number_holds() -> None:
    checked = set()
    for file, check in check_folder(DATA, MSTA_KINDS):
        checked.add(file.name)
        assert check.holds, f"{file.name}: {check}"
    assert checked == {path.name for path in DATA.glob("*.npz")}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    """A CLIP of two blocks in each tower, and a ViCLIP of 4 frames."""
    folder = tmp_path_factory.mktemp("encoders")
    text = {**CLIP["text_cfg"], "layers": 2}
    return {
        "clip": load_encoder(make_encoder(folder / "clip", text_cfg=text), "fp32"),
        "viclip": load_encoder(f"viclip:{make_viclip(folder / 'v.safetensors')}", "fp32"),
    }


def towers_of(encoder: Encoder, seed: int = 0, **changes: Any) -> AdaptedTowers:
    towers = AdaptedTowers(encoder.model, MstaConfig(**{**TINY, **changes}))
    towers.adapters.reset_parameters(torch.Generator().manual_seed(seed))
    return towers.eval()


def frames_for(clips: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(clips, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("given", "blocks", "found"),
    [((0, 0), (12, 12), (8, 12)), ((0, 0), (24, 12), (8, 12)), ((0, 0), (3, 2), (1, 2)),
     ((0, 4), (12, 12), (1, 4)), ((7, 0), (12, 12), (7, 12)), ((2, 3), (12, 12), (2, 3))],
)  # fmt: skip
def test_blocks_that_nobody_names_are_the_last_five_of_both_towers(
    given: tuple[int, int], blocks: tuple[int, int], found: tuple[int, int]
) -> None:
    made = MstaConfig(dim=32, first=given[0], last=given[1]).for_towers(64, 32, 32, *blocks)
    assert (made.first, made.last) == found


@pytest.mark.parametrize("form", ["a", "b"])
@pytest.mark.parametrize(("first", "width", "count"), [(8, 128, 1_744_000), (1, 256, 8_712_192)])
def test_the_parameters_are_those_that_are_published(
    form: Any, first: int, width: int, count: int
) -> None:
    config = MstaConfig(**BASE, first=first, width=width, form=form)
    assert config.parameters == count
    with torch.device("meta"):
        adapters = Adapters(config)
    assert sum(p.numel() for p in adapters.parameters()) == count
    without = replace(config, form="none")
    assert count - without.parameters == len(config.layers) * 4 * 768


def test_an_adapter_as_wide_as_a_tower_is_built_like_any_other() -> None:
    config = MstaConfig(dim=32, visual_width=64, text_width=32, first=2, last=2, width=32)
    adapters = Adapters(config)
    shapes = {name: tuple(value.shape) for name, value in adapters.named_parameters()}
    assert shapes["text_adapter.2.down.0.weight"] == (32, 32)
    assert shapes["text_adapter.2.up.weight"] == (32, 32)
    assert shapes["shared_adapter.2.0.weight"] == (32, 32)
    assert shapes["visual_adapter.2.down.0.weight"] == (32, 64)
    assert sum(value.numel() for value in adapters.parameters()) == config.parameters
    adapters.reset_parameters(torch.Generator().manual_seed(0))
    tokens = torch.randn(2, 3, 32)
    by_hand = tokens
    for part in ("text_adapter.2.down.0", "shared_adapter.2.0"):
        weights = (adapters.get_parameter(f"{part}.{name}") for name in ("weight", "bias"))
        by_hand = functional.linear(by_hand, *weights).relu()
    up = adapters.get_parameter("text_adapter.2.up.weight")
    assert torch.allclose(adapters.text(2, tokens), 0.005 * by_hand @ up.T)


@pytest.mark.parametrize("kind", ["clip", "viclip"])
def test_lambda_0_is_the_backbone(encoders: dict[str, Encoder], kind: str) -> None:
    encoder, frames = encoders[kind], frames_for()
    last = 2 if kind == "clip" else 1
    towers = towers_of(encoder, scale=0.0, last=last)
    tokens = encoder.tokenize(TEXTS)
    with torch.no_grad():
        video, texts = towers.video_features(frames), towers.text_features(tokens)
    if kind == "clip":
        wanted = encoder.encode_pixels(frames.flatten(0, 1)).unflatten(0, (2, 4)).mean(1)
    else:
        wanted = encoder.encode_clips(frames)
    assert torch.allclose(video, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert torch.equal(texts, encoder.encode_tokens(tokens))
    other = towers_of(encoder, last=last)
    with torch.no_grad():
        assert not torch.allclose(other.video_features(frames), wanted, atol=1e-3)
        assert not torch.allclose(other.text_features(tokens), texts, atol=1e-3)


def names_with_gradient(adapters: Adapters) -> set[str]:
    given = {n: p.grad for n, p in adapters.named_parameters() if p.grad is not None}
    return {name.partition(".")[0] for name, grad in given.items() if grad.abs().max() > 0}


def test_the_shared_layer_learns_from_either_tower(encoders: dict[str, Encoder]) -> None:
    towers = towers_of(encoders["clip"])
    towers.text_features(encoders["clip"].tokenize(TEXTS)).square().sum().backward()
    assert names_with_gradient(towers.adapters) == {"text_adapter", "shared_adapter"}
    towers.zero_grad()
    towers.video_features(frames_for()).square().sum().backward()
    assert names_with_gradient(towers.adapters) == {
        *("visual_adapter", "shared_adapter", "temporal_adapter"),
    }
    trained = {name for name, p in towers.named_parameters() if p.requires_grad}
    assert trained == {f"adapters.{name}" for name, _ in towers.adapters.named_parameters()}


@pytest.mark.parametrize("form", ["a", "b", "none"])
def test_the_gradient_trick_scales_what_adapters_learn_and_nothing_below(
    encoders: dict[str, Encoder], form: Any
) -> None:
    found = {}
    for trick in (True, False):
        towers = towers_of(encoders["clip"], form=form, gradient_trick=trick).double()
        tokens = towers.tokens_before(frames_for().double()).requires_grad_()
        towers.video_features_from(tokens).pow(3).sum().backward()
        parts = {name: p.grad for name, p in towers.adapters.named_parameters()}
        found[trick] = tokens.grad, {k: v.clone() for k, v in parts.items() if v is not None}
    towers.float()
    (inner, theirs), (plain, ours) = found[True], found[False]
    assert torch.allclose(inner, plain, rtol=1e-9)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(gradient, ours[name] / TINY["scale"], rtol=1e-9, atol=1e-12), name


def test_only_the_convolution_links_the_frames_of_a_clip(encoders: dict[str, Encoder]) -> None:
    frames, order = frames_for(), [2, 0, 3, 1]
    for form in ("a", "b"):
        towers = towers_of(encoders["clip"], form=form, last=2)
        with torch.no_grad():
            forward, mixed = (towers.video_features(x) for x in (frames, frames[:, order]))
            assert not torch.allclose(forward, mixed, atol=1e-4)
            for name, value in towers.adapters.named_parameters():
                if name.startswith("temporal_adapter.") and name.endswith("weight"):
                    value.zero_()
            forward, mixed = (towers.video_features(x) for x in (frames, frames[:, order]))
            assert torch.allclose(forward, mixed, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "repeat"])
@pytest.mark.parametrize("form", ["a", "b"])
def test_the_convolution_is_that_of_the_paper(form: Any, padding: Any) -> None:
    """In the layout of the paper: (B, d, T, G, G), kernel (3,1,1), channels in groups."""
    config = MstaConfig(
        dim=8, visual_width=12, text_width=4, first=1, last=1, width=4, form=form,
        conv_padding=padding,
    )  # fmt: skip
    adapters = Adapters(config).double()
    for value in adapters.parameters():
        torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(value.numel()))
    first, patches = torch.randn(2, 3, 1, 12).double(), torch.randn(2, 3, 4, 12).double()
    got_first, got = adapters.video(1, first, patches)
    hidden, spatial = adapters._spatial("visual", 1, patches)
    conv = torch.nn.Conv3d(
        *(12 if form == "a" else 4, 12, (3, 1, 1)),
        groups=12 if form == "a" else 4,
        padding=(1, 0, 0),
        padding_mode="zeros" if padding == "zeros" else "replicate",
        dtype=torch.float64,
    )
    state = adapters.temporal_adapter["1"].state_dict()
    conv.load_state_dict({k: v.reshape(conv.state_dict()[k].shape) for k, v in state.items()})
    read = spatial if form == "a" else hidden
    maps = read.unflatten(2, (2, 2)).permute(0, 4, 1, 2, 3)
    in_time = conv(maps).permute(0, 2, 3, 4, 1).flatten(2, 3)
    assert torch.allclose(got, 0.005 * (spatial + in_time))
    assert torch.allclose(got_first, 0.005 * adapters._spatial("visual", 1, first)[1])


def test_a_still_clip_is_changed_by_a_factor_in_its_middle() -> None:
    config = MstaConfig(dim=8, visual_width=6, text_width=4, first=1, last=1, width=16, scale=1.0)
    adapters, draws = Adapters(config), torch.Generator().manual_seed(3)
    adapters.reset_parameters(draws)
    patches = torch.randn(1, 1, 5, 6, generator=draws).expand(1, 4, 5, 6)
    with torch.no_grad():
        _, got = adapters.video(1, patches[:, :1, :1], patches)
        _, spatial = adapters._spatial("visual", 1, patches)
    factor = 1 + adapters.temporal_adapter["1"].weight.detach().sum((1, 2))
    assert torch.allclose(got[:, 1:3], factor * spatial[:, 1:3], atol=1e-5)
    assert not torch.allclose(got[:, 0], factor * spatial[:, 0], atol=1e-2)


def test_a_viclip_gets_each_patch_in_the_order_of_time(encoders: dict[str, Encoder]) -> None:
    towers = towers_of(encoders["viclip"], norm=False)
    seen: list[Tensor] = []
    original = towers.adapters.video

    def video(block: int, first: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(patches)
        return original(block, first, patches)

    towers.adapters.video = video  # type: ignore[method-assign]
    tokens = torch.randn(1, 1 + 4 * 4, 64)
    with torch.no_grad():
        towers.video_features_from(tokens)
    for patch in range(4):
        for frame in range(4):
            assert torch.equal(seen[0][0, frame, patch], tokens[0, 1 + patch * 4 + frame])


@pytest.mark.parametrize("kind", ["clip", "viclip"])
def test_kept_tokens_give_the_same_embeddings(kind: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[kind]
    first = 2 if kind == "clip" else 1
    towers = towers_of(encoder, first=first, last=first)
    kept, frames = towers.tokens_before(frames_for()), frames_for()
    assert not kept.requires_grad
    wide = (2, 4, 5, 32) if kind == "clip" else (2, 17, 64)
    assert tuple(kept.shape) == wide
    with torch.no_grad():
        online = towers.video_features(frames)
        assert torch.equal(towers.video_features_from(kept), online)
        # as a store keeps them
        assert torch.allclose(towers.video_features_from(kept.half()), online, atol=2e-2)
        ids = encoder.tokenize(TEXTS)
        texts = towers.text_features_from(towers.text_tokens_before(ids), ids)
        assert torch.equal(texts, towers.text_features(ids))


@pytest.mark.parametrize("kind", ["clip", "viclip"])
@pytest.mark.parametrize(
    "changes", [{}, {"conv_class_token": True}, {"form": "b"}, {"norm": False}, {"first": 1}]
)
def test_the_last_block_makes_class_tokens_only_and_changes_nothing(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {**CLIP["text_cfg"], "layers": 2}
    monkeypatch.setitem(VICLIP["text_cfg"], "layers", 2)
    encoder = (
        load_encoder(make_encoder(tmp_path / "clip", text_cfg=text), "fp32")
        if kind == "clip"
        else load_encoder(f"viclip:{make_viclip(tmp_path / 'v.safetensors')}", "fp32")
    )
    towers = towers_of(encoder, **{"first": 2, "last": 2, **changes})

    def found() -> list[Tensor]:
        towers.zero_grad()
        video = towers.video_features(frames_for())
        video.square().sum().backward()
        return [
            video.detach(),
            *(p.grad for p in towers.adapters.parameters() if p.grad is not None),
        ]

    fewer = found()
    monkeypatch.setattr(AdaptedTowers, "_reads_class_tokens_only", lambda *_: False)
    usual = found()
    assert len(fewer) == len(usual) > 1
    for mine, other in zip(fewer, usual, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_the_lower_blocks_may_run_in_bfloat16(tmp_path: Path) -> None:
    def loaded() -> Encoder:
        return load_encoder(
            make_encoder(tmp_path / "clip", text_cfg={**CLIP["text_cfg"], "layers": 2}), "fp32"
        )

    config = MstaConfig(**{**TINY, "first": 2, "last": 2})
    exact, rounded = (
        AdaptedTowers(loaded().model, config, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    rounded.adapters.load_state_dict(exact.adapters.state_dict())
    frames = frames_for()
    low, high = rounded.video_features(frames), exact.video_features(frames)
    assert low.dtype == torch.float32
    assert not torch.equal(low, high)
    assert functional.cosine_similarity(low, high).min() > 0.99
    low.sum().backward()
    assert all(p.grad is None for n, p in rounded.named_parameters() if "clip." in n)


def test_every_choice_changes_what_comes_out(encoders: dict[str, Encoder]) -> None:
    frames = frames_for()

    def outcome(**changes: Any) -> Tensor:
        with torch.no_grad():
            return towers_of(encoders["clip"], **changes).video_features(frames)

    usual = outcome()
    choices: list[dict[str, Any]] = [
        {"form": "b"},
        {"form": "none"},
        {"conv_reads": "input"},
        {"conv_class_token": True},
        {"conv_init": "fan-in"},
        {"conv_init": "zero"},
        {"conv_padding": "repeat"},
        {"norm": False},
        {"width": 4},
        {"scale": 0.2},
    ]
    for change in choices:
        assert not torch.allclose(outcome(**change), usual, atol=1e-5), change
    for same in ({"gradient_trick": False}, {"conv_reads": "up"}):
        assert torch.equal(outcome(**same), usual)
    assert torch.equal(outcome(conv_init="zero"), outcome(form="none"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"first": 3, "last": 2}, "last must not be before first"),
        ({"last": 3}, r"no block 3 for an adapter: the image tower has 2 blocks, 1 to 2"),
        ({"form": "b", "width": 7, "visual_width": 32}, "7 does not divide"),
        ({"form": "b", "conv_reads": "up"}, "not possible with form b: use auto or hidden"),
        ({"form": "none", "conv_reads": "input"}, "not possible with form none"),
        ({"scale": -1}, "scale is -1"),
        ({"visual_width": 64}, "visual width 32, the adapters were made for visual width 64"),
        ({"dim": 64}, "embedding width 32"),
        ({"visual_width": 60000, "width": 60000, "last": 500}, "choose smaller numbers"),
    ],
)
def test_adapters_that_are_not_possible_are_refused(
    encoders: dict[str, Encoder], change: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        towers_of(encoders["clip"], **change)


class OneTower(torch.nn.Module):
    def __init__(self, visual: torch.nn.Module) -> None:
        super().__init__()
        self.visual = visual


@pytest.mark.parametrize("kind", ["resnet", "timm", "coca"])
def test_towers_that_cannot_be_adapted_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"image tower is a .* MSTA cannot adapt"):
        AdaptedTowers(OneTower(tiny_tower(kind)), MstaConfig(**TINY))
    with pytest.raises(UserError, match=r"text tower .* none that MSTA can adapt"):
        AdaptedTowers(OneTower(tiny_tower()), MstaConfig(**{**TINY, "dim": 24}))


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        (torch.zeros(2, 4, 3, 16, 16), r"must be \[clips, frames, 3, 32, 32\]"),
        (torch.zeros(4, 3, 32, 32), "are no clips"),
        (torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8), "must be preprocessed"),
        (torch.zeros(2, 3, 3, 32, 32), "clips of 3 frames .* it takes 4"),
    ],
)
def test_frames_that_do_not_fit_are_refused(
    encoders: dict[str, Encoder], frames: Tensor, match: str
) -> None:
    with pytest.raises(UserError, match=match):
        towers_of(encoders["viclip"]).video_features(frames)


def test_texts_near_their_descriptions_cost_nothing() -> None:
    rows = functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    assert consistency_loss(3 * rows, rows, 2 * rows) == pytest.approx(0, abs=1e-6)
    assert consistency_loss(rows, -rows, -rows) == pytest.approx(4)
    assert consistency_loss(rows, rows, -rows) == pytest.approx(2)


def test_the_loss_is_that_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    video, classes, near, far = (torch.randn(n, 8, generator=generator) for n in (3, 5, 5, 5))
    labels = torch.tensor([4, 1, 4])
    config = MstaConfig(dim=8, alpha=0.5)

    def losses(config: MstaConfig, described: Any = (near, far)) -> Any:
        return msta_losses(config, video, labels, classes, described, 100.0)

    found = losses(config)
    unit: Callable[[Tensor], Tensor] = functional.normalize
    right = functional.cross_entropy(100 * unit(video) @ unit(classes).T, labels)
    assert found.classification == pytest.approx(float(right))
    assert found.consistency == pytest.approx(float(consistency_loss(classes, near, far)))
    assert found.total == pytest.approx(float(right + 0.5 * found.consistency))
    few = losses(replace(config, loss_classes="batch"))
    some = [rows[[1, 4]] for rows in (classes, near, far)]
    assert few.consistency == pytest.approx(float(consistency_loss(*some)))
    assert losses(config, None).total == pytest.approx(float(right))


def test_a_head_of_adapters_is_a_small_file(tmp_path: Path) -> None:
    config = MstaConfig(**BASE)
    head = build_head(config, torch.randn(3, 512), generator=torch.Generator().manual_seed(0))
    save_head(head, tmp_path / "head.safetensors")
    assert (tmp_path / "head.safetensors").stat().st_size < 7.1e6
    again = load_head(tmp_path / "head.safetensors")
    assert again.config == config
    for name, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    clips, classes = torch.randn(2, 3, 512), torch.randn(4, 512)
    unit: Callable[[Tensor], Tensor] = functional.normalize
    with torch.no_grad():
        cosines = unit(clips.mean(1)) @ unit(classes).T
        assert torch.allclose(again(clips, classes), cosines, atol=1e-6)
    with pytest.raises(UserError, match="does not say which towers"):
        build_head(MstaConfig(dim=8))


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    config = MstaConfig(**{**TINY, "visual_width": 16, "text_width": 12})
    drawn = []
    for seed in (0, 0, 1):
        adapters = Adapters(config)
        adapters.reset_parameters(torch.Generator().manual_seed(seed))
        drawn.append(np.concatenate([p.detach().numpy().ravel() for p in adapters.parameters()]))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_the_costs_are_those_that_run(encoders: dict[str, Encoder]) -> None:
    """Multiplications of one clip, counted by torch; those of form a's convolution are not."""
    towers = towers_of(encoders["clip"], first=1, last=2, frames=4)
    torch.backends.mha.set_fastpath_enabled(False)  # whose attention is not counted
    try:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            towers.video_features(frames_for(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    found = msta_costs(towers.config, 2, 16, 32)
    conv = 4 * 4 * 3 * 32  # in the first block; the last one makes class tokens only
    # Attention reads queries and keys of 16 in 2 heads, which are 32 together, as in the formula.
    assert counted.get_total_flops() / 2 == pytest.approx(found.forward - conv, rel=1e-3)


def test_the_page_says_what_adapters_cost() -> None:
    for first, width in ((8, 128), (1, 256)):
        found = msta_costs(MstaConfig(**BASE, first=first, width=width), 12, 16)
        row = [found.below + found.above, found.adapters, found.training_step, found.cached_step]
        numbers = " | ".join(f"{value / 1e9:.1f}" for value in row)
        line = f"| {first} to 12 | {width} | {found.trained:,} | {numbers} |"
        assert line in PAGE, line


def test_the_page_says_which_share_is_trained() -> None:
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
    image, both = (sum(p.numel() for p in part.parameters()) for part in (clip.visual, clip))
    counted = {
        "the image or video tower": image,
        "both towers without the table of words": both - clip.token_embedding.weight.numel(),
        "both towers": both,
    }
    for name, size in counted.items():
        shares = " | ".join(
            f"{count / size:.1%}".replace("%", " %") for count in (1_744_000, 8_712_192)
        )
        found = re.search(rf"^\| {name}, {size / 1e6:.1f}(,[^|]*)? \| {shares} \|$", PAGE, re.M)
        assert found, (name, size, shares)
