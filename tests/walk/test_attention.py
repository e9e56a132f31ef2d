"""Attention for calibration windows: equal to the definition in fp64, and out of the way where it cannot help."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sordino.recipe import load_recipe
from sordino.runtime.attention import attend
from sordino.runtime.prefix import give_prefix
from sordino.walk import attention
from sordino.walk.blocks import BlockFactory
from sordino.walk.plan import make_plan
from sordino.walk.source import open_source
from tiny import make_tiny


def reference(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """The definition, fp64, [B, L, H, d]; the first keys are a prefix where there are more than queries."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3)) * scaling
    length, keys = q.shape[2], k.shape[2]
    scores.masked_fill_(torch.ones(length, keys).triu(1 + keys - length).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2)])
def test_equals_the_definition(length: int, heads: int, kv: int, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_tiles", lambda: tiles)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, h, length, 16, generator=generator).bfloat16() for h in (heads, kv, kv))
    with torch.no_grad():
        out, _ = attention.window_attention(Layer(), q, k, v, None, scaling=0.3)
    exact = reference(q, k, v, 0.3)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("before", [1, 3, 130])
def test_both_ways_let_every_query_see_the_prefix(before: int) -> None:
    generator = torch.Generator().manual_seed(before)
    q, k, v = (
        torch.randn(2, h, n, 16, generator=generator).bfloat16() for h, n in ((6, 140), (2, before + 140), (2, before + 140))
    )
    exact = reference(q, k, v, 0.3)
    for out in (attention.fused(q, k, v, 0.3), attention.CausalAttention.apply(q, k, v, 0.3)):  # type: ignore[no-untyped-call]
        assert out.shape == exact.shape
        assert (out - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("before", [1, 20, 21, 70])
def test_checkpoints_see_a_prefix_shorter_or_longer_than_the_text(before: int, dtype: torch.dtype) -> None:
    generator, layer = torch.Generator().manual_seed(before), Layer()
    layer.num_key_value_groups = 3
    q, k, v = (
        torch.randn(2, h, n, 16, generator=generator).to(dtype) for h, n in ((6, 20), (2, before + 20), (2, before + 20))
    )
    k[1, :, :before], v[1, :, :before] = k[0, :, :before], v[0, :, :before]  # one prefix for all texts
    give_prefix(layer, k[:1, :, :before], v[:1, :, :before])
    out, _ = attend(layer, q, k[:, :, before:], v[:, :, before:], None, scaling=0.3)
    exact = reference(q, k, v, 0.3)
    assert out.shape == exact.shape and out.dtype == dtype
    assert (out - exact).norm() <= (4e-3 if dtype == torch.bfloat16 else 1e-6) * exact.norm()


@pytest.mark.parametrize("length", [7, 200])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2)])
def test_gradients_equal_those_of_the_definition(length: int, heads: int, kv: int) -> None:
    generator = torch.Generator().manual_seed(length)
    mine = [torch.randn(2, h, length, 16, generator=generator).bfloat16().requires_grad_() for h in (heads, kv, kv)]
    exact = [x.detach().double().requires_grad_() for x in mine]
    grad = torch.randn(2, length, heads, 16, generator=generator).bfloat16()
    attention.window_attention(Layer(), mine[0], mine[1], mine[2], None, scaling=0.3)[0].backward(grad)
    reference(exact[0], exact[1], exact[2], 0.3).backward(grad.double())
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-2 * b.grad.norm()


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("case", ["mask", "fp32"])
def test_other_cases_go_to_sdpa(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(attention, "attend", lambda *a, **k: called.append(a) or (a[1], None))
    q = torch.randn(1, 4, 8, 16, dtype=torch.float32 if case == "fp32" else torch.bfloat16)
    mask = torch.zeros(1, 1, 8, 8) if case == "mask" else None
    attention.window_attention(Layer(), q, q, q, mask)
    assert called


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_masks_of_a_family_survive(family: str, tmp_path: Path) -> None:
    """A sliding window (mistral) must still arrive as a mask; plain causal families need none."""
    source = open_source(str(make_tiny(tmp_path / "m", family, torch.bfloat16)))
    plan = make_plan(source, load_recipe("gptq-w4"), None, None)
    calls = BlockFactory(source, plan.anatomy, plan.dtype).calls(64)
    assert (calls[0]["attention_mask"] is None) == (family != "mistral")
