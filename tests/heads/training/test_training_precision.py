"""Precisions of end-to-end training: what is chosen, what stays float32, how float16 is scaled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featstore.errors import UserError
from heads.arithmetic import autocast, resolve_training_precision, scaler
from heads.end_to_end.config import FinetuneConfig
from heads.training.config import TrainConfig
from heads.training.schedule import build_optimizer
from tests.support.worlds.tiny_towers import DRAW, class_embeddings, clips, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_takes_what_the_device_has(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert resolve_training_precision("auto", GPU) == ("bf16" if has_bf16 else "fp16")
    assert resolve_training_precision("auto", CPU) == "fp32"
    for precision in ("fp32", "bf16", "fp16"):
        assert resolve_training_precision(precision, GPU) == precision
        assert resolve_training_precision(precision, CPU) == precision
    with pytest.raises(UserError, match="'amp' is unknown: choose one of auto, fp32, bf16, fp16"):
        FinetuneConfig(precision="amp")  # type: ignore[arg-type]


def test_only_float16_is_scaled() -> None:
    assert scaler("fp16", CPU).is_enabled()
    for precision in ("fp32", "bf16"):
        idle = scaler(precision, CPU)
        assert not idle.is_enabled()
        assert idle.scale(torch.tensor(3.0)) == 3.0


class Loop:
    """The loop that every precision shares."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.model = tiny_model()
        config = TrainConfig(lr=1e-3)
        self.optimizer = build_optimizer(self.model.head, self.model.tower_parameters(), config)
        self.scaler = scaler(precision, CPU)

    def step(self) -> dict[str, Tensor]:
        """One step; its gradients."""
        with autocast(self.precision, CPU):
            terms = self.model.training_loss(*clips(), class_embeddings(), DRAW)
        assert {term.dtype for term in terms} == {torch.float32}
        self.scaler.scale(terms.total).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        assert {p.dtype for p in self.model.parameters()} == {torch.float32}
        return gradients

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize("precision", LOW)
def test_low_precision_gives_nearly_the_gradients_of_float32(precision: str) -> None:
    exact, low = Loop("fp32"), Loop(precision)
    if precision == "fp16":
        low.scaler.load_state_dict(low.scaler.state_dict() | {"scale": 256.0})
    pair = [loop.step() for loop in (exact, low)]
    together = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in pair]
    assert torch.nn.functional.cosine_similarity(*together, dim=0) > 0.999


def test_steps_that_overflow_are_skipped_until_the_scale_fits() -> None:
    loop = Loop("fp16")
    start, skipped = loop.parameters(), 0
    while not all(gradient.isfinite().all() for gradient in loop.step().values()):
        skipped += 1
        assert loop.scaler.get_scale() == 65536 / 2**skipped
        for name, value in loop.parameters().items():
            assert torch.equal(value, start[name]), name
    assert 0 < skipped < 16
    moved = loop.parameters()
    assert all(value.isfinite().all() for value in moved.values())
    assert not torch.equal(moved["logit_scale"], start["logit_scale"])


@pytest.mark.parametrize("precision", LOW)
def test_the_tower_computes_low_and_cosines_are_float32(precision: str) -> None:
    model, (frames, _) = tiny_model(), clips()
    with autocast(precision, CPU):
        features = model.encode(frames)
        passes = model.head.training_pass(features, class_embeddings(), DRAW)
        evaluated = model.eval()(frames, class_embeddings())
    assert features.dtype == LOW[precision]
    assert passes.expert_cosines.dtype == evaluated.dtype == torch.float32
    assert passes.merged_features is not None
    assert passes.merged_features.dtype == torch.float32
    rounded = passes.expert_cosines.to(LOW[precision]).float()
    assert not torch.equal(passes.expert_cosines, rounded)
