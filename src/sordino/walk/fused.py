"""Norms and gated activations of the walk's blocks in one pass over memory each, forward and backward.

transformers' own modules take some ten passes there, more time than the matrix products of a small model. The operations round
where those modules' do. Whatever the kernels cannot take goes through the module's own forward. Shapes: n channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sordino.runtime.kernels import library, rows, training
from sordino.runtime.kernels.linear import TYPES
from sordino.runtime.known import FAMILIES, SILU

# Other families' norms may add 1 to the gain, or round elsewhere.
_NORMS, _GATED = ({f"{family}{part}" for family in FAMILIES} for part in ("RMSNorm", "MLP"))


def fuse(block: nn.Module) -> None:
    """Give a block's norms and its MLP, where they are of a known kind, the forward of this file."""
    for module in block.modules():
        kind: Any = type(module)
        if kind.__name__ in _NORMS:
            module.__class__ = _with(kind, _norm)
        elif kind.__name__ in _GATED and isinstance(module.act_fn, SILU):
            module.__class__ = _with(kind, _gated)


@cache
def _with(kind: type, forward: Callable[[Any, Tensor], Tensor]) -> type:
    """A class with another forward, under the name of the old one.

    A forward of the module's own would be a cycle, so that memory of dropped blocks would wait for the garbage collector.
    """
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _norm(module: Any, x: Tensor) -> Tensor:
    gain: Tensor = module.weight
    if not (x.dtype == gain.dtype and x.dtype in TYPES and x.shape[-1:] == gain.shape and training.ready(x, gain)):
        plain: Tensor = type(module).__base__.forward(module, x)  # type: ignore[union-attr]
        return plain
    out: Tensor = _RmsNorm.apply(x, gain, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype == up.dtype and gate.dtype in TYPES and gate.shape == up.shape and training.ready(gate, up):
        between = _Glu.apply(gate, up)  # type: ignore[no-untyped-call]
    else:
        between = module.act_fn(gate) * up
    out: Tensor = module.down_proj(between)
    return out


class _RmsNorm(torch.autograd.Function):
    """``gain * x / rms(x)``, x [..., n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """The norm of every row."""
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return rows.norm(library.Norm(gain.data_ptr(), 0, eps), x)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the gain."""
        x, gain = ctx.saved_tensors
        how = library.Norm(gain.data_ptr(), 0, ctx.eps)
        to_x, to_gain = training.norm_back(how, x, grads[0].contiguous(), ctx.needs_input_grad[1])
        return to_x, None if to_gain is None else to_gain.to(gain.dtype), None


class _Glu(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Entry by entry."""
        ctx.save_for_backward(gate, up)
        return rows.glu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both."""
        gate, up = ctx.saved_tensors
        return training.glu_back(gate, up, grads[0].contiguous())
