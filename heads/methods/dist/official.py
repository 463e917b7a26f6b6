"""Read checkpoints of DiST's released code.

A checkpoint is a dictionary that `torch.save` wrote:

| entry | |
|---|---|
| `model_state` | the branch and, unless it holds the branch alone, a whole CLIP in OpenAI's names |
| `epoch` | index of the last epoch trained, from 0; in files written by training |
| `cfg` | the configuration as JSON text; in files written by training |
| `optimizer_state` | in files written by training; never read |

Di, Dt = integration and temporal width, a = alpha, T = slow frames, E = embedding width, d = width
of CLIP's image tower, p = its patch. Source: DiST (Qing et al., ICCV 2023), its released code.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from featstore.errors import UserError, one_line
from featstore.files.durable import write_bytes
from heads.methods.clip_tensors import (
    VISION_BLOCKS,
    Shapes,
    clip_shapes,
    usual,
    usual_count,
    vision_tower,
    width_of,
)
from heads.methods.dist.branch import DistBranch
from heads.methods.dist.config import DistConfig, ratio_of
from heads.methods.dist.model import DistModel, for_tower
from heads.methods.weight_files import describe_faults, load_weight_file, plain_tensors

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

    from heads.methods.head import Head

EXAMPLE: Final = "DIST_VIT_B16_K400_16+32f_84.4.pyth"
_STATE: Final = "model_state"
_CLIP: Final = "backbone.base_encoder."
_BRANCH: Final = "dist_net."
# Files from before the release have this name for the branch, and these for some of its parts.
_EARLIER_BRANCH: Final = "ladder_net."
_EARLIER: Final = {
    "input_map_feat_nets": "input_linears",
    "s2t_fuse_nets": "integration2temporal_nets",
    "t2s_fuse_nets": "temporal2integration_nets",
    "spatial_nets": "integration_nets",
    "final_temporal_nets": "adapooling_nets",
}
# Entries of OpenAI's own files that describe the model and are no weights.
_DESCRIPTION: Final = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class DistCheckpoint:
    """A checkpoint whose branch tensors are known to be present, finite and of the right shape."""

    branch_state: dict[str, Tensor]
    """The branch under its official names, without what stands before them, float32."""
    clip_state: dict[str, Tensor]
    """The CLIP in OpenAI's names, float32, checked; empty if the file holds the branch alone."""
    config: DistConfig
    """The sizes; `selected_layers` counts from 0 where neither the file nor the caller says."""
    layers_known: bool
    """Whether file or caller say which blocks of the tower are selected."""
    epoch: int | None
    """Index of the last epoch trained; None if the file does not say."""
    name: str
    """The name of the checkpoint in errors."""

    @classmethod
    def read(
        cls,
        source: str | Path | Mapping[str, Any],
        selected_layers: Sequence[int] | None = None,
    ) -> DistCheckpoint:
        """Read a file (nothing in it is run) or take a loaded mapping; checks every tensor.

        Raises UserError for a file that is damaged or holds code, for the checkpoint of another
        method, and for tensors that are missing, extra, misshapen or not finite.
        """
        if isinstance(source, Mapping):
            name, content = "the checkpoint", source
        else:
            name, content = str(source), load_weight_file(Path(source), EXAMPLE)
        if absent := lacks(content):
            raise UserError(
                f"{name} is no checkpoint of DiST's released code: it lacks {absent}; pass one, "
                f"such as {EXAMPLE}"
            )
        epoch = content.get("epoch")
        whole = isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0
        if epoch is not None and not whole:
            raise UserError(f"{name} says epoch {one_line(repr(epoch), 40)}: it must be a number")
        state = plain_tensors(content[_STATE], name)
        if strange := [key for key in state if not key.startswith(_CLIP)]:
            raise UserError(
                f"{name} does not fit DiST's released code: {one_line(strange[0], 80)} is extra "
                f"(every tensor begins with {_CLIP})"
            )
        branch = {_present_name(key): v for key, v in state.items() if _of_branch(key)}
        clip = {key.removeprefix(_CLIP): v for key, v in state.items() if not _of_branch(key)}
        if selected_layers is None:
            selected_layers = _told_layers(content.get("cfg"))
        config = _config_of(branch, selected_layers)
        _require(_branch_shapes(config), branch, f"{name}, the branch")
        clip = {key: value for key, value in clip.items() if key not in _DESCRIPTION}
        if clip:
            _require_clip(clip, config.dim, f"{name}, the CLIP")
        return cls(branch, clip, config, selected_layers is not None, epoch, name)

    def build(self, clip_state: Mapping[str, Tensor] | None = None) -> ImportedDist:
        """Return the model, in evaluation mode, on the file's CLIP or else on `clip_state`.

        Raises UserError without a CLIP and for a CLIP that does not fit the branch.
        """
        clip = self.clip_state
        if clip_state is not None:
            given = {k: v for k, v in clip_state.items() if k not in _DESCRIPTION}
            given = plain_tensors(given, "the CLIP given")
            shapes = _require_clip(given, self.config.dim, "the CLIP given")
            for_tower(self.config, self._tower(given))
            if clip and (faults := describe_faults(shapes, clip)):
                raise UserError(
                    f"{self.name} holds another CLIP than the one given: of its tensors {faults}; "
                    "give the CLIP that it was trained with, or none"
                )
            clip = clip or given
        if not clip:
            raise UserError(
                f"{self.name} holds the branch alone: give the tensors of the CLIP that it was "
                "trained with as well"
            )
        tower = self._tower(clip)
        weights = {k.removeprefix("visual."): v for k, v in clip.items() if k.startswith("visual.")}
        tower.load_state_dict(weights, assign=True)
        blocks, listed = len(tower.transformer.resblocks), len(self.config.selected_layers)
        if not self.layers_known and blocks != listed:
            raise UserError(
                f"{self.name} reads {listed} of the tower's {blocks} blocks and does not say "
                "which: name them, counted from 0, as selected layers (--selected-layers 0,...)"
            )
        config = for_tower(self.config, tower)
        with torch.device("meta"):
            branch = DistBranch(config)
        branch.load_state_dict(self.branch_state, assign=True)
        branch.requires_grad_(True)
        model = DistModel(tower, branch, clip["logit_scale"]).eval()
        return ImportedDist(model, config, self.epoch, clip)

    def _tower(self, clip: Mapping[str, Tensor]) -> VisionTransformer:
        return vision_tower(clip, width_of(clip, self.config.dim), self.name)


