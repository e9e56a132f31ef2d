"""Dual-scale grids against generic least squares, brute force and the figures of the spec (section 6.5)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draws import normal
from sordino.numerics.additive import AdditiveGrid, DualScaleGrid, additive_values, column_step, fix_gauge
from sordino.numerics.affine import AffineGrid, GridParams, round_scale


def uneven(rows: int, cols: int, seed: int = 0) -> Tensor:
    return normal(rows, cols, seed=seed) * (0.7 * normal(cols, seed=seed + 1)).exp()


def error(grid: AdditiveGrid | DualScaleGrid | AffineGrid, w: Tensor, params: GridParams) -> float:
    return float((grid.nearest(w, params)[1] - w).square().sum() / w.square().sum())


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_nearest_is_the_nearest_of_all_levels(bits: int, rows: int, cols: int, seed: int) -> None:
    w, r, c = normal(rows, cols, seed=seed), normal(rows, 1, bits, seed=seed + 1).abs(), normal(cols, seed=seed + 2).abs() + 0.1
    codes, values = AdditiveGrid(bits).nearest(w, GridParams(r, torch.zeros(rows, 1), c))
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * bits).view(-1, bits) @ r[:, 0].T  # [2^b, R]
    best = (w[None] - every[..., None] * c).abs().amin(0)
    assert torch.allclose((w - values).abs(), best, atol=1e-6)
    assert torch.equal(additive_values(codes.to(torch.uint8), r[:, 0]) * c, values)


@pytest.mark.parametrize("bits", [2, 3])
def test_more_iterations_are_never_worse(bits: int) -> None:
    w = uneven(40, 64)
    errors = [error(g, w, g.fit(w)) for g in (AdditiveGrid(bits, iterations=n) for n in range(16))]
    assert all(b <= a * 1.002 for a, b in itertools.pairwise(errors))  # stored scales have 8 bits
    assert errors[15] < errors[0]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_row_step_is_generic_least_squares(bits: int, weighted: bool) -> None:
    w, c = normal(7, 24).double(), normal(24, seed=1).abs().double() + 0.1
    h = normal(24, seed=2).square().double() + 0.1 if weighted else torch.ones(24).double()
    grid = AdditiveGrid(bits)
    codes = torch.randint(0, 1 << bits, (7, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    new, r = grid._row_step(w.float(), c.float(), codes, torch.zeros(7, bits), h.float() if weighted else None)
    for i in range(7):
        basis = torch.stack([((codes[i] >> k) & 1).double() * 2 - 1 for k in range(bits)], 1) * c[:, None]
        best = torch.linalg.lstsq(h.sqrt()[:, None] * basis, (h.sqrt() * w[i])[:, None]).solution[:, 0]
        signs = torch.tensor([1.0 if bool(((new[i] ^ codes[i]) >> k & 1)[0] == 0) else -1.0 for k in range(bits)])
        assert torch.allclose(r[i] * signs, best.float(), atol=1e-3)


def test_column_step_is_generic_least_squares() -> None:
    w, s = normal(9, 5), normal(9, 5, seed=1)
    found = column_step(w, s, torch.ones(5))
    for j in range(5):
        assert torch.allclose(found[j], torch.linalg.lstsq(s[:, j : j + 1], w[:, j : j + 1]).solution.abs()[0, 0], atol=1e-5)


@pytest.mark.parametrize("grid", [AdditiveGrid(2), AdditiveGrid(3), DualScaleGrid(AffineGrid(2))])
def test_gauge_leaves_the_weight_and_takes_the_size_out_of_the_columns(grid: AdditiveGrid | DualScaleGrid) -> None:
    w = 0.01 * uneven(30, 64)
    params = grid.fit(w)
    assert params.column is not None
    assert abs(float(params.column.log().mean())) < 1e-5
    c, a = fix_gauge(3.7 * params.column)
    assert torch.allclose(c, params.column, rtol=1e-5) and abs(a - 3.7) < 1e-4
    assert torch.equal(params.scale, round_scale(params.scale))
    # The size of the weight is the rows': what the columns gave away, they took.
    large = grid.fit(8 * w)
    assert large.column is not None and torch.allclose(large.column, params.column, rtol=1e-4)
    assert torch.allclose(large.scale, 8 * params.scale, rtol=1e-2)
    torch.testing.assert_close(grid.nearest(8 * w, large)[1], 8 * grid.nearest(w, params)[1], rtol=2e-2, atol=1e-3)


def test_error_on_gaussian_weights_is_the_known_one() -> None:
    w = normal(2048, 128)
    plain, dual = (error(g, w, g.fit(w)) for g in (AdditiveGrid(2, column=False), AdditiveGrid(2)))
    assert abs(plain - 0.114) < 0.002 and abs(dual - 0.113) < 0.002 and dual < plain


@pytest.mark.parametrize("bits", [2, 3])
def test_column_scale_pays_where_columns_differ(bits: int) -> None:
    w = uneven(256, 128)
    for with_scale, without in (
        (AdditiveGrid(bits), AdditiveGrid(bits, column=False)),
        (DualScaleGrid(AffineGrid(bits)), AffineGrid(bits)),
    ):
        assert error(with_scale, w, with_scale.fit(w)) < 0.8 * error(without, w, without.fit(w))


@pytest.mark.parametrize(
    "grid", [AdditiveGrid(2), AdditiveGrid(3), DualScaleGrid(AffineGrid(2)), DualScaleGrid(AffineGrid(3, True))]
)
def test_empty_and_tiny_columns_are_ordinary(grid: AdditiveGrid | DualScaleGrid) -> None:
    w = uneven(16, 32)
    w[:, 3] = 0
    w[5] = 0
    w[:, 7] *= 1e-12
    params = grid.fit(w)
    assert params.column is not None and bool(torch.isfinite(params.column).all()) and bool((params.column > 0).all())
    values = grid.nearest(w, params)[1]
    assert bool(torch.isfinite(values).all()) and error(grid, w, params) < 0.35
    assert bool(torch.isfinite(grid.nearest(torch.zeros(4, 8), grid.fit(torch.zeros(4, 8)))[1]).all())


@settings(deadline=None)
@given(st.integers(2, 3), st.integers(1, 3), st.integers(0, 99))
def test_groups_are_fitted_each_on_its_own(bits: int, groups: int, seed: int) -> None:
    w = uneven(6, 8 * groups, seed)
    grid = AdditiveGrid(bits)
    together = grid.fit_groups(w, 8)
    values = grid.nearest(w, together)[1]
    for g in range(groups):
        part = w[:, 8 * g : 8 * g + 8].contiguous()
        assert torch.equal(values[:, 8 * g : 8 * g + 8], grid.nearest(part, grid.fit(part))[1])
