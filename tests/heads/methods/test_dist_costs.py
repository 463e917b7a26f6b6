"""What DiST costs is what its description says, and docs/methods.md says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heads import HeadConfig, build_head
from heads.files.portable import merged_head
from heads.methods.dist.branch import DistBranch
from heads.methods.dist.config import DistConfig
from heads.methods.dist.costs import OUTPUT, DistCosts, dist_costs

PAGE = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
TOWERS = {"ViT-B/16": (768, 16, 12, 512), "ViT-L/14": (1024, 14, 24, 768)}


def costs(tower: str, dense: int, pooling: int) -> DistCosts:
    config = DistConfig(dim=TOWERS[tower][3], dense_frames=dense, pooling_layers=pooling)
    return dist_costs(config.for_backbone(*TOWERS[tower]), TOWERS[tower][2])


def test_the_parameters_are_those_of_the_description() -> None:
    base, large = costs("ViT-B/16", 16, 4), costs("ViT-L/14", 64, 4)
    assert base.parameters == {
        "temporal stem": 368_736,
        "input maps": 3_543_552,
        "integration to temporal": 443_520,
        "temporal to integration": 926_208,
        "temporal blocks": 1_331_712,
        "integration blocks": 4_790_016,
        "pooling blocks": 14_208_000,
        OUTPUT: 295_296 + 768 + 196_608 + 768,
    }
    assert (base.trained, base.tensors) == (26_105_184, 433)
    assert (large.trained, large.tensors) == (39_867_744, 757)
    assert large.parameters[OUTPUT] == 393_600 + 768 + 294_912 + 768
    fewer = costs("ViT-B/16", 16, 2)
    assert (fewer.trained, fewer.tensors) == (19_001_184, 383)
    others = {
        ("ViT-B/16", 32, 4): 26_154_336,
        ("ViT-B/16", 64, 4): 26_252_640,
        ("ViT-B/16", 64, 2): 19_130_208,
        ("ViT-L/14", 16, 4): 39_609_696,
        ("ViT-L/14", 64, 2): 32_745_312,
    }
    assert {key: costs(*key).trained for key in others} == others


def test_the_multiplications_are_those_of_the_description() -> None:
    """Billions of one clip; published tables have 163 for ViT-B/16 and 710 for ViT-L/14."""
    published, own = costs("ViT-B/16", 16, 2), costs("ViT-B/16", 16, 4)
    assert published.tower / 1e9 == pytest.approx(141.4, abs=0.05)
    assert published.forward / 1e9 == pytest.approx(163, abs=0.5)
    assert sum(own.branch.values()) / 1e9 == pytest.approx(22, abs=0.5)
    assert own.training_step / 1e9 == pytest.approx(207, rel=0.01)
    assert own.cached_step / 1e9 == pytest.approx(66, rel=0.02)
    assert costs("ViT-L/14", 16, 4).forward / 1e9 == pytest.approx(710, rel=0.005)


def test_a_branch_multiplies_as_often_as_is_said() -> None:
    """torch counts ours: no pooling, whose projections are another sum, and no ends of clips."""
    config = DistConfig(dim=512, dense_frames=16, pooling_layers=0)
    config = config.for_backbone(768, 16, 12, 512)
    with torch.device("meta"):
        branch = DistBranch(config)
        frames = torch.empty(1, 16, 3, 224, 224)
        tokens = [torch.empty(8, 197, 768) for _ in range(12)]
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        branch(frames, tokens)
    said = dist_costs(config, 12).branch
    # The last map to the temporal side is never used, and ours does without it.
    said["integration to temporal"] = said["integration to temporal"] * 11 // 12
    assert counted.get_total_flops() / 2 == pytest.approx(sum(said.values()), rel=0.02)


def rows(title: str) -> list[list[str]]:
    """The cells of the table whose first column has that title."""
    lines = PAGE.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {title} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_the_page_says_what_is_computed() -> None:
    for words, frames, *numbers in rows("configuration"):
        match = re.match(r"(ViT-./\d+), (\d)", words)
        assert match is not None
        found = costs(match[1], int(frames.split("+")[1]), int(match[2]))
        billions = (found.tower, sum(found.branch.values()), found.training_step)
        assert numbers == [f"{found.trained:,}", *(f"{n / 1e9:,.0f}" for n in billions)]


def test_the_page_says_what_other_heads_cost() -> None:
    """Of ViT-B/16 and 8 frames, without the tower."""
    for name, layers, experts, trained, multiplied in rows("head"):
        head = build_head(HeadConfig(dim=512, kind=name, layers=int(layers), experts=int(experts)))
        count = sum(p.numel() for p in head.parameters())
        merged = merged_head(head)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            merged(torch.ones(1, 8, 512), torch.ones(5, 512), modulate=False)
        multiplications = f"{counted.get_total_flops() / 2e9:.2f}"
        assert (trained, multiplied) == (f"{count:,}", multiplications)
