"""Checks the orthogonal transforms against their defining identities and against brute-force models."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sordino.numerics.hadamard import (
    Rotation,
    factor,
    galois_field,
    hadamard,
    has_hadamard,
    rotation,
)

UNAVAILABLE_TO_200 = [92, 116, 156, 172, 184, 188]
SIZES = [1, 2, 6, 9, 12, 36, 172, 576, 896, 1536, 4864]
SMALL_FIELDS = [2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 25, 27]


def sample(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Draw normal values from a fixed seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_hadamard(matrix: Tensor, n: int) -> None:
    """Check the definition in exact arithmetic: entries +-1 and orthogonal rows."""
    assert matrix.dtype == torch.int8
    assert matrix.shape == (n, n)
    assert bool((matrix.abs() == 1).all())
    # float32 products of +-1 are exact integers far beyond these orders, and much faster than int64 ones.
    wide = matrix.float()
    assert torch.equal(wide @ wide.T, n * torch.eye(n))


def natural_sylvester(m: int) -> Tensor:
    """Model: entry (i, j) is the parity of the bits i and j share."""
    size = 1 << m
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


def is_prime_power(q: int) -> bool:
    """Model: exactly one prime divides q."""
    return sum(q % d == 0 and all(d % e for e in range(2, d)) for d in range(2, q + 1)) == 1


def reachable_orders(limit: int) -> set[int]:
    """Model: close 1, 2 and both Paley families under products, without any notion of a smallest factor."""
    orders = {1, 2}
    orders |= {q + 1 for q in range(3, limit, 4) if is_prime_power(q)}
    orders |= {2 * (q + 1) for q in range(5, limit // 2, 4) if is_prime_power(q)}
    while True:
        grown = orders | {a * b for a in orders for b in orders if a * b <= limit}
        if grown == orders:
            return {n for n in orders if n <= limit}
        orders = grown


# --- finite fields ---


@pytest.mark.parametrize("q", SMALL_FIELDS)
def test_field_axioms_hold_for_every_element(q: int) -> None:
    field = galois_field(q)
    assert (field.q, field.p**field.k) == (q, q)
    plus = torch.tensor([[field.add(a, b) for b in range(q)] for a in range(q)])
    times = torch.tensor([[field.mul(a, b) for b in range(q)] for a in range(q)])
    every = torch.arange(q)
    a, b, c = every[:, None, None], every[None, :, None], every[None, None, :]
    for table in (plus, times):
        assert torch.equal(table, table.T)
        assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert torch.equal(times[a, plus[b, c]], plus[times[a, b], times[a, c]])
    assert torch.equal(plus[0], every)
    assert torch.equal(times[1], every)
    # Latin squares: every element has a negative, every nonzero one an inverse.
    assert torch.equal(plus.sort(1).values, every.expand(q, q))
    assert torch.equal(times[1:].sort(1).values, every.expand(q - 1, q))


@pytest.mark.parametrize("q", SMALL_FIELDS)
def test_field_has_its_characteristic_and_a_generator(q: int) -> None:
    field = galois_field(q)
    total = 0
    for _ in range(field.p):
        total = field.add(total, 1)
    assert total == 0
    powers = [list(itertools.accumulate([g] * (q - 1), field.mul)) for g in range(1, q)]
    assert any(len(set(row)) == q - 1 for row in powers)


@pytest.mark.parametrize("q", [3, 5, 7, 9, 11, 25, 27, 49])
def test_jacobsthal_is_the_character_of_differences(q: int) -> None:
    field = galois_field(q)
    squares = {field.mul(a, a) for a in range(1, q)}
    assert len(squares) == (q - 1) // 2
    minus = {b: next(a for a in range(q) if field.add(a, b) == 0) for b in range(q)}
    difference = [[field.add(a, minus[b]) for b in range(q)] for a in range(q)]
    expected = [[0 if d == 0 else 1 if d in squares else -1 for d in row] for row in difference]
    assert torch.equal(field.jacobsthal(), torch.tensor(expected, dtype=torch.int8))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([81, 125, 343, 361, 729, 1331]), st.data())
def test_large_fields_follow_fermat_and_distribute(q: int, data: st.DataObject) -> None:
    field = galois_field(q)
    a, b, c = (data.draw(st.integers(1, q - 1)) for _ in range(3))
    assert field.mul(a, field.add(b, c)) == field.add(field.mul(a, b), field.mul(a, c))
    assert field.mul(a, b) != 0
    power = 1
    for bit in bin(q - 1)[2:]:
        power = field.mul(power, power)
        power = field.mul(power, a) if bit == "1" else power
    assert power == 1


@pytest.mark.parametrize("q", [-3, 0, 1, 6, 12, 75])
def test_no_field_without_a_prime_power(q: int) -> None:
    with pytest.raises(ValueError, match=str(q)):
        galois_field(q)


# --- Hadamard matrices ---


def test_exactly_these_orders_to_200_are_unavailable() -> None:
    missing = [n for n in range(4, 201, 4) if not has_hadamard(n)]
    assert missing == UNAVAILABLE_TO_200
    for n in missing:
        with pytest.raises(ValueError, match=rf"\b{n}\b"):
            hadamard(n)


def test_availability_matches_closure_under_products() -> None:
    reachable = reachable_orders(2000)
    assert {n for n in range(1, 2001) if has_hadamard(n)} == reachable
    for n in (28, 36, 52, 76, 108, 140, 148, 344, 576, 1376):
        assert n in reachable


def test_every_claimed_order_to_200_is_hadamard() -> None:
    for n in filter(has_hadamard, range(1, 201)):
        assert_hadamard(hadamard(n), n)


# 344 = 343 + 1 and 1332 = 1331 + 1 need cubic fields, 244 = 243 + 1 a quintic one, 1904 = 28 * 68 a product.
@pytest.mark.parametrize("n", [244, 344, 724, 1332, 1376, 148 * 8, 1904])
def test_larger_orders_are_hadamard(n: int) -> None:
    assert_hadamard(hadamard(n), n)


@pytest.mark.parametrize("n", [3, 5, 6, 9, 10, 18, 43, 86, 90, 198])
def test_orders_that_cannot_exist_are_refused(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=rf"\b{n}\b"):
        hadamard(n)


@pytest.mark.parametrize("n", [0, -1, -4])
def test_sizes_below_one_are_refused(n: int) -> None:
    for function in (factor, has_hadamard, hadamard, rotation):
        with pytest.raises(ValueError, match=str(n)):
            function(n)


def test_powers_of_two_are_sylvester() -> None:
    for m in range(8):
        assert torch.equal(hadamard(1 << m).float(), natural_sylvester(m))


def test_returned_matrices_may_be_overwritten() -> None:
    for n in (1, 12, 24):
        hadamard(n).zero_()
        assert_hadamard(hadamard(n), n)
        rotation(n).matrix().zero_()
        assert torch.allclose(rotation(n).matrix().norm(dim=1), torch.ones(n, dtype=torch.float64))


# --- factoring ---


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (1, 0)),
        (2, (1, 1)),
        (4096, (1, 12)),
        (9, (9, 0)),
        (12, (12, 0)),
        (18, (9, 1)),
        (172, (43, 2)),
        (184, (23, 3)),
        (344, (344, 0)),
        (576, (36, 4)),
        (896, (28, 5)),
        (1536, (12, 7)),
        (4864, (76, 6)),
        (11008, (344, 5)),
        (14336, (28, 9)),
    ],
)
def test_factor_examples(n: int, expected: tuple[int, int]) -> None:
    assert factor(n) == expected


@given(st.integers(1, 2000))
def test_factor_takes_the_smallest_dense_factor(n: int) -> None:
    k, m = factor(n)
    assert k << m == n
    odd = n // (n & -n)
    splits = [odd << j for j in range((n & -n).bit_length())]
    reachable = [part for part in splits if has_hadamard(part)]
    assert k == (min(reachable) if reachable else odd)
    assert has_hadamard(n) == bool(reachable)


@pytest.mark.parametrize("n", [12, 24, 96, 144, 576])
def test_hadamard_is_dense_factor_times_sylvester(n: int) -> None:
    k, m = factor(n)
    assert torch.equal(hadamard(n).float(), torch.kron(hadamard(k).float(), natural_sylvester(m)))


# --- rotations ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 260), st.integers(0, 2**31))
def test_matrix_is_orthonormal_and_named(n: int, seed: int) -> None:
    made = rotation(n, seed)
    matrix, name = made.matrix(), made.name
    eye = torch.eye(n, dtype=torch.float64)
    assert matrix.dtype == torch.float64
    assert (matrix @ matrix.T - eye).abs().max() < 1e-12
    assert (matrix.T @ matrix - eye).abs().max() < 1e-12
    assert name.startswith("Hadamard" if has_hadamard(n) else "seeded orthogonal")
    if has_hadamard(n):
        assert torch.allclose(matrix * math.sqrt(n), hadamard(n).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (1, "Hadamard 1 = Sylvester 1"),
        (512, "Hadamard 512 = Sylvester 512"),
        (12, "Hadamard 12 = Paley 12"),
        (576, "Hadamard 576 = Paley 36 x Sylvester 16"),
        (3808, "Hadamard 3808 = Paley 28 x Paley 68 x Sylvester 2"),
        (9, "seeded orthogonal 9"),
        (172, "seeded orthogonal 43 x Sylvester 4"),
    ],
)
def test_names(n: int, name: str) -> None:
    assert rotation(n).name == name


def test_seed_decides_only_what_is_seeded() -> None:
    first = rotation(43 * 4, seed=3).matrix()
    rotation.cache_clear()
    assert torch.equal(first, rotation(43 * 4, seed=3).matrix())
    assert not torch.allclose(first, rotation(43 * 4, seed=4).matrix())
    assert torch.equal(rotation(36, seed=3).matrix(), rotation(36, seed=4).matrix())


def test_seeding_leaves_the_global_generator_alone() -> None:
    rotation.cache_clear()
    before = torch.get_rng_state()
    rotation(9, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_factor_is_the_qr_factor_with_positive_diagonal() -> None:
    drawn = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    upper = rotation(9, seed=7).left.T @ drawn
    assert torch.allclose(upper.tril(-1), torch.zeros_like(upper), atol=1e-12)
    assert bool((upper.diagonal() > 0).all())


@pytest.mark.parametrize("n", SIZES)
def test_fast_application_matches_the_matrix(n: int) -> None:
    made = rotation(n, seed=2)
    matrix = made.matrix()
    x = sample(5, n)
    assert (made.size, made.left.shape[0] << made.power) == (n, n)
    assert torch.allclose(made.apply(x), x @ matrix, rtol=0, atol=1e-11)
    assert torch.allclose(made.apply_transpose(x), x @ matrix.T, rtol=0, atol=1e-11)
    assert torch.allclose(made.apply_transpose(made.apply(x)), x, rtol=0, atol=1e-11)
    assert torch.allclose(made.apply(made.apply_transpose(x)), x, rtol=0, atol=1e-11)
    single = made.apply(x.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), x @ matrix, rtol=0, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 130), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99))
def test_any_leading_shape_and_layout(n: int, batch: list[int], seed: int) -> None:
    made = rotation(n, seed)
    x = sample(*batch, n, seed=seed)
    kept = x.clone()
    expected = x @ made.matrix()
    strided = x.repeat_interleave(2, -1)[..., ::2]
    for given_x in (x, strided):
        assert torch.allclose(made.apply(given_x), expected, rtol=0, atol=1e-12)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [64, 172, 576])
def test_half_precision_rounds_once(n: int, dtype: torch.dtype) -> None:
    x = sample(3, n, dtype=dtype)
    assert torch.equal(rotation(n).apply(x), rotation(n).apply(x.float()).to(dtype))


def test_wrong_inputs_are_refused() -> None:
    made = rotation(12)
    with pytest.raises(ValueError, match="12"):
        made.apply(torch.zeros(12, 11))
    with pytest.raises(ValueError, match="12"):
        made.apply_transpose(torch.tensor(1.0))
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype)):
            made.apply(torch.zeros(12, dtype=dtype))


@pytest.mark.parametrize("n", [8, 12, 18, 24])
def test_gradients_flow_even_if_first_built_in_inference_mode(n: int) -> None:
    rotation.cache_clear()
    with torch.inference_mode():
        rotation(n)
    x = sample(2, n).requires_grad_()
    weight = sample(2, n, seed=9)
    (gradient,) = torch.autograd.grad((rotation(n).apply(x) * weight).sum(), x)
    assert torch.allclose(gradient, rotation(n).apply_transpose(weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [11008, 14336])
def test_model_sizes_build_quickly(n: int) -> None:
    rotation.cache_clear()
    galois_field.cache_clear()
    start = time.perf_counter()
    made = rotation(n)
    assert time.perf_counter() - start < 2
    assert isinstance(made, Rotation)
    x = sample(2, n)
    assert torch.allclose(made.apply(x).norm(dim=1), x.norm(dim=1))
    assert torch.allclose(made.apply_transpose(made.apply(x)), x, rtol=0, atol=1e-11)
    # A row in the middle, from the definition: apply to a basis vector.
    basis = torch.zeros(n, dtype=torch.float64)
    basis[n // 3] = 1
    core, tail = divmod(n // 3, 1 << made.power)
    signs = torch.tensor([(-1.0) ** (tail & j).bit_count() for j in range(1 << made.power)], dtype=torch.float64)
    expected = torch.outer(made.left[core], signs).flatten() / math.sqrt(1 << made.power)
    assert torch.allclose(made.apply(basis), expected, rtol=0, atol=1e-14)
