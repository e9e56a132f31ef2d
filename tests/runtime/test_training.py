"""Small steps of training by the kernels against torch's, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from draws import normal
from levels import SEEDS, TYPES, every_level, examples, needs_kernels
from sordino.numerics.straight import fake_round
from sordino.runtime import kernels
from sordino.runtime.kernels import library, training

pytestmark = needs_kernels


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=seed).to(dtype)


def near(found: Tensor, exact: Tensor, steps: float) -> bool:
    """Whether two tensors differ by no more than so many steps of the dtype, as a share of the whole."""
    return float((found.double() - exact).norm()) <= steps * torch.finfo(found.dtype).eps * float(exact.norm()) + 1e-30


@every_level
@examples
@given(
    bits=st.integers(2, 8), rows=st.integers(1, 9), groups=st.integers(1, 4), group=st.integers(1, 130), dtype=TYPES, seed=SEEDS
)
def test_grids(level: str, bits: int, rows: int, groups: int, group: int, dtype: torch.dtype, seed: int) -> None:
    top = (1 << bits) - 1
    zero = (draw(seed, rows, groups, 1).sigmoid() * top).round()
    latent, scale = draw(seed + 1, rows, groups, group) * top / 2, draw(seed + 2, rows, groups).exp().bfloat16().float()
    grad = draw(seed + 3, rows, groups, group, dtype=dtype)
    with kernels.using(level):
        found = training.on_grid(latent, scale, zero, bits, dtype)
        assert found is not None
        codes, values = found
        again = training.on_grid(codes, scale, zero, bits, dtype)
        back = training.on_grid_back(grad, codes, scale, zero, True, True)
        half = training.on_grid_back(grad, codes, scale, zero, False, True)
        held = latent.clone()
        assert training.keep_near(held, zero, bits, 0.499)
    assert torch.equal(codes, (latent.round() + zero).clamp(0, top).to(torch.uint8))
    assert torch.equal(values, ((codes - zero) * scale[..., None]).to(dtype))
    assert again is not None and again[0] is codes and torch.equal(again[1], values)
    assert back is not None and half is not None and half[0] is None
    to_latent, to_scale = back
    assert to_latent is not None and torch.equal(to_latent, grad.float() * scale[..., None])
    exact = ((codes.double() - zero) * grad.double()).sum(-1)
    assert to_scale is not None and float((to_scale - exact).norm()) < 1e-5 * top * float(grad.double().norm() + 1)
    assert half[1] is not None and torch.equal(half[1], to_scale)
    assert torch.equal(held, torch.minimum(torch.maximum(latent, -zero - 0.499), top - zero + 0.499))


@every_level
@examples
@given(rows=st.integers(1, 150), n=st.integers(1, 200), dtype=TYPES, seed=SEEDS)
def test_gradients_of_norms(level: str, rows: int, n: int, dtype: torch.dtype, seed: int) -> None:
    x, grad, gain = draw(seed, rows, n, dtype=dtype), draw(seed + 1, rows, n, dtype=dtype), draw(seed + 2, n, dtype=dtype)
    with kernels.using(level):
        how = library.Norm(gain.data_ptr(), 0, 1e-5)
        to_x, to_gain = training.norm_back(how, x, grad, True)
        alone, nothing = training.norm_back(how, x, grad, False)
    exact_x, exact_gain = (t.double().requires_grad_() for t in (x, gain))
    F.rms_norm(exact_x, (n,), exact_gain, 1e-5).backward(grad.double())
    assert exact_x.grad is not None and exact_gain.grad is not None
    # For one channel the gradient is a difference of numbers much larger than itself.
    assert n < 4 or near(to_x, exact_x.grad, 8)
    bound = 4 * torch.finfo(dtype).eps * rows**0.5 * (n + 9) ** 0.5
    assert to_gain is not None and float((to_gain - exact_gain.grad).norm()) <= bound
    assert nothing is None and torch.equal(alone, to_x)


@every_level
@examples
@given(n=st.integers(1, 9000), dtype=TYPES, seed=SEEDS)
def test_gradients_of_gated_activations(level: str, n: int, dtype: torch.dtype, seed: int) -> None:
    gate, up, grad = (draw(seed + i, n, dtype=dtype) * 4 for i in range(3))
    with kernels.using(level):
        to_gate, to_up = training.glu_back(gate, up, grad)
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    (F.silu(exact_gate) * exact_up).backward(grad.double())
    assert exact_gate.grad is not None and exact_up.grad is not None
    assert near(to_gate, exact_gate.grad, 8) and near(to_up, exact_up.grad, 8)


@every_level
@examples
@given(
    heads=st.integers(1, 3), shared=st.integers(1, 3), queries=st.integers(1, 40), before=st.integers(0, 20), seed=SEEDS,
    scaling=st.floats(0.01, 3),
)  # fmt: skip
def test_causal_weights(level: str, heads: int, shared: int, queries: int, before: int, seed: int, scaling: float) -> None:
    keys = before + queries
    scores = draw(seed, heads, shared, queries, keys) * 3
    hidden = torch.full((queries, keys), float("-inf")).triu(before + 1)
    with kernels.using(level):
        weights = training.weigh(scores.clone(), before + 1, scaling)
        assert weights is not None
        grad, inner = draw(seed + 1, *weights.shape).bfloat16(), draw(seed + 2, heads, shared, queries)
        found = training.weigh_back(grad, weights, inner, before + 1, scaling)
    exact = torch.softmax(scores.double() * scaling + hidden, -1)
    assert weights.dtype == torch.bfloat16 and bool((weights[..., hidden < 0] == 0).all())
    assert float((weights.double() - exact).abs().max()) <= 2**-8
    assert near(weights, exact, 1)
    expected = ((grad.float() - inner[..., None]) * weights * scaling).bfloat16()
    assert found is not None and near(found, expected.double(), 1)


@every_level
@examples
@given(
    kind=st.sampled_from(["one", "a row", "a head"]), bits=st.sampled_from([3, 4, 8]), tokens=st.integers(1, 40),
    n=st.integers(1, 130), dtype=TYPES, seed=SEEDS,
)  # fmt: skip
def test_rounding(level: str, kind: str, bits: int, tokens: int, n: int, dtype: torch.dtype, seed: int) -> None:
    top = (1 << bits) - 1
    x, grad = (draw(seed + i, 2, 3, tokens, n, dtype=dtype).contiguous() for i in range(2))
    shape = {"one": (1,), "a row": (2, 3, tokens, 1), "a head": (3, 1, 1)}[kind]
    scale = draw(seed + 2, *shape).abs() / top + 0.01
    zero = (draw(seed + 3, *shape).sigmoid() * top).round()
    results = []
    for name in (level, "off"):
        values, factor = x.clone().requires_grad_(), scale.clone().requires_grad_()
        with kernels.using(name):
            rounded = fake_round(values, factor, -zero, top - zero)
            rounded.backward(grad)
        results.append((rounded.detach(), values.grad, factor.grad))
    (ours, to_x, to_scale), (theirs, exact_x, exact_scale) = results
    assert torch.equal(ours, theirs) and to_x is not None and exact_x is not None and torch.equal(to_x, exact_x)
    assert to_scale is not None and exact_scale is not None and to_scale.shape == scale.shape
    assert float((to_scale - exact_scale).norm()) <= 1e-4 * top * float(grad.float().norm() + 1)


def test_scales_that_differ_inside_a_row_are_left_to_torch() -> None:
    x = torch.randn(5, 8)
    assert training.rows_of(x, torch.rand(5, 8), -4, 3) is None
    assert training.rows_of(x, torch.rand(8), -4, 3) is None
    assert training.rows_of(x.T, torch.rand(1), -4, 3) is None


@every_level
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(level: str, bad: float) -> None:
    scores, x = torch.zeros(1, 2, 40), torch.zeros(2, 40)
    scores[0, 0, 3], x[1, 5] = bad, float("nan")
    gate = torch.zeros(40)
    gate[7] = float("nan")
    with kernels.using(level):
        weights = training.weigh(scores, 39, 1.0)
        back = training.glu_back(gate.bfloat16(), gate.bfloat16(), torch.ones(40).bfloat16())
        rounded = fake_round(x, torch.tensor([0.5]), -8, 7)
    assert weights is not None and bool(weights[0, 0, :39].isnan().all()) and bool(weights[0, 1].isfinite().all())
    assert all(bool(t[7].isnan()) for t in back) and bool(rounded[1, 5].isnan()) and int(rounded.isnan().sum()) == 1


def test_other_types_are_left_to_torch() -> None:
    half = torch.randn(2, 4, 8).bfloat16()
    assert training.weigh(half, 5, 1.0) is None
    assert training.weigh_back(half.float(), half, torch.ones(2, 4), 5, 1.0) is None
    assert training.on_grid(half, torch.ones(2, 4), torch.ones(2, 4, 1), 3, torch.bfloat16) is None
    assert training.on_grid(half.float(), torch.ones(2, 4).bfloat16(), torch.ones(2, 4, 1), 3, torch.bfloat16) is None
    assert not training.keep_near(half, torch.ones(2, 4, 1), 3, 0.499)


def test_what_they_cannot_read_is_left_to_torch() -> None:
    scores = torch.randn(2, 4, 8)
    assert training.weigh(scores.transpose(0, 1), 5, 1.0) is None
    assert training.on_grid(scores, torch.ones(2, 4), torch.ones(2, 4, 1), 3, torch.float16) is None
    with kernels.using("off"):
        assert training.weigh(scores, 5, 1.0) is None
        assert training.on_grid(scores, torch.ones(2, 4), torch.ones(2, 4, 1), 3, torch.float32) is None
        assert not training.keep_near(scores, torch.ones(2, 4, 1), 3, 0.499)
