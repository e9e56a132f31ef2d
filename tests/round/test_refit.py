"""Refit of scales: equal to generic least squares on the inputs, and never worse than what it starts from."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from draws import normal
from sordino.numerics.additive import AdditiveGrid, DualScaleGrid
from sordino.numerics.affine import AffineGrid
from sordino.round import refit as module
from sordino.round.gptq import GptqSolver
from sordino.round.refit import refit, row_errors
from sordino.round.rtn import RtnSolver
from sordino.rounding import Rounded, Stats

GRIDS = [AffineGrid(2), AffineGrid(3, True), AdditiveGrid(2), AdditiveGrid(3), DualScaleGrid(AffineGrid(2))]


def case(grid: Any) -> tuple[Tensor, Tensor, Rounded]:
    x = normal(300, 32) @ normal(32, 32, seed=1)
    w = normal(12, 32, seed=2) * normal(32, seed=3).exp()
    return w, x, RtnSolver().solve(w, None, grid, 8)


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_are_generic_least_squares(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "round_scale", lambda s: s)
    w, x, rounded = case(grid)
    found = module._refit_rows(rounded, x.T @ x, w @ x.T @ x)
    basis = module._basis(rounded)
    rows, groups, bits, size = basis.shape
    for i in range(rows):
        design = torch.zeros(x.shape[0], groups, bits, dtype=torch.float64)
        for g in range(groups):
            design[:, g] = x[:, g * size : (g + 1) * size].double() @ basis[i, g].T.double()
        best = torch.linalg.lstsq(design.view(len(x), -1), (x @ w[i]).double()[:, None], driver="gelsd").solution[:, 0]
        if bool((best > 1e-3).all()):
            assert torch.allclose(found.scale[i].reshape(-1).double(), best, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("grid", [DualScaleGrid(AffineGrid(3)), AdditiveGrid(2)])
def test_columns_are_generic_least_squares(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One design matrix for all rows together: the inputs times what each column scale multiplies."""
    monkeypatch.setattr(module, "round_scale", lambda s: s)
    monkeypatch.setattr(module, "_RIDGE", 1e-12)
    w, x, rounded = case(grid)
    s = replace(rounded, column=None).values()
    truth = w * (0.2 * normal(32, seed=5)).exp()
    found = module._refit_columns(rounded, x.T @ x, truth @ x.T @ x)
    design = (x.double()[None] * s.double()[:, None]).flatten(0, 1)  # [R*T, C]
    best = torch.linalg.lstsq(design, (truth.double() @ x.double().T).flatten()[:, None], driver="gelsd").solution[:, 0]
    assert bool((best > 0).all())
    torch.testing.assert_close(found.values().double(), s.double() * best, rtol=5e-3, atol=1e-4)
    assert found.column is not None
    assert float(found.column.view(-1, rounded.group).log().mean(1).abs().max()) < 1e-5


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("drift", [False, True])
def test_is_never_worse_and_mostly_better(grid: Any, drift: bool) -> None:
    w, x, _ = case(grid)
    x_fp = x + 0.2 * normal(*x.shape, seed=7) if drift else x
    stats = [Stats(len(x), x.T @ x, (x_fp - x).T @ x if drift else None) for _ in range(2)]
    errors = []
    for given, again in zip(stats, (False, True), strict=True):
        solver = GptqSolver(alpha=1.0 if drift else 0.0, refit=again)
        rounded = solver.solve(w.clone(), solver.prepare(given, 8), grid, 8)
        errors.append((rounded.values() @ x.T - w @ x_fp.T).square().sum(1))
    assert bool((errors[1].sum() < errors[0].sum()).all())
    assert torch.equal(rounded.codes, solver.solve(w.clone(), solver.prepare(Stats(1, x.T @ x, stats[0].d), 8), grid, 8).codes)


def test_row_errors_are_the_squared_error_but_for_a_constant() -> None:
    w, x, rounded = case(AffineGrid(3))
    h = x.T @ x
    other = replace(rounded, scale=rounded.scale * 1.1)
    exact = [((r.values() - w) @ x.T).square().sum(1) for r in (rounded, other)]
    ours = [row_errors(r, h, w @ h) for r in (rounded, other)]
    assert torch.allclose(exact[0] - exact[1], ours[0] - ours[1], rtol=1e-3, atol=1e-2 * float(exact[0].mean()))


def test_a_zero_weight_is_ordinary() -> None:
    x = normal(50, 16)
    rounded = RtnSolver().solve(torch.zeros(4, 16), None, AffineGrid(2), 8)
    assert bool(torch.isfinite(refit(rounded, x.T @ x, torch.zeros(4, 16)).scale).all())
