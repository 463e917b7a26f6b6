"""Evaluation merges experts once, and says and respects the arithmetic it ran in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import heads.scoring.view_summaries
from featstore import Store, UserError
from heads import EvalResult, HeadConfig, TemporalHead, TestSet, build_head, evaluate_store
from heads.methods.mote.experts import ExpertFeedForward, quick_gelu
from heads.scoring.scores import BlockScores
from tests.support.stores.action_store import action_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return action_store(tmp_path / "toy.zarr", noise=3.0, samples=64)


def lively_head(store: Store, **config: Any) -> TemporalHead:
    """A head whose contribution is large enough to be seen in the cosines."""
    text = torch.from_numpy(store.class_text("mote28").embeddings)
    generator = torch.Generator().manual_seed(0)
    head = build_head(HeadConfig(dim=16, layers=2, **config), text, generator=generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return head


def evaluate(store: Store, head: TemporalHead, **options: Any) -> EvalResult:
    return evaluate_store(
        store,
        head,
        protocol="zeroshot",
        dataset="toy",
        tests=[TestSet("all", store.rows)],
        device="cpu",
        **options,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_are_merged_once_for_a_whole_evaluation(
    store: Store, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    merges, passes = [], []
    combine, forward = ExpertFeedForward.combine, ExpertFeedForward.forward

    def counted(self: ExpertFeedForward, coefficients: Any) -> Any:
        merges.append(1)
        return combine(self, coefficients)

    def seen(self: ExpertFeedForward, *arguments: Any) -> Any:
        passes.append(1)
        return forward(self, *arguments)

    monkeypatch.setattr(ExpertFeedForward, "combine", counted)
    monkeypatch.setattr(ExpertFeedForward, "forward", seen)
    monkeypatch.setattr(heads.scoring.view_summaries, "BATCH_FRAMES", 64)  # several batches
    evaluate(store, lively_head(store), precision=precision)
    assert len(merges) == 2  # once for each layer
    assert len(passes) >= 8


def test_the_precision_is_used_and_recorded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    scores: dict[str, list[torch.Tensor]] = {"fp32": [], "bf16": []}
    compute = BlockScores.scores
    for precision, kept in scores.items():

        def keep(*arguments: Any, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(compute(*arguments))
            return kept[-1]

        monkeypatch.setattr(BlockScores, "scores", keep)
        result = evaluate(store, lively_head(store), precision=precision)
        assert result.precision == result.to_json()["precision"] == precision
    exact, low = (torch.cat(scores[name]) for name in ("fp32", "bf16"))
    assert exact.dtype == low.dtype == torch.float64
    assert not torch.equal(exact, low)
    torch.testing.assert_close(exact, low, atol=2e-3, rtol=0)
    margin = exact.topk(2, dim=1).values.diff(dim=1).abs().squeeze(1)
    clear = margin > 1e-3
    assert clear.float().mean() > 0.5
    assert torch.equal(exact.argmax(1)[clear], low.argmax(1)[clear])


def test_narrow_heads_are_evaluated_in_float32_by_default(store: Store) -> None:
    result = evaluate(store, lively_head(store))
    assert result.precision == "fp32"
    assert result == evaluate(store, lively_head(store), precision="fp32")


def test_an_unknown_precision_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match="precision 'fp8' is unknown"):
        evaluate(store, lively_head(store), precision="fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_activation_is_the_same_with_and_without_gradients(dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 1001, dtype=dtype)
    with torch.no_grad():
        low = quick_gelu(x)
    assert torch.equal(low, quick_gelu(x))
    assert torch.equal(x, torch.linspace(-9, 9, 1001, dtype=dtype))  # and its input is left alone
    torch.testing.assert_close(low, x * torch.sigmoid(1.702 * x))
