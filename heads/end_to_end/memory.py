"""Memory and cores that a fine-tuning has on this machine, and what it will take of them."""

from __future__ import annotations

import logging
import os

import torch

from featstore.files.machine import available_memory, peak_rss_mb, usable_cores
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.models.end_to_end_model import EndToEndModel

log = logging.getLogger(__name__)


def cores_here() -> int:
    """Return the machine's cores divided by the processes on it."""
    return max(1, usable_cores() // processes_here())


def processes_here() -> int:
    """Return how many processes the launcher started on this machine."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(local) if local.isdigit() else 1)


def memory_words(device: torch.device) -> str:
    """Describe the most memory that this process has held so far."""
    words = f"{peak_rss_mb() / 1000:.1f} GB"
    return words if device.type != "cuda" else f"{words}, GPU {gpu_mb(device) / 1000:.1f} GB"


def gpu_mb(device: torch.device) -> float:
    """Return the most memory, in MB, that this process has held on a GPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6


def memory_left(model: EndToEndModel, device: torch.device) -> int:
    """Return the free bytes of this process, beside what its optimiser will take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = available_memory() // processes_here()
    return max(0, free - optimiser_bytes(model))


def optimiser_bytes(model: EndToEndModel) -> int:
    """Return the bytes of gradients and both moments of AdamW, which are still to come."""
    return 3 * sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


def warn_of_memory(model: EndToEndModel, n_listed: int, config: FinetuneConfig) -> None:
    """Warn before the CPU's memory runs out: the system then ends the process without an error."""
    videos = min(config.batch_size, n_listed)
    needed = model.kept_bytes() * config.frames * videos + optimiser_bytes(model)
    needed += 0 if model.texts is None else model.texts.kept_bytes
    free = available_memory()
    if needed > free:
        log.warning(
            "a step of %d videos takes about %.0f GB of memory, %.0f GB are free: lower "
            "--batch-size (and raise --accumulation), or add --checkpointing",
            *(videos, needed / 1e9, free / 1e9),
        )
