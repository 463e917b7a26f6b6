"""A method that no other line knows is built, trained, saved, loaded, scored and exported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore import UserError
from heads import (
    TestSet,
    TrainConfig,
    build_head,
    evaluate_store,
    load_head,
    predict_scores,
    save_head,
    train_head,
)
from heads.files.portable import merged_head
from heads.files.run_files import read_metrics
from heads.methods import registry
from heads.methods.head import Head
from heads.methods.registry import Method
from heads.methods.settings import MethodConfig
from heads.methods.text_classifier import class_cosines, video_embeddings
from heads.recipes import Recipe
from heads.training.trainer import Trainer
from tests.support.stores.action_store import action_store


@dataclass(frozen=True)
class ToyConfig(MethodConfig):
    WHAT: ClassVar[str] = "toy"

    dim: int
    kind: str = "toy"
    width: int = 3
    modulation_neighbours: int = 0
    modulation_temperature: float = 0.05


class ToyLosses(NamedTuple):
    total: Tensor
    right: Tensor
    size: Tensor


class ToyHead(Head):
    """Adds a linear map of every frame."""

    def __init__(self, config: ToyConfig, training_classes: int) -> None:
        super().__init__(config, training_classes)
        self.narrow = nn.Linear(config.dim, config.width)
        self.widen = nn.Linear(config.width, config.dim)

    def hidden(self, features: Tensor) -> Tensor:
        return self.widen(self.narrow(features))

    def draw(self, generator: torch.Generator) -> float:
        return float(torch.rand((), generator=generator))

    def training_loss(
        self,
        features: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        logit_scale: Tensor,
        draw: float,
        subsets: Tensor | None,
        weights: Mapping[str, float],
    ) -> ToyLosses:
        assert subsets is None
        added = self.hidden(features)
        cosines = class_cosines(video_embeddings(features + added), class_embeddings)
        right = functional.cross_entropy(logit_scale.exp() * cosines, labels)
        size = added.square().mean()
        return ToyLosses(right + draw * size, right, size)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register(
        Method("toy", "Toy", ToyConfig, ToyHead, losses=("right", "size"), modulated=False)
    )


def test_a_new_method_is_trained_saved_loaded_and_scored(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    config = Recipe("toy", {"kind": "toy"}, {}, {}).head_config(16, width=4)
    recipe = TrainConfig(epochs=2, warmup_epochs=0, lr=1e-3, batch_size=4, frames=4)
    run = tmp_path / "run"
    summary = train_head(
        store, run, config, recipe, rows=store.split("train"), prompt_set="mote28", device="cpu"
    )
    assert summary.head == "toy"
    assert {"loss", "right_loss", "size_loss"} <= read_metrics(run)[0].keys()
    assert "expert_loss" not in read_metrics(run)[0]
    head = load_head(run)
    assert isinstance(head, ToyHead)
    assert head.config == ToyConfig(16, width=4)
    tests = [TestSet("all", store.split("train"))]
    result = evaluate_store(
        store,
        head,
        protocol="closeset",
        dataset=store.provenance.dataset,
        tests=tests,
        device="cpu",
    )
    assert result.kind == "toy"
    assert not result.modulate
    names = store.class_names
    scores = predict_scores(head, torch.ones(1, 4, 16), head.training_class_embeddings, names)
    assert sum(score for _, score in scores) == pytest.approx(1)
    save_head(merged_head(head), tmp_path / "out.safetensors")
    assert isinstance(load_head(tmp_path / "out.safetensors"), ToyHead)


def test_a_step_of_a_new_method_changes_its_weights() -> None:
    classes = functional.normalize(torch.randn(5, 16), dim=-1)
    head = build_head(ToyConfig(16), classes)
    trainer = Trainer.on_features(
        head, TrainConfig(epochs=1, warmup_epochs=0, lr=1e-2, batch_size=2), 1
    )
    before = {name: value.clone() for name, value in head.named_parameters()}
    draw = head.draw(torch.Generator().manual_seed(1))
    total, right, size = trainer.step(torch.randn(2, 3, 16), torch.tensor([0, 4]), draw)
    torch.testing.assert_close(total, right + draw * size)
    trainer.update(trainer.rates[0, 0])
    assert all(not torch.equal(before[name], value) for name, value in head.named_parameters())


def test_the_registry_names_its_choices() -> None:
    assert registry.names() == [
        *("mote", "transformer", "mean", "linear", "knn", "dist", "msta", "taco", "toy"),
    ]
    with pytest.raises(
        UserError, match="choose one of mote, transformer, mean, linear, knn, dist, msta, taco, toy"
    ):
        registry.method("lstm")
    with pytest.raises(UserError, match="layers is no setting of Toy"):
        Recipe("toy", {"kind": "toy"}, {}, {}).head_config(16, layers=2)
    assert registry.untrained("mean")
    assert not any(map(registry.untrained, ["mote", "toy", "lstm", None]))


def test_asking_for_a_method_loads_no_torch() -> None:
    code = (
        "import sys, heads, heads.recipes\n"
        "from heads.methods.registry import method, names\n"
        "heads.recipes.load_recipe('end-to-end').head_config(64)\n"
        "assert [method(name).title for name in names()]\n"
        "assert 'mote_loss' in dir(heads)\n"
        "loaded = {'torch', 'open_clip'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "from heads import mote_loss, build_head\n"
        "from heads.training import build_optimizer\n"
        "assert not any(name.startswith('pipeline') for name in sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True, timeout=120
    )
