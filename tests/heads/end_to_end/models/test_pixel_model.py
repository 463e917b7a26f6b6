"""DiST beside a frozen tower: losses, what a step keeps and changes, rates and decay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featstore.errors import UserError
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.finetune import end_to_end_trainer
from heads.end_to_end.models.pixel_model import (
    PixelHeadModel,
    pixel_head_config,
    require_pixel_training,
    tower_precision,
)
from heads.methods.dist import DistModel, RateSchedule, parameter_groups, training_step_parts
from heads.methods.dist.config import DistConfig
from heads.methods.dist.training import draw_mix
from heads.methods.head import build_head
from heads.recipes import load_recipe
from heads.training.ranks import Ranks
from heads.training.schedule import draw_generator, learning_rates
from heads.training.trainer import Trainer
from pipeline.video_clips.loader import ClipBatch
from tests.heads.end_to_end.test_finetuner import Clips, equal, weights
from tests.support.worlds.tiny_towers import CLASSES, DIM, SIZE, class_embeddings, tiny_tower

FRAMES = 4
BRANCH = DistConfig(dim=DIM, integration_dim=32, temporal_dim=8, pooling_layers=1)
CONFIG = FinetuneConfig(
    epochs=3,
    warmup_epochs=1,
    warmup_start=1e-5,
    schedule="whole-wave",
    lr=3e-3,
    weight_decay=0.1,
    batch_size=3,
    frames=FRAMES,
    train="head",
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
)


def pixel_model(precision: str = "fp32", **changes: Any) -> PixelHeadModel:
    tower = tiny_tower()
    config = pixel_head_config(replace(BRANCH, **changes), CONFIG, tower)
    head = build_head(config, class_embeddings(), generator=torch.Generator().manual_seed(2))
    return PixelHeadModel(tower, head, 100.0, train="head", precision=precision)


def clip_batch(number: int, good: int = 3) -> ClipBatch:
    generator = torch.Generator().manual_seed(number)
    return ClipBatch(
        frames=torch.randn(good, FRAMES, 3, SIZE, SIZE, generator=generator),
        labels=torch.randint(CLASSES, (good,), generator=generator),
        positions=torch.arange(good) + 10 * number,
        keys=tuple(f"clip{number}.{i}" for i in range(good)),
        failed=(),
    )


def trainer(folder: Path, clips: Clips, config: FinetuneConfig = CONFIG, **more: Any) -> Trainer:
    streamed: Any = clips
    return end_to_end_trainer(
        pixel_model(), config, streamed, "bf16", Ranks(), False, run_dir=folder / "run", **more
    )


def test_the_loss_is_that_of_the_parts() -> None:
    model, batch, classes = pixel_model().train(), clip_batch(0), class_embeddings()
    terms = model.training_loss(batch.frames, batch.labels, classes, 5, **CONFIG.mixing)
    mix = draw_mix(np.random.RandomState(5), SIZE, SIZE)
    dist: DistModel = model.dist
    parts = training_step_parts(dist, batch.frames, batch.labels, classes, mix)
    assert mix is not None
    assert torch.equal(terms.total, parts.loss)
    plain = model.training_loss(batch.frames, batch.labels, classes, 5).total
    logits = dist(batch.frames, classes)
    wanted = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert plain.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_evaluation_is_the_cosine_of_the_video_features() -> None:
    model, batch, classes = pixel_model().eval(), clip_batch(1), class_embeddings()
    with torch.no_grad():
        found = model(batch.frames, classes)
        wanted = model.dist(batch.frames, classes) / math.exp(model.logit_scale.item())
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_tower_runs_in_its_precision_and_leaves_nothing_behind(precision: str) -> None:
    model, batch = pixel_model(precision).train(), clip_batch(2)
    before = {name: value.clone() for name, value in model.image_tower.state_dict().items()}
    blocks: Any = model.image_tower
    seen: list[tuple[bool, torch.dtype]] = []
    for block in blocks.transformer.resblocks:
        block.register_forward_hook(
            lambda _, given, made: seen.append((torch.is_inference_mode_enabled(), made.dtype))
        )
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model.training_loss(batch.frames, batch.labels, class_embeddings(), 1).total
    loss.backward()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert seen == [(True, dtype)] * 3
    own = {p.untyped_storage().data_ptr() for p in model.image_tower.parameters()}
    assert not any(value.untyped_storage().data_ptr() in own for value in kept)
    # The hidden layers of the tower are 4 * 64 wide, and none of the branch's is.
    assert not any(value.shape[-1] == 4 * 64 for value in kept if value.ndim)
    assert all(p.grad is None for p in model.image_tower.parameters())
    assert model.logit_scale.grad is None
    after = model.image_tower.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # Only what the branch reads is kept, however deep the tower is.
    assert pixel_model(selected_layers=(0,)).kept_bytes() < 0.6 * pixel_model().kept_bytes()


def test_steps_are_the_published_ones(tmp_path: Path) -> None:
    """Groups, decay, rates and mixing of an epoch as one would write them."""
    clips = Clips([clip_batch(n) for n in range(4)])
    tuned = trainer(tmp_path, clips)
    for _ in range(2):
        tuned.run_epoch()
        tuned.next_epoch()
    plain = pixel_model().train()
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    groups = parameter_groups(plain.dist.branch, CONFIG.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    course = RateSchedule(base=3e-4, epochs=3, warmup=1, start=1e-6)
    for epoch in range(2):
        draws = draw_generator(CONFIG.seed, epoch)
        for number, batch in enumerate(clips.batches):
            seed = int(torch.randint(2**32, (), generator=draws))
            mix = draw_mix(np.random.RandomState(seed), SIZE, SIZE)
            classes = class_embeddings()
            parts = training_step_parts(plain.dist, batch.frames, batch.labels, classes, mix)
            parts.loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 10 * course.rate(epoch + number / 4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    found, wanted = weights(tuned), {n: p.detach() for n, p in plain.named_parameters()}
    worst = max(float((found[n] - wanted[n]).abs().max()) for n in wanted)
    assert worst < 1e-6
    changed = {n for n, value in start.items() if not torch.equal(found[n], value)}
    assert len(changed) > 40
    assert not any(n.startswith("image_tower.") or n == "logit_scale" for n in changed)
    assert not any("integration2temporal_nets.2." in n for n in changed)  # it is never used


def test_it_learns_what_it_sees(tmp_path: Path) -> None:
    alone = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
    config = replace(CONFIG, epochs=40, lr=1e-2, weight_decay=0.0, **alone)
    tuned = trainer(tmp_path, Clips([clip_batch(n) for n in range(2)]), config, kept=False)
    tuned.train(lambda epoch: {})
    losses = [record["loss"] for record in tuned.position.metrics]
    assert losses[-1] < 0.1 * losses[0]


def test_the_schedule_is_the_published_one() -> None:
    config = load_recipe("dist-k400-vit-b16").finetune_config()
    rates = learning_rates(config, 100)
    assert rates.shape == (36, 100, 2)
    for epoch, step in ((0, 0), (3, 50), (5, 99), (6, 0), (20, 7), (35, 99)):
        wanted = 10 * RateSchedule().rate(epoch + step / 100)
        assert rates[epoch, step, 1] == pytest.approx(wanted, rel=1e-12, abs=1e-18)
    assert rates[6, 0, 1] == pytest.approx(2.9856e-4, rel=1e-4)
    assert rates[0, 0, 1] == pytest.approx(8e-7)


def test_resuming_inside_an_epoch_changes_no_bit(tmp_path: Path) -> None:
    batches = [clip_batch(n) for n in range(5)]
    whole = trainer(tmp_path / "a", Clips(batches))
    whole.run_epoch()

    class Stopped(Exception):
        pass

    first = trainer(tmp_path / "b", Clips(batches), checkpoint_every=2)
    saves = first.save

    def stop() -> None:
        saves()
        raise Stopped

    first.save = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.run_epoch()
    second = trainer(tmp_path / "b", Clips(batches))
    assert second.resume()
    assert second.position.step == 2
    second.run_epoch()
    assert equal(weights(whole), weights(second))
    assert whole.position.sums == second.position.sums


def test_checkpointing_keeps_less_and_changes_no_bit() -> None:
    batch, found = clip_batch(0), []
    for on in (False, True):
        tower = tiny_tower()
        head = build_head(
            pixel_head_config(BRANCH, CONFIG, tower),
            class_embeddings(),
            generator=torch.Generator().manual_seed(2),
        )
        model = PixelHeadModel(tower, head, 100.0, checkpointing=on).train()
        model.training_loss(batch.frames, batch.labels, class_embeddings(), 1).total.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((model.kept_bytes(), gradients))
    (kept, plain), (less, again) = found
    assert less < 0.75 * kept
    assert plain.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_no_pooling_blocks_leave_most_weights_without_a_gradient() -> None:
    model, batch = pixel_model(pooling_layers=0).train(), clip_batch(0)
    model.training_loss(batch.frames, batch.labels, class_embeddings(), 0).total.backward()
    assert any(p.grad is None for p in model.dist.branch.parameters())
    assert not model.uses_all  # so that several processes do not wait for the others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "tower"}, "--train tower is not possible: leave it out"),
        ({"train": "tower-last-1"}, "keeps the tower as it is"),
        ({"shard": "fsdp"}, "--shard fsdp spreads a trained tower"),
        ({"frames": 6}, "6 frames do not fit the head to begin with, which takes 4: use --frames"),
    ],
)
def test_settings_that_a_frozen_tower_cannot_follow(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_pixel_training(pixel_model().head, replace(CONFIG, **changes))


def test_frames_and_layers_that_are_not_possible() -> None:
    with pytest.raises(UserError, match="5 frames are not divisible by alpha 2"):
        pixel_head_config(BRANCH, replace(CONFIG, frames=5), tiny_tower())
    with pytest.raises(UserError, match="selected layer 3 is out of range: the image tower has 3"):
        pixel_model(selected_layers=(0, 3))


def test_the_towers_number_type_does_not_depend_on_a_measurement() -> None:
    cpu = torch.device("cpu")
    assert tower_precision(replace(CONFIG, precision="fp16"), 512, cpu) == "fp16"
    assert tower_precision(CONFIG, 32, cpu) == "fp32"
    assert tower_precision(CONFIG, 512, cpu) in ("bf16", "fp32")


def test_labels_that_the_class_texts_do_not_have() -> None:
    model, batch = pixel_model(), clip_batch(0)
    with pytest.raises(UserError, match="labels from 0 to 9 do not fit a list of 7 classes"):
        training_step_parts(
            model.dist, batch.frames, torch.tensor([0, 3, 9]), class_embeddings(), None
        )
