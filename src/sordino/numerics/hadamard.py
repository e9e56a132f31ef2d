"""Builds orthogonal transforms of any size: Hadamard matrices where a construction is known, seeded ones elsewhere.

Quantizers rotate weights and activations so that outliers spread over all coordinates. The transform used here is
always `kron(left, S)`, where `S` is the normalized Sylvester matrix of a power of two (applied as a butterfly) and
`left` is a small dense orthogonal factor: a Paley Hadamard matrix, a Kronecker product of such, or, if the odd part
of the size allows neither, a random orthogonal matrix drawn from a seed.

No matrix is stored. Paley's two constructions need the quadratic character of a finite field of any odd prime power
order, so the fields are built here too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import isqrt, sqrt

import torch
from torch import Tensor

__all__ = ["GaloisField", "Rotation", "factor", "galois_field", "hadamard", "has_hadamard", "rotation"]


def _digits(value: int, base: int, count: int) -> list[int]:
    """Return the `count` lowest digits of `value`, least significant first."""
    digits = []
    for _ in range(count):
        value, digit = divmod(value, base)
        digits.append(digit)
    return digits


def _remainder(dividend: list[int], divisor: list[int], p: int) -> list[int]:
    """Return `dividend` modulo a monic `divisor` over GF(p); coefficients run from the constant term up."""
    rest, degree = list(dividend), len(divisor) - 1
    while len(rest) > degree:
        lead = rest.pop()
        shift = len(rest) - degree
        for i in range(degree):
            rest[shift + i] = (rest[shift + i] - lead * divisor[i]) % p
    return rest


def _is_irreducible(poly: list[int], p: int) -> bool:
    """Tell whether a monic polynomial over GF(p) has no monic divisor of degree 1 up to half its own."""
    half = (len(poly) - 1) // 2
    return all(any(_remainder(poly, [*_digits(t, p, d), 1], p)) for d in range(1, half + 1) for t in range(p**d))


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p**k, p prime and k > 0, or None if there is no such pair."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


@dataclass(frozen=True)
class GaloisField:
    """The field of q = p**k elements; an element is an int whose base-p digits are its polynomial coefficients.

    `modulus` holds the coefficients of the monic irreducible polynomial behind `mul`, constant term first.
    """

    q: int
    p: int
    k: int
    modulus: tuple[int, ...]

    def _number(self, coefficients: list[int]) -> int:
        return reduce(lambda high, digit: high * self.p + digit, reversed(coefficients), 0)

    def add(self, a: int, b: int) -> int:
        """Return a + b, for elements in [0, q)."""
        pairs = zip(_digits(a, self.p, self.k), _digits(b, self.p, self.k), strict=True)
        return self._number([(x + y) % self.p for x, y in pairs])

    def mul(self, a: int, b: int) -> int:
        """Return a * b, for elements in [0, q)."""
        product = [0] * (2 * self.k - 1)
        right = _digits(b, self.p, self.k)
        for i, x in enumerate(_digits(a, self.p, self.k)):
            for j, y in enumerate(right):
                product[i + j] = (product[i + j] + x * y) % self.p
        return self._number(_remainder(product, list(self.modulus), self.p))

    def jacobsthal(self) -> Tensor:
        """Return the int8 [q, q] matrix whose entry (a, b) is 0 if a = b, 1 if a - b is another square, else -1."""
        character = torch.full((self.q,), -1, dtype=torch.int8, device="cpu")
        character[[self.mul(a, a) for a in range(self.q)]] = 1
        character[0] = 0
        places = torch.tensor([self.p**i for i in range(self.k)], device="cpu")
        digits = torch.arange(self.q, device="cpu")[:, None] // places % self.p
        # One row at a time: all differences at once would take 8k bytes per entry of a one-byte result.
        return torch.stack([character[((row - digits) % self.p * places).sum(1)] for row in digits])


@lru_cache(maxsize=32)
def galois_field(q: int) -> GaloisField:
    """Return the field of q elements; raises ValueError, naming q, unless q is a prime power."""
    power = _prime_power(q)
    if power is None:
        raise ValueError(f"no field has {q} elements: not a prime power")
    p, k = power
    candidates = ([*_digits(tail, p, k), 1] for tail in range(q))
    return GaloisField(q, p, k, tuple(next(poly for poly in candidates if _is_irreducible(poly, p))))


def _paley_field(order: int) -> int | None:
    """Return the field order q from which Paley's first or second construction gives `order`, if there is one."""
    first, second = order - 1, order // 2 - 1
    if first % 4 == 3 and _prime_power(first):
        return first
    if order % 2 == 0 and second % 4 == 1 and _prime_power(second):
        return second
    return None


