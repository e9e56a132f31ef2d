"""Weights of tokens and divergences, against their definitions written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sordino.numerics.divergence import token_factors, token_kl, token_weights


@given(st.integers(0, 10_000), st.floats(0.25, 64))
def test_a_token_counts_for_at_most_cap_medians(seed: int, cap: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 4, generator=rng) * torch.randn(2, 9, 1, generator=rng).mul(3).exp()
    weights, energy = token_weights(x, cap), x.square().sum(-1)
    for b in range(2):
        median = energy[b].sort().values[4]
        for t in range(9):
            assert weights[b, t] == pytest.approx(min(1.0, float(cap * median / energy[b, t])), rel=1e-5)


@given(st.integers(0, 10_000), st.floats(0.25, 64))
def test_factors_are_powers_of_two_next_above_the_weights_roots(seed: int, cap: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 9, 4, generator=rng) * torch.randn(2, 9, 1, generator=rng).mul(3).exp()).bfloat16()
    factors, roots = token_factors(x, cap), token_weights(x, cap).sqrt()
    assert factors.dtype == x.dtype and torch.equal(torch.frexp(factors.float()).mantissa, torch.full((2, 9), 0.5))
    assert bool((factors.float() >= roots * (1 - 1e-6)).all()) and bool((factors.float() < 2 * roots * (1 + 1e-6)).all())
    assert torch.equal((x * factors[..., None]).float(), x.float() * factors[..., None].float())


def test_a_token_of_zeros_and_an_even_window_keep_their_weight() -> None:
    x = torch.ones(1, 5, 3)
    x[0, 2] = 0
    assert torch.equal(token_weights(x), torch.ones(1, 5)) and torch.equal(token_factors(x, 1.0), torch.ones(1, 5))


def test_kl_is_torchs_and_zero_between_equals() -> None:
    p, q = torch.randn(2, 7, 11).log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_kl(p, q), expected)
    assert torch.equal(token_kl(p, p), torch.zeros(7))
