"""Every choice of the design space does what its name says, against plain loops over experts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from featstore import UserError
from heads import (
    HeadConfig,
    RoutingDraw,
    TemporalHead,
    TestSet,
    TrainConfig,
    build_head,
    evaluate_store,
    load_head,
    mote_loss,
    save_head,
    train_head,
)
from heads.methods.mote.config import TEMPERATURES, Placement
from heads.methods.mote.experts import quick_gelu, temperature_weights
from heads.methods.mote.modulation import modulation
from heads.methods.mote.routing import expert_probabilities
from heads.methods.mote.temporal_transformer import Block
from heads.training.schedule import data_subsets
from heads.training.trainer import Trainer
from tests.support.stores.action_store import action_store

PLACEMENTS: list[Placement] = ["ffn", "separate", "up", "down"]
FEATURES = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(1))
CLASSES = functional.normalize(
    torch.randn(9, 16, generator=torch.Generator().manual_seed(2)), dim=-1
)
LABELS = torch.tensor([0, 1, 2, 3, 4, 5])

Shares = Callable[[int, str], Tensor]
"""(layer, "up" or "down") -> share of every expert [E]."""


def make_head(**config: Any) -> TemporalHead:
    """A small head whose weights are large enough to tell experts apart, biases included."""
    generator = torch.Generator().manual_seed(3)
    head = build_head(HeadConfig(**({"dim": 16, "layers": 2, "experts": 3} | config)), CLASSES)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in head.named_buffers():
            if name.endswith("fusion_logits"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return head


def blocks(head: TemporalHead) -> list[Block]:
    assert head.transformer is not None
    found = list(head.transformer.blocks)
    assert all(isinstance(block, Block) for block in found)
    return found  # type: ignore[return-value]


def project(stacked_weight: Tensor, stacked_bias: Tensor, share: Tensor, hidden: Tensor) -> Tensor:
    """Mix the weights of one projection expert by expert, then apply it."""
    if len(stacked_weight) == 1:  # shared by all experts
        return functional.linear(hidden, stacked_weight[0], stacked_bias[0])
    weight = sum(s * w for s, w in zip(share, stacked_weight, strict=True))
    bias = sum(s * b for s, b in zip(share, stacked_bias, strict=True))
    assert isinstance(weight, Tensor)
    return functional.linear(hidden, weight, bias)  # type: ignore[arg-type]


def by_hand(head: TemporalHead, features: Tensor, shares: Shares) -> Tensor:
    """`head` with merged projections, one layer after the other: [B,T,D] -> [B,T,D]."""
    assert head.transformer is not None
    hidden = features + head.transformer.positions[: features.shape[1]]
    for layer, block in enumerate(blocks(head)):
        hidden = hidden + block.attention(block.attention_norm(hidden))
        layer_weights = block.feed_forward
        inner = quick_gelu(
            project(
                layer_weights.up_weight,
                layer_weights.up_bias,
                shares(layer, "up"),
                block.feed_forward_norm(hidden),
            )
        )
        hidden = hidden + project(
            layer_weights.down_weight, layer_weights.down_bias, shares(layer, "down"), inner
        )
    return hidden + features


def cosines(frames: Tensor) -> Tensor:
    return functional.cosine_similarity(frames.mean(1)[:, None], CLASSES[None], dim=-1)


def entry(head: TemporalHead, layer: int, side: str) -> int:
    """Where a draw holds the routing of one projection."""
    routings = head.config.routings
    return layer * routings + (routings - 1 if side == "down" else 0)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (3, 5)])
def test_placement_layers_and_experts(placement: Placement, layers: int, experts: int) -> None:
    head = make_head(placement=placement, layers=layers, experts=experts)
    assert len(blocks(head)) == layers
    for block in blocks(head):
        up, down = block.feed_forward.up_weight, block.feed_forward.down_weight
        assert len(up) == (1 if placement == "down" else experts)
        assert len(down) == (1 if placement == "up" else experts)
    draw = RoutingDraw.sample(head.config, torch.Generator().manual_seed(layers))
    assert len(draw.experts) == layers * (2 if placement == "separate" else 1)

    def one(layer: int, side: str) -> Tensor:
        return torch.eye(experts)[draw.experts[entry(head, layer, side)]]

    def merged(layer: int, side: str) -> Tensor:
        return temperature_weights(draw.temperatures[entry(head, layer, side)], experts)

    def evaluated(layer: int, side: str) -> Tensor:
        logits = blocks(head)[layer].feed_forward.fusion_logits.view(-1, experts)
        return logits[-1 if side == "down" else 0].softmax(0)

    with torch.no_grad():
        passes = head.training_pass(FEATURES, CLASSES, draw)
        assert passes.merged_features is not None
        torch.testing.assert_close(passes.expert_cosines, cosines(by_hand(head, FEATURES, one)))
        torch.testing.assert_close(passes.merged_features, by_hand(head, FEATURES, merged))
        torch.testing.assert_close(head.aggregate(FEATURES), by_hand(head, FEATURES, evaluated))


def test_separate_routing_reaches_pairs_that_whole_networks_cannot() -> None:
    config = HeadConfig(dim=16, layers=2, experts=3, placement="separate", routing="uniform")
    generator = torch.Generator().manual_seed(0)
    pairs = {RoutingDraw.sample(config, generator).experts[:2] for _ in range(300)}
    assert pairs == {(up, down) for up in range(3) for down in range(3)}


def shares_drawn(config: HeadConfig, draws: int = 3000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [RoutingDraw.sample(config, generator).experts for _ in range(draws)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=config.experts)
    return counts / counts.sum()


def test_multinomial_routing_follows_any_prior() -> None:
    config = HeadConfig(dim=16, experts=4, expert_prior=(3, 0, 1, 4))
    share = shares_drawn(config)
    torch.testing.assert_close(share, torch.tensor([3, 0, 1, 4]) / 8, atol=0.02, rtol=0)
    assert share[1] == 0
    torch.testing.assert_close(expert_probabilities(config), torch.tensor([3, 0, 1, 4]) / 8)
    torch.testing.assert_close(
        expert_probabilities(HeadConfig(dim=16)), torch.arange(1.0, 5.0).softmax(0)
    )


def test_uniform_routing_is_even() -> None:
    share = shares_drawn(HeadConfig(dim=16, experts=5, routing="uniform"))
    torch.testing.assert_close(share, torch.full((5,), 0.2), atol=0.02, rtol=0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_subset_routing_gives_every_sample_its_subsets_expert(placement: Placement) -> None:
    head = make_head(routing="subset", placement=placement)
    subsets = torch.tensor([2, 0, 2, 1, 0, 2])
    draw = RoutingDraw.sample(head.config, torch.Generator().manual_seed(5))
    with torch.no_grad():
        passes = head.training_pass(FEATURES, CLASSES, draw, subsets)
        for expert in range(3):
            own = subsets == expert
            frames = by_hand(head, FEATURES, lambda layer, side, e=expert: torch.eye(3)[e])
            torch.testing.assert_close(passes.expert_cosines[own], cosines(frames)[own])
        merged = by_hand(
            head,
            FEATURES,
            lambda layer, side: temperature_weights(draw.temperatures[entry(head, layer, side)], 3),
        )
    assert passes.merged_features is not None
    assert passes.merged_cosines is not None
    torch.testing.assert_close(passes.merged_features, merged)
    torch.testing.assert_close(passes.merged_cosines, cosines(merged))


def test_subset_routing_teaches_an_expert_by_its_own_subset_only() -> None:
    head = make_head(routing="subset", layers=1)
    recipe = TrainConfig(merged_weight=0, feature_weight=0, precision="fp32")
    trainer = Trainer.on_features(head, recipe, 1)
    draw = RoutingDraw.sample(head.config, torch.Generator())
    subsets = torch.tensor([0, 0, 0, 1, 1, 1])
    trainer.step(FEATURES, LABELS, draw, subsets)
    first = blocks(head)[0].feed_forward.up_weight.grad
    assert first is not None
    first = first.clone()
    assert first[0].any()
    assert first[1].any()
    assert not first[2].any()
    trainer.optimizer.zero_grad()
    changed = FEATURES.clone()
    changed[3:] += 1.0  # samples of the other subset
    trainer.step(changed, LABELS, draw, subsets)
    second = blocks(head)[0].feed_forward.up_weight.grad
    assert second is not None
    torch.testing.assert_close(second[0], first[0])
    assert not torch.allclose(second[1], first[1])


def test_data_subsets_are_lasting_even_and_seeded() -> None:
    rows = torch.arange(9000)
    subsets = data_subsets(rows, 3, seed=7)
    share = torch.bincount(subsets, minlength=3) / len(rows)
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    some = torch.tensor([8999, 5, 5, 0])
    assert torch.equal(data_subsets(some, 3, seed=7), subsets[some])
    other = data_subsets(rows, 3, seed=8)
    assert float((other == subsets).float().mean()) == pytest.approx(1 / 3, abs=0.03)
    neighbours = (subsets[1:] == subsets[:-1]).float().mean()
    assert float(neighbours) == pytest.approx(1 / 3, abs=0.03)  # a row says nothing of the next


def test_subsets_are_given_for_subset_routing_and_only_for_it() -> None:
    head = make_head(routing="subset")
    draw = RoutingDraw.sample(head.config, torch.Generator())
    with pytest.raises(ValueError, match="subset routing needs"):
        head.training_pass(FEATURES, CLASSES, draw)
    with pytest.raises(ValueError, match="names experts"):
        head.training_pass(FEATURES, CLASSES, draw, torch.full((6,), 3))
    with pytest.raises(ValueError, match="multinomial routing takes no"):
        make_head().training_pass(FEATURES, CLASSES, draw, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("initialisation", ["different", "identical"])
def test_experts_start_different_or_identical(placement: Placement, initialisation: Any) -> None:
    config = HeadConfig(dim=64, layers=1, placement=placement, initialisation=initialisation)
    head = build_head(config, generator=torch.Generator().manual_seed(0))
    layer = blocks(head)[0].feed_forward
    for weight in (layer.up_weight, layer.down_weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        for other in weight[1:]:
            assert torch.equal(weight[0], other) == (initialisation == "identical")


def test_output_averaging_averages_outputs() -> None:
    weights, outputs = make_head(), make_head(aggregation="outputs")

    def feed_forward(block: Block, tokens: Tensor) -> Tensor:
        layer = block.feed_forward
        total = torch.zeros_like(tokens)
        for e, share in enumerate(layer.fusion_logits.softmax(0)):
            inner = functional.linear(tokens, layer.up_weight[e], layer.up_bias[e])
            given = functional.linear(quick_gelu(inner), layer.down_weight[e], layer.down_bias[e])
            total = total + share * given
        return total

    assert outputs.transformer is not None
    with torch.no_grad():
        hidden = FEATURES + outputs.transformer.positions[:4]
        for block in blocks(outputs):
            hidden = hidden + block.attention(block.attention_norm(hidden))
            hidden = hidden + feed_forward(block, block.feed_forward_norm(hidden))
        averaged = outputs.aggregate(FEATURES)
        torch.testing.assert_close(averaged, hidden + FEATURES)
        assert not torch.allclose(averaged, weights.aggregate(FEATURES), atol=1e-2)
        draw = RoutingDraw.sample(weights.config, torch.Generator())  # training is the same
        passes = [head.training_pass(FEATURES, CLASSES, draw) for head in (weights, outputs)]
    assert torch.equal(passes[0].expert_cosines, passes[1].expert_cosines)


@pytest.mark.parametrize("placement", ["separate", "up", "down"])
def test_for_single_projections_outputs_and_weights_average_to_the_same(
    placement: Placement,
) -> None:
    head = make_head(placement=placement, aggregation="outputs")
    with torch.no_grad():
        merged = make_head(placement=placement).aggregate(FEATURES)
        torch.testing.assert_close(head.aggregate(FEATURES), merged)
        # and by hand: average what the experts' projections give
        layer = blocks(head)[0].feed_forward
        tokens = torch.randn(5, 16)
        share = layer.fusion_logits.view(-1, 3)[0].softmax(0)
        if placement != "down":
            maps = [
                functional.linear(tokens, layer.up_weight[e], layer.up_bias[e]) for e in range(3)
            ]
            by_outputs = sum(s * m for s, m in zip(share, maps, strict=True))
            by_weights = project(layer.up_weight, layer.up_bias, share, tokens)
            torch.testing.assert_close(by_outputs, by_weights)


@pytest.mark.parametrize(
    ("temperatures", "expected"),
    [
        (TEMPERATURES, set(TEMPERATURES)),
        ((0.5, -2.0), {0.5, -2.0}),
        ((2.4,), {2.4}),
        ((math.inf,), {math.inf}),
        ((), {1.0}),
    ],
)
def test_temperatures_are_a_set_a_fixed_one_or_none(
    temperatures: tuple[float, ...], expected: set[float]
) -> None:
    head = make_head(temperatures=temperatures)
    generator = torch.Generator().manual_seed(0)
    draws = [RoutingDraw.sample(head.config, generator) for _ in range(300)]
    assert {t for draw in draws for t in draw.temperatures} == expected
    if len(temperatures) == 1:
        shares = temperature_weights(temperatures[0], 3)
    elif not temperatures:
        shares = torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    else:
        return
    with torch.no_grad():
        passes = head.training_pass(FEATURES, CLASSES, draws[0])
        expected_frames = by_hand(head, FEATURES, lambda layer, side: shares)
    assert passes.merged_features is not None
    torch.testing.assert_close(passes.merged_features, expected_frames)


@pytest.mark.parametrize(
    "weights",
    [(1.0, 0.5, 0.1), (1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 2.0), (0.3, 0.0, 0.1)],
)
def test_loss_terms_are_weighted_or_off(weights: tuple[float, float, float]) -> None:
    head = make_head()
    recipe = TrainConfig(
        expert_weight=weights[0],
        merged_weight=weights[1],
        feature_weight=weights[2],
        precision="fp32",
    )
    draw = RoutingDraw((0, 2), (0.6, math.inf))
    trainer = Trainer.on_features(head, recipe, 1)
    terms = trainer.step(FEATURES, LABELS, draw)
    scale = head.logit_scale.exp()
    with torch.no_grad():
        passes = head.training_pass(FEATURES, CLASSES, draw)
        assert passes.merged_cosines is not None
        assert passes.merged_features is not None
        parts = (
            functional.cross_entropy(scale * passes.expert_cosines, LABELS),
            functional.cross_entropy(scale * passes.merged_cosines, LABELS),
            ((passes.merged_features - FEATURES) ** 2).mean(),
        )
    for got, part in zip(terms[1:], parts, strict=True):
        torch.testing.assert_close(got.detach(), part)
    total = sum(w * part for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(terms.total.detach(), total)
    # expert 1 was not drawn: only the merged pass can teach it
    gradient = blocks(head)[0].feed_forward.up_weight.grad
    assert gradient is not None
    assert bool(gradient[1].any()) == bool(weights[1] or weights[2])


def test_a_term_that_is_off_cannot_spoil_the_total() -> None:
    head = make_head()
    passes = head.training_pass(FEATURES, CLASSES, RoutingDraw((0, 0), (1.2, 1.2)))
    spoilt = passes._replace(merged_cosines=passes.expert_cosines * math.nan)
    terms = mote_loss(spoilt, FEATURES, LABELS, 100.0, merged_weight=0)
    assert terms.total.isfinite()
    assert terms.merged.isnan()


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(UserError, match="all three loss weights are 0"):
        TrainConfig(expert_weight=0, merged_weight=0, feature_weight=0)
    with pytest.raises(UserError, match="plain transformer has no other loss"):
        Trainer.on_features(make_head(kind="transformer"), TrainConfig(expert_weight=0), 1)


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.05), (5, 0.05), (3, 0.5), (9, 2.0)])
def test_modulation_compares_as_many_neighbours_as_named(
    neighbours: int, temperature: float
) -> None:
    head = make_head(modulation_neighbours=neighbours, modulation_temperature=temperature)
    tested = functional.normalize(CLASSES + 0.3 * torch.randn(9, 16), dim=-1)
    video = functional.normalize(FEATURES.mean(1), dim=-1)
    factors = []
    for v in video:
        near = tested[(tested @ v).argsort(descending=True)[:neighbours]]
        trained = CLASSES[(CLASSES @ v).argsort(descending=True)[:neighbours]]
        best = [max(float(g @ f) for f in trained) for g in near]
        factors.append(math.exp(-(1 - sum(best) / neighbours) / temperature))
    with torch.no_grad():
        hidden = head.aggregate(FEATURES) - FEATURES
        expected = torch.tensor(factors)[:, None, None] * hidden + FEATURES
        torch.testing.assert_close(head.aggregate(FEATURES, tested), expected, atol=1e-4, rtol=1e-4)
        scale = modulation(FEATURES, tested, CLASSES, neighbours, temperature).scale
    torch.testing.assert_close(scale, torch.tensor(factors), atol=1e-5, rtol=1e-4)
    if neighbours > 4:
        with pytest.raises(UserError, match=f"compares the {neighbours} nearest"):
            head(FEATURES, tested[:4])


def test_modulation_off_is_off_everywhere(tmp_path: Path) -> None:
    head = make_head(modulation_neighbours=0)
    with torch.no_grad():
        few = CLASSES[:2]
        assert torch.equal(head(FEATURES, few, modulate=True), head(FEATURES, few, modulate=False))
    store = action_store(tmp_path / "toy.zarr")
    result = evaluate_store(
        store,
        head,
        protocol="zeroshot",
        dataset="toy",
        tests=[TestSet("all", store.rows)],
        device="cpu",
    )
    assert not result.modulate


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"placement": "attention"}, "placement 'attention'.*choose one of ffn, separate, up, do"),
        ({"routing": "top2"}, "routing 'top2'"),
        ({"initialisation": "zero"}, "initialisation 'zero'"),
        ({"aggregation": "max"}, "aggregation 'max'"),
        ({"expert_prior": (1, 2)}, r"expert_prior \[1.0, 2.0\] does not fit"),
        ({"expert_prior": (0, 0, 0, 0)}, "not all 0"),
        ({"expert_prior": (1, 1, 1, -1)}, "from 0 up"),
        ({"expert_prior": (1, 1, 1, math.inf)}, "from 0 up"),
        ({"routing": "uniform", "expert_prior": (1, 1, 1, 1)}, "does not fit uniform routing"),
        ({"expert_prior": "1234"}, "must be a list of numbers"),
        ({"temperatures": (0.6, 0)}, "temperature 0 divides by zero"),
        ({"temperatures": (math.nan,)}, "must be a list of numbers"),
        ({"temperatures": 0.6}, "must be a list of numbers"),
        ({"modulation_neighbours": -1}, "modulation_neighbours is -1"),
        ({"modulation_neighbours": 2.5}, "modulation_neighbours is 2.5"),
        ({"modulation_temperature": 0}, "modulation_temperature is 0"),
    ],
)
def test_impossible_designs_are_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        HeadConfig(**({"dim": 16} | config))
    assert "\n" not in str(caught.value)


class Stopped(Exception):
    pass


DESIGNS: list[dict[str, Any]] = [
    {"placement": "separate", "expert_prior": (1.0, 0.0, 2.0)},
    {"placement": "up", "routing": "uniform", "temperatures": (math.inf,)},
    {"placement": "down", "initialisation": "identical", "temperatures": ()},
    {"routing": "subset", "aggregation": "outputs", "modulation_neighbours": 2},
]


@pytest.mark.parametrize("design", DESIGNS)
def test_a_design_trains_resumes_bit_for_bit_and_comes_back_from_its_file(
    tmp_path: Path, design: dict[str, Any]
) -> None:
    store = action_store(tmp_path / "toy.zarr")
    config = HeadConfig(dim=16, layers=2, experts=3, **design)
    recipe = TrainConfig(epochs=3, warmup_epochs=1, lr=1e-3, batch_size=5, frames=4)

    def interrupt(done: int, total: int, **details: Any) -> None:
        if done > total // 2:
            raise Stopped

    def run(name: str, **options: Any) -> None:
        train_head(
            store,
            tmp_path / name,
            config,
            recipe,
            rows=store.split("train"),
            prompt_set="mote28",
            device="cpu",
            **options,
        )

    run("whole")
    with pytest.raises(Stopped):
        run("broken", progress=interrupt)
    run("broken", resume=True)
    heads = [load_head(tmp_path / name) for name in ("whole", "broken")]
    assert heads[0].config == heads[1].config == config
    first, second = (head.state_dict() for head in heads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert all(math.isfinite(loss) for loss in losses)


def test_configurations_are_strict_json() -> None:
    for design in [{}, *DESIGNS]:
        config = HeadConfig(dim=16, experts=3, **design)
        text = json.dumps(config.to_json(), allow_nan=False)
        assert HeadConfig.from_json(json.loads(text)) == config


def test_what_is_said_about_experts_is_dropped_for_a_plain_transformer() -> None:
    config = HeadConfig(dim=16, kind="transformer", routing="uniform", placement="up")
    assert config == HeadConfig(dim=16, kind="transformer")


def test_head_files_from_before_the_design_space_still_load(tmp_path: Path) -> None:
    head = make_head()
    old = {
        name: value
        for name, value in head.config.to_json().items()
        if name in ("dim", "kind", "layers", "experts", "attention_heads", "positions")
    }
    card = {"format": 1, "head": old, "origin": None}
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    save_file(tensors, tmp_path / "head.safetensors", metadata={"mote": json.dumps(card)})
    loaded = load_head(tmp_path)
    assert loaded.config == head.config
    with torch.no_grad():
        assert torch.equal(loaded(FEATURES, CLASSES), head(FEATURES, CLASSES))


def test_a_run_begun_before_the_design_space_is_continued(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    config = HeadConfig(dim=16, layers=1, experts=2)
    recipe = TrainConfig(epochs=1, batch_size=8, frames=4)
    arguments: dict[str, Any] = {"rows": store.split("train"), "prompt_set": "mote28"}
    train_head(store, tmp_path / "run", config, recipe, **arguments)
    file = tmp_path / "run" / "config.json"
    settings = json.loads(file.read_text())
    for name in ("placement", "routing", "temperatures"):
        del settings["head"][name]
    file.write_text(json.dumps(settings))
    again = train_head(store, tmp_path / "run", config, recipe, resume=True, **arguments)
    assert again.resumed_from == 1
    other = replace(config, placement="up")
    with pytest.raises(UserError, match=r'head\.placement is "ffn" in the run, asked for "up"'):
        train_head(store, tmp_path / "run", other, recipe, resume=True, **arguments)


def test_a_mixed_design_survives_its_file(tmp_path: Path) -> None:
    head = make_head(placement="separate", temperatures=(0.5, math.inf))
    save_head(head, tmp_path / "head.safetensors")
    loaded = load_head(tmp_path)
    assert loaded.config == head.config
    with torch.no_grad():
        assert torch.equal(loaded(FEATURES, CLASSES), head(FEATURES, CLASSES))
