"""Rounding with gradients straight through it: one pass of the kernels, or, without them, a tile at a time.

One pass over a large tensor costs memory bandwidth, and the formula has a dozen of them: torch's own operations on whole
tensors take two to four times as long as on tiles that stay in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sordino.runtime.kernels import training

_TILE = 1 << 16  # numbers: 256 KB in fp32


def fake_round(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale`` in the dtype of x (round half to even).

    Gradients of x go straight through the rounding, and are zero where x is clipped. A scale is pulled by the rounding
    error in steps, and by a clipped entry with its whole code (LSQ without its gradient scale; PrefixQuant, spec section 5).

    Args:
        x: float, of any shape.
        scale: fp32, broadcasts to x.
        low: least code: a number, or fp32 that broadcasts to x; integers.
        high: largest code, likewise.
    """
    how = training.rows_of(x, scale, low, high)
    out: Tensor = _ByTiles.apply(x, scale, low, high) if how is None else _ByRows.apply(x, scale, how)  # type: ignore[no-untyped-call]
    return out


class _ByRows(torch.autograd.Function):
    """By the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, how: training.Rows) -> Tensor:
        """Round every row."""
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
            ctx.how, ctx.shape = how, scale.shape
        return training.rounded(x, how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Gradients of x and the scale."""
        (x,) = ctx.saved_tensors
        to_x, pulls = training.rounded_back(x, grads[0].contiguous(), ctx.how)
        return to_x, pulls.sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None, None


class _ByTiles(torch.autograd.Function):
    """By torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
        """Round every tile."""
        out = torch.empty_like(x)
        for values, rounded, s, a, b in tiles(x, out, scale, low, high):
            rounded.copy_(torch.div(values, s).round_().clamp_(a, b).mul_(s))
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, scale, *(t for t in (low, high) if isinstance(t, Tensor)))
            ctx.bounds = tuple(None if isinstance(t, Tensor) else t for t in (low, high))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of x and the scale; steps are made again, which is cheaper than keeping them."""
        x, scale, *tensors = ctx.saved_tensors
        given = iter(tensors)
        low, high = (next(given) if bound is None else bound for bound in ctx.bounds)
        dx = torch.empty_like(x)
        ds = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        for values, given_grad, dv, s, a, b, pulled in tiles(x, grads[0], dx, scale, low, high, ds):
            grad = given_grad.float()
            steps = torch.div(values, s)
            near = steps.round()
            codes = near.clamp(a, b)
            clipped = near.sub_(codes).abs_().clamp_(max=1)  # 1 or 0, as numbers: booleans are slow
            dv.copy_(torch.addcmul(grad, grad, clipped, value=-1))
            if pulled is not None:
                pulled.add_(codes.sub_(steps).addcmul_(steps, clipped).mul_(grad).sum_to_size(s.shape))
        return dx, ds, None, None


def tiles(x: Tensor, *others: Any) -> Iterator[list[Any]]:
    """Cut a tensor into contiguous pieces of about a tile.

    Args:
        x: of any shape.
        others: tensors that broadcast to x, cut alike; anything else (numbers, None) is given as it is.

    Yields:
        Views of x and the others.
    """
    shape, dims = x.shape, x.dim()
    # Of equal dimensions; a scalar stays a tensor of one, which does not give its dtype away to the other operand.
    whole = [t.reshape((*(1,) * (dims - t.dim()), *t.shape)) if isinstance(t, Tensor) else t for t in (x, *others)]
    if not dims:
        yield whole
        return
    cut = next(k for k in range(dims) if prod(shape[k + 1 :]) <= _TILE or k == dims - 1)
    step = max(1, _TILE // max(1, prod(shape[cut + 1 :])))
    for outer in product(*(range(n) for n in shape[:cut])):
        for i in range(0, shape[cut], step):
            index = (*(slice(j, j + 1) for j in outer), slice(i, i + step))
            yield [_part(t, index) if isinstance(t, Tensor) else t for t in whole]


def _part(t: Tensor, index: tuple[slice, ...]) -> Tensor:
    """A tile of a tensor, whole where it broadcasts."""
    return t[tuple(slice(None) if n == 1 else i for n, i in zip(t.shape, index, strict=False))]
