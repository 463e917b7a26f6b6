"""Chooses the arithmetic that a head runs in, and the device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

from featstore.errors import UserError, meant
from featstore.files.machine import cpu_has_bf16

Precision = Literal["auto", "fp32", "bf16"]
SMALLEST_WIDTH_FOR_BF16 = 256
"""Narrower heads stay in float32 on a CPU: they take seconds or minutes, and their results do
not depend on whether the CPU has bfloat16 products (which would halve the time even at 64)."""


def resolve_device(device: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if the machine has it, else the CPU.

    UserError for an unknown device, and for CUDA on a machine without it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        near = meant(device, ("auto", "cpu", "cuda"), {"gpu": "cuda"})
        raise UserError(f"device {device!r} is unknown: {near}choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but this machine has none: use --device cpu")
    return torch.device(device)


def resolve_precision(precision: str, dim: int, device: torch.device) -> str:
    """Return the arithmetic of a head of width `dim`, "fp32" or "bf16".

    "auto" takes bf16 where it helps: on a GPU with bfloat16, and, for a width of at least 256, on a
    CPU with AVX512-BF16, AMX or Arm's bf16. Raises UserError for an unknown precision.
    """
    if precision not in get_args(Precision):
        near = meant(precision, get_args(Precision))
        raise UserError(f"precision {precision!r} is unknown: {near}choose auto, fp32 or bf16")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return resolve_training_precision(precision, device).replace("fp16", "fp32")
    return "bf16" if dim >= SMALLEST_WIDTH_FOR_BF16 and cpu_has_bf16() else "fp32"


def resolve_training_precision(precision: str, device: torch.device) -> str:
    """Return the precision of end-to-end training (`FinetuneConfig`): "fp32", "bf16" or "fp16".

    "auto" takes bf16 on a GPU with bfloat16; fp16 on an older GPU, like the released code; and fp32
    on a CPU, because most CPUs have no bfloat16 products.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context for a forward pass in `precision`; weights stay float32 in every one."""
    context: AbstractContextManager[None] = torch.autocast(
        device.type,
        dtype=torch.float16 if precision == "fp16" else torch.bfloat16,
        enabled=precision != "fp32",
    )
    return context


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler that keeps small gradients from vanishing in float16 (otherwise idle).

    Scale the loss, step and update through it in every precision, so that one loop serves them all.
    It skips a step whose gradients are not finite and lowers its scale, which starts at 65536.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
