"""Checks GPTQ and GPTAQ against a float64 model that inverts what is left of the Hessian anew at every column."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from draws import normal
from sordino.numerics.additive import AdditiveGrid, DualScaleGrid
from sordino.numerics.affine import AffineGrid, GridParams
from sordino.numerics.gram import inverse_factor
from sordino.round import gptq
from sordino.round.gptq import GptqSolver, asymmetric_term, gar_order, whole_shift
from sordino.round.rtn import RtnSolver
from sordino.rounding import Rounded, Stats

both = pytest.mark.parametrize("symmetric", [False, True])
orders = pytest.mark.parametrize("order", ["gar", "none"])


def correlated(tokens: int, cols: int, seed: int) -> Tensor:
    """Inputs [T, C] with strong correlations and channels of very different size."""
    mix = normal(cols, cols, seed=seed + 1000) * torch.linspace(1, 0.05, cols)[:, None]
    size = normal(cols, seed=seed + 2000).exp()
    return normal(tokens, cols, seed=seed) @ mix / cols**0.5 * size


def solve(solver: GptqSolver, w: Tensor, h: Tensor, grid: AffineGrid, group: int, d: Tensor | None = None) -> Rounded:
    stats = Stats(1, h.clone(), None if d is None else d.clone())
    return solver.solve(w.clone(), solver.prepare(stats, group), grid, group)


def loss(w: Tensor, rounded: Rounded, h: Tensor) -> float:
    """tr(E H E^T)."""
    error = (rounded.values() - w).double()
    return float(((error @ h.double()) * error).sum())


def model_order(diag: list[float], group: int, order: str) -> list[int]:
    groups = [list(range(i, i + group)) for i in range(0, len(diag), group)]
    if order == "gar":
        groups = [sorted(g, key=lambda c: -diag[c]) for g in groups]
        groups.sort(key=lambda g: -diag[g[0]])
    return [c for g in groups for c in g]


def model(
    w: Tensor, h: Tensor, grid: AffineGrid, group: int, order: str, static: bool, d: Tensor | None = None, alpha: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal-brain-style reference: codes [R, C], scale and zero [R, G].

    The inverse of the Hessian of the columns still to come is formed explicitly at each step; one column at a time,
    no blocks, no Cholesky factor, no permuted copies.
    """
    original, w, h = w.clone(), w.double().clone(), h.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left = model_order(h.diagonal().tolist(), group, order)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    scale, zero = torch.empty(w.shape[0], w.shape[1] // group), torch.empty(w.shape[0], w.shape[1] // group)
    seen = set()
    p = model_term(d.double(), h, left, alpha) if d is not None else torch.zeros_like(h)
    while left:
        c, g = left[0], left[0] // group
        if g not in seen:
            seen.add(g)
            params = grid.fit((original if static else w)[:, g * group : (g + 1) * group].float().contiguous())
            scale[:, g], zero[:, g] = params.scale[:, 0], params.zero[:, 0]
        code, value = grid.nearest(w[:, c : c + 1].float(), GridParams(scale[:, g : g + 1], zero[:, g : g + 1]))
        codes[:, c] = code[:, 0]
        inverse = torch.linalg.inv(h[left][:, left])
        error = (w[:, c] - value[:, 0]) / inverse[0, 0]
        before = w[:, c].clone()
        w[:, left[1:]] += before[:, None] * p[c, left[1:]] - error[:, None] * inverse[0, 1:]
        left = left[1:]
    return codes, scale, zero


def model_term(d: Tensor, h: Tensor, order: list[int], alpha: float) -> Tensor:
    """P by its definition, in the original column order: a sum over the columns k that come after column i."""
    u = torch.zeros_like(h)
    for k, c in enumerate(order):
        inverse = torch.linalg.inv(h[order[k:]][:, order[k:]])
        u[c, order[k:]] = inverse[0] / inverse[0, 0].sqrt()
    p = torch.zeros_like(h)
    for i, row in enumerate(order):
        for k in order[i + 1 :]:
            p[row] += alpha * (d[row] @ u[k]) * u[k]
    return p


def assert_same(rounded: Rounded, expected: tuple[Tensor, Tensor, Tensor], w: Tensor, h: Tensor) -> None:
    """Equal, but for a row in 50 whose fp32 sums fall on the other side of a tie: a flip changes the rest of its row."""
    codes, scale, zero = expected
    other = Rounded(codes, scale, zero, rounded.bits, rounded.group, rounded.symmetric)
    same = (rounded.codes == codes).all(1) & (rounded.scale == scale).all(1) & (rounded.zero == zero).all(1)
    assert int((~same).sum()) <= len(w) // 50
    assert loss(w, rounded, h) == pytest.approx(loss(w, other, h), rel=0.01)


@both
@orders
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 16, 48])
def test_gptq_equals_the_model(bits: int, group: int, static: bool, order: str, symmetric: bool) -> None:
    cols = 48
    x = correlated(4 * cols, cols, seed=bits + group)
    w, h, grid = normal(50, cols, seed=group), x.T @ x, AffineGrid(bits, symmetric)
    rounded = solve(GptqSolver(0.01, order, static), w, h, grid, group)
    assert rounded.notes == {}
    assert_same(rounded, model(w, h, grid, group, order, static), w, h)


