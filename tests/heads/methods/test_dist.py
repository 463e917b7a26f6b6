"""DiST computes what its authors' code computes, and reads their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featstore import UserError
from heads import import_dist_checkpoint
from heads.methods.dist import (
    DistModel,
    Mix,
    RateSchedule,
    parameter_groups,
    set_rates,
    training_step_parts,
)
from heads.methods.dist.branch import QuickGelu
from heads.methods.dist.config import DistConfig, ratio_of
from heads.methods.dist.head import DistHead, packed_vectors
from tests.support.golden.checks import check_folder
from tests.support.golden.dist.kinds import DIST_KINDS
from tests.support.golden.dist.model import clips_of, model_of, stored

DATA = Path(__file__).parents[2] / "data" / "golden_dist"
# Its hashes need the data sets' own lists of classes.
UNREAD = ("dist_token_hashes.json",)
CLIP, BRANCH = "backbone.base_encoder.", "backbone.base_encoder.dist_net."


@pytest.mark.parametrize("pattern", DIST_KINDS)
def test_every_number_of_the_authors_code_holds(pattern: str) -> None:
    found = list(check_folder(DATA, {pattern: DIST_KINDS[pattern]}))
    assert found
    for file, check in found:
        assert check.holds, f"{file.name}: {check}"


def test_every_golden_file_has_a_check() -> None:
    read = {path for pattern in DIST_KINDS for path in DATA.glob(pattern)}
    halves = set(DATA.glob("dist_clip_*.npz"))
    others = {path for path in DATA.iterdir() if path.name in (*UNREAD, "README.md")}
    assert {p for p in DATA.iterdir() if p.is_file()} <= read | halves | others


@pytest.fixture(scope="module")
def golden_0() -> tuple[DistModel, Tensor, Tensor]:
    """A small model, its clips [2,8,3,32,32] and class embeddings."""
    data = stored(DATA / "dist_model_0.npz")
    model, _, _ = model_of(data)
    return (
        model,
        clips_of(data["video"], torch.float32),
        torch.from_numpy(data["text_features_f32"]),
    )


def test_the_frames_between_the_slow_ones_reach_the_branch_alone(
    golden_0: tuple[DistModel, Tensor, Tensor],
) -> None:
    model, frames, _ = golden_0
    with torch.no_grad():
        v, clip = model.video_features(frames), model.frame_embeddings(frames)
        for number, changes in ((3, False), (4, True)):
            other = frames.clone()
            other[:, number] += 1
            assert not torch.allclose(model.video_features(other), v)
            assert model.frame_embeddings(other).equal(clip) != changes
        assert not torch.allclose(model.video_features(frames.flip(1)), v)
        swapped = model.video_features(frames.flip(0)).flip(0)
        assert torch.allclose(swapped, v, atol=1e-5)


def test_the_zero_shot_logits_are_the_mean_of_both(
    golden_0: tuple[DistModel, Tensor, Tensor],
) -> None:
    model, frames, text = golden_0
    with torch.no_grad():
        unit = functional.normalize(model.frame_embeddings(frames), dim=-1)
        clip = model.logit_scale.exp() * (unit @ functional.normalize(text, dim=-1).T).mean(1)
        wanted = (model(frames, text) + clip) / 2
        assert torch.allclose(model.zero_shot_logits(frames, text), wanted, atol=1e-5)


def test_training_changes_the_branch_and_keeps_nothing_of_clip(
    golden_0: tuple[DistModel, Tensor, Tensor],
) -> None:
    _, frames, text = golden_0
    model, _, _ = model_of(stored(DATA / "dist_model_0.npz"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = parameter_groups(model.branch)
    optimizer = torch.optim.AdamW(groups)
    set_rates(optimizer.param_groups, RateSchedule().rate(6.0))
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(2.9856e-4, 1e-4)
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        parts = training_step_parts(model, frames, torch.tensor([1, 4]), text, Mix(0.3))
    towers = {p.untyped_storage().data_ptr() for p in model.image_tower.parameters()}
    assert kept
    assert not {value.untyped_storage().data_ptr() for value in kept} & towers
    assert not any(value.is_inference() for value in kept)
    parts.loss.backward()
    optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not value.equal(before[n])}
    still = {n for n, p in model.named_parameters() if n.startswith("branch.") and p.grad is None}
    assert still == {f"branch.integration2temporal_nets.1.linear_fuse.{n}" for n in
                     ("weight", "bias")}  # fmt: skip
    assert changed == {n for n in before if n.startswith("branch.")} - still


def test_a_tower_in_another_type_gives_nearly_the_same(
    golden_0: tuple[DistModel, Tensor, Tensor],
) -> None:
    _, frames, text = golden_0
    model, _, _ = model_of(stored(DATA / "dist_model_0.npz"))
    with torch.no_grad():
        exact = model(frames, text)
        model.image_tower.to(torch.bfloat16)
        fast = model(frames, text)
    assert fast.dtype == torch.float32
    assert 0 < float((fast - exact).abs().max()) < 0.5


def test_quick_gelu_has_the_slope_of_its_formula() -> None:
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGelu.apply, (x,))
    assert torch.equal(QuickGelu.apply(x), torch.sigmoid(1.702 * x) * x)


@pytest.mark.parametrize("width", [96, 384, 130, 7])
def test_a_ratio_gives_back_its_hidden_width(width: int) -> None:
    for hidden in range(1, 2 * width):
        assert int(width * ratio_of(hidden, width)) == hidden


BAD_CONFIGS = {
    "frames are not divisible by alpha": {"dense_frames": 9},
    "is even: it must be odd": {"stem_kernel": 4},
    "not divisible by its 2 attention heads": {"integration_dim": 131},
    "are no blocks of a tower": {"selected_layers": (2, 1)},
    "gives a hidden width of 0": {"integration_temporal_ratio": 0.001},
    "must be a whole number": {"pooling_layers": 65},
}


@pytest.mark.parametrize("words", BAD_CONFIGS)
def test_a_configuration_that_makes_no_sense_is_refused(words: str) -> None:
    with pytest.raises(UserError, match=words):
        DistConfig(dim=512, **BAD_CONFIGS[words])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, t: (f[:, :7], t), "7 frames are not divisible by alpha 2"),
        (lambda f, t: (f[:, :6], t), "it takes 8 of 32x32"),
        (lambda f, t: (f[..., :24], t), "it takes 8 of 32x32"),
        (lambda f, t: (f[:, :, :2], t), "are no clips"),
        (lambda f, t: (f.to(torch.uint8), t), "must be preprocessed, floating"),
        (lambda f, t: (f, t[:, :5]), "do not fit a DiST model of width 32"),
    ],
)
def test_wrong_input_of_the_model_is_one_line(
    golden_0: tuple[DistModel, Tensor, Tensor],
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    words: str,
) -> None:
    model, frames, text = golden_0
    with pytest.raises(UserError, match=words):
        model(*change(frames, text))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A file in the layout that the authors released, loaded."""
    import zipfile

    folder = tmp_path_factory.mktemp("dist")
    zipfile.ZipFile(DATA / "ckpt" / "checkpoints.zip").extractall(folder)
    return dict(torch.load(folder / "DIST_tiny_released_layout.pyth", weights_only=True))


