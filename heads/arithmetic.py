"""Which arithmetic a head runs in, and on which device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

from featstore.errors import UserError
from featstore.files.machine import cpu_has_bf16

Precision = Literal["auto", "fp32", "bf16"]
SMALLEST_WIDTH_FOR_BF16 = 256
"""Narrower heads stay in float32 on a CPU: they take seconds or minutes, and their results do
not depend on whether the CPU has bfloat16 products (which would halve the time even at 64)."""


def resolve_device(device: str) -> torch.device:
    """The device asked for; "auto" is CUDA where there is one, else the CPU.

    UserError for an unknown device, and for CUDA where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for and this machine has none: use --device cpu")
    return torch.device(device)


def resolve_precision(precision: str, dim: int, device: torch.device) -> str:
    """Whether a head of width `dim` runs in "fp32" or "bf16"; "auto" takes bf16 where it helps.

    That is on a GPU with bfloat16, and on a CPU with AVX512-BF16, AMX or Arm's bf16 for a width of
    at least 256. Raises UserError for an unknown precision.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision {precision!r} is unknown: choose auto, fp32 or bf16")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return resolve_training_precision(precision, device).replace("fp16", "fp32")
    return "bf16" if dim >= SMALLEST_WIDTH_FOR_BF16 and cpu_has_bf16() else "fp32"


def resolve_training_precision(precision: str, device: torch.device) -> str:
    """The precision of end-to-end training, "fp32", "bf16" or "fp16" (of `FinetuneConfig`).

    "auto" takes bf16 on a GPU with bfloat16, fp16 on an older one, as the released code, and fp32
    on a CPU, where most have no bfloat16 products.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context a pass runs in; weights stay float32 in all of them."""
    context: AbstractContextManager[None] = torch.autocast(
        device.type,
        dtype=torch.float16 if precision == "fp16" else torch.bfloat16,
        enabled=precision != "fp32",
    )
    return context


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler that keeps small gradients from vanishing in float16; idle in other precisions.

    Scale the loss, step and update through it in every precision: one loop serves all. It skips a
    step whose gradients are not finite and lowers its scale, which starts at 65536.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
