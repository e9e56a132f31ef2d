"""Descent over orthogonal matrices by Cayley steps (SpinQuant, arXiv 2405.16406, section 3.2, after Li et al. 2020).

A step multiplies Q by the Cayley transform of a skew matrix, which is orthogonal exactly, so nothing has to be projected back.
SpinQuant iterates towards the transform a few times; here it is solved for, in float64. Shapes: Q [..., n, n], a batch of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(skew: Tensor) -> Tensor:
    """``(I - A/2)^-1 (I + A/2)`` of skew A, float64 [..., n, n]: orthogonal, and I + A + O(A²)."""
    half = skew.double() / 2
    eye = torch.eye(skew.shape[-1], dtype=torch.float64, device=skew.device)
    turned: Tensor = torch.linalg.solve(eye - half, eye + half)
    return turned


def skew_part(q: Tensor, grad: Tensor) -> Tensor:
    """The direction of steepest ascent at Q, as a skew matrix A to the right of it: the loss rises along Q + tQA.

    Args:
        q: orthogonal, float64 [..., n, n].
        grad: of the loss by the entries of Q.

    Returns:
        ``(Q^T G - G^T Q) / 2``, float64.
    """
    product = q.mT @ grad.double()
    return (product - product.mT) / 2


def cayley_step(q: Tensor, grad: Tensor, rate: float) -> Tensor:
    """One step of gradient descent over orthogonal matrices.

    Args:
        q: float64 [..., n, n], orthogonal.
        grad: of the loss by the entries of Q.
        rate: length of the step; shortened where it would turn by more than about a radian (SpinQuant's own bound,
            1 over the largest column sum of the skew matrix, so that a large gradient cannot throw Q anywhere).

    Returns:
        The next Q, a fresh tensor.
    """
    skew = skew_part(q, grad)
    largest = skew.abs().sum(-2).amax(-1).clamp(min=1e-30)[..., None, None]
    return q @ cayley(-skew * (1 / largest).clamp(max=rate))
