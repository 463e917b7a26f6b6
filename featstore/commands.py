"""The `mote-cli` commands that messages name, written so that they work when they are pasted.

This is the one place that writes such a command: every room may import it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from featstore.files.documents import found_object
from featstore.files.durable import write_json

STORE_SUFFIX: Final = ".zarr"
DEFAULT_ENCODER: Final = "ViT-B-16/openai"
DEFAULT_ROOT: Final = Path("mote-data")
ROOT_VARIABLE: Final = "MOTE_ROOT"
ADAPTED_BY: Final = "head:"
"""What the name of an encoder begins with that is a CLIP whose towers the head of a run adapts."""

PACKING_FOLDER: Final = ".packing"
"""The folder in a data set's folder with the records of its packing."""
FOUND_TARS: Final = "tars"
"""The folder in `PACKING_FOLDER` that `pack --tars` keeps its records in."""
_COMMAND_FILE: Final = "command.json"
_MOST_WORDS: Final = 1000
_HEAD_PART: Final = "head-"  # of a store's name

_UNSAFE = re.compile(r"[^A-Za-z0-9._+]+")


def command(*words: str | Path, root: str | Path | None = None, **options: object) -> str:
    """Return "mote-cli WORDS --option VALUE ...", quoted for a shell.

    Options with the value None, False or "" are left out, True writes the option alone, and a
    tuple writes its words as they are. Paths are written relative to the working folder if they
    lie inside it. `--root` is written unless `root` is the workspace that is used without it.
    """
    said = ["mote-cli", *map(_shown, words)]
    for name, value in options.items():
        if value is None or value is False or value == "":
            continue
        if isinstance(value, tuple):
            said += map(_shown, value)
        else:
            said.append(f"--{name.replace('_', '-')}")
            said += [] if value is True else [_shown(value)]
    return shlex.join(said) + ("" if root is None else root_words(root))


@dataclass(frozen=True)
class Extraction:
    """The options of one `extract` command; the command's own defaults where they are None."""

    dataset: str
    encoder: str | None = None
    sampling: str | None = None
    crops: int = 1
    tier: str | None = None
    """None means embeddings, one per frame."""
    split: str | None = None
    prompts: str | None = None
    head: str | None = None
    """The head that makes the rows, of whole views, when it is evaluated; None for frames."""
    style: str | None = None
    """How such a head cuts frames, if not in its usual way."""

    def command(self, root: str | Path | None, **more: object) -> str:
        """Return the command for the workspace `root`; `more` are further options of `extract`."""
        if self.head is not None:
            views = f"{(self.sampling or '').partition('x')[2] or 1}x{self.crops}"
            said = {"zeroshot": self.dataset, "head": self.head, "views": views}
            return command("eval", **said, crop_style=self.style, root=root)
        adapted = (self.encoder or "").startswith(ADAPTED_BY)
        return command(
            "extract",
            dataset=self.dataset,
            encoder=None if adapted else self.encoder,
            head=(self.encoder or "").removeprefix(ADAPTED_BY) if adapted else None,
            sampling=self.sampling,
            crops=self.crops if self.crops > 1 else None,
            tier=self.tier,
            split=self.split,
            prompts=self.prompts,
            **more,
            root=root,
        )

    @property
    def file_name(self) -> str:
        """The name of the store: `<encoder>--<sampling>[--crops3][--<tier>][--<split>].zarr`.

        After a head that makes it come `[--<style>]--head-<head>`. Characters that trouble file
        systems or copying tools become "-".
        """
        tower = self.encoder or ""
        if os.path.isabs(tower):  # a folder or a file gives its own name
            tower = Path(tower).name.removesuffix(".pt")
        crops = f"crops{self.crops}" if self.crops > 1 else ""
        parts = [tower, self.sampling, crops, self.tier, self.split, self.style]
        parts += [self.head and f"{_HEAD_PART}{self.head}"]
        safe = [_UNSAFE.sub("-", part or "").strip("-.") for part in parts]
        return "--".join(part for part in safe if part) + STORE_SUFFIX


