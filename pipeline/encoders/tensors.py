"""Tensors in weight files, held against those that a model has before they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from featstore.errors import UserError, one_line, quoted

# Entries of an OpenAI archive that describe the model and are not weights.
OPENAI_DESCRIPTION = ("input_resolution", "context_length", "vocab_size")
LISTED_TENSORS = 3  # how many tensors an error names before it counts the rest


def shapes_in_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors of `path`, and none of their numbers."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_safetensors(
    path: Path, expected: Mapping[str, torch.Tensor], model: str = "its model config"
) -> dict[str, torch.Tensor]:
    """Read the tensors of `path`. UserError names missing, extra and misshapen tensors.

    `expected` are those that `model` has; the message names it.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    require_shapes(path, wanted, shapes_in_safetensors(path), model)
    with _opened(path) as file:
        return {name: file.get_tensor(name).reshape(shape) for name, shape in wanted.items()}


def require_shapes(
    path: Path,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    model: str,
) -> None:
    """Raise UserError that names the missing, extra and misshapen tensors of `path`, if any."""

    def listed(names: list[str]) -> str:
        rest = len(names) - LISTED_TENSORS
        return ", ".join(names[:LISTED_TENSORS]) + (f" and {rest} more" if rest > 0 else "")

    problems = {
        "missing:": sorted(wanted.keys() - found.keys()),
        "not in the model:": sorted(found.keys() - wanted.keys()),
        "wrong shape:": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found
            and found[name] != shape
            # A scale may be stored as a number or as a list of one.
            and not (name.startswith("logit_") and {*found[name], *shape} <= {1})
        ],
    }
    if any(problems.values()):
        told = [f"{what} {listed(names)}" for what, names in problems.items() if names]
        raise UserError(f"{path} does not fit {model}: {'; '.join(told)}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors: {one_line(error, 160)}; fetch or write it again"
        ) from None


def require_finite(model: torch.nn.Module, where: str) -> None:
    """Raise UserError, naming `where` and the tensor, if a weight is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{where}: tensor {name} holds NaN or infinity: the file is damaged")


def plain_tensors(named: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return `named` if all are tensors that the file holds in full; UserError otherwise.

    A tensor that repeats one number needs no room in a file and any amount of it in memory.
    """
    for name, value in named.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
        whole = plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        if not whole and name not in OPENAI_DESCRIPTION:
            raise UserError(
                f"{path} is not a plain state dict: entry {quoted(name, 80)} is no tensor that "
                "it holds in full"
            )
    return named