def test_grids_fitted_beforehand_are_weighted_too() -> None:
    h = torch.diag(normal(32, seed=1).exp())
    w, grid = normal(20, 32, seed=2), AffineGrid(3)
    rounded = solve(GptqSolver(static_groups=True, weighted=True), w, h, grid, 16)
    fits = [grid.fit(w[:, i : i + 16].contiguous(), h.diagonal()[i : i + 16]) for i in (0, 16)]
    assert torch.equal(rounded.scale, torch.cat([f.scale for f in fits], 1))
    assert not torch.equal(rounded.scale, grid.fit_groups(w, 16).scale)


@orders
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("group", [8, 40])
def test_gptaq_equals_the_model(alpha: float, group: int, order: str) -> None:
    x = correlated(160, 40, seed=group)
    d = (0.3 * normal(160, 40, seed=3) + 0.3 * x @ normal(40, 40, seed=4) / 6).T @ x
    w, h, grid = normal(50, 40), x.T @ x, AffineGrid(3)
    rounded = solve(GptqSolver(order=order, alpha=alpha), w, h, grid, group, d)
    assert_same(rounded, model(w, h, grid, group, order, False, d, alpha), w, h)


@pytest.mark.parametrize(("cols", "group"), [(1, 1), (12, 4), (48, 16), (20, 20)])
def test_gar_keeps_groups_whole(cols: int, group: int) -> None:
    diag = normal(cols, seed=cols).exp()
    assert gar_order(diag, group).tolist() == model_order(diag.tolist(), group, "gar")


def test_gar_leaves_equal_columns_in_place() -> None:
    assert gar_order(torch.ones(24), 8).tolist() == list(range(24))