def remake_command(store: Path) -> str:
    """Return the `extract` command for a store of which only place and name can be read.

    In a workspace, these tell data set, sampling, crops, tier and split; the encoder stands in the
    note beside the store, if there is one.
    """
    root = workspace_of(store)
    if root is None:
        return command("extract", dataset="NAME", store=store)
    told = Extraction(store.absolute().parent.name, _noted_encoder(store))
    _, *parts = store.stem.split("--")
    if (head := head_in_name(store)) is not None:
        return command("eval", zeroshot=told.dataset, head=head, root=root)
    for part in parts:
        if sampling := re.fullmatch(r"(uniform|middle|clips|dense|dist)-(\d+(?:x\d+)?)", part):
            told = replace(told, sampling=f"{sampling[1]}:{sampling[2]}")
        elif crops := re.fullmatch(r"crops(\d)", part):
            told = replace(told, crops=int(crops[1]))
        elif tier := re.fullmatch(r"(frames)|tokens-(\d+)", part):
            told = replace(told, tier=tier[1] or f"tokens:{tier[2]}")
        else:
            told = replace(told, split=part)
    return told.command(root)


def head_in_name(store: Path) -> str | None:
    """Return the head that a store was made by, as its name has it; None for no head."""
    return store.stem.partition(f"--{_HEAD_PART}")[2] or None


def _noted_encoder(store: Path) -> str | None:
    note = found_object(store.with_name(f"{store.name}.encoder.json")) or {}
    signature = note.get("signature")
    spec = signature.get("spec") if isinstance(signature, dict) else None
    return spec if isinstance(spec, str) else None


def remember_packing(dataset_dir: Path, asked: Sequence[str]) -> None:
    """Keep the words of the `pack` command that a data set is begun with; nothing without words.

    The plan of packing does not say where the videos lie or which lists were given, so without this
    an interrupted packing could only be continued by somebody who remembers the command.
    """
    if asked and _packing_words(dataset_dir) != [*asked]:
        write_json(dataset_dir / PACKING_FOLDER / _COMMAND_FILE, {"words": [*asked]})


def packing_begun(dataset_dir: Path) -> bool:
    """Return whether packing into a folder has begun, as far as its records show."""
    return (dataset_dir / PACKING_FOLDER).is_dir()


def pack_command(dataset_dir: Path, root: str | Path | None) -> tuple[str, bool]:
    """Return the command that begins or continues packing, and whether it is known whole.

    Where it is not, capitals stand for what has to be filled in.
    """
    name, words = dataset_dir.name, _packing_words(dataset_dir)
    if words:
        shown = [Path(word) if word.startswith("/") else word for word in words]
        return command("pack", *shown, dataset=name, root=root), True
    from_tars = (dataset_dir / PACKING_FOLDER / FOUND_TARS).is_dir()
    source: dict[str, object] = {"tars": "PATTERN"} if from_tars else {"videos": "DIR"}
    return command("pack", dataset=name, **source, root=root), False


def _packing_words(dataset_dir: Path) -> list[str]:
    found = found_object(dataset_dir / PACKING_FOLDER / _COMMAND_FILE) or {}
    words = found.get("words")
    if not isinstance(words, list) or len(words) > _MOST_WORDS:
        return []
    return words if all(isinstance(word, str) for word in words) else []


def workspace_of(store: Path) -> Path | None:
    """Return the workspace in which a store lies at `features/NAME/STORE.zarr`, else None."""
    folders = store.absolute().parents
    inside = len(folders) > 2 and folders[1].name == "features" and store.suffix == STORE_SUFFIX
    return folders[2] if inside else None


def root_words(root: str | Path) -> str:
    """Return what a command needs to find the workspace: " --root DIR", or ""."""
    usual = Path(os.environ.get(ROOT_VARIABLE, DEFAULT_ROOT))
    if "://" not in str(root) and Path(root).absolute() == usual.absolute():
        return ""
    return " --root " + shlex.quote(_shown(root))


def _shown(value: object) -> str:
    here = Path.cwd()
    if isinstance(value, Path) and value.is_absolute() and value.is_relative_to(here):
        value = value.relative_to(here)
    return str(value)
