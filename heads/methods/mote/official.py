"""Read and write checkpoints of MoTE's released code, with one table of names for both.

A checkpoint is a dictionary that `torch.save` wrote:

| entry | |
|---|---|
| `epoch` | index of the last epoch trained, from 0 |
| `model_state_dict` | `visual.*` of an OpenAI ViT and `logit_scale` (natural logarithm) |
| `fusion_model_state_dict` | the head, named as in `_OUTER`, `_BLOCK` and `_EXPERT` |
| `optimizer_state_dict` | may be missing; never read, never written |

S = training classes, D = embedding width, W = width of the tower, L = layers, E = experts.
Source: MoTE (Zhu et al., NeurIPS 2024), its released code.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from featstore.errors import UserError, one_line
from featstore.files.durable import write_bytes
from heads.methods.clip_tensors import usual, usual_count, vision_shapes, vision_tower
from heads.methods.head import Head
from heads.methods.mote.config import POSITIONS, HeadConfig
from heads.methods.mote.model import TemporalHead
from heads.methods.weight_files import blended, describe_faults, load_weight_file, plain_tensors

BLEND: Final = 0.99
"""Share of the tuned tower in what the released test scripts evaluate; the rest is CLIP's own."""

TUNED: Final = 0.5
"""The least cosine between the weights of a tower and its tuned version: unrelated towers are near
0, and a tower tuned at a far higher rate than the published one (the golden run) is at 0.9."""

log = logging.getLogger(__name__)

EXAMPLE: Final = "MoTE_B16.pt"
_TOWER, _HEAD = "model_state_dict", "fusion_model_state_dict"
_LAYERS = "transformer.resblocks."

# The released code's names (left) and ours; an expert's tensor is a slice of ours.
_OUTER = {
    "spe_cls_feature": "training_class_embeddings",
    "frame_position_embeddings.weight": "transformer.positions",
}
_BLOCK = {
    "attn.in_proj_weight": "attention.qkv_weight",
    "attn.in_proj_bias": "attention.qkv_bias",
    "attn.out_proj.weight": "attention.out_weight",
    "attn.out_proj.bias": "attention.out_bias",
    "ln_1.weight": "attention_norm.weight",
    "ln_1.bias": "attention_norm.bias",
    "mlp.mote_fusion_weight": "feed_forward.fusion_logits",
    "ln_2.weight": "feed_forward_norm.weight",
    "ln_2.bias": "feed_forward_norm.bias",
}
_EXPERT = {
    "mlp.fc_up.{}.weight": "feed_forward.up_weight",
    "mlp.fc_up.{}.bias": "feed_forward.up_bias",
    "mlp.fc_dn.{}.weight": "feed_forward.down_weight",
    "mlp.fc_dn.{}.bias": "feed_forward.down_bias",
}


# Configuration fields that are fixed in the released code and that evaluation depends on.
_FIXED = ("placement", "aggregation", "modulation_neighbours", "modulation_temperature")


class _Entry(NamedTuple):
    official: str
    ours: str
    expert: int | None


