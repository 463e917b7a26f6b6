"""A frozen block in a low precision computes what open_clip's computes, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from heads.methods.msta import frozen_block
from heads.methods.msta.frozen_block import FrozenBlock

CAUSAL = torch.full((7, 7), float("-inf")).triu(1)


def block_of(act: type[nn.Module] = QuickGELU, **changes: Any) -> ResidualAttentionBlock:
    torch.manual_seed(0)
    block = ResidualAttentionBlock(24, 2, act_layer=act, **changes)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.requires_grad_(False).eval()


def tokens_of() -> Tensor:
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradient(output: Tensor, tokens: Tensor) -> Tensor:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((output * weights).sum(), tokens)
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def low_of(block: nn.Module, tokens: Tensor, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    low = FrozenBlock(block, dtype)
    output: Tensor = low(tokens, low.read(tokens), mask)
    return output


@pytest.mark.parametrize("longest", [512, 3])  # attention as products, and fused
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["all", "back"])
@pytest.mark.parametrize("act", [QuickGELU, nn.GELU])
def test_it_is_the_block(
    act: type[nn.Module], mask: Tensor | None, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_block, "LONGEST", longest)
    block, tokens = block_of(act), tokens_of()
    wanted = block(tokens, attn_mask=mask)
    slope = gradient(wanted, tokens)
    exact = low_of(block, tokens, torch.float32, mask)
    assert torch.allclose(exact, wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(gradient(exact, tokens), slope, rtol=1e-3, atol=1e-3)
    rounded = low_of(block, tokens, torch.bfloat16, mask)
    assert rounded.dtype == torch.float32
    for found, other in ((rounded, wanted), (gradient(rounded, tokens), slope)):
        assert 0 < distance(found, other) < 2**-6


@pytest.mark.parametrize("act", [QuickGELU, nn.GELU])
def test_class_tokens_alone_are_those_of_the_block(act: type[nn.Module]) -> None:
    block, tokens = block_of(act), tokens_of()
    wanted = block(tokens)[:, :1]
    slope = gradient(wanted, tokens)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        low = FrozenBlock(block, dtype)
        found = low.class_tokens(tokens, low.read(tokens))
        assert found.shape == (3, 1, 24)
        assert distance(found, wanted) < near
        assert distance(gradient(found, tokens), slope) < near


def test_its_weights_are_copies_in_the_low_precision() -> None:
    block = block_of()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    low = FrozenBlock(block, torch.bfloat16)
    assert {value.dtype for value in low.buffers()} == {torch.bfloat16}
    assert not any(name in low.state_dict() for name, _ in low.named_buffers())
    low(tokens_of(), low.read(tokens_of())).sum().backward()
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


def test_blocks_that_do_more_are_not_taken() -> None:
    class Other(ResidualAttentionBlock):
        pass

    assert FrozenBlock.fits(block_of())
    assert FrozenBlock.fits(block_of(nn.GELU))
    assert not FrozenBlock.fits(block_of(nn.ReLU))
    assert not FrozenBlock.fits(block_of(ls_init_value=0.5))
    assert not FrozenBlock.fits(Other(24, 2))
