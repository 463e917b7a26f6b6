"""Files of adapters alone, under the names of MMA's published code, on which MSTA is built.

A file is safetensors, or a dictionary that `torch.save` wrote, with the tensors themselves or under
`state_dict`:

| tensor | |
|---|---|
| `text_adapter.{block}.down.0.weight`, `.bias`, `.up.weight`, `.bias` | of the text tower |
| `visual_adapter.{block}.` and the same | of the image or video tower |
| `shared_adapter.{block}.0.weight`, `.bias` | of both |
| `temporal_adapter.{block}.weight`, `.bias` | over time; ours, which MMA does not have |

Blocks count from 1. Names may have anything in front that ends in a dot. The two buffers with the
tokens of prompts that MMA's files have besides are not read. A file that mote wrote also says the
configuration; of another one, lambda is a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from featstore.errors import UserError
from featstore.files.durable import write_bytes
from heads.methods.clip_tensors import usual
from heads.methods.msta.adapter import Adapters
from heads.methods.msta.config import MstaConfig
from heads.methods.weight_files import CARD, describe_faults, load_weight_file, plain_tensors

if TYPE_CHECKING:
    from heads.methods.head import Head

EXAMPLE: Final = "adapters.safetensors"
_NAME: Final = re.compile(r"(?:.*\.)?((?:text|visual|shared|temporal)_adapter\.(\d{1,4})\..+)")


@dataclass(frozen=True)
class MstaCheckpoint:
    """A file whose tensors are known to be present, finite and of the right shape."""

    state: dict[str, Tensor]
    """The tensors of `Adapters`, float32."""
    config: MstaConfig
    """The sizes; `dim` is 1 unless `told`, since no tensor has it."""
    told: bool
    """Whether the file says lambda, the form of the temporal part, and the other choices."""
    name: str
    """The name of the file in errors."""

    def build(self, dim: int) -> MstaConfig:
        """Return the configuration for an encoder of embedding width `dim`."""
        return self.config if self.told else replace(self.config, dim=dim)


def read(path: str | Path) -> MstaCheckpoint:
    """Read a file; nothing in it is run.

    Raises UserError for a file that is damaged or holds code, for one of another method, and for
    tensors that are missing, extra, misshapen or not finite.
    """
    content = load_weight_file(Path(path), EXAMPLE)
    if absent := lacks(content):
        raise UserError(f"{path} holds no adapters of MMA or MSTA: it lacks {absent}")
    named = {m[1]: v for key, v in _entries(content).items() if (m := _NAME.fullmatch(str(key)))}
    state = plain_tensors(named, str(path))
    told = _told(content)
    config = told or _config_of(state, str(path))
    with torch.device("meta"):
        wanted = {name: tuple(v.shape) for name, v in Adapters(config).state_dict().items()}
    if faults := describe_faults(wanted, state):
        raise UserError(f"{path} does not fit MMA's or MSTA's code: {faults}")
    return MstaCheckpoint(state, config, told is not None, str(path))


def lacks(content: Mapping[str, Any]) -> str:
    """Return what a file with these entries lacks to be one of adapters; "" if nothing."""
    named = (_NAME.fullmatch(str(key)) for key in _entries(content))
    found = {match[1].partition(".")[0] for match in named if match}
    absent = sorted({"text_adapter", "visual_adapter", "shared_adapter"} - found)
    return f"tensors {', '.join(f'{part}.*' for part in absent)}" if absent else ""


def is_of(content: Mapping[str, Any]) -> bool:
    """Return whether a file with these entries is one of adapters."""
    return not lacks(content)


def write(path: Path, head: Head) -> None:
    """Write a head's adapters alone, with the configuration as metadata."""
    adapters = head.adapters
    assert isinstance(adapters, Adapters)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapters.state_dict().items()}
    card = json.dumps({"head": head.config.to_json()})
    write_bytes(path, safetensors_bytes(tensors, metadata={CARD: card}))


def _entries(content: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = content.get("state_dict", content)
    return inner if isinstance(inner, Mapping) else {}


def _told(content: Mapping[str, Any]) -> MstaConfig | None:
    """Return the configuration that mote wrote beside the tensors; None without one."""
    card = content.get(CARD)
    head = card.get("head") if isinstance(card, Mapping) else None
    if not isinstance(head, Mapping) or head.get("kind") != "msta":
        return None
    return MstaConfig.from_json(head)


def _config_of(state: Mapping[str, Tensor], where: str) -> MstaConfig:
    """Infer the configuration from the tensors."""
    blocks = sorted({int(name.split(".")[1]) for name in state})
    if blocks[0] < 1 or blocks != list(range(blocks[0], blocks[-1] + 1)):
        raise UserError(
            f"{where} has adapters in blocks {', '.join(map(str, blocks[:12]))}: they must follow "
            "one another, from 1 up"
        )

    def size(ending: str, axis: int) -> int:
        fitting = (v for k, v in state.items() if re.fullmatch(ending, k) and v.ndim > axis)
        return max(usual(value.shape[axis] for value in fitting), 1)

    temporal = any(name.startswith("temporal_adapter.") for name in state)
    return MstaConfig(
        dim=1,
        first=blocks[0],
        last=blocks[-1],
        width=size(r"shared_adapter\.\d+\.0\.weight", 0),
        form="a" if temporal else "none",
        visual_width=size(r"visual_adapter\.\d+\.up\.weight", 0),
        text_width=size(r"text_adapter\.\d+\.up\.weight", 0),
    )
