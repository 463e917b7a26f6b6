"""Weight files of other programs: read without running anything, checked tensor by tensor."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from featstore.errors import UserError
from featstore.files.documents import parse_json

CARD: Final = "mote"
"""The metadata entry of our safetensors files, and its name in what `load_weight_file` returns."""

_CODE = re.compile(r"GLOBAL (\S+)")  # how torch names what a pickle wants to call


def load_weight_file(path: Path, example: str) -> Mapping[str, Any]:
    """Load a dictionary written by `torch.save`; UserError if it is damaged, holds code or is none.

    A file in the format of safetensors, whatever its name, gives its tensors and, under `CARD`,
    what mote wrote of them. Tensors are memory-mapped: unused ones, such as the optimiser's state,
    cost nothing. `example` is the name of a right file, for messages.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: name a checkpoint file, such as {example}")
    if path.suffix == ".safetensors" or _begins_as_safetensors(path):
        return _safetensors(path)
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:  # torch does not check
                    raise UserError(f"{path} is damaged at {damaged}: fetch it again")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except Exception as error:  # damaged bytes make readers fail in any way
        raise _unreadable(path, error) from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a checkpoint: pass one of a method's "
            f"released code, such as {example}"
        )
    return content


def _begins_as_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a header that fits into it, and its first brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            card = (file.metadata() or {}).get(CARD)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found if card is None else {**found, CARD: parse_json(card)}
    except Exception as error:  # damaged bytes make readers fail in any way
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    # torch's own message advises the user to allow code, so it is left out.
    if match := _CODE.search(str(error)):
        return UserError(
            f"{path} holds code ({match[1]}), not only tensors, and nothing of it was "
            "run: get the checkpoint from its authors"
        )
    return UserError(
        f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is cut off, damaged "
        "or of another kind; fetch it again"
    )


def plain_tensors(entries: object, where: str) -> dict[str, Tensor]:
    """Copy `entries` as float32 tensors, under names without `module.` prefixes.

    Raises UserError, naming the entry, if one is not a tensor, is not finite, or appears twice.
    """
    if not isinstance(entries, Mapping):
        raise UserError(f"{where} is a {type(entries).__name__}, not a state dict")
    tensors: dict[str, Tensor] = {}
    for key, value in entries.items():
        name = str(key).removeprefix("module.")
        if name in tensors:
            raise UserError(f"{where}: {name} is there twice, with and without `module.`")
        if not isinstance(value, Tensor) or not _is_plain(value):
            raise UserError(f"{where}: {name} is not a tensor of numbers: the file is incomplete")
        scale = name == "logit_scale" and value.numel() == 1  # stored as a number or a list of one
        value = value.reshape(()) if scale else value
        plain = value.detach().cpu().float()  # a float64 may be too large for it
        if not bool(plain.isfinite().all()):
            raise UserError(f"{where}: {name} holds NaN or infinity: the file is damaged")
        tensors[name] = plain.clone(memory_format=torch.contiguous_format)
    return tensors


def _is_plain(value: Tensor) -> bool:
    """Return whether a tensor stores all its numbers: it is not sparse, and strides repeat none.

    Otherwise a small file could ask for any amount of memory.
    """
    return (
        value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and value.is_floating_point()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def blended(
    tuned: Mapping[str, Tensor], original: Mapping[str, Tensor], blend: float
) -> dict[str, Tensor]:
    """Average tensors: `blend` of the tuned tower, the rest of the original; 1 is the tuned tower.

    MoTE's released test code blends tower and logit scale 0.99 to 0.01 (Zhu et al., NeurIPS 2024).
    """
    return {
        name: (blend * value + (1 - blend) * original[name].float()).reshape(original[name].shape)
        if value.is_floating_point()
        else value.clone()
        for name, value in tuned.items()
    }


LISTED_FAULTS: Final = 3  # how many tensors an error names before it counts the rest


def describe_faults(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> str:
    """Describe which tensors are missing, extra or misshapen; an empty text if all fit."""
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is extra" for name in found if name not in wanted]
    faults += [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    more = f" and {len(faults) - LISTED_FAULTS} more" if len(faults) > LISTED_FAULTS else ""
    return "; ".join(faults[:LISTED_FAULTS]) + more
