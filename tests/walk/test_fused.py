"""Norms and MLPs of the walk's blocks against those of transformers, forward and backward."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from levels import LEVELS, needs_kernels
from sordino.runtime import kernels
from sordino.walk import fused

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
MODULES: list[Any] = [
    lambda: LlamaRMSNorm(48),
    lambda: LlamaMLP(LlamaConfig(**SIZES)),
    lambda: Qwen3RMSNorm(48),
    lambda: Qwen3MLP(Qwen3Config(**SIZES)),
]


def pair(make: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A module and the same with its forward replaced."""
    torch.manual_seed(0)
    plain = make().to(dtype)
    for p in plain.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    ours = copy.deepcopy(plain)
    fused.fuse(ours)
    assert type(ours) is not type(plain) and type(ours).__name__ == type(plain).__name__
    return plain, ours


def passes(module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_equal_the_modules(make: Any, dtype: torch.dtype) -> None:
    plain, ours = pair(make, dtype)
    x, grad = torch.randn(2, 7, 48).to(dtype), torch.randn(2, 7, 48).to(dtype)
    exact = passes(copy.deepcopy(plain).double(), x.double(), grad.double())
    for found, theirs, true in zip(passes(ours, x, grad), passes(plain, x, grad), exact, strict=True):
        assert found.dtype == dtype
        error, bound = float((found - true).norm()), float((theirs - true).norm())
        assert error <= 1.1 * bound + 4 * torch.finfo(dtype).eps * float(true.norm())


@needs_kernels
def test_copies_go_through_the_kernels_too() -> None:
    _, ours = pair(MODULES[0], torch.bfloat16)
    x = torch.randn(3, 48).bfloat16().requires_grad_()
    for module in (ours, copy.deepcopy(ours)):
        assert type(module(x).grad_fn).__name__ == "_RmsNormBackward"


def test_what_is_dropped_is_freed_at_once() -> None:
    _, ours = pair(MODULES[1], torch.float32)
    watched = weakref.ref(ours.up_proj.weight)
    gc.disable()  # a cycle would stay
    try:
        del ours
        assert watched() is None
    finally:
        gc.enable()


@needs_kernels
def test_what_the_kernels_cannot_take_is_the_modules_own() -> None:
    plain, ours = pair(MODULES[0], torch.float32)
    x = torch.randn(3, 96)[:, ::2]  # not contiguous
    assert torch.equal(ours(x), plain(x))
    with torch.no_grad():
        assert torch.equal(ours(torch.ones(2, 1)), plain(torch.ones(2, 1)))  # broadcast
    _, gated = pair(MODULES[1], torch.float32)
    with kernels.using("off"):
        off = gated(x)
    with kernels.using(LEVELS[-1]):
        assert torch.allclose(gated(x), off, atol=1e-5)
