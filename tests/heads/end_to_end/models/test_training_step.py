"""The training step as processes share it: weights, parts without samples, DDP and FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heads.end_to_end import TrainingStep
from tests.support.processes.two_process_step import CASES
from tests.support.worlds.tiny_towers import DRAW, class_embeddings, clips, tiny_model

ROOT = Path(__file__).parents[4]


def test_every_term_is_weighted() -> None:
    step = TrainingStep(tiny_model(), merged_weight=0.25)
    whole = step(*clips(), class_embeddings(), DRAW)
    part = step(*clips(), class_embeddings(), DRAW, weight=0.5)
    torch.testing.assert_close(
        whole.total, whole.expert + 0.25 * whole.merged + 0.1 * whole.feature
    )
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(b, 0.5 * a)


@pytest.mark.parametrize("routing", ["multinomial", "subset"])
def test_no_samples_touch_every_parameter_and_change_none(routing: str) -> None:
    model = tiny_model(head={"routing": routing})
    frames, labels = clips()
    subsets = labels[:0] if routing == "subset" else None
    step = TrainingStep(model)
    terms = step(frames[:0], labels[:0], class_embeddings(), DRAW, subsets, weight=0.5)
    assert all(term == 0 for term in terms)
    terms.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    script = ROOT / "tests/support/processes/two_process_step.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, folder], env=environment, check=True, timeout=120)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(case: str, two_processes: Path) -> None:
    """However the samples are shared out, also when one process has none."""
    result = torch.load(two_processes / f"{case}.pt", weights_only=True)
    model = tiny_model(**CASES[case][1])
    frames, labels = clips()
    model.training_loss(frames, labels, class_embeddings(), DRAW).total.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert result["gradients"].keys() == expected.keys()
    for name, gradient in result["gradients"].items():
        wanted = expected[name]
        close = {"rtol": 0, "atol": 1e-5 * float(wanted.abs().max())}
        torch.testing.assert_close(gradient.reshape(wanted.shape), wanted, **close)
    with torch.no_grad():
        torch.testing.assert_close(result["cosines"], model.eval()(frames, class_embeddings()))