def _entries(layers: int, experts: int) -> Iterator[_Entry]:
    """Yield every tensor of a head under both names."""
    for official, ours in _OUTER.items():
        yield _Entry(official, ours, None)
    for layer in range(layers):
        theirs, mine = f"{_LAYERS}{layer}.", f"transformer.blocks.{layer}."
        for official, ours in _BLOCK.items():
            yield _Entry(theirs + official, mine + ours, None)
        for expert in range(experts):
            for official, ours in _EXPERT.items():
                yield _Entry(theirs + official.format(expert), mine + ours, expert)


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A checkpoint in which every tensor is known to be present, finite and of the right shape."""

    head_state: dict[str, Tensor]
    """The head under its official names, float32."""
    tower_state: dict[str, Tensor]
    """`visual.*` and `logit_scale` as trained, float32."""
    epoch: int
    name: str
    """The name of the checkpoint in errors."""

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> OfficialCheckpoint:
        """Read a file (nothing in it is run) or take a loaded mapping; checks every tensor.

        `module.` prefixes are dropped; other entries, such as the optimiser's, are ignored.
        Raises UserError for a file that is damaged or holds code, for the checkpoint of another
        method, and for tensors that are missing, extra, misshapen or not finite.
        """
        if isinstance(source, Mapping):
            name, content = "the checkpoint", source
        else:
            name, content = str(source), load_weight_file(Path(source), EXAMPLE)
        if absent := lacks(content):
            raise UserError(
                f"{name} is no checkpoint of MoTE's released code: it lacks {absent}; "
                f"pass one, such as {EXAMPLE}"
            )
        epoch = content["epoch"]
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise UserError(f"{name} says epoch {one_line(repr(epoch), 40)}: it must be a number")
        head = plain_tensors(content[_HEAD], f"{name}, {_HEAD}")
        tower = plain_tensors(content[_TOWER], f"{name}, {_TOWER}")
        config = _config_of(head, name)
        _require(_head_shapes(config, _classes_of(head)), head, f"{name}, {_HEAD}")
        _require_tower(tower, config.dim, f"{name}, {_TOWER}")
        return cls(head, tower, epoch, name)

    @property
    def dim(self) -> int:
        """D, the embedding width."""
        return self.head_state["spe_cls_feature"].shape[1]

    def build_head(self, attention_heads: int | None = None) -> TemporalHead:
        """Build our form of the head, in evaluation mode; `attention_heads` defaults to D // 64.

        Raises UserError if they do not divide D.
        """
        config = _config_of(self.head_state, self.name, attention_heads or 0)
        head = TemporalHead(config, _classes_of(self.head_state))
        state = head.state_dict()
        for official, ours, expert in _entries(config.layers, config.experts):
            target = state[ours] if expert is None else state[ours][expert]
            target.copy_(self.head_state[official])
        head.logit_scale.copy_(self.tower_state["logit_scale"])
        return head.eval()

    def blended_tower(
        self, original: Mapping[str, Tensor], blend: float = BLEND
    ) -> dict[str, Tensor]:
        """Average `blend` of the tuned tower and `1 - blend` of CLIP's own tower, in float32.

        `original` is the state dict of that CLIP in OpenAI's or open_clip's names; its text tower
        is ignored. Raises UserError if its image tower has another shape or `blend` is outside 0 to
        1; logs a warning if its weights have nothing in common with the tuned ones.
        """
        if not 0 <= blend <= 1:
            raise UserError(f"blend {blend} is no share: it must be from 0 to 1")
        tower = plain_tensors(
            {name: value for name, value in original.items() if _of_tower(name)},
            "the original CLIP",
        )
        _require(
            {name: value.shape for name, value in self.tower_state.items()},
            tower,
            f"the original CLIP given for {self.name}",
        )
        likeness = _likeness(self.tower_state, tower)
        if likeness < TUNED:
            log.warning(
                "the weights of the original CLIP and of %s hardly agree (cosine %.2f): make sure "
                "it is the CLIP that the tower was tuned from",
                *(self.name, likeness),
            )
        return blended(self.tower_state, tower, blend)


@dataclass(frozen=True)
class ImportedCheckpoint:
    """An official checkpoint, ready to use."""

    head: TemporalHead
    tower_state: dict[str, Tensor]
    """`visual.*` and `logit_scale` (logarithm), float32; blended if CLIP's own were given."""
    epoch: int
    """Index of the last epoch trained."""
    logit_scale: float
    """Multiplier of the cosines in training (already exponentiated), of `tower_state`."""


def import_official_checkpoint(
    path_or_mapping: str | Path | Mapping[str, Any] | OfficialCheckpoint,
    tower_state: Mapping[str, Tensor] | None = None,
    blend: float = BLEND,
    attention_heads: int | None = None,
) -> ImportedCheckpoint:
    """Import head and image tower from a checkpoint of MoTE's released code.

    With `tower_state`, the original CLIP's state dict, the tower is `blend` of the checkpoint's and
    `1 - blend` of the original, as in the released test scripts. `attention_heads`
    defaults to D // 64 (at least 1, lowered until it divides D); the released code takes the text
    tower's, which is the same for OpenAI's ViTs. The file is read with `weights_only=True`.
    Raises UserError as `OfficialCheckpoint.read`, `build_head` and `blended_tower`.
    """
    checkpoint = (
        path_or_mapping
        if isinstance(path_or_mapping, OfficialCheckpoint)
        else OfficialCheckpoint.read(path_or_mapping)
    )
    head = checkpoint.build_head(attention_heads)
    tower = checkpoint.tower_state
    if tower_state is not None:
        tower = checkpoint.blended_tower(tower_state, blend)
    head.logit_scale.copy_(tower["logit_scale"])
    return ImportedCheckpoint(head, tower, checkpoint.epoch, float(tower["logit_scale"].exp()))