@dataclass(frozen=True)
class ImportedDist:
    """An official checkpoint, ready to use."""

    model: DistModel
    config: DistConfig
    epoch: int | None
    """Index of the last epoch trained; None if the file does not say."""
    clip_state: dict[str, Tensor]
    """The CLIP of the model in OpenAI's names, float32."""


def import_dist_checkpoint(
    path_or_mapping: str | Path | Mapping[str, Any],
    clip_state: Mapping[str, Tensor] | None = None,
    selected_layers: Sequence[int] | None = None,
) -> ImportedDist:
    """Import a DiST model from a checkpoint of the released code.

    The file may come from training, be a released one with towers, or hold the branch alone; the
    last needs `clip_state`, the state dict of the CLIP in OpenAI's names. A CLIP in the file takes
    the place of the given one. `selected_layers` are the blocks of the tower, from 0, that the
    branch reads; they are needed if it reads some of them only and the file does not say which.
    All sizes are read off the tensors, with `weights_only=True`. Raises UserError as
    `DistCheckpoint.read` and `DistCheckpoint.build`.
    """
    return DistCheckpoint.read(path_or_mapping, selected_layers).build(clip_state)


def lacks(content: Mapping[str, Any]) -> str:
    """Return what a file with these entries lacks to be a checkpoint, in words; "" if nothing."""
    state = content.get(_STATE)
    if not isinstance(state, Mapping):
        return f"an entry {_STATE} with tensors {_CLIP}{_BRANCH}*"
    if any(_of_branch(str(key)) for key in state):
        return ""
    return f"tensors {_CLIP}{_BRANCH}* in {_STATE}"


def is_of(content: Mapping[str, Any]) -> bool:
    """Return whether a file with these entries is a checkpoint of DiST's released code."""
    return not lacks(content)


# The name that the registry uses.
read = DistCheckpoint.read


def write(path: Path, head: Head, clip_state: Mapping[str, Tensor]) -> None:
    """Write a head and its CLIP as the authors release a model: `model_state` alone.

    `clip_state` are all tensors of the CLIP in OpenAI's names. A branch that reads only some blocks
    of the tower gets the entry `cfg` besides, in which training names them. Raises UserError for a
    CLIP that the format has no place for.
    """
    config, branch = head.config, head.branch
    assert isinstance(branch, DistBranch)
    named = {_BRANCH + name: value for name, value in branch.state_dict().items()}
    state = {_CLIP + name: value.detach().cpu() for name, value in {**clip_state, **named}.items()}
    content: dict[str, Any] = {_STATE: state}
    chosen = list(config.selected_layers)
    blocks = usual_count(clip_state, re.escape(VISION_BLOCKS) + r"(?P<n>\d+)\..*")
    if chosen != list(range(blocks)):
        told = {"DIST": {"SELECTED_LAYERS": chosen}}
        content["cfg"] = json.dumps({"VIDEO": {"BACKBONE": told}})
    DistCheckpoint.read(content).build()
    data = io.BytesIO()
    torch.save(content, data)
    write_bytes(path, data.getvalue())


