"""Finds the files that an encoder spec means, without loading them or any slow library."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from featstore.commands import DEFAULT_ENCODER as DEFAULT_ENCODER
from featstore.files.documents import found_object
from featstore.files.durable import write_json
from featstore.files.scratch import cache_folder

logger = logging.getLogger(__name__)

CONFIG_FILE = "open_clip_config.json"
VICLIP = "viclip:"
"""What a spec begins with that names a weight file of ViCLIP."""
# Layers and width of the towers that papers name (Dosovitskiy et al., ICLR 2021).
_SIZES = {(12, 768): "B", (24, 1024): "L", (32, 1280): "H"}
WEIGHTS_FILE = "open_clip_model.safetensors"


def encoder_label(spec: str, encoders_dir: Path | None = None) -> str:
    """Short name of an encoder, for a store's file name: that of its folder or file, or `spec`."""
    place = local_encoder(spec, encoders_dir)
    if place is None or _workspace_folder(spec, encoders_dir):
        return spec
    return (
        viclip_label(place) if spec.startswith(VICLIP) else place.resolve().name.removesuffix(".pt")
    )


def viclip_label(file: Path) -> str:
    """Return the name of a ViCLIP's file, or of its folder where hubs call every file `model`."""
    file = file.resolve()
    return file.parent.name if file.stem == "model" else file.stem


def lasting_spec(spec: str, encoders_dir: Path | None = None) -> str:
    """Return `spec` in a form that holds in any working directory: paths become absolute."""
    place = local_encoder(spec, encoders_dir)
    if place is None or _workspace_folder(spec, encoders_dir):
        return spec
    return f"{VICLIP if spec.startswith(VICLIP) else ''}{place.resolve()}"


def local_encoder(spec: str, encoders_dir: Path | None) -> Path | None:
    """The folder or file that `spec` names; None if it can only be an `ARCH/TAG` of open_clip.

    A bare name means the workspace's encoder if there is one, so that a command means the same in
    every working directory. A file or folder of that name in the working directory is `./NAME`.
    The file of `viclip:FILE` is returned whether or not it is there.
    """
    if spec.startswith(VICLIP):
        return Path(os.path.expanduser(spec.removeprefix(VICLIP)))
    path = Path(os.path.expanduser(spec))  # Path.expanduser raises for an unknown user
    here = bool(spec.strip()) and (path.is_dir() or path.is_file())
    known = _workspace_folder(spec, encoders_dir)
    if known is None:
        return path if here else None
    if here and path.resolve() != known.resolve():
        _say_taken(spec, known.absolute(), path.absolute())
    return known


def _workspace_folder(spec: str, encoders_dir: Path | None) -> Path | None:
    """The folder of the workspace's encoder with this bare name; None if there is none."""
    if encoders_dir is None or not is_plain_name(spec) or not (encoders_dir / spec).is_dir():
        return None
    return encoders_dir / spec


@cache  # a command looks for its encoder several times
def _say_taken(spec: str, taken: Path, other: Path) -> None:
    logger.info("encoder %s is %s in the workspace; for %s write ./%s", spec, taken, other, spec)


def local_architecture(spec: str, encoders_dir: Path | None) -> str | None:
    """Read the architecture of an encoder's folder, such as "ViT-B/16", from its configuration.

    None if there is no such folder or the tower has no usual name.
    """
    place = local_encoder(spec, encoders_dir)
    if place is None or not place.is_dir():
        return None
    config = found_object(place / CONFIG_FILE) or {}
    try:
        vision = config["model_cfg"]["vision_cfg"]
        size = _SIZES.get((vision["layers"], vision["width"]))
        patch = int(vision["patch_size"])
    except (ValueError, LookupError, TypeError):
        return None
    return None if size is None else f"ViT-{size}/{patch}"


def is_plain_name(spec: str) -> bool:
    """Whether `spec` can name a folder in the workspace's `encoders/`."""
    return bool(re.fullmatch(r"[A-Za-z0-9._+-]+", spec)) and not spec.startswith(".")


def signature(spec: str, encoders_dir: Path | None) -> dict[str, Any]:
    """JSON-ready names, sizes and times of the encoder's files, which show whether they changed.

    For `ARCH/TAG` it is the name alone, because open_clip pins the weights of that name.
    """
    place = local_encoder(spec, encoders_dir)
    if place is None:
        return {"spec": spec, "files": []}
    files = [place / CONFIG_FILE, place / WEIGHTS_FILE] if place.is_dir() else [place]
    return {
        "spec": str(place.resolve()),
        "files": [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.is_file()
        ],
    }


def remember_fingerprint(
    store: Path | str, spec: str, encoders_dir: Path | None, fingerprint: str
) -> None:
    """Note beside the store the encoder's fingerprint and the present state of its files."""
    value = {"signature": signature(spec, encoders_dir), "fingerprint": fingerprint}
    write_json(_fingerprint_note(store), value)


def remembered_fingerprint(store: Path | str, spec: str, encoders_dir: Path | None) -> str | None:
    """The noted fingerprint; None if there is none or the encoder's files changed since then."""
    files = signature(spec, encoders_dir)
    value = found_object(_fingerprint_note(store))
    if value is None or value.get("signature") != files:
        return None
    fingerprint = value.get("fingerprint")
    return fingerprint if isinstance(fingerprint, str) else None


def _fingerprint_note(store: Path | str) -> Path:
    """The path of the note: beside a store on disk, in the cache for a store at a URL."""
    if isinstance(store, str):
        digest = hashlib.sha256(store.encode()).hexdigest()[:16]
        return cache_folder() / "stores" / f"{digest}.encoder.json"
    return store.with_name(f"{store.name}.encoder.json")