def official_checkpoint(
    head: Head, tower_state: Mapping[str, Tensor], epoch: int
) -> dict[str, Any]:
    """Convert `head` and its tower to the form the released code saves, without the optimiser.

    `tower_state` is a state dict with `visual.*` and `logit_scale`; other entries are left out.
    Raises UserError for a head or a tower that the format cannot hold.
    """
    config = head.config
    if not any(True for _ in head.parameters()):
        raise UserError("a mean of frames has no parameters: there is nothing to export")
    released = HeadConfig(dim=config.dim)
    if any(getattr(config, name) != getattr(released, name) for name in _FIXED):
        raise UserError(
            "the head is built otherwise than the released code's, whose format has no place for "
            "it: export it as safetensors or onnx"
        )
    state = head.state_dict()
    exported = OrderedDict(
        (official, (state[ours] if expert is None else state[ours][expert]).detach().cpu().clone())
        for official, ours, expert in _entries(config.layers, config.experts)
    )
    tower = plain_tensors(
        {name: value for name, value in tower_state.items() if _of_tower(name)}, "the tower"
    )
    _require_tower(tower, config.dim, "the tower")
    return {"epoch": epoch, _TOWER: OrderedDict(tower), _HEAD: exported}


def save_official_checkpoint(
    path: Path, head: Head, tower_state: Mapping[str, Tensor], epoch: int
) -> None:
    """Write `official_checkpoint` with `torch.save`, complete or not at all."""
    buffer = io.BytesIO()
    torch.save(official_checkpoint(head, tower_state, epoch), buffer)
    write_bytes(path, buffer.getbuffer())


def lacks(content: Mapping[str, Any]) -> str:
    """Return the entries of a checkpoint that a file with these ones lacks, in words."""
    return ", ".join(entry for entry in ("epoch", _TOWER, _HEAD) if entry not in content)


def is_of(content: Mapping[str, Any]) -> bool:
    """Return whether a file with these entries is a checkpoint of MoTE's released code."""
    return _HEAD in content


# The names that the registry uses.
read, write = OfficialCheckpoint.read, save_official_checkpoint


def _of_tower(name: str) -> bool:
    name = name.removeprefix("module.")
    return name.startswith("visual.") or name == "logit_scale"


def _require(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], where: str
) -> None:
    if faults := describe_faults(wanted, found):
        raise UserError(f"{where} does not fit MoTE's released code: {faults}")


def _likeness(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the cosine between two towers' matrices; vectors, such as norms, are all alike."""
    pairs = [(value, second[name]) for name, value in first.items() if value.ndim > 1]
    product = sum(float((a * b).sum()) for a, b in pairs)
    squares = [sum(float(pair[side].square().sum()) for pair in pairs) for side in (0, 1)]
    return product / max(math.sqrt(squares[0] * squares[1]), 1e-12)


def _classes_of(head: Mapping[str, Tensor]) -> int:
    table = head.get("spe_cls_feature")
    return table.shape[0] if table is not None and table.ndim == 2 else 1


def _config_of(head: Mapping[str, Tensor], where: str, attention_heads: int = 0) -> HeadConfig:
    """Infer the configuration from the tensors of an official head."""
    widths = [
        value.shape[-1]
        for name, value in head.items()
        if value.ndim and (name in _OUTER or (name.startswith(_LAYERS) and ".ln_" in name))
    ]
    if not widths:
        raise UserError(
            f"{where} is no checkpoint of MoTE's released code: its {_HEAD} has no tensor "
            f"such as {', '.join(_OUTER)}"
        )
    positions = head.get("frame_position_embeddings.weight")
    return HeadConfig(
        dim=usual(widths),
        layers=usual_count(head, re.escape(_LAYERS) + r"(?P<n>\d+)\.(attn|ln_|mlp\.mote).*"),
        experts=usual_count(head, re.escape(_LAYERS) + r"\d+\.mlp\.fc_(up|dn)\.(?P<n>\d+)\..*"),
        attention_heads=attention_heads,
        positions=POSITIONS if positions is None or not positions.ndim else positions.shape[0],
    )


def _head_shapes(config: HeadConfig, classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a head under its official name."""
    with torch.device("meta"):
        state = TemporalHead(config, classes).state_dict()
    return {
        official: tuple(state[ours].shape[0 if expert is None else 1 :])
        for official, ours, expert in _entries(config.layers, config.experts)
    }


def _require_tower(tower: Mapping[str, Tensor], dim: int, where: str) -> None:
    """Raise UserError unless `tower` is an OpenAI ViT of output width `dim` with a logit scale."""
    _require(vision_shapes(vision_tower(tower, dim, where)), tower, where)
