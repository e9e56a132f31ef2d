"""Cayley steps: the transform against its closed form on eigenvalues and a dense inverse, Q orthogonal, a loss that falls."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino.numerics.cayley import cayley, cayley_step, skew_part
from sordino.numerics.hadamard import rotation

SIZES = st.integers(1, 24)
SEEDS = st.integers(0, 99)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(n=SIZES, seed=SEEDS, size=st.sampled_from([1e-6, 0.3, 30.0]))
def test_the_transform_is_what_a_dense_inverse_and_the_eigenvalues_say(n: int, seed: int, size: float) -> None:
    a = random(n, n, seed=seed) * size
    skew = (a - a.T).numpy()
    dense = np.linalg.inv(np.eye(n) - skew / 2) @ (np.eye(n) + skew / 2)
    values, vectors = np.linalg.eigh(1j * skew)  # skew = -i * hermitian
    turned = (1 - 1j * values / 2) / (1 + 1j * values / 2)
    spectral = (vectors * turned) @ vectors.conj().T
    ours = cayley(torch.from_numpy(skew)).numpy()
    np.testing.assert_allclose(ours, dense, atol=1e-9)
    np.testing.assert_allclose(ours, spectral.real, atol=1e-9)


def test_the_paper_s_iteration_ends_there() -> None:
    a = random(12, 12)
    skew, q = (a - a.T) / (a - a.T).abs().sum(0).max(), rotation(12).matrix()
    y = q
    for _ in range(60):
        y = q + skew @ (q + y) / 2
    torch.testing.assert_close(cayley(skew) @ q, y)


@settings(max_examples=30)
@given(n=SIZES, batch=st.integers(1, 3), seed=SEEDS, rate=st.floats(1e-3, 1e3), scale=st.sampled_from([0.0, 1e-9, 1.0, 1e9]))
def test_q_stays_orthogonal_however_long_the_steps(n: int, batch: int, seed: int, rate: float, scale: float) -> None:
    q = torch.stack([rotation(n, seed + i).matrix() for i in range(batch)])
    for i in range(20):
        q = cayley_step(q, scale * random(batch, n, n, seed=seed + i), rate)
    torch.testing.assert_close(q @ q.mT, torch.eye(n, dtype=torch.float64).expand_as(q), atol=1e-12, rtol=0)


@given(n=st.integers(2, 12), seed=SEEDS)
def test_the_skew_part_is_the_slope_along_the_manifold(n: int, seed: int) -> None:
    """The loss <G, Q> along Q cayley(tB) has slope <G, QB>, which is <A, B> for skew B."""
    q, grad, b = rotation(n, seed).matrix(), random(n, n, seed=seed), random(n, n, seed=seed + 1)
    b = b - b.T
    t = 1e-5
    slope = ((grad * (q @ cayley(t * b))).sum() - (grad * (q @ cayley(-t * b))).sum()) / (2 * t)
    torch.testing.assert_close((skew_part(q, grad) * b).sum(), slope, rtol=1e-6, atol=1e-7)


@given(n=st.integers(2, 12), seed=SEEDS)
@settings(max_examples=20)
def test_descent_finds_a_rotation(n: int, seed: int) -> None:
    """Procrustes: |XQ - XT|² for a T that can be reached by turning falls with every short step, and in the end to little."""
    x, start = random(4 * n, n, seed=seed) / (4 * n) ** 0.5, rotation(n, seed).matrix()
    a = random(n, n, seed=seed + 7)
    target = start @ cayley(0.5 * (a - a.T) / (a - a.T).norm())
    q, losses = start, []
    for _ in range(300):
        error = x @ (q - target)
        losses.append(float(error.square().sum()))
        q = cayley_step(q, 2 * x.T @ error, 0.1)
    assert all(b <= a + 1e-12 for a, b in pairwise(losses))
    assert losses[-1] < 0.2 * losses[0]


def test_steps_are_bounded() -> None:
    q = torch.eye(6, dtype=torch.float64)
    moved = cayley_step(q, 1e6 * random(6, 6), 1.5)
    assert float(torch.linalg.matrix_norm(moved - q, 2)) <= 1.0
    assert torch.equal(cayley_step(q, torch.zeros_like(q), 1.5), q)
    assert not torch.equal(moved, q)
    with pytest.raises(RuntimeError):
        cayley_step(q, random(5, 5), 1.0)
