"""Read and write safetensors files of a run: the finished head, and the training state. No pickle.

`head.safetensors` holds the head's state dict (for MoTE, see `heads.methods.mote.model`) and, as
metadata, a JSON text with configuration and origin, so that the file alone is enough to use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featstore.errors import UserError, WorkError, one_line
from featstore.files.documents import parse_json
from featstore.files.durable import durable_path
from featstore.workspace import Workspace
from heads.files.run_files import CONFIG_FILE, HEAD_FILE
from heads.methods.head import Head
from heads.methods.registry import MEAN_OF_FRAMES, config_from_json, method
from heads.methods.settings import HeadOrigin
from heads.methods.weight_files import describe_faults

HEAD_FORMAT: Final = 1
_METADATA_KEY: Final = "mote"


def save_head(head: Head, path: Path) -> None:
    """Write `head` with its configuration and origin to `path`, complete or not at all."""
    origin = None if head.origin is None else head.origin.to_json()
    card = {"format": HEAD_FORMAT, "head": head.config.to_json(), "origin": origin}
    save_tensors(path, dict(head.state_dict()), card)


def load_head(path: str | Path) -> Head:
    """Load the head of a run folder or a `head.safetensors` file on the CPU, in evaluation mode.

    Raises UserError if there is no head, if mote did not write the file, or if a tensor is missing,
    extra or misshapen; WorkError if the file is damaged or holds numbers that are not finite.
    """
    path = Path(path)
    file = path / HEAD_FILE if path.is_dir() else path
    if not file.is_file():
        if (path / CONFIG_FILE).is_file():
            raise UserError(f"run {path} has no head yet: finish it with --resume")
        raise UserError(f"there is no head at {path}: name a run folder or a {HEAD_FILE} file")
    tensors, card = load_tensors(file)
    if card.get("format") != HEAD_FORMAT or "head" not in card:
        raise UserError(
            f"{file} is not a head of format {HEAD_FORMAT} (it says {card.get('format')!r}): "
            "train or import the head with this version of mote"
        )
    config = config_from_json(card["head"])
    with torch.device("meta"):
        head = method(config.kind).head(config, _training_classes(tensors))
        if "logit_bias" in tensors:
            head.take_several_classes()
    _check_shapes(file, head.state_dict(), tensors)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise WorkError(f"{file} is damaged: {name} holds values that are not finite")
    head.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    try:
        head.require_sound()
    except WorkError as error:
        raise WorkError(f"{file} is damaged: {error}") from error
    origin = card.get("origin")
    head.origin = None if origin is None else HeadOrigin.from_json(origin)
    return head.requires_grad_(True).eval()


def choose_head(
    workspace: Workspace, name: str | None, *, or_mean: bool = False
) -> tuple[Head | None, Path]:
    """Return the head called `name` and its run folder; (None, folder) for the mean of frames.

    None means the newest run, or the mean if `or_mean` allows it and nothing was trained.
    Errors as `Workspace.choose_run` and `load_head`.
    """
    if name == MEAN_OF_FRAMES or (name is None and or_mean and not workspace.trained_runs()):
        return None, workspace.run_dir(MEAN_OF_FRAMES)
    run_dir = workspace.choose_run(name)
    return load_head(run_dir), run_dir


def head_fingerprint(head: Head) -> str:
    """Hash the head's configuration and tensors, 16 hex digits; identifies the tested weights."""
    digest = hashlib.sha256(json.dumps(head.config.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def joint_fingerprint(encoder_fingerprint: str, head: Head) -> str:
    """Return the fingerprint of a CLIP together with a head that is made for it."""
    return hashlib.sha256(f"{encoder_fingerprint} {head_fingerprint(head)}".encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors and a JSON `card` as one safetensors file, complete or not at all."""
    text = json.dumps(card, ensure_ascii=False, allow_nan=False)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with durable_path(path) as partial:
        save_file(contiguous, partial, metadata={_METADATA_KEY: text})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load tensors and card that `save_tensors` wrote; errors as `load_head`."""
    with open_tensors(path) as (names, tensor, card):
        return {name: tensor(name) for name in names}, card


@contextmanager
def open_tensors(
    path: Path,
) -> Iterator[tuple[list[str], Callable[[str], Tensor], dict[str, Any]]]:
    """Yield names, a function that reads one tensor, and the card; errors as `load_head`."""
    try:
        with safe_open(path, framework="pt") as file:
            try:
                card = parse_json((file.metadata() or {})[_METADATA_KEY])
            except (KeyError, ValueError):
                card = None
            if not isinstance(card, dict):
                raise UserError(
                    f"{path} is a safetensors file that mote did not write: import it first"
                )
            yield list(file.keys()), file.get_tensor, card
    except SafetensorError as error:
        raise WorkError(
            f"{path} is not a complete safetensors file ({one_line(error, 120)}): copy it again "
            "or train again"
        ) from error


def _training_classes(tensors: Mapping[str, Tensor]) -> int:
    table = tensors.get("training_class_embeddings")
    return 0 if table is None or table.ndim != 2 else table.shape[0]


def _check_shapes(file: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    faults = describe_faults({name: tensor.shape for name, tensor in wanted.items()}, found)
    strange = [f"{n} is {t.dtype}" for n, t in found.items() if not t.is_floating_point()]
    if faults or strange:
        raise UserError(
            f"{file} does not fit its own configuration: {faults or strange[0]}; "
            "train or import the head again"
        )
