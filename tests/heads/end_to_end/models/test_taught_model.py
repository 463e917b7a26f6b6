"""Towers that train while a teacher holds them: the step, the teacher and the mean of weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from featstore.errors import WorkError
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.kept_weights import keep_mean, read_weights
from heads.end_to_end.models.taught_model import TaughtModel
from heads.end_to_end.models.trained_texts import TrainedTexts
from heads.methods.head import build_head
from heads.methods.taco import relative_structure_loss
from heads.methods.taco.config import TacoConfig
from heads.training.ranks import Ranks
from heads.training.schedule import build_optimizer
from heads.training.state import Position, restore_state, save_state
from pipeline.clip_encoder import image_embeddings
from pipeline.encoders.sources import build_model
from pipeline.encoders.text_tower import text_embeddings
from tests.support.worlds.tiny_world import CLIP

CLASSES, DIM, FRAMES = 4, 32, 2
TOKENS = torch.tensor([[49406, 320 + n, 1000 * n + 7, 49407, *[0] * 73] for n in range(CLASSES)])


def tiny_clip() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build_model(CLIP, "test")


def taught(clip: Any, momentum: float = 0.75) -> TaughtModel:
    config = TacoConfig(dim=DIM, teacher_momentum=momentum)
    head: Any = build_head(
        config, torch.zeros(CLASSES, DIM), generator=torch.Generator().manual_seed(5)
    )
    return TaughtModel(clip, head, 14.0, texts=TrainedTexts(clip, TOKENS, [1] * CLASSES)).train()


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    frames = torch.randn(5, FRAMES, 3, 32, 32, generator=generator)
    return frames, torch.randint(CLASSES, (5,), generator=generator)


def test_steps_are_the_plain_loop() -> None:
    """Anchors, teacher before its forward pass, and losses as one would write them."""
    config = FinetuneConfig(train="both-towers", frames=FRAMES)
    model, clip = taught(tiny_clip()), tiny_clip().requires_grad_(True)
    plain: Any = copy.deepcopy(model.head)
    scale = torch.nn.Parameter(model.logit_scale.detach().clone())
    teacher = copy.deepcopy(clip)
    tuned = build_optimizer(model.head, model.tower_parameters(), config)
    towers = [p for n, p in clip.named_parameters() if n != "logit_scale"]
    mine = build_optimizer(plain, [*towers, scale], config)
    anchors = torch.Generator().manual_seed(0)
    for step in range(3):
        frames, labels = batch(step)
        draw = model.head.draw(anchors)
        assert draw.shape == (round(DIM * 200 / 512), DIM)
        terms = model.training_loss(frames, labels, torch.zeros(CLASSES, DIM), draw)
        terms.total.backward()

        images = frames.flatten(0, 1)
        video = image_embeddings(clip.visual, images).unflatten(0, (5, FRAMES)).mean(1)
        text = functional.normalize(text_embeddings(clip, TOKENS), dim=-1)
        with torch.no_grad():
            for (name, held), (_, own) in zip(
                teacher.named_parameters(), clip.named_parameters(), strict=True
            ):
                if name != "logit_scale":
                    held.copy_(0.75 * held + 0.25 * own)
            held_video = image_embeddings(teacher.visual, images).unflatten(0, (5, FRAMES)).mean(1)
            held_text = text_embeddings(teacher, TOKENS)
        video = video + plain.projection.added(video)
        cosines = functional.normalize(video, dim=-1) @ text.T
        ce = functional.cross_entropy(scale.exp() * cosines, labels)
        kl = relative_structure_loss(video, text, held_video, held_text, draw, scale)
        (ce + 0.4 * kl).backward()
        torch.testing.assert_close(terms.ce, ce, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(terms.kl, kl, rtol=1e-4, atol=1e-6)
        for optimizer in (tuned, mine):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            optimizer.step()
            optimizer.zero_grad()
    assert terms.kl > 1e-4  # the two have come apart
    for name, held in model.held().items():
        if name != "logit_scale":
            own = dict(teacher.named_parameters())[
                name.replace("image_tower.", "visual.").removeprefix("texts.")
            ]
            torch.testing.assert_close(held, own, rtol=1e-3, atol=1e-3)


def test_the_teacher_is_not_trained_and_has_no_head() -> None:
    model = taught(tiny_clip())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    held = model.held()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert held.keys() == {name for name in trained if not name.startswith("head.")}
    before = {name: value.clone() for name, value in held.items()}
    frames, labels = batch(0)
    with torch.no_grad():
        for parameter in model.image_tower.parameters():
            parameter += 1
    draw = model.head.draw(torch.Generator())
    model.training_loss(frames, labels, torch.zeros(CLASSES, DIM), draw)
    moved = model.held()["image_tower.conv1.weight"] - before["image_tower.conv1.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        model.held()["texts.positional_embedding"], before["texts.positional_embedding"]
    )
    model.train()
    assert not any(part.training for part in (model.teacher, model.image_tower))


def test_the_state_has_the_teacher(tmp_path: Path) -> None:
    config, file = FinetuneConfig(train="both-towers"), tmp_path / "state/last.safetensors"
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, other = taught(tiny_clip()), taught(tiny_clip())
    with torch.no_grad():
        for value in model.held().values():
            value += 0.5
    for which in (model, other):
        optimizer = build_optimizer(which.head, which.tower_parameters(), config)
        trained = {n: p for n, p in which.named_parameters() if p.requires_grad}
        further = which.further_state()
        if which is model:
            save_state(file, trained, optimizer, scaler, Position(), Ranks(), further)
        else:
            restore_state(file, trained, optimizer, scaler, further)
    for name, value in other.held().items():
        assert torch.equal(value, model.held()[name])
    of_run = read_weights(tmp_path, "teacher")
    assert torch.equal(of_run["image_tower.proj"], model.held()["image_tower.proj"])
    assert torch.equal(
        of_run["head.projection.linear_A.bias"],
        dict(model.named_parameters())["head.projection.linear_A.bias"],
    )


def test_the_mean_counts_every_epoch_once(tmp_path: Path) -> None:
    points = [torch.full((3,), float(value), dtype=torch.float64) for value in (0, 3, 9)]
    for epoch, value in enumerate(points):
        keep_mean(tmp_path, {"a": value}, epoch)
        keep_mean(tmp_path, {"a": value + 100}, epoch)  # trained again after a kill
    assert read_weights(tmp_path, "mean")["a"].tolist() == [4.0] * 3
    with pytest.raises(WorkError, match="holds the mean of 2 epochs, not of 4"):
        keep_mean(tmp_path, {"a": points[0]}, 5)
    (tmp_path / "state/mean.safetensors").unlink()
    with pytest.raises(WorkError, match="is gone, which holds the mean"):
        keep_mean(tmp_path, {"a": points[0]}, 3)
