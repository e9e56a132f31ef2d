"""What may be around a quantized model: casts, transforms, hooks of all modules, modes of autograd, caches in others' hands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM

import sordino
from levels import LEVELS, needs_kernels
from sordino.recipe import load_recipe
from sordino.runtime.block import one_call
from sordino.runtime.modules import QuantLinear
from tiny import make_tiny

SMALL: dict[str, Any] = {"windows": 8, "seqlen": 48}
KINDS = {
    "plain cache": ("rtn-w4", []),
    "packed cache": ("prefixquant-w4a8kv4-static", ["guard=off", 'moves=[{move="rotate-inner"}]']),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("around")
    make_tiny(where / "model", layers=2)
    recipe, sets = KINDS[request.param]
    sordino.quantize(str(where / "model"), load_recipe(recipe, sets), where / "out", **SMALL)
    return where / "out"


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


IDS = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("second", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("call", [True, False])
def test_a_cache_goes_on_in_another_mode(model: Any, first: Any, second: Any, call: bool) -> None:
    with one_call(call):
        with first():
            cache = model(IDS[:, :8], use_cache=True).past_key_values
            model(IDS[:, 8:9], past_key_values=cache)
        with second():
            chunk = model(IDS[:, 9:14], past_key_values=cache).logits
            last = model(IDS[:, 14:15], past_key_values=cache).logits
        with torch.no_grad():
            whole = model(IDS[:, :15], use_cache=False).logits
    found = torch.cat([chunk, last], 1).float()
    assert float((found - whole[:, 9:]).norm() / whole[:, 9:].norm()) < 2e-2


@torch.no_grad()
def test_what_was_cut_off_a_cache_stays_as_it_was(model: Any) -> None:
    cache = model(IDS[:, :12], use_cache=True).past_key_values
    model(IDS[:, 12:13], past_key_values=cache)
    held = cache.layers[0].keys
    before = held.clone()
    cache.crop(-3)
    for i in (20, 21, 22):
        model(IDS[:, i : i + 1], past_key_values=cache)
    assert torch.equal(held, before) and cache.get_seq_length() == 13


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("group", [None, 16])
def test_no_tokens(mode: str, group: int | None) -> None:
    inputs = {"bits": 8, "mode": mode} | ({} if group is None else {"group": group})
    linear = QuantLinear(32, 12, True, 8, 32, True, inputs=inputs if mode == "dynamic" else {"bits": 8, "mode": mode})
    for shape in ((0, 32), (2, 0, 32), (0, 3, 32)):
        assert linear(torch.zeros(shape)).shape == (*shape[:-1], 12)


def test_a_cast_leaves_scales_alone(model: Any) -> None:
    linear = model.model.layers[0].mlp.down_proj
    before = {k: b.clone() for k, b in linear._buffers.items() if b is not None}
    for cast in (nn.Module.float, nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        cast(linear)
        for name, old in before.items():
            assert linear._buffers[name].dtype == old.dtype and torch.equal(linear._buffers[name], old)


def test_scales_that_moved_are_read_anew() -> None:
    linear = QuantLinear(64, 16, False, 4, 32, True)
    linear.weight_packed.random_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 64)
    for i in range(50):  # memory of the old tensor is given away again and again
        linear.weight_scale = torch.full_like(linear.weight_scale, 1.0 + i, dtype=torch.bfloat16)
        exact = x @ linear.dequantize(torch.float32).T
        torch.testing.assert_close(linear(x), exact, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_transforms_and_forward_differentiation_go_to_torch() -> None:
    linear = QuantLinear(64, 16, False, 4, 32, True)
    linear.weight_packed.random_(generator=torch.Generator().manual_seed(0))
    linear.weight_scale.fill_(0.1)
    w, x, t = linear.dequantize(torch.float32), torch.randn(3, 64), torch.randn(3, 64)
    torch.testing.assert_close(torch.func.vmap(linear)(x[:, None]), (x @ w.T)[:, None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.jvp(linear, (x,), (t,))[1], t @ w.T, rtol=1e-4, atol=1e-4)
    grad = torch.func.grad(lambda v: linear(v).sum())(x)
    torch.testing.assert_close(grad, w.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(tangent, t @ w.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_of_all_modules_see_all_modules(model: Any) -> None:
    cache = model(IDS[:, :8], use_cache=True).past_key_values
    model(IDS[:, 8:9], past_key_values=cache)  # the kernels know the model by now
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(IDS[:, 9:10], past_key_values=cache)
    finally:
        handle.remove()
    assert {m for m in model.modules() if isinstance(m, QuantLinear)} <= set(seen)


class Cast(nn.Module):
    """Gives another dtype than what comes."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x).to(self.dtype)
        return out


@torch.no_grad()
def test_linears_of_others_may_give_another_dtype(model: Any) -> None:
    model = model.bfloat16()
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.down_proj = Cast(mlp.gate_proj, torch.float32), Cast(mlp.down_proj, torch.bfloat16)
    with one_call(True):
        ours = model(IDS).logits
    with one_call(False):
        theirs = model(IDS).logits
    assert float((ours - theirs).float().norm() / theirs.float().norm()) < 0.1  # codes at a tie


def test_the_kernels_are_there_where_a_compiler_is() -> None:
    """Installation goes on without them where they do not compile; that must not pass for a success here."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        assert LEVELS, "installed without native kernels although a C++ compiler is here: see the output of pip install -v"
