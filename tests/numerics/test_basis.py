"""The rotated basis: orthogonal, undone exactly, the same from its written form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.numerics.basis import Basis


@given(hidden=st.integers(1, 60).map(lambda n: 2 * n), seed=st.integers(0, 9), largest=st.sampled_from([16, 128]))
def test_is_orthogonal_and_undone(hidden: int, seed: int, largest: int) -> None:
    basis = Basis.draw(hidden, seed, largest)
    assert hidden % basis.size == 0 and basis.size <= largest
    x = torch.randn(3, hidden, dtype=torch.float64)
    y = basis.apply(x)
    full = torch.block_diag(*[basis.matrix] * (hidden // basis.size))
    assert torch.allclose(y, x @ full) and torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(basis.undo(y), x)
    assert torch.equal(Basis(basis.size, basis.signs).matrix, basis.matrix)


def test_sizes_of_the_models_at_hand() -> None:
    assert [Basis.draw(d, 0).size for d in (576, 4096, 896, 64)] == [64, 128, 128, 64]
    assert Basis.draw(576, 0) != Basis.draw(576, 1)
    with pytest.raises(ValueError, match="575"):
        Basis.draw(575, 0)
