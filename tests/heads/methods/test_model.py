"""What the head promises besides its numbers: caching, kinds, shapes, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore import UserError
from heads import HeadConfig, RoutingDraw, TemporalHead, build_head
from heads.arithmetic import resolve_precision
from heads.methods.mote.config import TEMPERATURES
from heads.methods.mote.experts import ExpertFeedForward, temperature_weights
from heads.methods.mote.routing import expert_probabilities


def small_head(seed: int = 0, **config: Any) -> TemporalHead:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.nn.functional.normalize(torch.randn(7, 16, generator=generator), dim=-1)
    config = {"dim": 16, "layers": 2, "experts": 3} | config
    return build_head(HeadConfig(**config), classes, generator=generator)


FEATURES = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(1))
CLASSES = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("dim", "layers", "expected"), [(512, 4, 37_845_504), (768, 6, 127_590_144)]
)
def test_released_sizes(dim: int, layers: int, expected: int) -> None:
    with torch.device("meta"):
        head = TemporalHead(HeadConfig(dim=dim, layers=layers), 400)
    assert sum(p.numel() for p in head.parameters()) == expected


def test_defaults_follow_the_width() -> None:
    assert HeadConfig(dim=512).attention_heads == 8
    assert HeadConfig(dim=32).attention_heads == 1
    assert HeadConfig(dim=200).attention_heads == 2  # 3 does not divide 200
    assert HeadConfig(dim=64, kind="transformer").experts == 1
    assert HeadConfig(dim=64, kind="mean").layers == 0


@pytest.mark.parametrize(
    "config",
    [{"dim": 0}, {"dim": 16, "layers": 0}, {"dim": 16, "attention_heads": 3}, {"kind": "lstm"}],
)
def test_impossible_configurations_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        HeadConfig(**({"dim": 16} | config))


@given(st.builds(HeadConfig, dim=st.integers(1, 512), kind=st.sampled_from(["mote", "mean"])))
def test_configurations_survive_json(config: HeadConfig) -> None:
    assert HeadConfig.from_json(config.to_json()) == config


def test_initialisation() -> None:
    head = build_head(HeadConfig(dim=64, layers=1), generator=torch.Generator().manual_seed(0))
    state = head.state_dict()
    block = "transformer.blocks.0."
    assert float(state[f"{block}feed_forward.up_weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(state[f"{block}attention.out_weight"].std()) == pytest.approx(0.02, rel=0.05)
    xavier = math.sqrt(2 / (64 + 3 * 64))
    assert float(state[f"{block}attention.qkv_weight"].std()) == pytest.approx(xavier, rel=0.05)
    experts = state[f"{block}feed_forward.up_weight"]
    assert not torch.equal(experts[0], experts[1])
    assert float(head.logit_scale.exp()) == pytest.approx(100.0)


def test_without_a_transformer_the_output_is_the_input() -> None:
    head = small_head(kind="mean")
    assert torch.equal(head.aggregate(FEATURES, CLASSES[:2]), FEATURES)
    expected = torch.nn.functional.cosine_similarity(
        FEATURES.mean(1)[:, None], CLASSES[None], dim=-1
    )
    torch.testing.assert_close(head(FEATURES, CLASSES), expected)
    assert list(head.parameters()) == []


def test_merged_weights_follow_every_change_of_a_weight() -> None:
    layer = ExpertFeedForward(HeadConfig(dim=8, experts=3)).eval()
    layer.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        first = layer(x)
        merged = layer.evaluation_weights()
        assert layer.evaluation_weights() is merged
        layer.up_weight.mul_(2)
        assert layer.evaluation_weights() is not merged
        assert not torch.equal(layer(x), first)
        layer.fusion_logits.copy_(torch.tensor([9.0, 0.0, 0.0]))
        only_first = layer(x, torch.tensor([[1.0, 0.0, 0.0]]))
        torch.testing.assert_close(layer(x), only_first, atol=0.02, rtol=0.1)
        layer.load_state_dict(ExpertFeedForward(layer.config).requires_grad_(False).state_dict())
        before = layer.evaluation_weights()
        layer.train()
        layer.eval()
        assert layer.evaluation_weights() is not before


def test_evaluation_passes_gradients_on_when_asked() -> None:
    head = small_head()
    with torch.no_grad():
        head(FEATURES, CLASSES, modulate=False)  # fills the memory
    head(FEATURES, CLASSES, modulate=False).sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_merged_evaluation_equals_the_merged_pass_at_infinite_temperature() -> None:
    head = small_head()
    passes = head.training_pass(FEATURES, CLASSES, RoutingDraw((0, 2), (math.inf, math.inf)))
    assert passes.merged_cosines is not None
    torch.testing.assert_close(passes.merged_cosines, head(FEATURES, CLASSES, modulate=False))
    assert not torch.equal(passes.expert_cosines, passes.merged_cosines)


def test_the_plain_transformer_trains_what_it_evaluates() -> None:
    head = small_head(kind="transformer")
    draw = RoutingDraw.sample(head.config, torch.Generator())
    passes = head.training_pass(FEATURES, CLASSES, draw)
    assert passes.merged_cosines is None
    torch.testing.assert_close(passes.expert_cosines, head(FEATURES, CLASSES, modulate=False))


def test_modulation_with_the_training_classes_changes_nothing() -> None:
    head = small_head()
    classes = head.training_class_embeddings
    modulated, plain = head(FEATURES, classes), head(FEATURES, classes, modulate=False)
    torch.testing.assert_close(modulated, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["tested", "training"])
def test_modulation_needs_five_classes_on_both_sides(side: str) -> None:
    head = small_head()
    tested = CLASSES
    if side == "tested":
        tested = CLASSES[:4]
    else:
        head = build_head(head.config, CLASSES[:4])
    with pytest.raises(UserError, match=r"there are \d tested and \d training.*--no-modulate"):
        head(FEATURES, tested)
    assert head(FEATURES, tested, modulate=False).shape == (5, len(tested))


def test_draws_follow_the_prior_and_the_generator() -> None:
    config = HeadConfig(dim=16, layers=4, experts=4)
    generator = torch.Generator().manual_seed(0)
    draws = [RoutingDraw.sample(config, generator) for _ in range(3000)]
    share = torch.bincount(torch.tensor([d.experts for d in draws]).flatten(), minlength=4) / 12000
    torch.testing.assert_close(
        share, expert_probabilities(HeadConfig(dim=64, experts=4)), atol=0.02, rtol=0
    )
    seen = [t for d in draws for t in d.temperatures]
    assert all(abs(seen.count(t) / len(seen) - 1 / 11) < 0.02 for t in TEMPERATURES)
    again = RoutingDraw.sample(config, torch.Generator().manual_seed(0))
    assert again == draws[0]


@given(st.sampled_from(TEMPERATURES), st.integers(1, 9))
def test_merging_weights_are_a_mean(temperature: float, experts: int) -> None:
    weights = temperature_weights(temperature, experts)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    order = weights.sort(descending=temperature < 0).values
    assert torch.equal(weights, order)


def test_wrong_shapes_are_refused() -> None:
    head = small_head()
    with pytest.raises(UserError, match=r"features of shape \[5, 4, 8\]"):
        head(FEATURES[..., :8], CLASSES)
    with pytest.raises(UserError, match="class embeddings of shape"):
        head(FEATURES, CLASSES[:, :8])
    with pytest.raises(UserError, match="78 frames"):
        head(torch.zeros(1, 78, 16), CLASSES)
    with pytest.raises(ValueError, match="one of each per layer"):
        head.training_pass(FEATURES, CLASSES, RoutingDraw((0,), (1.2,)))
    with pytest.raises(ValueError, match="names experts"):
        head.training_pass(FEATURES, CLASSES, RoutingDraw((0, 3), (1.2, 1.2)))


def test_half_precision_features_are_taken() -> None:
    head = small_head()
    torch.testing.assert_close(
        head(FEATURES.half(), CLASSES), head(FEATURES.half().float(), CLASSES)
    )


def test_autocast_stays_close() -> None:
    head = small_head()
    with torch.no_grad():
        exact = head(FEATURES, CLASSES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = head(FEATURES, CLASSES)
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).abs().max()) < 0.02


def test_narrow_heads_stay_in_float32_on_a_cpu() -> None:
    assert resolve_precision("auto", 64, torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", 64, torch.device("cpu")) == "bf16"
