"""The low-rank pair that takes most of a weight's error off the output, against Eckart and Young and random others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.numerics.side import Side, best_pair


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(4, 12))
def test_no_other_pair_leaves_less(seed: int, rank: int, cols: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    error = torch.randn(6, cols, generator=rng)
    x = torch.randn(200, cols, generator=rng) @ torch.randn(cols, cols, generator=rng)
    a, b = best_pair(error, x.T @ x, rank)
    assert a.shape == (rank, cols) and b.shape == (6, rank)

    def left(values: torch.Tensor) -> float:
        return float((x.double() @ (error - values).double().T).square().sum())

    least = float(torch.linalg.svdvals(x.double() @ error.double().T)[rank:].square().sum())
    whole = float((x.double() @ error.double().T).square().sum())
    assert left(b @ a) == pytest.approx(least, abs=1e-3 * whole)  # but for the ridge
    for _ in range(5):
        step = 0.05 * torch.randn(b.shape, generator=rng) * b.abs().mean()
        assert left((b + step) @ a) >= left(b @ a) - 1e-3 * whole
    used = a.square().mean(1) > 0
    torch.testing.assert_close(a[used].square().mean(1), torch.ones(int(used.sum())), rtol=1e-3, atol=1e-3)


def test_an_empty_pair_adds_nothing() -> None:
    assert not Side.none(3, 4, 5).values().any() and Side.none(3, 4, 5).values().shape == (4, 5)
