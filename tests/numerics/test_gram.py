"""Checks sums of squares and the inverse factor against float64."""

import pytest
import torch
from torch import Tensor

from draws import normal
from sordino.numerics.gram import add_cross, add_gram, exact_bf16_products, inverse_factor, mirror


@pytest.mark.parametrize("n", [1, 7, 191, 192, 193, 385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_gram_sums_batches(n: int, dtype: torch.dtype) -> None:
    batches = [normal(t, n, seed=t).to(dtype) for t in (1, 33, 50)]
    total = torch.zeros(n, n)
    for x in batches:
        add_gram(total, x)
    assert mirror(total) is total
    x = torch.cat(batches).double()
    assert torch.allclose(total.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("n", [1, 5, 256, 257, 515])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_inverse_factor(n: int, damp: float) -> None:
    x = normal(3 * n + 2, n)
    h = x.T @ x
    before = h.clone()
    u, share = inverse_factor(h, damp)
    assert share == damp
    assert torch.equal(h, before)
    assert u.dtype == torch.float32
    assert torch.equal(u, torch.triu(u))
    assert bool((u.diagonal() > 0).all())
    damped = h.double() + damp * h.double().diagonal().mean() * torch.eye(n)
    error = u.double().T @ u.double() @ damped - torch.eye(n)
    assert float(error.norm()) <= 1e-4 * n**0.5


def test_inverse_factor_does_not_depend_on_the_size_of_h() -> None:
    x = normal(99, 31)
    u, _ = inverse_factor(x.T @ x, 0.01)
    for size in (1e-12, 1e12):
        assert torch.allclose(inverse_factor(x.T @ x * size, 0.01)[0] * size**0.5, u, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("h", "damp"),
    [
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.01),  # indefinite: eigenvalues 3 and -1
        (torch.ones(6, 6), 0.0),  # rank 1
        (torch.ones(6, 6), 1e-30),
        (torch.diag(torch.tensor([1.0, 1.0, -0.5])), 0.01),
    ],
)
def test_damping_is_raised_until_it_works(h: Tensor, damp: float) -> None:
    u, share = inverse_factor(h, damp)
    assert share > damp
    damped = h.double() + share * h.double().diagonal().mean() * torch.eye(len(h))
    assert float(torch.linalg.eigvalsh(damped).min()) > 1e-8
    # Rank 1 with the least of damping is ill conditioned: fp32 holds its factor, not the identity to full precision.
    assert torch.allclose(u.double().T @ u.double() @ damped, torch.eye(len(h)).double(), atol=1e-4 / min(share, 1) ** 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 3)])
def test_refuses_numbers_that_are_not_finite(bad: float, place: tuple[int, int]) -> None:
    h = torch.eye(5)
    h[place] = bad
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(h, 0.01)


@pytest.mark.parametrize("size", [0.0, -1.0])
def test_refuses_a_diagonal_no_damping_can_help(size: float) -> None:
    with pytest.raises(ValueError, match="not positive"):
        inverse_factor(size * torch.eye(4), 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_exact_products_added_in_fp32(dtype: torch.dtype) -> None:
    a, b = torch.randn(500, 30).to(dtype), torch.randn(500, 20).to(dtype)
    total = torch.zeros(30, 20)
    add_cross(total, a, b)
    exact = a.double().T @ b.double()
    assert (total - exact).abs().max() <= 1e-6 * (a.double().abs().T @ b.double().abs()).max()


def test_precision_of_other_matmuls_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), exact_bf16_products():
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
