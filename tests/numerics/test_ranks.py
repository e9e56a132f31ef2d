"""Rank correlation against the closed form for permutations, and by hand with ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.numerics.ranks import rank_correlation, ranks


@given(st.permutations(range(9)))
def test_permutations_follow_spearmans_formula(order: list[int]) -> None:
    y = torch.tensor(order, dtype=torch.float64).exp()  # rising: ranks stay
    squares = sum((i - j) ** 2 for i, j in enumerate(order))
    found = rank_correlation(torch.arange(9), y)
    assert found == pytest.approx(1 - 6 * squares / (9 * (81 - 1)), abs=1e-12)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_ranks_are_mean_places_in_the_sorted_list(values: list[int]) -> None:
    order = sorted(values)
    expected = [sum(i for i, v in enumerate(order) if v == x) / order.count(x) for x in values]
    assert ranks(torch.tensor(values)).tolist() == pytest.approx(expected)


def test_constants_have_no_correlation() -> None:
    assert rank_correlation(torch.zeros(3), torch.arange(3)) is None
