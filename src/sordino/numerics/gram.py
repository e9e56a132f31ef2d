"""Second moments of calibration inputs, and the triangular factor GPTQ walks along.

Sums over tokens are kept unnormalized in fp32, so that several processes can add them up. Products of bf16 inputs are
exact in fp32; symmetry halves the work. Shapes: T tokens, N input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_TILE = 192
_EXACT = 8192


@contextmanager
def exact_bf16_products(when: bool = True) -> Iterator[None]:
    """Let fp32 matmuls in the body multiply in bf16 and add in fp32 (if ``when``): exact on bf16 numbers, twice as fast."""
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16" if when else before
    try:
        yield
    finally:
        backend.fp32_precision = before


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the upper block triangle of ``total``, in place.

    Args:
        total: fp32 [N, N]; only tiles on and above the diagonal are touched, see :func:`mirror`.
        x: float [T, N].
    """
    n, wide = x.shape[1], x.float()
    with exact_bf16_products(x.dtype == torch.bfloat16):
        for i in range(0, n, _TILE):
            # One product per block row: the tile of the diagonal and everything to its right.
            total[i : i + _TILE, i:].addmm_(wide[:, i : i + _TILE].T, wide[:, i:])


def add_cross(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a^T b`` to ``total`` fp32 [M, N], in place; a is [T, M], b [T, N], both of one float dtype."""
    with exact_bf16_products(a.dtype == b.dtype == torch.bfloat16):
        total.addmm_(a.float().T, b.float())


def mirror(total: Tensor) -> Tensor:
    """Fill the lower triangle from the upper one, in place and tile by tile; returns ``total`` fp32 [N, N]."""
    n = total.shape[0]
    for i in range(0, n, _TILE):
        tile = total[i : i + _TILE, i : i + _TILE]
        tile.copy_(torch.triu(tile) + torch.triu(tile, 1).T)
        total[i + _TILE :, i : i + _TILE] = total[i : i + _TILE, i + _TILE :].T
    return total


def inverse_factor(h: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper triangular ``U`` with ``U^T U = (H + d I)^-1``, raising the damping until it exists.

    With J the reversal of the index order, ``J H J = L L^T`` gives ``U = (J L J)^-1``: one Cholesky factorization and
    one triangular inverse, without ever forming the inverse of H. Computed in fp64, beyond 8192 columns in fp32 (where
    an fp64 copy would not fit beside a large model's block).

    Args:
        h: fp32 [N, N] symmetric, positive diagonal.
        damp: first damping, as a share of the mean diagonal.

    Returns:
        ``U`` fp32 [N, N] and the damping share that was used.

    Raises:
        ValueError: if H holds numbers that are not finite, or its diagonal is not positive on average.
    """
    n = h.shape[0]
    mean = float(h.diagonal().double().mean())
    if not math.isfinite(mean) or not bool(torch.isfinite(h).all()):
        raise ValueError("the Hessian holds numbers that are not finite")
    if mean <= 0:  # no damping, being a share of the mean, would ever help
        raise ValueError("the Hessian's mean diagonal is not positive")
    dtype = torch.float64 if n <= _EXACT else torch.float32
    share = damp
    damped = h.flip(0, 1).to(dtype)
    del h  # for a large model every copy of it counts; callers hand it over without keeping it
    damped.diagonal().add_(share * mean)
    while True:
        lower, info = torch.linalg.cholesky_ex(damped)
        # A singular matrix can pass by rounding errors, with pivots that are nothing else.
        if int(info) == 0 and bool((lower.diagonal().square() > 100 * torch.finfo(dtype).eps * mean).all()):
            del damped
            upper = lower.flip(0, 1)
            del lower
            _invert_upper(upper)
            return upper.float(), share
        raised = max(share * 10, 1e-6)
        damped.diagonal().add_((raised - share) * mean)
        share = raised


def _invert_upper(u: Tensor) -> None:
    """Invert an upper triangular matrix in place, by halves: inv [[A, B], [0, C]] = [[A', -A' B C'], [0, C']]."""
    n = u.shape[0]
    if n <= 256:
        u.copy_(torch.linalg.solve_triangular(u, torch.eye(n, dtype=u.dtype), upper=True))
        return
    half = n // 2
    a, b, c = u[:half, :half], u[:half, half:], u[half:, half:]
    _invert_upper(a)
    _invert_upper(c)
    b.copy_(-(a @ b) @ c)
