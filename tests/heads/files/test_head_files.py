"""Head files: what is saved comes back, and what is not a head is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from featstore import UserError, WorkError
from heads import HeadConfig, HeadOrigin, TemporalHead, build_head, load_head, save_head

CONFIG = HeadConfig(dim=8, layers=1, experts=2)
ORIGIN = HeadOrigin(
    dataset="toy",
    dataset_fingerprint="feed",
    encoder="ViT-B-32/random",
    encoder_fingerprint="0123",
    encoder_precision="fp32",
    sampling="uniform:16",
    crops=1,
    preprocessing={"size": 224},
    prompt_set="mote28",
    class_names=("brush hair", "jump", "löwe"),
    frames=8,
)


def make_head() -> TemporalHead:
    generator = torch.Generator().manual_seed(0)
    head = build_head(CONFIG, torch.eye(3, 8), logit_scale=50.0, generator=generator)
    head.origin = ORIGIN
    return head


def write(path: Path, tensors: dict[str, Tensor], card: Any) -> None:
    save_file(tensors, path, metadata={"mote": json.dumps(card)})


def test_round_trip(tmp_path: Path) -> None:
    head = make_head()
    save_head(head, tmp_path / "head.safetensors")
    for path in (tmp_path, tmp_path / "head.safetensors", str(tmp_path)):
        loaded = load_head(path)
        assert loaded.config == CONFIG
        assert loaded.origin == ORIGIN
        assert not loaded.training
        assert all(p.requires_grad for p in loaded.parameters())
        state = loaded.state_dict()
        assert all(torch.equal(state[name], value) for name, value in head.state_dict().items())


def test_a_head_without_parameters_round_trips(tmp_path: Path) -> None:
    save_head(build_head(HeadConfig(dim=8, kind="mean")), tmp_path / "head.safetensors")
    loaded = load_head(tmp_path)
    assert loaded.config.kind == "mean"
    assert loaded.origin is None


def test_no_head_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no head"):
        load_head(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--resume"):
        load_head(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    save_head(make_head(), file)
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(WorkError, match="not a complete safetensors file"):
        load_head(file)
    file.write_bytes(b"")
    with pytest.raises(WorkError, match="not a complete safetensors file"):
        load_head(file)
    head = make_head()
    with torch.no_grad():
        next(head.parameters())[0, 0] = float("inf")
    save_head(head, file)
    with pytest.raises(WorkError, match=r"transformer\.positions holds values that are not finite"):
        load_head(file)


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="mote did not write"):
        load_head(file)
    tensors = {name: value.clone() for name, value in make_head().state_dict().items()}
    card = {"format": 1, "head": CONFIG.to_json(), "origin": None}
    write(file, tensors, card | {"format": 2})
    with pytest.raises(UserError, match="not a head of format 1"):
        load_head(file)
    write(file, tensors, card | {"head": CONFIG.to_json() | {"gates": 3}})
    with pytest.raises(UserError, match="unknown fields gates"):
        load_head(file)
    write(file, tensors, card | {"head": CONFIG.to_json() | {"layers": 10**9}})
    with pytest.raises(UserError, match="layers is 1000000000"):
        load_head(file)
    write(file, tensors, card | {"head": {"layers": 1}})
    with pytest.raises(UserError, match="lacks dim"):
        load_head(file)
    write(file, tensors, card | {"origin": {"dataset": "toy"}})
    with pytest.raises(UserError, match="head origin configuration lacks class_names"):
        load_head(file)
    write(file, tensors | {"extra": torch.zeros(1)}, card)
    with pytest.raises(UserError, match="extra is extra"):
        load_head(file)
    write(file, tensors | {"transformer.positions": torch.zeros(3, 8)}, card)
    with pytest.raises(UserError, match=r"transformer\.positions is \[3, 8\], not \[77, 8\]"):
        load_head(file)
    del tensors["transformer.positions"]
    write(file, tensors, card)
    with pytest.raises(UserError, match=r"transformer\.positions is missing"):
        load_head(file)
