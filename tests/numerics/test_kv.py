"""Rounding of keys and values: nearest codes, rows that unpack to what was simulated."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.numerics.inputs import InputGrid
from sordino.numerics.kv import KvGrid


@given(
    st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans(), st.sampled_from([8, 20, 64]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_packed_rows_hold_what_is_simulated(
    seed: int, bits: int, symmetric: bool, static: bool, size: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 3, 5, size, generator=rng) * 3 + torch.randn(size, generator=rng)).to(dtype)
    grid = KvGrid(bits, symmetric or static, static)
    share = torch.tensor([0.5, 1.0, 0.75]) if not static else torch.tensor([0.25, 0.5, 2.0])
    rows = grid.pack(x, share)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 5, grid.row_bytes(size))
    simulated = grid.fake(x, share)
    assert simulated.dtype == dtype and torch.equal(grid.unpack(rows, share, size, dtype), simulated)
    trained = grid.fake(x, share.clone().requires_grad_(True))
    torch.testing.assert_close(trained, simulated, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)
    scale, zero = grid.fit(x, share)
    levels = (torch.arange(grid.top + 1) - zero[..., None]) * scale[..., None]
    codes = grid.encode(x, scale, zero).float()
    nearest = (x.float()[..., None] - levels.expand(2, 3, 5, 1, -1)).abs().amin(-1)
    torch.testing.assert_close((x.float() - (codes - zero) * scale).abs(), nearest, rtol=1e-3, atol=1e-4)


@given(st.integers(0, 1000), st.sampled_from([3, 4, 8]))
def test_an_unclipped_token_is_within_half_a_step(seed: int, bits: int) -> None:
    x = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(seed))
    for symmetric in (True, False):
        grid, one = KvGrid(bits, symmetric, False), torch.ones(2)
        scale, _ = grid.fit(x, one)
        # The stored scale is rounded to 8 bits, and so is the zero point to a code.
        assert bool(((grid.fake(x, one) - x).abs() <= scale * (1.01 + (1 << bits) / 200)).all())


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([0.6, 0.95]))
def test_moving_scales_feel_what_makes_all_of_a_token_louder(seed: int, symmetric: bool, share: float) -> None:
    """Codes stay, the scale grows: what is rounded is homogeneous, also where it is clipped, so that dL/dc is L."""
    grid, x = KvGrid(3, symmetric, False), torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(seed))
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    c = torch.ones((), requires_grad=True)
    (grid.fake(c * x, torch.tensor([share, share]), moving=True) * slope).sum().backward()
    exact = (grid.fake(x, torch.tensor([share, share])) * slope).sum()
    assert c.grad is not None and abs(float(c.grad - exact)) < 0.02 * float(slope.norm() * x.norm() / 4)


def test_gradients_are_those_of_rounded_inputs() -> None:
    """Straight through inside, the outermost codes too; none where clipped; the scale's is LSQ's."""
    x = torch.randn(1, 1, 6, 16, generator=torch.Generator().manual_seed(2)) * 2
    found = []
    for rounding in (lambda v, s: KvGrid(3, True, True).fake(v, s), lambda v, s: InputGrid(3, static=True).fake(v, s)):
        value, scale = x.clone().requires_grad_(True), torch.tensor([0.5], requires_grad=True)
        (rounding(value, scale) * x).sum().backward()
        found.append((value.grad, scale.grad))
    assert found[0][0] is not None and found[0][1] is not None
    assert torch.allclose(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1])  # type: ignore[arg-type]
