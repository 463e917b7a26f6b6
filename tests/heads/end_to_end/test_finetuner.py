"""The steps of end-to-end training on batches made by hand: weights, schedule, stops, state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.errors import UserError, WorkError
from heads.end_to_end import EndToEndModel
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.finetune import end_to_end_trainer
from heads.end_to_end.models.trained_texts import TrainedTexts
from heads.end_to_end.sharding import sharded
from heads.files.run_files import BEST_FILE
from heads.methods.head import build_head
from heads.methods.mote.config import HeadConfig
from heads.methods.mote.routing import RoutingDraw
from heads.training.ranks import Ranks, contact, joined
from heads.training.schedule import build_optimizer, draw_generator, learning_rates
from heads.training.state import restore_weights, save_weights
from heads.training.trainer import Trainer
from pipeline.encoders.sources import build_model
from pipeline.video_clips.loader import ClipBatch
from tests.support.worlds.tiny_world import CLIP

CLASSES, DIM, FRAMES = 6, 32, 2
CONFIG = FinetuneConfig(epochs=3, warmup_epochs=1, lr=1e-3, batch_size=4, frames=FRAMES)


def batch(number: int, good: int, failed: int = 0) -> ClipBatch:
    generator = torch.Generator().manual_seed(number)
    return ClipBatch(
        frames=torch.randn(good, FRAMES, 3, 32, 32, generator=generator),
        labels=torch.randint(CLASSES, (good,), generator=generator),
        positions=torch.arange(good) + 10 * number,
        keys=tuple(f"clip{number}.{i}" for i in range(good)),
        failed=tuple((f"bad{number}.{i}", "broken") for i in range(failed)),
        waited=0.25,
    )


@dataclass
class Clips:
    """Stands in for `ClipStream`: the same batches in every epoch."""

    batches: list[ClipBatch]
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def n_listed(self) -> int:
        return sum(len(b.keys) + len(b.failed) for b in self.batches)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[ClipBatch]:
        self.asked.append((epoch, start))
        yield from self.batches[start:]


def model(kind: str = "mote", train: str = "tower", **more: Any) -> EndToEndModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip: Any = build_model(CLIP, "test")
        for parameter in clip.visual.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        classes = torch.nn.functional.normalize(torch.randn(CLASSES, DIM), dim=-1)
    config = HeadConfig(dim=DIM, kind=kind, layers=1, experts=2, **more)  # type: ignore[arg-type]
    head = build_head(config, classes, generator=torch.Generator().manual_seed(5))
    texts = None
    if train == "both-towers":
        tokens = torch.tensor(
            [[49406, 320 + n, 1000 * n, 49407, *[0] * 73] for n in range(CLASSES)]
        )
        texts = TrainedTexts(clip, tokens, [1] * CLASSES)
    return EndToEndModel(clip.visual, head, 14.0, train=train, texts=texts)


def finetuner(
    folder: Path,
    clips: Clips,
    config: FinetuneConfig = CONFIG,
    precision: str = "fp32",
    **more: Any,
) -> Trainer:
    made = more.pop("model", None) or model()
    streamed: Any = clips
    return end_to_end_trainer(
        made, config, streamed, precision, Ranks(), False, run_dir=folder / "run", **more
    )


def weights(trained: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_epochs_are_the_plain_loop(tmp_path: Path, accumulation: int) -> None:
    """Schedule, draws, groups and means as one would write them.

    Of three batches in groups of two, the third is carried over into the next epoch.
    """
    config = replace(CONFIG, accumulation=accumulation)
    clips = Clips([batch(0, 4), batch(1, 3, failed=1), batch(2, 2)])
    tuned = finetuner(tmp_path, clips, config)
    for _ in range(2):
        tuned.run_epoch()
        assert tuned.position.pending == (2 if accumulation == 2 else 0)
        tuned.next_epoch()

    plain = model().train()
    optimizer = build_optimizer(plain.head, plain.tower_parameters(), config)
    rates = learning_rates(config, 3)
    for epoch in range(2):
        draws = draw_generator(config.seed, epoch)
        for number, part in enumerate(clips.batches, start=1):
            draw = RoutingDraw.sample(plain.head.config, draws)
            classes = plain.head.training_class_embeddings
            terms = plain.training_loss(part.frames, part.labels, classes, draw)
            (terms.total / accumulation).backward()
            if number % accumulation == 0:
                chosen = rates[epoch, number // accumulation - 1]
                for group, rate in zip(optimizer.param_groups, chosen, strict=True):
                    group["lr"] = float(rate)
                optimizer.step()
                optimizer.zero_grad()
    assert equal(weights(tuned), {n: p.detach() for n, p in plain.named_parameters()})


def test_batches_without_good_videos_change_nothing(tmp_path: Path) -> None:
    config = replace(CONFIG, warmup_epochs=0)
    tuned = finetuner(tmp_path, Clips([batch(0, 4), batch(1, 0, failed=4)]), config)
    seen: list[dict[str, torch.Tensor]] = []
    original = tuned._train_on
    tuned._train_on = lambda *a: (original(*a), seen.append(weights(tuned)))[0]  # type: ignore[method-assign]
    tuned.run_epoch()
    assert equal(seen[0], seen[1])
    assert (tuned.position.samples, tuned.position.failed) == (4, 4)
    assert tuned.position.failures["bad1.0"] == {"epoch": 1, "split": "train", "reason": "broken"}


def test_no_good_video_at_all(tmp_path: Path) -> None:
    tuned = finetuner(tmp_path, Clips([batch(0, 0, failed=2)]))
    with pytest.raises(WorkError, match=r"none of 2 training videos could be decoded \(broken\)"):
        tuned.run_epoch()


@pytest.mark.parametrize(
    ("precision", "train"), [("fp32", "tower"), ("fp16", "tower"), ("fp32", "both-towers")]
)
def test_resuming_inside_an_epoch_changes_no_bit(
    tmp_path: Path, precision: str, train: str
) -> None:
    config = replace(CONFIG, accumulation=2)
    batches = [batch(n, 4) for n in range(5)]

    memory = iter([10**9, 0, 10**9, 0])

    def tuner(folder: str, clips: Clips, **more: Any) -> Trainer:
        made = model(train=train)
        if made.texts is not None:  # what is free differs, and changes no bit either
            made.texts.keep_within(next(memory))
        return finetuner(tmp_path / folder, clips, config, precision, model=made, **more)

    whole = tuner("a", Clips(batches))
    whole.run_epoch()
    whole.next_epoch()
    whole.run_epoch()

    first = tuner("b", Clips(batches), checkpoint_every=2)
    first.run_epoch()
    first.next_epoch()
    clips = Clips(batches)
    second = tuner("b", clips, checkpoint_every=1)
    assert second.resume()
    assert (second.position.epoch, second.position.step, second.position.pending) == (0, 5, 4)
    second.run_epoch()  # nothing is left of it
    second.next_epoch()
    assert clips.asked == [(0, 5)]

    class Stopped(Exception):
        pass

    saves = second.save

    def stop() -> None:
        saves()
        raise Stopped

    second.save = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        second.run_epoch()
    clips = Clips(batches)
    third = tuner("b", clips)
    assert third.resume()
    assert (third.position.epoch, third.position.step) == (1, 2)
    third.run_epoch()
    assert clips.asked == [(1, 2)]
    assert equal(weights(whole), weights(third))
    assert whole.position.sums == third.position.sums
    assert whole.scaler.state_dict() == third.scaler.state_dict()


def test_a_loss_that_is_no_number_stops_and_keeps_the_state(tmp_path: Path) -> None:
    bad = batch(1, 2)
    bad.frames[1] = math.nan
    tuned = finetuner(tmp_path, Clips([batch(0, 4), bad]), checkpoint_every=1)
    with pytest.raises(WorkError) as caught:
        tuned.run_epoch()
    assert "the loss became nan in epoch 1, step 2, with the videos clip1.0, clip1.1" in str(
        caught.value
    )
    assert "the last good checkpoint is kept" in str(caught.value)
    again = finetuner(tmp_path, Clips([batch(0, 4), bad]))
    assert again.resume()
    assert again.position.step == 1
    assert all(p.isfinite().all() for p in again.model.parameters())


def test_a_weight_that_is_no_number_is_never_saved(tmp_path: Path) -> None:
    tuned = finetuner(tmp_path, Clips([batch(0, 4)]))
    tuned.run_epoch()
    kept = tuned.state_file.read_bytes()
    with torch.no_grad():
        tuned.logit_scale.fill_(math.inf)
    with pytest.raises(WorkError, match="a weight stopped being a number"):
        tuned.save()
    assert tuned.state_file.read_bytes() == kept


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heads.training.trainer.CHECKPOINT_EVERY_S", 0.0)
    tuned = finetuner(tmp_path, Clips([batch(n, 1) for n in range(3)]))
    saves: list[int] = []
    original = tuned.save
    tuned.save = lambda: (original(), saves.append(tuned.position.step))[0]  # type: ignore
    tuned.run_epoch()
    assert saves == [1, 2, 3]


def test_progress_says_speed_waiting_and_memory(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    began = time.perf_counter()
    tuned = finetuner(
        tmp_path,
        Clips([batch(0, 4, failed=1)]),
        progress=lambda done, total, **details: said.append({"at": (done, total), **details}),
    )
    tuned.run_epoch()
    assert said[0]["at"] == (1, 3)
    assert {"epoch", "loss", "clips_per_second", "waiting", "memory"} <= said[0].keys()
    assert said[0]["failed"] == 1
    # The first step counts with the time it took.
    assert 0 < tuned.position.seconds <= time.perf_counter() - began
    assert said[0]["clips_per_second"] == round(4 / tuned.position.seconds, 2)


def test_the_best_weights_are_those_of_their_epoch(tmp_path: Path) -> None:
    tuned = finetuner(tmp_path, Clips([batch(0, 4)]))
    file = tmp_path / BEST_FILE
    save_weights(file, tuned.parameters, 2, Ranks())
    other = model()
    with torch.no_grad():
        other.logit_scale.zero_()
    restore_weights(file, dict(other.named_parameters()), 2)
    assert equal(weights(tuned), {n: p.detach() for n, p in other.named_parameters()})
    with pytest.raises(WorkError, match="holds epoch 2, but epoch 3 is wanted"):
        restore_weights(file, dict(other.named_parameters()), 3)


def test_a_state_of_another_model_or_damaged(tmp_path: Path) -> None:
    tuned = finetuner(tmp_path, Clips([batch(0, 4)]))
    tuned.run_epoch()
    other = finetuner(tmp_path, Clips([batch(0, 4)]), model=model(kind="transformer"))
    with pytest.raises(WorkError, match="does not fit this run"):
        other.resume()
    content = tuned.state_file.read_bytes()
    tuned.state_file.write_bytes(content[: len(content) // 2])
    with pytest.raises(WorkError, match="not a complete safetensors file"):
        tuned.resume()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "text"}, "train 'text' is unknown"),
        ({"train": "both-towers", "shard": "fsdp"}, "--shard fsdp spreads the image tower alone"),
        ({"draws": "mine"}, "draws 'mine' is unknown: choose one of shared, per-rank"),
        ({"save": "all"}, "save 'all' is unknown"),
        ({"shard": "zero"}, "shard 'zero' is unknown"),
        ({"blend": 1.5}, "blend is 1.5: it must be a number from 0 to 1"),
        ({"evaluate_every": -1}, "evaluate_every is -1"),
        ({"checkpointing": 1}, "checkpointing is 1"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"save": "best", "evaluate_every": 0}, "save best needs evaluations"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)


def test_settings_come_back() -> None:
    assert FinetuneConfig.from_json(CONFIG.to_json()) == CONFIG
    with pytest.raises(UserError, match="unknown fields colour"):
        FinetuneConfig.from_json({"colour": 1})


def test_large_towers_are_sharded() -> None:
    two = Ranks(0, 2)
    with torch.device("meta"):
        large, small = torch.nn.Linear(20_000, 15_200), torch.nn.Linear(10_000, 8_700)
    assert sharded(two, "auto", large)
    assert not sharded(two, "auto", small)
    assert sharded(two, "fsdp", small)
    assert not sharded(two, "ddp", large)
    assert not sharded(Ranks(), "fsdp", large)


def test_lost_processes_are_told_from_other_errors() -> None:
    lost = r"rank 1 of 2 lost the others \(Connection closed by peer"
    with pytest.raises(WorkError, match=lost), contact(Ranks(1, 2)):
        raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    with pytest.raises(RuntimeError, match="shapes"), contact(Ranks(1, 2)):
        raise RuntimeError("shapes cannot be multiplied")


def test_an_environment_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="must be numbers"):
        joined("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WorkError, match="start them with torchrun"):
        joined("cpu")
