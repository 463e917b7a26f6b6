"""How a model is spread over the processes of one training."""

from __future__ import annotations

import functools
import warnings
from typing import Final

import torch.distributed as dist
from torch import Tensor, nn

from heads.end_to_end.models.end_to_end_model import TrainingStep
from heads.end_to_end.models.trained_parts import trained_blocks
from heads.training.ranks import Ranks

SHARDED_FROM: Final = 200_000_000
"""Parameters of a tower from which "auto" shards it: CLIP's ViT-B towers have 86 to 88 million,
ViT-L/14 304 million."""


def sharded(ranks: Ranks, shard: str, tower: nn.Module) -> bool:
    """Return whether to spread parameters over the processes: by `shard`, or by tower size."""
    if ranks.alone or shard == "ddp":
        return False
    return shard == "fsdp" or sum(p.numel() for p in tower.parameters()) >= SHARDED_FROM


def spread(step: TrainingStep, ranks: Ranks, shard: bool) -> nn.Module:
    """Make the processes average the gradients of `step`, which all must call equally often.

    Processes hold whole copies (DistributedDataParallel), or with `shard` use FSDP2: each block of
    the tower, each layer of the head and the rest are assembled only while they compute. Optimisers
    must be built afterwards.
    """
    if ranks.alone:
        return step
    if not shard:
        with warnings.catch_warnings():
            # Its newer name is not there in all versions that fit.
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                step,
                device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=not step.model.uses_all,
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = step.model
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for block in [*trained_blocks(model.image_tower), *model.head.blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    register_fsdp_forward_method(model, "training_loss")
    # FSDP2 takes no scalars.
    model.logit_scale.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        functools.partial(_average_gradient, world_size=ranks.world_size)
    )
    return step


def _average_gradient(parameter: Tensor, world_size: int) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size
