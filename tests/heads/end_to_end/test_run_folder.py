"""A run's folder: what stops it from being begun, and the move of a first stage."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.errors import UserError
from heads.end_to_end import EndToEndModel, run_folder
from heads.end_to_end import publish as publishing
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.run_folder import (
    open_run,
    starting_head,
    write_failed_clips,
)
from heads.files.head_file import save_head
from heads.files.run_files import read_failed_clips
from heads.methods.head import build_head
from heads.methods.mote.config import HeadConfig
from heads.methods.settings import HeadOrigin
from heads.methods.weight_files import blended
from heads.training.ranks import Ranks
from pipeline.clip_encoder import load_encoder
from tests.support.worlds.tiny_world import make_encoder

SETTINGS: dict[str, Any] = {
    "mode": "finetune",
    "training": FinetuneConfig().to_json(),
    "batch": {"processes": 2, "videos_per_step": 8},
    "from_head": {"run": "r"},
}
FILES = {
    "metrics.jsonl": "{}\n",
    "state/last.safetensors": "state",
    "eval/one.json": "{}",
    "config.json": "{}",
}


def first_stage(folder: Path) -> Path:
    run = folder / "r"
    for name, text in FILES.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    save_head(build_head(HeadConfig(dim=16, layers=1)), run / "head.safetensors")
    return run


def begin(run: Path, **more: Any) -> None:
    options = {"resume": False, "continues": True} | more
    open_run(run, run.parent.parent / "encoders/r", SETTINGS, **options)


def complete(run: Path) -> bool:
    return (run / "head.safetensors").is_file() and all((run / n).is_file() for n in FILES)


class Stop(Exception):
    pass


def stopping(original: Any, left: Iterator[int]) -> Any:
    """`original`, which raises Stop once `left` has run out."""

    def called(*arguments: Any, **more: Any) -> Any:
        if next(left, None) is None:
            raise Stop
        return original(*arguments, **more)

    return called


@pytest.mark.parametrize("at", range(12))
def test_a_stopped_move_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Whatever operation it is stopped at, the first stage is complete in one of two places."""
    run = first_stage(tmp_path)
    left = iter(range(at))
    with monkeypatch.context() as patch:
        for owner, name in (
            *((Path, name) for name in ("rename", "unlink")),
            *((run_folder, name) for name in ("link_or_copy", "write_json")),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, stopping(getattr(owner, name), left))
        try:
            begin(run)
        except Stop:
            assert complete(run) or complete(run / "frozen")
            assert starting_head(run, run) in (run, run / "frozen")
            assert (run / "head.safetensors").is_file() or not run_folder.is_finetuning(run)
    if not run_folder.is_finetuning(run):
        begin(run)
    assert complete(run / "frozen")
    assert starting_head(run, run) == run / "frozen"
    assert json.loads((run / "config.json").read_text()) == SETTINGS
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "frozen", "state"]


def test_runs_that_cannot_be_begun(tmp_path: Path) -> None:
    run = first_stage(tmp_path / "heads")
    with pytest.raises(UserError, match="begin with it by --from-head r"):
        begin(run, continues=False)
    begin(run)
    with pytest.raises(UserError, match="pass --resume"):
        begin(run)
    begin(run, resume=True)
    other = tmp_path / "heads/other"
    (tmp_path / "encoders/r").mkdir(parents=True)
    with pytest.raises(UserError, match="exists already, and the tuned tower goes there"):
        begin(other, continues=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"processes": 1, "videos_per_step": 8}}, None),
        ({"batch": {"processes": 2, "videos_per_step": 4}}, "batch.videos_per_step is 8"),
        ({"training": FinetuneConfig(shard="fsdp", batch_size=4).to_json()}, None),
        ({"training": FinetuneConfig(lr=1.0).to_json()}, "training.lr is 5e-05"),
        ({"from_head": {"run": "s"}}, None),
        (
            {
                "training": FinetuneConfig(draws="per-rank").to_json(),
                "batch": {"processes": 1, "videos_per_step": 8},
            },
            "batch.processes is 2 in the run, asked for 1; training.draws",
        ),
    ],
)
def test_what_may_differ_on_resume(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    run, encoder = tmp_path / "heads/r", tmp_path / "encoders/r"
    open_run(run, encoder, SETTINGS, resume=False, continues=False)
    asked = SETTINGS | changes
    if message is None:
        open_run(run, encoder, asked, resume=True, continues=False)
        return
    with pytest.raises(UserError, match=message):
        open_run(run, encoder, asked, resume=True, continues=False)


def test_failures_are_written_as_a_table(tmp_path: Path) -> None:
    write_failed_clips(
        tmp_path, {"a,b": {"split": "train", "epoch": 2, "reason": 'said "no"\nand left'}}
    )
    (line,) = csv.DictReader((tmp_path / "failures.csv").open(newline=""))
    assert line["key"] == "a,b"
    assert read_failed_clips(tmp_path) == [line]
    assert read_failed_clips(tmp_path / "nowhere") == []


def test_blending_is_that_of_the_released_code() -> None:
    tuned = {"visual.a": torch.tensor([1.0, 2.0]), "logit_scale": torch.tensor(4.0)}
    start = {"visual.a": torch.tensor([3.0, 0.0]), "logit_scale": torch.tensor(2.0)}
    half = blended(tuned, start, 0.5)
    assert half["visual.a"].tolist() == [2.0, 1.0]
    assert float(half["logit_scale"]) == 3.0
    assert all(torch.equal(v, tuned[n]) for n, v in blended(tuned, start, 1).items())


def test_publishing_shows_both_or_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = tmp_path / "encoders"
    make_encoder(encoders / "tiny")
    encoder = load_encoder("tiny", "fp32", encoders_dir=encoders)
    head = build_head(HeadConfig(dim=32, layers=1), torch.eye(6, 32))
    model = EndToEndModel(encoder.image_tower, head, encoder.logit_scale)
    run = tmp_path / "heads/r"

    def publish() -> str:
        return publishing.publish(
            model,
            run,
            encoders / "r",
            origin=HeadOrigin("d", "", "tiny", encoder.fingerprint, "", "", 1, {}, "name", None, 2),
            encoders_dir=encoders,
            blend=0.9,
            epoch=3,
            epoch_choice="last",
            ranks=Ranks(),
        )

    for name in ("save_head", "save_open_clip_folder", "save_tensors"):
        with monkeypatch.context() as patch:

            def full(*a: Any, **k: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(publishing, name, full)
            with pytest.raises(OSError, match="No space"):
                publish()
        assert not (encoders / "r").exists()
        assert not (run / "head.safetensors").exists()
    published = publish()
    (run / "head.safetensors").unlink()  # as if killed between the two
    assert publish() == published
    assert (run / "head.safetensors").is_file()
    assert load_encoder("r", "fp32", encoders_dir=encoders).fingerprint == published
    assert not list(tmp_path.rglob("*.partial"))
