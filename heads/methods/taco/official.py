"""Read and write checkpoints of TACO's released code.

A checkpoint is a dictionary that `torch.save` wrote:

| entry | |
|---|---|
| `epoch` | index of the last epoch trained, from 0 |
| `model_state_dict` | a whole CLIP in OpenAI's names: `visual.*`, the text tower, `logit_scale` |
| `fusion_model_state_dict` | `vision_proj.*`, or nothing for a model without a projection |

A training writes four of them, which only their names tell apart (`WHICH`).

C = embedding width of the CLIP. Source: TACO (Zhu et al., NeurIPS 2026), its released code.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from featstore.errors import UserError, one_line
from featstore.files.durable import write_bytes
from heads.methods.clip_tensors import clip_shapes, is_text, usual
from heads.methods.head import Head
from heads.methods.taco.config import TacoConfig
from heads.methods.taco.head import Projection, TacoHead
from heads.methods.weight_files import describe_faults, load_weight_file, plain_tensors

EXAMPLE: Final = "we_model.pt"
WHICH: Final = {
    "last_model": "last",
    "model_best": "best",
    "we_model": "mean",
    "teacher_model": "teacher",
}
"""Which weights of a training a file holds, by its name without the suffix."""

_CLIP, _HEAD = "model_state_dict", "fusion_model_state_dict"
_PROJECTION: Final = "vision_proj."
# Other heads of the released code's configuration, by what the names of their tensors contain.
_OTHERS: Final = {
    "select": "Selective, a head which crashes in the released code's first step",
    "distill": "Self-Distill, a head which crashes in the released code's first step",
    "frame_position": "Transf, a temporal transformer without TACO's projection",
    "transformer": "Transf, a temporal transformer without TACO's projection",
}


@dataclass(frozen=True)
class TacoCheckpoint:
    """A checkpoint whose tensors are known to be present, finite and of the right shape."""

    clip_state: dict[str, Tensor]
    """The whole CLIP in OpenAI's names, float32."""
    head_state: dict[str, Tensor]
    """The projection under its official names, float32; empty without one."""
    epoch: int
    """Index of the last epoch trained."""
    which: str | None
    """"last", "best", "mean" or "teacher", by the file's name; None if that does not say."""
    name: str
    """The name of the checkpoint in errors."""

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> TacoCheckpoint:
        """Read a file (nothing in it is run) or take a loaded mapping; checks every tensor.

        `module.` prefixes are dropped; other entries are ignored. Raises UserError for a path that
        is no file, a file that is damaged or holds code, the checkpoint of another method or of
        another head of the released code, and tensors that are missing, extra, misshapen or not
        finite.
        """
        which = None
        if isinstance(source, Mapping):
            name, content = "the checkpoint", source
        else:
            name, content = str(source), load_weight_file(Path(source), EXAMPLE)
            which = WHICH.get(Path(source).name.partition(".")[0])
        if absent := lacks(content):
            raise UserError(
                f"{name} is no checkpoint of TACO's released code: it lacks {absent}; pass one, "
                f"such as {EXAMPLE}"
            )
        epoch = content["epoch"]
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise UserError(f"{name} says epoch {one_line(repr(epoch), 40)}: it must be a number")
        head = plain_tensors(content[_HEAD], f"{name}, {_HEAD}")
        _require_projection(head, f"{name}, {_HEAD}")
        clip = plain_tensors(content[_CLIP], f"{name}, {_CLIP}")
        where, dim = f"{name}, {_CLIP}", _width_of(clip, head)
        _require(clip_shapes(clip, dim, where, text=True), clip, where)
        if head:
            with torch.device("meta"):
                wanted = Projection(dim).state_dict()
            shapes = {_PROJECTION + key: tuple(value.shape) for key, value in wanted.items()}
            _require(shapes, head, f"{name}, {_HEAD}")
        return cls(clip, head, epoch, which, name)

    def build(self, class_embeddings: Tensor | None = None) -> ImportedTaco:
        """Return encoder and head, the head in evaluation mode.

        `class_embeddings` [S,C] are the texts of the training classes, which the file lacks.
        """
        dim = self.clip_state["visual.proj"].shape[1]
        classes = torch.zeros(0, dim) if class_embeddings is None else class_embeddings
        head = TacoHead(TacoConfig(dim=dim, projection=bool(self.head_state)), len(classes))
        if head.projection is not None:
            state = {k.removeprefix(_PROJECTION): v for k, v in self.head_state.items()}
            head.projection.load_state_dict(state)
        head.training_class_embeddings.copy_(classes)
        head.logit_scale.copy_(self.clip_state["logit_scale"])
        return ImportedTaco(self.clip_state, head.eval(), self.which, self.epoch)


