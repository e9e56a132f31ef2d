"""Columns kept at 8 bits: what error compensation sees of the others, against brute force and against GPTQ itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.numerics.affine import AffineGrid
from sordino.numerics.inputs import InputGrid
from sordino.numerics.kept import Kept, round_with_kept, set_apart, with_kept
from sordino.round.gptq import GptqSolver
from sordino.round.keeping import Keeping
from sordino.rounding import Stats


def gram(columns: int, seed: int, tokens: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    h = x.T @ x
    return (h + h.T) / 2


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 1000))
def test_the_kept_columns_take_over_what_they_can(others: int, kept: int, seed: int) -> None:
    """No other change of the kept columns leaves less of the output's error, and the complement says how much is left."""
    h = gram(others + kept, seed).double()
    left, gain = set_apart(h, kept)
    assert not left[others:].any() and not left[:, others:].any()
    error = torch.randn(3, others, generator=torch.Generator().manual_seed(seed)).double()
    damped = h.clone()
    damped.diagonal()[others:] += 0.01 * h.diagonal()[others:].mean()

    def cost(change: torch.Tensor) -> torch.Tensor:
        both = torch.cat([error, change], 1)
        return ((both @ damped) * both).sum(1)

    best = cost(-error @ gain)
    torch.testing.assert_close(best, ((error @ left[:others, :others]) * error).sum(1), rtol=1e-6, atol=1e-6)
    for step in torch.randn(8, 3, kept, generator=torch.Generator().manual_seed(1)).double():
        assert (cost(-error @ gain + 0.1 * step) >= best - 1e-9).all()


def test_it_is_gptq_with_the_kept_columns_last() -> None:
    """Other columns get the codes that GPTQ gives them when it comes to the kept ones last."""
    w, h = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)), gram(24, 3)
    grid = AffineGrid(3, symmetric=True)
    plain = GptqSolver(damp=1e-6, order="none")
    whole = plain.solve(w.clone(), plain.prepare(Stats(400, h.clone()), 8), grid, 8)
    left, gain = set_apart(h, 8, damp=1e-6)
    keeping = Keeping(GptqSolver(damp=1e-6, order="none"), 8, gain)
    ours = keeping.solve(w.clone(), keeping.prepare(Stats(400, left), 8), grid, 8)
    agree = (ours.codes[:, :16] == whole.codes[:, :16]).float().mean()
    assert agree > 0.97  # but for the damping of the kept columns
    assert ours.kept is not None and ours.kept.codes.shape == (6, 8)
    apart = Keeping(GptqSolver(damp=1e-6, order="none"), 8, None)  # the kept columns take nothing over
    alone = apart.solve(w.clone(), apart.prepare(Stats(400, set_apart(h, 8)[0]), 8), grid, 8)

    def cost(values: torch.Tensor) -> float:
        return float(((values - w) @ h @ (values - w).T).trace())

    assert cost(ours.values()) < 0.5 * cost(alone.values())
    assert cost(ours.values()) < cost(whole.values())


def test_values_rows_and_pieces() -> None:
    """The last columns are the kept ones, whatever the codes say there."""
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    from sordino.round.rtn import RtnSolver

    r = Keeping(RtnSolver(), 4, None).solve(w, None, AffineGrid(3, symmetric=True), 16)
    assert (r.values()[:, -4:] - w[:, -4:]).abs().max() <= w[:, -4:].abs().max() / 127
    assert torch.equal(r.values(), with_kept(r.low_values(), Kept.of(w[:, -4:]).values()))
    assert torch.equal(type(r).join([r.rows(slice(0, 1)), r.rows(slice(1, 4))]).values(), r.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_channel_does_not_coarsen_the_others(dtype: torch.dtype) -> None:
    """An outlier among the kept channels leaves the low-bit scales alone and is itself rounded at 8 bits."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., -2:] *= 1000
    y = round_with_kept(x, InputGrid(4, group=16), torch.ones(2), 4)
    low = x.clone()
    low[..., -4:] = 0
    expected = InputGrid(4, group=16).fake(low, torch.ones(2))
    assert torch.equal(y[..., :-4], expected[..., :-4])
    step = x[..., -4:].abs().amax(-1, keepdim=True) / 127
    assert ((y - x)[..., -4:].abs() <= step * 0.5 + x[..., -4:].abs() * 2**-8).all()
    assert y.dtype == dtype
