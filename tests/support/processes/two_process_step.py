"""One training step by two processes: `python two_process_step.py FOLDER`.

Rank 0 writes `NAME.pt` for every case to FOLDER: the gradients, and what evaluation gives after.
"""

from __future__ import annotations

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from heads.end_to_end import EndToEndModel, TrainingStep
from heads.end_to_end.models.trained_parts import trained_blocks
from heads.end_to_end.sharding import spread
from heads.training.ranks import Ranks
from tests.support.worlds.tiny_towers import DRAW, class_embeddings, clips, tiny_model

WORLD = 2
CASES: dict[str, tuple[int, dict[str, object]]] = {
    # samples of rank 0, of three; options of the model
    "ddp-2-1": (2, {}),
    "ddp-3-0": (3, {}),
    "ddp-0-3-checkpointing": (0, {"checkpointing": True}),
    "ddp-2-1-both": (2, {"train": "both-towers"}),
    "ddp-0-3-both-checkpointing": (0, {"train": "both-towers", "checkpointing": True}),
    "ddp-2-1-both-custom": (2, {"train": "both-towers", "kind": "custom"}),
    "ddp-3-0-last": (3, {"train": "tower-last-1"}),
    "fsdp-2-1": (2, {}),
    "fsdp-3-0-checkpointing": (3, {"checkpointing": True}),
}


def sharded(model: EndToEndModel) -> TrainingStep:
    """As `TrainingStep` says."""
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    mesh = init_device_mesh("cpu", (WORLD,))
    assert model.head.transformer is not None
    for block in [*trained_blocks(model.image_tower), *model.head.transformer.blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "training_loss")
    return TrainingStep(model)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    frames, labels = clips()
    for name, (first, options) in CASES.items():
        model = tiny_model(**options)
        step = (
            spread(TrainingStep(model), Ranks(rank, WORLD), False)
            if name.startswith("ddp")
            else sharded(model)
        )
        part = slice(None, first) if rank == 0 else slice(first, None)
        share = len(labels[part]) * WORLD / len(labels)
        step(frames[part], labels[part], class_embeddings(), DRAW, weight=share).total.backward()
        gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        model.eval()
        with torch.no_grad():
            cosines = model(frames, class_embeddings())
        if rank == 0:
            torch.save({"gradients": gradients, "cosines": cosines}, folder / f"{name}.pt")
    distributed.destroy_process_group()


def main(folder: Path) -> int:
    # Forks of a process that has imported torch and computed nothing.
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, folder), daemon=True) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return int(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