@dataclass(frozen=True)
class ImportedTaco:
    """An official checkpoint, ready to use."""

    encoder_state: dict[str, Tensor]
    """The tuned CLIP, both towers and logit scale (logarithm), in OpenAI's names, float32."""
    head: TacoHead
    """The head for the classes of the training. For new classes leave it out."""
    which: str | None
    """As `TacoCheckpoint.which`; the head of "teacher" is the student's."""
    epoch: int
    """Index of the last epoch trained."""


def import_taco_checkpoint(path_or_mapping: str | Path | Mapping[str, Any]) -> ImportedTaco:
    """Import encoder and head from a checkpoint of TACO's released code.

    All sizes are read off the tensors, with `weights_only=True`. Raises UserError as
    `TacoCheckpoint.read`.
    """
    return TacoCheckpoint.read(path_or_mapping).build()


def lacks(content: Mapping[str, Any]) -> str:
    """Return the entries of a checkpoint that a file with these ones lacks, in words."""
    absent = [entry for entry in ("epoch", _CLIP, _HEAD) if entry not in content]
    if not absent and not _of_taco(content):
        absent = [f"a text tower in {_CLIP}"]
    return ", ".join(absent)


def is_of(content: Mapping[str, Any]) -> bool:
    """Return whether a file with these entries is a checkpoint of TACO's released code.

    MoTE's has the same entries, but no text tower.
    """
    return not lacks(content)


# The name that the registry uses.
read = TacoCheckpoint.read


def write(path: Path, head: Head, clip_state: Mapping[str, Tensor], epoch: int) -> None:
    """Write a head and its CLIP as the released code saves them.

    `clip_state` are all tensors of the CLIP in OpenAI's names. Raises UserError for a CLIP that the
    format has no place for.
    """
    assert isinstance(head, TacoHead)
    own = {} if head.projection is None else head.projection.state_dict()
    named = {_PROJECTION + name: value.detach().cpu() for name, value in own.items()}
    content = {"epoch": epoch, _CLIP: dict(clip_state), _HEAD: named}
    TacoCheckpoint.read(content)
    data = io.BytesIO()
    torch.save(content, data)
    write_bytes(path, data.getbuffer())


def _of_taco(content: Mapping[str, Any]) -> bool:
    clip, head = content[_CLIP], content[_HEAD]
    if not isinstance(clip, Mapping) or not isinstance(head, Mapping):
        return False
    # A temporal head has names of a text tower, too: only the CLIP's count.
    texts = any(is_text(str(key).removeprefix("module.")) for key in clip)
    return texts or any(str(key).removeprefix("module.").startswith(_PROJECTION) for key in head)


def _width_of(clip: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> int:
    """Return the C that most tensors have, so that errors name the one that deviates."""
    axes = {"visual.proj": 1, "text_projection": 1, f"{_PROJECTION}linear_A.weight": 1}
    found = {**clip, **head}
    sizes = (found[name].shape[axis] for name, axis in axes.items()
             if name in found and found[name].ndim == 2)  # fmt: skip
    return max(usual(sizes), 1)


def _require_projection(head: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError if the tensors are those of another head."""
    strange = [name for name in head if not name.startswith(_PROJECTION)]
    if not strange:
        return
    found = (said for part, said in _OTHERS.items() if part in strange[0].lower())
    raise UserError(
        f"{where} has the tensor {one_line(strange[0], 80)}, of "
        f"{next(found, 'a head that is not known')}: only files of the head vision_proj, or of "
        "none, can be read (Transf, Selective and Self-Distill cannot)"
    )


def _require(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], where: str
) -> None:
    if faults := describe_faults(wanted, found):
        raise UserError(f"{where} does not fit TACO's released code: {faults}")
