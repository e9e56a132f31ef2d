"""Rotated bases of the residual stream: one random Hadamard matrix, shared by all groups of channels.

One that was learned is a matrix of its own. Shapes: D hidden size, g size of a group, D = n*g.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sordino.numerics.hadamard import hadamard, has_hadamard, rotation
from sordino.runtime.kernels.rows import rotate

_DENSE = 512  # larger groups go through the fast transform


@dataclass(frozen=True)
class Basis:
    """``x -> x Q`` with ``Q = blockdiag(M, …, M)``, ``M = diag(signs) H / sqrt(g)``.

    Attributes:
        size: g, a size that a Hadamard matrix is constructed for.
        signs: of the rows of H, as g bits in hexadecimal (first sign in the highest bit, set for -1).
    """

    size: int
    signs: str

    @staticmethod
    def draw(hidden: int, seed: int, largest: int = 128) -> Basis:
        """Random signs for the largest power of two up to ``largest`` that divides ``hidden``.

        Raises:
            ValueError: if ``hidden`` is odd.
        """
        size = min(largest, hidden & -hidden)
        if size < 2:
            raise ValueError(f"no Hadamard group divides {hidden}")
        return Basis._signed(size, seed)

    @staticmethod
    def whole(hidden: int, seed: int) -> Basis:
        """Random signs for one group of all channels, or as many of them as there is a Hadamard matrix for.

        Raises:
            ValueError: if ``hidden`` is odd.
        """
        size = next(d for d in range(hidden, 0, -1) if hidden % d == 0 and has_hadamard(d))
        if size < 2:
            raise ValueError(f"no Hadamard group divides {hidden}")
        return Basis._signed(size, seed)

    @staticmethod
    def _signed(size: int, seed: int) -> Basis:
        bits = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
        return Basis(size, f"{int(''.join(map(str, bits)), 2):0{-(-size // 4)}x}")

    @cached_property
    def _signs(self) -> Tensor:
        return torch.tensor([1.0 - 2.0 * int(b) for b in f"{int(self.signs, 16):0{self.size}b}"], dtype=torch.float64)

    @cached_property
    def matrix(self) -> Tensor:
        """M, float64 [g, g], orthogonal."""
        exact: Tensor = self._signs[:, None] * hadamard(self.size).double() / self.size**0.5
        return exact

    def apply(self, x: Tensor) -> Tensor:
        """``x Q`` for x [..., D], in fp32 (float64 for float64), given back in x's dtype."""
        if self.size > _DENSE:
            return rotate(rotation(self.size), x.unflatten(-1, (-1, self.size)) * self._row(x)).flatten(-2)
        return self._multiply(x, self.matrix)

    def undo(self, x: Tensor) -> Tensor:
        """``x Q^T``, the inverse of :meth:`apply`."""
        if self.size > _DENSE:
            back = rotation(self.size).transposed()
            return (rotate(back, x.unflatten(-1, (-1, self.size))) * self._row(x)).flatten(-2)
        return self._multiply(x, self.matrix.T)

    def _row(self, x: Tensor) -> Tensor:
        return self._signs.to(x.device, x.dtype)

    def _multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        grouped = x.to(work).unflatten(-1, (-1, self.size))
        product: Tensor = grouped @ matrix.to(x.device, work)
        return product.flatten(-2).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Dense:
    """``x -> x Q`` with any orthogonal Q.

    Attributes:
        matrix: Q, fp32 [D, D].
    """

    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """``x Q`` for x [..., D], in fp32 (float64 for float64), given back in x's dtype."""
        return self._multiply(x, self.matrix)

    def undo(self, x: Tensor) -> Tensor:
        """``x Q^T``, the inverse of :meth:`apply` to fp32's precision."""
        return self._multiply(x, self.matrix.T)

    @staticmethod
    def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        product: Tensor = x.to(work) @ matrix.to(x.device, work)
        return product.to(x.dtype)
