"""The unblended towers that an imported or fine-tuned run keeps beside its head."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import UserError
from heads.files.head_file import load_tensors, open_tensors
from heads.files.run_files import TOWER_FILE
from heads.methods.head import Head
from heads.methods.text_classifier import SAME_CLASS, class_cosines


def imported_tower(run_dir: Path) -> tuple[dict[str, Tensor], int] | None:
    """Load a run's unblended tower and epoch (from 0); None for a head trained from a store."""
    file = run_dir / TOWER_FILE
    if not file.is_file():
        return None
    tensors, card = load_tensors(file)
    return tensors, int(card["epoch"])


def exported_tower(run_dir: Path) -> tuple[dict[str, Tensor], int] | None:
    """Load what `imported_tower` does, for a file of the authors' format.

    Raises UserError if the run trained its text tower too, for which that format has no place.
    """
    if (tower_facts(run_dir) or {}).get("text_tower"):
        raise UserError(
            f"run {run_dir.name} trained its text tower too, which the official format cannot "
            "hold: its encoder is a folder in open_clip's format already; export the head with "
            "--format safetensors"
        )
    return imported_tower(run_dir)


def tower_facts(run_dir: Path) -> dict[str, Any] | None:
    """Read the facts stored with a run's unblended tower: `epoch`, counted from 0, and after a
    fine-tuning also `blend`, `epoch_choice` and, if the text tower was trained too, `text_tower`;
    None for a run without a tower of its own."""
    file = run_dir / TOWER_FILE
    if not file.is_file():
        return None
    with open_tensors(file) as (_, _, card):
        return card


def tower_hash(run_dir: Path) -> str | None:
    """Return the SHA-256 of the tensors of a run's unblended tower; None for a run without one.

    It stays the same when a tower is exported and imported again.
    """
    found = imported_tower(run_dir)
    if found is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(found[0].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_class_names(head: Head, class_names: tuple[str, ...], embeddings: Tensor) -> None:
    """Raise UserError unless `class_names` are the names of the head's classes, in its order.

    `embeddings` [S,D] are the class features of the names, from the head's own text tower.
    """
    trained = head.training_class_embeddings
    if len(class_names) != trained.shape[0]:
        raise UserError(
            f"{len(class_names)} class names for the checkpoint's {trained.shape[0]} classes: name "
            "the file of the list it was trained on"
        )
    cosines = class_cosines(functional.normalize(embeddings, dim=-1), trained).diagonal()
    worst = int(cosines.argmin())
    if cosines[worst] < SAME_CLASS:
        raise UserError(
            f"class {worst}, {class_names[worst]!r}, does not give the class features that the "
            f"checkpoint holds (cosine {float(cosines[worst]):.4f}): name the file of the list it "
            "was trained on, in its order, and the CLIP it was tuned from"
        )
