"""Losses, gradients, AdamW steps and learning rates against the authors' training loop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from heads.methods.mote.losses import TrainingPass, mote_loss
from heads.training.config import TrainConfig
from heads.training.schedule import learning_rates
from heads.training.trainer import Trainer
from tests.support.golden.checks import golden_draw, golden_recipe, our_tensor, worst
from tests.support.golden.head import golden_entries, golden_head


def assert_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float, *, relative: bool
) -> None:
    """Every tensor within `limit`, absolute or relative to its largest entry.

    The key third of the packed bias is left out: its gradient is zero but for rounding, which
    Adam blows up to steps of the size of the learning rate.
    """
    for name, value in expected.items():
        ours = our_tensor(got, name).detach().double()
        value = value.double()
        if name.endswith("in_proj_bias"):
            third = len(value) // 3
            ours = torch.cat([ours[:third], ours[2 * third :]])
            value = torch.cat([value[:third], value[2 * third :]])
        scale = float(value.abs().max()) if relative else 1.0
        assert float((ours - value).abs().max()) <= limit * max(scale, 1e-30), name


@pytest.mark.parametrize("name", ["trainstep_0", "trainstep_1", "trainstep_2"])
@pytest.mark.parametrize(("suffix", "dtype"), [("f32", torch.float32), ("f64", torch.float64)])
def test_training_steps(golden: Path, name: str, suffix: str, dtype: torch.dtype) -> None:
    data = np.load(golden / f"{name}.npz")
    config = golden_recipe(json.loads(str(data["solver_json"])))
    head = golden_head(data, dtype)
    head.logit_scale.fill_(float(data["logit_scale0"]))
    text = torch.from_numpy(data["text"]).to(dtype)
    trainer = Trainer.on_features(head, config, int(data["iters_per_epoch"]), class_embeddings=text)
    rates = trainer.rates[int(data["epoch"])]
    exact = suffix == "f64"
    loss_limit, gradient_limit = (1e-12, 1e-12) if exact else (1e-4, 5e-6)
    parameter_limit = (1e-5 if exact else 0.05) * config.lr
    steps = 0
    frozen = {name: buffer.clone() for name, buffer in head.named_buffers()}
    for i, embedding in enumerate(data["vid_emb"]):
        draw = golden_draw(data, i)
        features = torch.from_numpy(embedding).to(dtype).requires_grad_()
        terms = trainer.step(features, torch.from_numpy(data["labels"][i]), draw)
        found = {
            "loss": terms.total / config.accumulation,
            "ce_expert": terms.expert,
            "ce_merged": terms.merged,
            "mse": terms.feature,
        }
        for key, value in found.items():
            assert worst(value, data[f"{key}_{suffix}"][i]) <= loss_limit, key
        if i == 0:
            assert features.grad is not None
            expected = torch.from_numpy(data[f"grad_vid_emb0_{suffix}"]).double()
            difference = (features.grad.double() - expected).abs().max() / expected.abs().max()
            assert float(difference) <= gradient_limit
            with torch.no_grad():
                passes = head.training_pass(features.detach(), text, draw)
            for cosines, key in (
                (passes.expert_cosines, "logits0"),
                (passes.merged_cosines, "logits_reg0"),
            ):
                assert cosines is not None
                assert worst(cosines, data[f"{key}_{suffix}"]) <= (1e-12 if exact else 1e-6)
        if (i + 1) % config.accumulation == 0:
            if steps == 0:
                gradients = {k: p.grad for k, p in trainer.parameters.items() if p.grad is not None}
                assert_close(
                    gradients, golden_entries(data, "grad_f64/"), gradient_limit, relative=True
                )
            np.testing.assert_allclose(rates[steps], data["lrs"][steps], rtol=0, atol=1e-15)
            trainer.update(rates[steps])
            steps += 1
            if steps == 1:
                after = golden_entries(data, "after1_f64/")
                assert_close(trainer.parameters, after, parameter_limit, relative=False)
    if last := golden_entries(data, "afterK_f64/"):
        assert_close(trainer.parameters, last, parameter_limit, relative=False)
    for key, buffer in head.named_buffers():
        assert torch.equal(buffer, frozen[key]), key


@pytest.mark.parametrize("case", range(6))
def test_learning_rates(golden: Path, case: int) -> None:
    data = np.load(golden / "lr_schedules.npz")
    meta = json.loads(str(data["meta_json"]))[case]
    config = golden_recipe(meta["solver"])
    ours = learning_rates(config, meta["iters_per_epoch"])
    assert ours.shape == data[f"lr_{case}"].shape
    assert np.abs(ours - data[f"lr_{case}"]).max() <= 1e-12 * config.lr


def test_refreshed_every_iteration_the_rate_never_stands_still() -> None:
    rates = learning_rates(TrainConfig(epochs=6, warmup_epochs=2, lr=1.0), 7)[..., 1].ravel()
    assert rates[0] == 0
    assert (np.diff(rates[:14]) > 0).all()
    assert (np.diff(rates[14:]) < 0).all()
    assert rates.max() == pytest.approx(1.0)


def test_a_run_shorter_than_its_warm_up_still_reaches_the_base_rate() -> None:
    rates = learning_rates(TrainConfig(epochs=3, lr=1.0), 40)[..., 1]
    assert rates.max() == pytest.approx(1.0)
    assert rates[-1, -1] < 0.01


def test_the_plain_transformer_has_only_the_expert_loss() -> None:
    passes = TrainingPass(torch.randn(4, 7), None, None)
    labels = torch.arange(4)
    terms = mote_loss(passes, torch.randn(4, 3, 8), labels, 100.0)
    assert terms.total == terms.expert
    assert terms.merged == terms.feature == 0