def cases() -> Iterator[tuple[int, int, int, int, str, bool]]:
    for seed in range(32):
        cols = (32, 48, 96, 172)[seed % 4]
        group = (8, 16, cols)[seed % 3] if cols != 172 else (4, 43, 172)[seed % 3]
        yield seed, cols, group, (2, 3, 4, 8)[seed // 4 % 4], ("gar", "none")[seed // 2 % 2], seed % 5 > 2


@pytest.mark.parametrize(("seed", "cols", "group", "bits", "order", "symmetric"), list(cases()))
def test_gptq_beats_rtn_on_correlated_inputs(seed: int, cols: int, group: int, bits: int, order: str, symmetric: bool) -> None:
    x = correlated(3 * cols, cols, seed)
    w, h, grid = normal(24, cols, seed=seed), x.T @ x, AffineGrid(bits, symmetric)
    ours = solve(GptqSolver(order=order), w, h, grid, group)
    assert loss(w, ours, h) <= loss(w, RtnSolver().solve(w, None, grid, group), h)


@both
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("group", [8, 96])
def test_gptq_without_correlations_is_rtn(group: int, static: bool, symmetric: bool) -> None:
    w, grid = normal(20, 96), AffineGrid(3, symmetric)
    ours, rtn = solve(GptqSolver(0.01, "none", static), w, torch.eye(96), grid, group), RtnSolver().solve(w, None, grid, group)
    assert torch.equal(ours.codes, rtn.codes)
    assert torch.equal(ours.scale, rtn.scale)
    assert torch.equal(ours.zero, rtn.zero)


def test_gptq_does_not_depend_on_the_number_of_tokens() -> None:
    x, w, grid = correlated(128, 32, 0), normal(16, 32), AffineGrid(3)
    h = x.T @ x
    assert torch.equal(solve(GptqSolver(), w, h, grid, 8).codes, solve(GptqSolver(), w, h * 4096, grid, 8).codes)


def test_rows_do_not_depend_on_each_other() -> None:
    x, w, grid = correlated(128, 32, 0), normal(16, 32), AffineGrid(3)
    whole, part = (solve(GptqSolver(), v, x.T @ x, grid, 8) for v in (w, w[5:9]))
    assert torch.equal(whole.rows(slice(5, 9)).values(), part.values())


@orders
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_dead_columns_are_rounded_to_nearest(order: str, alpha: float) -> None:
    x, dead = correlated(128, 32, 0), [3, 8, 31]
    x[:, dead] = 0
    w, h, grid, solver = normal(16, 32), x.T @ x, AffineGrid(3), GptqSolver(order=order, alpha=alpha)
    rounded = solve(solver, w, h, grid, 8, (0.1 * normal(128, 32)).T @ x)
    assert rounded.notes == {"dead_columns": 3.0}
    params = GridParams(rounded.scale, rounded.zero)
    assert torch.equal(rounded.codes[:, dead].float(), grid.codes(w, params)[:, dead])
    # The others do not notice them.
    alive = [c for c in range(32) if c not in dead]
    assert int((rounded.codes[:, alive].float() != grid.codes(w, params)[:, alive]).sum()) > 50


@pytest.mark.parametrize("grid", [AdditiveGrid(2), DualScaleGrid(AffineGrid(3))])
def test_dead_columns_of_grids_with_column_scales_stay_ordinary(grid: Any) -> None:
    x, dead = correlated(128, 32, 0), [3, 8, 31]
    x[:, dead] = 0
    w = normal(16, 32)
    rounded = solve(GptqSolver(), w, x.T @ x, grid, 8)
    assert rounded.notes == {"dead_columns": 3.0} and rounded.column is not None
    assert bool(torch.isfinite(rounded.values()).all()) and bool((rounded.column > 1e-3).all())
    # Nothing is made up for at them: they are as near as their grid gets.
    assert float((rounded.values() - w)[:, dead].abs().mean()) < 0.5 * float(w[:, dead].abs().mean())
    alive = [c for c in range(32) if c not in dead]
    plain = RtnSolver().solve(w, None, grid, 8).values()
    ours, theirs = (float(((v - w)[:, alive] @ x[:, alive].T).square().sum()) for v in (rounded.values(), plain))
    assert ours < theirs


def test_inputs_that_are_always_zero_give_rtn() -> None:
    w, grid = normal(6, 16), AffineGrid(2)
    rounded = solve(GptqSolver(), w, torch.zeros(16, 16), grid, 8)
    assert rounded.notes == {"dead_columns": 16.0}
    assert torch.equal(rounded.values(), RtnSolver().solve(w, None, grid, 8).values())


@both
@pytest.mark.parametrize("group", [8, 32])
def test_zero_weights_stay_zero(group: int, symmetric: bool) -> None:
    x, w = correlated(128, 32, 0), normal(8, 32)
    w[2] = 0
    rounded = solve(GptqSolver(), w, x.T @ x, AffineGrid(2, symmetric), group)
    assert torch.equal(rounded.values()[2], torch.zeros(32))
    assert bool(torch.isfinite(rounded.values()).all())


def test_a_zero_group_takes_part_in_the_compensation() -> None:
    x, w, grid = correlated(128, 32, 0), normal(50, 32), AffineGrid(2)
    w[:, 8:16] = 0
    h = x.T @ x
    assert_same(solve(GptqSolver(), w, h, grid, 8), model(w, h, grid, 8, "gar", False), w, h)


@orders
@pytest.mark.parametrize(("cols", "group"), [(384, 192), (172, 172), (240, 24), (200, 8), (262, 131)])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_results_do_not_depend_on_the_block_size(
    cols: int, group: int, order: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = correlated(2 * cols, cols, seed=cols)
    w, h, grid = normal(50, cols), x.T @ x, AffineGrid(3)
    d = (0.2 * x @ normal(cols, cols, seed=2) / cols**0.5).T @ x
    found = []
    for block in (16, 64, 128, 512):
        monkeypatch.setattr(gptq, "_BLOCK", block)
        found.append(solve(GptqSolver(order=order, alpha=alpha), w, h, grid, group, d))
    for other in found[:-1]:
        assert_same(other, (found[-1].codes, found[-1].scale, found[-1].zero), w, h)


def test_raised_damping_is_noted() -> None:
    h = torch.eye(8) + 0.5 * (torch.ones(8, 8) - torch.eye(8)) * torch.tensor([1.0, -1.0] * 4)[:, None]
    h = (h + h.T) / 2
    h[0, 1] = h[1, 0] = 3.0  # no Gram matrix looks like this; sums that overflowed may
    rounded = solve(GptqSolver(), normal(4, 8), h, AffineGrid(3), 8)
    assert rounded.notes["damp"] > 0.01
    assert bool(torch.isfinite(rounded.values()).all())


def test_statistics_are_needed() -> None:
    with pytest.raises(ValueError, match="needs the Hessian"):
        GptqSolver().prepare(None, 8)


def test_statistics_that_are_not_finite_are_refused() -> None:
    h = torch.eye(8)
    h[2, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        GptqSolver().prepare(Stats(1, h), 8)


@pytest.mark.parametrize(("alpha", "needs"), [(0.0, {"H"}), (0.25, {"H", "D"})])
def test_what_each_solver_asks_for(alpha: float, needs: set[str]) -> None:
    assert GptqSolver(alpha=alpha).needs == needs


def test_asymmetric_term_is_its_definition() -> None:
    n, alpha = 13, 0.25
    d, u = normal(n, n), torch.triu(normal(n, n, seed=1))
    p = torch.zeros(n, n)
    for i in range(n):
        for k in range(i + 1, n):
            for j in range(n):
                p[i, j] += alpha * (d[i] @ u[k]) * u[k, j]
    assert torch.allclose(asymmetric_term(d, u, alpha), p, atol=1e-5)


def test_gptaq_without_strength_is_gptq() -> None:
    x, w, grid = correlated(128, 32, 0), normal(16, 32), AffineGrid(3)
    h, d = x.T @ x, normal(128, 32).T @ x
    assert torch.equal(solve(GptqSolver(alpha=0.0), w, h, grid, 8, d).codes, solve(GptqSolver(), w, h, grid, 8).codes)


def test_gptaq_on_equal_streams_is_gptq() -> None:
    x, w, grid = correlated(128, 32, 0), normal(16, 32), AffineGrid(3)
    h = x.T @ x
    ours = solve(GptqSolver(alpha=1.0), w, h, grid, 8, torch.zeros(32, 32))
    assert torch.equal(ours.codes, solve(GptqSolver(), w, h, grid, 8).codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["low rank", "shrunk"])
def test_gptaq_comes_closer_to_the_full_precision_stream(kind: str, bits: int) -> None:
    """On unseen tokens; the recipe's strength always helps on average, full strength helps more from 3 bits on."""
    cols, tokens, alphas = 48, 768, (0.0, 0.25, 1.0)
    errors = torch.zeros(len(alphas), 8)
    for seed in range(8):
        target = correlated(2 * tokens, cols, seed)
        if kind == "low rank":
            drift = target @ normal(cols, 4, seed=seed + 1) @ normal(4, cols, seed=seed + 2) / cols
            x = target + 0.3 * drift
        else:
            x = target * (1 - 0.2 * torch.rand(cols, generator=torch.Generator().manual_seed(seed)))
        (seen, unseen), (x_seen, x_unseen) = target.split(tokens), x.split(tokens)
        w, h, d = normal(32, cols, seed=seed), x_seen.T @ x_seen, (seen - x_seen).T @ x_seen
        for i, alpha in enumerate(alphas):
            rounded = solve(GptqSolver(alpha=alpha), w, h, AffineGrid(bits), 16, d).values()
            errors[i, seed] = (unseen @ w.T - x_unseen @ rounded.T).norm() / (unseen @ w.T).norm()
    gptq_error, mild, full = errors.square().mean(1).tolist()
    assert mild < gptq_error
    assert bits == 2 or full < mild


def test_whole_target_is_the_least_squares_one_and_beats_the_plain_one() -> None:
    x_fp = normal(600, 32) @ normal(32, 32, seed=1)
    x = x_fp + 0.3 * x_fp @ normal(32, 32, seed=2) / 6  # a drift that the weight can partly undo
    w = normal(24, 32, seed=3)
    h, d = x.T @ x, (x_fp - x).T @ x
    u, _ = inverse_factor(h.clone(), 1e-6)
    target = w + w @ whole_shift(d, u, 1.0)
    exact = torch.linalg.lstsq(x.double(), x_fp.double() @ w.T.double()).solution.T
    assert (target - exact).norm() <= 1e-3 * exact.norm()
    errors = []
    for solver in (GptqSolver(), GptqSolver(alpha=1.0), GptqSolver(alpha=1.0, whole=True)):
        rounded = solve(solver, w, h.clone(), AffineGrid(4), 32, d.clone() if solver.alpha else None)
        errors.append(float((rounded.values() @ x.T - w @ x_fp.T).norm()))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("order", ["gar", "none"])
def test_latent_weights_are_what_was_rounded(order: str) -> None:
    w, x, grid = normal(8, 32), normal(200, 32, seed=1), AffineGrid(3)
    solver = GptqSolver(order=order)
    assert solve(solver, w, x.T @ x, grid, 16).latent is None
    solver.keep_latent = True
    rounded = solve(solver, w, x.T @ x, grid, 16)
    assert rounded.latent is not None
    codes, _ = grid.nearest(rounded.latent, GridParams(rounded.scale, rounded.zero))
    assert torch.equal(codes.to(torch.uint8), rounded.codes)
    assert not torch.equal(rounded.latent, w)