def _of_branch(key: str) -> bool:
    return key.removeprefix("module.").startswith((_CLIP + _BRANCH, _CLIP + _EARLIER_BRANCH))


def _present_name(key: str) -> str:
    inner = key.removeprefix(_CLIP)
    if inner.startswith(_BRANCH):
        return inner.removeprefix(_BRANCH)
    part, dot, rest = inner.removeprefix(_EARLIER_BRANCH).partition(".")
    return _EARLIER.get(part, part) + dot + rest


def _require(wanted: Shapes, found: Mapping[str, Tensor], where: str) -> None:
    if faults := describe_faults(wanted, found):
        raise UserError(f"{where} does not fit DiST's released code: {faults}")


def _require_clip(clip: Mapping[str, Tensor], dim: int, where: str) -> Shapes:
    """Raise UserError unless `clip` is an image tower, a scale and all or nothing of the text."""
    shapes = clip_shapes(clip, width_of(clip, dim), where)
    _require(shapes, clip, where)
    return shapes


def _told_layers(text: object) -> list[int] | None:
    """Find SELECTED_LAYERS in the configuration that training files hold; None without it."""

    def found(value: object) -> Iterator[object]:
        if isinstance(value, dict):
            yield from (inner for key, inner in value.items() if key == "SELECTED_LAYERS")
            for inner in value.values():
                yield from found(inner)

    try:
        layers = next(found(json.loads(text)), None) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    plain = isinstance(layers, list) and layers and all(type(v) is int for v in layers)
    return list(layers) if isinstance(layers, list) and plain else None


def _config_of(branch: Mapping[str, Tensor], selected_layers: Sequence[int] | None) -> DistConfig:
    """Infer the configuration from the tensors of a branch."""

    def size(pattern: str, axis: int) -> int:
        fitting = (v for name, v in branch.items() if re.fullmatch(pattern, name))
        return max(usual(value.shape[axis] for value in fitting if value.ndim > axis), 1)

    each = r"\.\d+\."
    layers = usual_count(branch, r"(input_linears|\w+_nets)(?<!adapooling_nets)\.(?P<n>\d+)\..*")
    pools = any(name.startswith("adapooling_nets.") for name in branch)
    wide = size(rf"integration_nets{each}ln(_temporal)?\.weight|ln_post\.weight", 0)
    narrow = size(
        rf"temporal_nets{each}(ln|temporal_net\.c_fc2)\.bias|temporal_stem\.bias"
        rf"|integration2temporal_nets{each}linear_fuse\.bias",
        0,
    )
    alpha = size(rf"temporal2integration_nets{each}linear_fuse\.weight", 2)
    slow = size(rf"temporal2integration_nets{each}cls_token", 2)
    temporal = rf"temporal_nets{each}temporal_net\.c_fc1\.weight"
    feed, over = rf"integration_nets{each}ffn.c_fc.weight", rf"integration_nets{each}temporal_ffn"
    if selected_layers is not None and len(selected_layers) != layers:
        raise UserError(
            f"{len(selected_layers)} selected layers for a branch that reads {layers} blocks: name "
            f"{layers}, counted from 0"
        )
    return DistConfig(
        dim=size("proj", 1),
        dense_frames=slow * alpha,
        alpha=alpha,
        width=size(rf"input_linears{each}weight|proj_spatial_cls_token\.weight", 1),
        patch=size(r"temporal_stem\.weight", 4),
        selected_layers=tuple(range(layers) if selected_layers is None else selected_layers),
        integration_dim=wide,
        temporal_dim=narrow,
        pooling_layers=usual_count(branch, r"adapooling_nets\.(?P<n>\d+)\..*") if pools else 0,
        stem_kernel=size(r"temporal_stem\.weight", 2),
        temporal_kernel=size(temporal, 2),
        temporal_ratio=ratio_of(size(temporal, 0), narrow),
        integration_ratio=ratio_of(size(feed, 0), wide),
        integration_temporal_ratio=ratio_of(size(rf"{over}\.c_fc1\.weight", 0), wide),
    )


def _branch_shapes(config: DistConfig) -> Shapes:
    with torch.device("meta"):
        state = DistBranch(config).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}
