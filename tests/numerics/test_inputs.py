"""Rounding of activations against its definition, and its gradient against finite differences' meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.numerics.inputs import InputGrid, encode


@given(st.integers(0, 10_000), st.sampled_from([3, 4, 8]), st.floats(0.3, 1.0), st.booleans())
def test_codes_are_nearest_and_simulation_equals_them(seed: int, bits: int, clip: float, static: bool) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) * 10
    scale = torch.tensor([0.37]) if static else InputGrid(bits).fit(x, clip)[0]
    codes, top = encode(x, scale, bits), (1 << (bits - 1)) - 1
    if not static:
        torch.testing.assert_close(scale[..., 0], clip * x.abs().amax(-1) / top)
    grid = torch.arange(-top - 1, top + 1) * scale.expand(2, 5, 1)[..., None]
    nearest = (x[..., None] - grid).abs().amin(-1)
    assert codes.dtype == torch.int8 and bool((codes >= -top - 1).all()) and bool((codes <= top).all())
    torch.testing.assert_close((x - codes * scale).abs(), nearest, rtol=1e-4, atol=1e-5)
    assert torch.equal(InputGrid(bits, static=True).fake(x, scale), codes * scale)


@given(st.integers(0, 10_000), st.sampled_from([3, 4, 8]), st.floats(0.3, 1.0), st.floats(-30, 30))
def test_zero_points_reach_from_the_smallest_entry_to_the_largest(seed: int, bits: int, clip: float, middle: float) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) * 10 + middle
    grid = InputGrid(bits, symmetric=False)
    scale, least, most = grid.fit(x, clip)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    torch.testing.assert_close(scale[..., 0], clip * (high - low) / ((1 << bits) - 1))
    assert bool((most - least == (1 << bits) - 1).all()) and bool((least <= 0).all()) and bool((most >= 0).all())
    values = (least[..., None] + torch.arange(1 << bits)) * scale[..., None]  # [2, 5, 1, codes]
    ours, nearest = (grid.fake(x, clip) - x).abs(), (x[..., None] - values).abs().amin(-1)
    torch.testing.assert_close(ours, nearest, rtol=1e-4, atol=1e-5)


def test_codes_with_a_zero_point_are_finer_on_one_sided_inputs() -> None:
    x = torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    even, uneven = ((InputGrid(4, symmetric=s).fake(x, 1.0) - x).square().mean() for s in (True, False))
    assert float(uneven) < 0.3 * float(even)  # half the step: a quarter


@given(st.integers(0, 10_000), st.sampled_from([3, 4, 8]), st.sampled_from([2, 3, 4, 12]), st.booleans(), st.booleans())
def test_groups_are_rounded_as_if_each_stood_alone(seed: int, bits: int, group: int, many: bool, even: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 12, generator=rng) * 10 ** torch.randn(12, generator=rng)
    clip = 0.5 + torch.rand(12 // group if many else 1, generator=rng) / 2
    ours = InputGrid(bits, group=group, symmetric=even).fake(x, clip)
    for i in range(12 // group):
        part = x[..., i * group : (i + 1) * group]
        alone = InputGrid(bits, symmetric=even).fake(part, clip[i if many else 0])
        assert torch.equal(ours[..., i * group : (i + 1) * group], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("even", [True, False])
def test_a_token_of_zeros_stays_zero(dtype: torch.dtype, even: bool) -> None:
    x = torch.zeros(1, 3, 4, dtype=dtype)
    assert torch.equal(InputGrid(4, symmetric=even).fake(x, 1.0), x)


def test_gradients_pass_inside_and_stop_where_clipped() -> None:
    x = torch.tensor([[0.2, -0.6, 1.49, 9.0, -9.0, -1.9]], requires_grad=True)
    InputGrid(3, static=True).fake(x, torch.tensor([0.5])).sum().backward()  # codes -4 … 3, values -2 … 1.5
    assert x.grad is not None and torch.equal(x.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 1.0]]))


def test_the_gradient_of_a_scale_is_lsqs() -> None:
    """Inside: the rounding error in steps; clipped: the outermost code."""
    x, scale = torch.tensor([[0.2, -0.6, 1.4, 9.0, -9.0]]), torch.tensor([0.5], requires_grad=True)
    parts = []
    for i in range(5):
        scale.grad = None
        InputGrid(3, static=True).fake(x[:, i : i + 1], scale).sum().backward()
        assert scale.grad is not None
        parts.append(float(scale.grad))
    assert parts == pytest.approx([0.0 - 0.4, -1.0 + 1.2, 3.0 - 2.8, 3.0, -4.0], abs=1e-6)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_a_loud_channel_is_pulled_down(group: int | None, even: bool) -> None:
    """Making the channel quieter that sets every token's scale lowers the error: the gradient must say so."""
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 20

    def error(u: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(32).index_put((torch.tensor(5),), u.exp())
        y = x / factor
        return ((InputGrid(3, group=group, symmetric=even).fake(y, 1.0, moving=True) * factor - x)[:, :5] ** 2).sum(-1).mean()

    u = torch.zeros((), requires_grad=True)
    error(u).backward()
    difference = float(error(torch.tensor(0.4)) - error(torch.tensor(-0.4))) / 0.8
    assert u.grad is not None and difference < -0.1 and float(u.grad) < 0.3 * difference