def changed(content: dict[str, Any], **tensors: Tensor | None) -> dict[str, Any]:
    """The checkpoint with other tensors, by name; None takes one out."""
    state = {**content["model_state"], **tensors}
    return {**content, "model_state": {n: v for n, v in state.items() if v is not None}}


def broken(name: str, value: Tensor | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: changed(content, **{name: value})


BROKEN = {
    "the branch does not fit DiST's released code: proj is missing": broken(BRANCH + "proj", None),
    "proj_more is extra": broken(BRANCH + "proj_more", torch.zeros(2)),
    r"temporal_nets.0.ln.weight is \[5\], not \[8\]": broken(
        BRANCH + "temporal_nets.0.ln.weight", torch.zeros(5)
    ),
    "ln_post.bias holds NaN": broken(BRANCH + "ln_post.bias", torch.full((64,), torch.nan)),
    "visual.ln_pre.weight is missing": broken(CLIP + "visual.ln_pre.weight", None),
    r"ln_final.weight is \[3\], not \[64\]": broken(CLIP + "ln_final.weight", torch.zeros(3)),
    "the CLIP has patch 4, the DiST branch was made for patch 8": broken(
        CLIP + "visual.conv1.weight", torch.zeros(64, 3, 4, 4)
    ),
    "head.weight is extra": broken("head.weight", torch.zeros(2)),
    "is no checkpoint of DiST's": lambda content: {"model_state_dict": {}, "epoch": 1},
    "says epoch -3": lambda content: {**content, "epoch": -3},
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_file_that_does_not_fit_is_refused_by_name(released: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        import_dist_checkpoint(BROKEN[words](released))
    assert "\n" not in str(caught.value)


def branch_alone(content: dict[str, Any]) -> dict[str, Any]:
    state = content["model_state"]
    return {"model_state": {n: v for n, v in state.items() if n.startswith(BRANCH)}}


def test_a_branch_alone_needs_the_clip_it_was_trained_with(released: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="holds the branch alone"):
        import_dist_checkpoint(branch_alone(released))
    clip = stored(DATA / "dist_model_1.npz")
    other = {n.removeprefix("clip/"): torch.from_numpy(v) for n, v in clip.items() if "clip/" in n}
    for content in (released, branch_alone(released)):
        with pytest.raises(UserError, match="the CLIP has width 128, the DiST branch was made for"):
            import_dist_checkpoint(content, other)


def test_selected_layers_are_told_or_asked_for() -> None:
    data = stored(DATA / "dist_model_0.npz")  # reads blocks 0 and 2 of three
    state = {CLIP + n.removeprefix("clip/"): v for n, v in data.items() if n.startswith("clip/")}
    state |= {BRANCH + n.removeprefix("dist/"): v for n, v in data.items() if n[:5] == "dist/"}
    content = {"model_state": {n: torch.from_numpy(v) for n, v in state.items()}}
    with pytest.raises(UserError, match="reads 2 of the tower's 3 blocks and does not say which"):
        import_dist_checkpoint(content)
    for wrong, words in (([0, 3], "layer 3 is out of range"), ([1], "name 2, counted from 0")):
        with pytest.raises(UserError, match=words):
            import_dist_checkpoint(content, selected_layers=wrong)
    assert import_dist_checkpoint(content, selected_layers=[0, 2]).config.selected_layers == (0, 2)
    told = {**content, "cfg": '{"VIDEO": {"BACKBONE": {"DIST": {"SELECTED_LAYERS": [0, 2]}}}}'}
    assert import_dist_checkpoint(told).config.selected_layers == (0, 2)


def test_names_from_before_the_release_are_read(released: dict[str, Any]) -> None:
    earlier = {
        "input_linears": "input_map_feat_nets",
        "integration2temporal_nets": "s2t_fuse_nets",
        "temporal2integration_nets": "t2s_fuse_nets",
        "integration_nets": "spatial_nets",
        "adapooling_nets": "final_temporal_nets",
    }

    def old(name: str) -> str:
        if not name.startswith(BRANCH):
            return name
        part, dot, rest = name.removeprefix(BRANCH).partition(".")
        return f"{CLIP}ladder_net.{earlier.get(part, part)}{dot}{rest}"

    content = {"model_state": {old(n): v for n, v in released["model_state"].items()}}
    ours, theirs = import_dist_checkpoint(content), import_dist_checkpoint(released)
    assert ours.config == theirs.config
    for name, value in theirs.model.state_dict().items():
        assert ours.model.state_dict()[name].equal(value)


def test_a_store_keeps_the_vectors_of_a_view_as_exactly_as_float32() -> None:
    video, clip = (functional.normalize(torch.randn(5, 32), dim=-1) for _ in range(2))
    head = DistHead(
        DistConfig(dim=32, width=64, patch=8, selected_layers=(0,), integration_dim=64), 0
    )
    stored_rows = packed_vectors(video, clip, 16).half().float()
    _, found, mean = head.view_vectors(stored_rows)
    assert float((found - video).abs().max()) < 1e-7
    assert float((mean - clip).abs().max()) < 1e-7
    with pytest.raises(UserError, match="8 rows a view are not what DiST made: it needs all 16"):
        head.view_vectors(stored_rows[:, :8])
    with pytest.raises(UserError, match="does not say which image tower"):
        DistHead(DistConfig(dim=32), 0)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 78, dtype=torch.int64), "token ids must be whole numbers"),
        (torch.zeros(2, 77), "token ids must be whole numbers"),
        (torch.full((2, 5), 61), "token id 61 is none of the encoder's 61"),
    ],
)
def test_token_ids_that_a_tower_lacks_are_refused(tokens: Tensor, words: str) -> None:
    _, encoder, _ = model_of(stored(DATA / "dist_model_0.npz"))
    with pytest.raises(ValueError, match=words):
        encoder.encode_tokens(tokens)
    assert encoder.encode_tokens(torch.zeros(0, 77, dtype=torch.int64)).shape == (0, 32)
