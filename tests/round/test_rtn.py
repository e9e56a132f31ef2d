"""Checks round to nearest: the grid's own best groups, row by row."""

import pytest
import torch

from draws import normal
from sordino.numerics.affine import AffineGrid, GridParams, round_scale
from sordino.round.rtn import RtnSolver
from sordino.rounding import Stats


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 43, 172])
def test_rounds_to_the_nearest_on_the_best_grid(bits: int, symmetric: bool, group: int) -> None:
    w, grid, solver = normal(13, 172 if group > 8 else 40, seed=bits), AffineGrid(bits, symmetric), RtnSolver()
    before = w.clone()
    rounded = solver.solve(w, solver.prepare(None, group), grid, group)
    assert torch.equal(w, before)
    assert rounded.codes.dtype == torch.uint8
    assert int(rounded.codes.max()) <= grid.top
    assert (rounded.bits, rounded.group, rounded.symmetric, rounded.notes) == (bits, group, symmetric, {})
    for g in range(w.shape[1] // group):
        span = slice(g * group, (g + 1) * group)
        params = grid.fit(w[:, span].contiguous())
        codes, values = grid.nearest(w[:, span].contiguous(), params)
        assert torch.equal(rounded.codes[:, span].float(), codes)
        assert torch.equal(rounded.values()[:, span], values)


def test_asks_for_no_statistics() -> None:
    assert RtnSolver().needs == frozenset()


def test_rows_do_not_depend_on_each_other() -> None:
    w, grid, solver = normal(20, 64), AffineGrid(3), RtnSolver()
    whole, part = solver.solve(w, None, grid, 16), solver.solve(w[5:9], None, grid, 16)
    assert torch.equal(whole.rows(slice(5, 9)).values(), part.values())
    assert torch.equal(whole.values()[5:9], part.values())


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_on_the_grid_stay_as_they_are(symmetric: bool) -> None:
    codes = torch.randint(0, 16, (9, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[:, :2] = torch.tensor([0.0, 15.0])
    w = (codes - 8) * 0.25
    rounded = RtnSolver().solve(w, None, AffineGrid(4, symmetric), 32)
    assert torch.equal(rounded.values(), w)
    assert torch.equal(rounded.codes.float(), codes)


@pytest.mark.parametrize(("symmetric", "group"), [(True, 48), (False, 48), (True, 16), (False, 16)])
def test_the_scale_by_output_is_the_best_of_its_candidates(symmetric: bool, group: int) -> None:
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(7, 48, generator=rng)
    w[2, 5] = 9.0  # an outlier among the weights, whose input hardly moves
    x = torch.randn(300, 48, generator=rng) * torch.rand(48, generator=rng)
    x[:, 5] *= 1e-3
    solver, grid = RtnSolver(output=True), AffineGrid(4, symmetric, search=0)
    rounded = solver.solve(w, solver.prepare(Stats(300, x.T @ x), group), grid, group)
    full = grid.fit_groups(w, group)
    for row in range(7):
        for g in range(48 // group):
            span = slice(g * group, (g + 1) * group)
            errors = []
            for i in range(10):
                params = GridParams(round_scale(full.scale * (1 - i / 20)), full.zero)
                q = grid.nearest(w, params)[1][row, span]
                errors.append(float((x[:, span] @ (w[row, span] - q)).square().sum()))
            ours = float((x[:, span] @ (w[row, span] - rounded.values()[row, span])).square().sum())
            assert ours <= min(errors) * (1 + 1e-4)
    first = slice(0, group)
    plain = RtnSolver().solve(w, None, AffineGrid(4, symmetric), group)
    by_row = [float((x[:, first] @ (w[2, first] - r.values()[2, first])).square().sum()) for r in (rounded, plain)]
    assert by_row[0] < by_row[1]