@lru_cache(maxsize=4096)
def _paley_parts(order: int) -> tuple[int, ...] | None:
    """Return Paley orders whose product is `order`, or None if none multiply to it; 1 is the empty product."""
    if order == 1:
        return ()
    if _paley_field(order) is not None:
        return (order,)
    for part in range(4, isqrt(order) + 1, 4):
        if order % part == 0 and _paley_field(part) is not None:
            rest = _paley_parts(order // part)
            if rest is not None:
                return (part, *rest)
    return None


def _paley(order: int) -> Tensor:
    """Build the int8 [order, order] Paley matrix; `order` must be one for which `_paley_field` finds a field."""
    q = _paley_field(order)
    assert q is not None, f"order {order} is not a Paley order"
    border = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    border[0, 0] = 0
    border[1:, 1:] = galois_field(q).jacobsthal()
    eye = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    if q % 4 == 3:
        # -1 is no square, so the character is odd: a negated border column makes the whole matrix skew.
        border[1:, 0] = -1
        return border + eye
    # -1 is a square: `border` is symmetric with a zero diagonal, and doubling it fills the zeros.
    filling = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(border, _sylvester(1)) + torch.kron(eye, filling)


def _product(matrices: Iterable[Tensor]) -> Tensor:
    """Return the Kronecker product of int8 matrices, [[1]] if there are none."""
    return reduce(torch.kron, matrices, torch.ones(1, 1, dtype=torch.int8, device="cpu"))


def _sylvester(m: int) -> Tensor:
    """Build the int8 Sylvester matrix of order 2**m by doubling."""
    return _product([torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")] * m)


def factor(n: int) -> tuple[int, int]:
    """Split n into k * 2**m, the sizes of the dense and of the butterfly factor of the transform.

    Returns:
        (k, m), where k is the smallest order for which a Hadamard matrix is constructed here (1 for a power of
        two); if no split has one, k is the odd part of n, whose factor has to be seeded.

    Raises:
        ValueError: If n is not positive.
    """
    if n < 1:
        raise ValueError(f"a transform needs a positive size, got {n}")
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    doublings = next((j for j in range(twos + 1) if _paley_parts(odd << j) is not None), 0)
    return odd << doublings, twos - doublings


def has_hadamard(n: int) -> bool:
    """Tell whether `hadamard(n)` is constructed here, without building it; raises ValueError unless n >= 1."""
    return _paley_parts(factor(n)[0]) is not None


def hadamard(n: int) -> Tensor:
    """Build the Hadamard matrix of order n as kron(H_k, Sylvester(2**m)) with (k, m) = factor(n).

    Returns:
        A fresh int8 [n, n] tensor H of +1 and -1 with H @ H.T = n * identity.

    Raises:
        ValueError: If n is not positive, or no product of Sylvester and Paley matrices has order n (92, say).
    """
    k, m = factor(n)
    parts = _paley_parts(k)
    if parts is None:
        raise ValueError(f"no Hadamard matrix of order {n}: no product of Sylvester and Paley orders gives {n}")
    return torch.kron(_product(map(_paley, parts)), _sylvester(m))


_DENSE = 7  # a product with a matrix of 2**7 rows costs less than seven passes over memory


@lru_cache(maxsize=64)
def _signs(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept, and training may use it later
        return _sylvester(m).to(device, dtype)


def _walsh(x: Tensor, m: int) -> Tensor:
    """Multiply the last dimension, of length 2**m, by the unnormalized (symmetric) Sylvester matrix."""
    if m <= _DENSE:
        return x @ _signs(m, x.dtype, x.device)
    grid = x.unflatten(-1, (-1, 1 << _DENSE)) @ _signs(_DENSE, x.dtype, x.device)
    return _walsh(grid.transpose(-1, -2), m - _DENSE).transpose(-1, -2).flatten(-2)


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal transform kron(left, S / sqrt(2**power)), with S the Sylvester matrix of order 2**power.

    Instances compare by identity. Those made by `rotation` are shared: `left` must not be written to.

    It acts on vectors of length `size` = k * 2**power; `left` is orthonormal, float64 [k, k], on the CPU; `name`
    describes the transform to people.
    """

    size: int
    left: Tensor
    power: int
    name: str

    def __deepcopy__(self, memo: dict[int, object]) -> Rotation:
        """Itself, so that a copied cache still fits its model."""
        return self

    def matrix(self) -> Tensor:
        """Return the whole transform as a fresh float64 [n, n] tensor."""
        scaled = self.left.contiguous() / sqrt(1 << self.power)  # kron refuses the column-major result of QR
        return torch.kron(scaled, _sylvester(self.power).double())

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ matrix without forming the matrix; differentiable in x.

        Args:
            x: A floating tensor [..., n], on any device. Computed in float64 if it is float64, else in float32.

        Returns:
            A tensor of the shape, dtype and device of x.

        Raises:
            ValueError: If the last dimension of x is not n.
            TypeError: If x is not of a real floating dtype.
        """
        return self._transform(x, self.left)

    def apply_transpose(self, x: Tensor) -> Tensor:
        """Return x @ matrix.T, which undoes `apply`; shapes, dtypes and errors are those of `apply`."""
        return self._transform(x, self.left.T)

    def transposed(self) -> Rotation:
        """The rotation that undoes this one; made once."""
        return _transposed(self)

    def _transform(self, x: Tensor, left: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"a rotation needs a floating tensor, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.size:
            raise ValueError(f"a rotation of size {self.size} cannot act on shape {tuple(x.shape)}")
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        # The scale goes into the small factor, in float64, rather than costing a pass over x.
        dense = (left / sqrt(1 << self.power)).to(device=x.device, dtype=work)
        grid = _walsh(x.to(work).reshape(*x.shape[:-1], left.shape[0], 1 << self.power), self.power)
        # With k last, the product is one large matmul instead of a batch of small ones.
        grid = grid * dense if left.shape[0] == 1 else (grid.transpose(-1, -2) @ dense).transpose(-1, -2)
        return grid.reshape(x.shape).to(x.dtype)


@lru_cache(maxsize=64)
def _transposed(turn: Rotation) -> Rotation:
    return Rotation(turn.size, turn.left.T, turn.power, f"{turn.name}, transposed")


def _seeded_orthogonal(n: int, seed: int) -> Tensor:
    """Draw a float64 [n, n] orthogonal matrix, uniform over the orthogonal group (Haar)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu"))
    # QR leaves the sign of each column to the library; a positive diagonal of R makes it unique, and q uniform.
    unique: Tensor = torch.where(r.diagonal() < 0, -q, q)
    return unique


@lru_cache(maxsize=16)
def rotation(n: int, seed: int = 0) -> Rotation:
    """Build the rotation of size n: a normalized Hadamard matrix if one is constructed here, else partly seeded.

    Args:
        n: The size, at least 1.
        seed: Selects the dense factor where no Hadamard matrix is available; ignored otherwise.

    Returns:
        A rotation, kept and handed out again to later callers.

    Raises:
        ValueError: If n is not positive.
    """
    k, m = factor(n)
    parts = _paley_parts(k)
    tail = [f"Sylvester {1 << m}"] if m or k == 1 else []
    if parts is None:
        return Rotation(n, _seeded_orthogonal(k, seed), m, " x ".join([f"seeded orthogonal {k}", *tail]))
    name = f"Hadamard {n} = " + " x ".join([f"Paley {part}" for part in parts] + tail)
    return Rotation(n, _product(map(_paley, parts)).double() / sqrt(k), m, name)
