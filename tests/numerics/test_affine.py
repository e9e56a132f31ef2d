"""Checks affine grids against brute force over all codes, and their scales against the two 16-bit formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draws import normal
from sordino.numerics.affine import SCALE_CEILING, SCALE_FLOOR, AffineGrid, GridParams, round_scale

BITS = [2, 3, 4, 5, 6, 8]
both = pytest.mark.parametrize("symmetric", [False, True])
every_width = pytest.mark.parametrize("bits", BITS)
weights = st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=24)


def weighted_error(grid: AffineGrid, w: Tensor, params: GridParams, diag_h: Tensor) -> Tensor:
    return ((grid.nearest(w, params)[1] - w).double().square() * diag_h.double()).sum(1)


def assert_storable(scale: Tensor) -> None:
    assert scale.dtype == torch.float32
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert bool(((scale >= SCALE_FLOOR) & (scale <= SCALE_CEILING)).all())


@settings(max_examples=150, deadline=None)
@given(weights, st.sampled_from(BITS), st.booleans(), st.sampled_from([0, 5]))
def test_nearest_is_nearest(values: list[float], bits: int, symmetric: bool, search: int) -> None:
    grid = AffineGrid(bits, symmetric, search)
    w = torch.tensor([values])
    params = grid.fit(w)
    codes, got = grid.nearest(w, params)
    scale, zero = params.scale.double(), params.zero.double()
    levels = (torch.arange(grid.top + 1) - zero) * scale  # [1, levels]
    best = (levels[0, :, None] - w.double()).abs().amin(0)
    # fp32 rounds w / scale, which matters only where two levels are all but equally near.
    assert bool(((got.double() - w.double()).abs() <= best * (1 + 1e-6) + 1e-6 * w.abs() + 1e-6 * scale).all())
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= 0) & (codes <= grid.top)).all())
    assert torch.equal(((codes.double() - zero) * scale).float(), got)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 999), st.integers(-140, 125), st.sampled_from(BITS), st.booleans(), st.sampled_from([0, 4]))
def test_grids_are_storable_at_any_magnitude(seed: int, exponent: int, bits: int, symmetric: bool, search: int) -> None:
    grid = AffineGrid(bits, symmetric, search)
    w = 2.0**exponent * normal(4, 9, seed=seed)
    params = grid.fit(w)
    assert_storable(params.scale)
    assert torch.equal(params.zero, params.zero.round())
    assert bool(((params.zero >= 0) & (params.zero <= grid.top)).all())
    assert bool(torch.isfinite(grid.nearest(w, params)[1]).all())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1))
def test_round_scale_is_storable_and_near(values: list[float]) -> None:
    scale = torch.tensor(values)
    rounded = round_scale(scale)
    assert_storable(rounded)
    inside = scale.clamp(SCALE_FLOOR, SCALE_CEILING)
    assert bool(((rounded - inside).abs() <= inside * 2.0**-8).all())


@both
@every_width
@pytest.mark.parametrize("size", [0.0, 1e-9, -1e-9, 1e-38])
def test_all_but_zero_weights_become_zero(bits: int, symmetric: bool, size: float) -> None:
    grid = AffineGrid(bits, symmetric)
    w = torch.full((3, 8), size)
    params = grid.fit_groups(w, 4, diag_h=torch.ones(8))
    codes, values = grid.nearest(w, params)
    assert torch.equal(values, torch.zeros(3, 8))
    assert torch.equal(codes, params.zero.repeat_interleave(4, 1))
    assert_storable(params.scale)


@both
@every_width
@pytest.mark.parametrize("constant", [0.7, -0.7, 123.0])
def test_constant_groups_are_hit(bits: int, symmetric: bool, constant: float) -> None:
    grid = AffineGrid(bits, symmetric)
    w = torch.full((2, 16), constant)
    values = grid.nearest(w, grid.fit(w))[1]
    # One level has to fall on the constant; what is left is the rounding of the scale to 8 significant bits.
    assert torch.allclose(values, w, rtol=2.0**-8)


@both
@every_width
@pytest.mark.parametrize("heavy", [False, True])
def test_search_is_never_worse_than_the_full_range(bits: int, symmetric: bool, heavy: bool) -> None:
    w = normal(200, 32, seed=bits)
    w = w**3 if heavy else w
    diag_h = normal(32, seed=9).exp()
    full = AffineGrid(bits, symmetric, search=0)
    before = weighted_error(full, w, full.fit(w, diag_h), diag_h)
    for search in (2, 24):
        grid = AffineGrid(bits, symmetric, search)
        after = weighted_error(grid, w, grid.fit(w, diag_h), diag_h)
        assert bool((after <= before * (1 + 1e-5)).all())
    if bits < 8:
        assert float(after.sum()) < float(before.sum())


@both
@every_width
def test_search_finds_the_best_share_of_the_range(bits: int, symmetric: bool) -> None:
    w, diag_h = normal(40, 32, seed=bits) ** 3, normal(32, seed=9).exp()
    full = AffineGrid(bits, symmetric, search=0)
    shares = torch.linspace(1, 0.4, 9).tolist()
    # The range of shrunk weights is the shrunk range.
    best = torch.stack([weighted_error(full, w, full.fit(w * share), diag_h) for share in shares]).amin(0)
    grid = AffineGrid(bits, symmetric, search=9, smallest=0.4)
    assert torch.allclose(weighted_error(grid, w, grid.fit(w, diag_h), diag_h), best, rtol=1e-4)


def test_search_heeds_the_weights_of_the_error() -> None:
    w, diag_h = normal(64, 32), normal(32, seed=1).mul(2).exp()
    grid = AffineGrid(2)
    ours, blind = (weighted_error(grid, w, grid.fit(w, h), diag_h).sum() for h in (diag_h, None))
    assert float(ours) < float(blind)


@every_width
def test_symmetric_zero_is_the_middle(bits: int) -> None:
    params = AffineGrid(bits, symmetric=True).fit_groups(normal(5, 32), 8)
    assert torch.equal(params.zero, torch.full((5, 4), 2.0 ** (bits - 1)))


@every_width
@pytest.mark.parametrize("shift", [4.0, -4.0])
def test_one_sided_groups_keep_zero_in_range(bits: int, shift: float) -> None:
    grid = AffineGrid(bits, search=0)
    zero = grid.fit(normal(5, 32).clamp(-3, 3) + shift).zero
    # The scale is rounded to 8 significant bits, which may cost the last of 255 levels.
    assert bool(((zero - (0 if shift > 0 else grid.top)).abs() <= (bits == 8)).all())


@both
@every_width
@pytest.mark.parametrize("with_h", [False, True])
def test_fit_groups_is_fit_of_each_group(bits: int, symmetric: bool, with_h: bool) -> None:
    grid = AffineGrid(bits, symmetric)
    w, diag_h = normal(7, 48, seed=bits), normal(48, seed=1).exp() if with_h else None
    together = grid.fit_groups(w, 12, diag_h)
    for g in range(4):
        span = slice(12 * g, 12 * (g + 1))
        alone = grid.fit(w[:, span].contiguous(), None if diag_h is None else diag_h[span])
        assert torch.equal(together.scale[:, g : g + 1], alone.scale)
        assert torch.equal(together.zero[:, g : g + 1], alone.zero)


def test_chunks_do_not_change_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    w, grid = normal(50, 24), AffineGrid(3)
    whole = grid.fit(w)
    monkeypatch.setattr("sordino.numerics.affine._CHUNK", 24 * 7)
    assert torch.equal(grid.fit(w).scale, whole.scale)
