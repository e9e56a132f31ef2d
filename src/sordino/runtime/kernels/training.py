"""What training asks of the kernels: the passes over memory between matrix products, each in one call instead of some ten.

Where the kernels are missing, or cannot read a tensor, the callers go through torch. Shapes: R rows of a weight, G groups, g
entries of a group, T queries, S keys.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sordino.runtime.kernels import library
from sordino.runtime.kernels.linear import TYPES, traced

_ROWS = 64  # tokens whose gradients of a gain are summed by one thread


def ready(*given: Tensor) -> bool:
    """Whether the kernels are there and can read, and write gradients for, all of these."""
    if library.active() is None or traced():
        return False
    return all(x.device.type == "cpu" and x.is_contiguous() and x.numel() > 0 for x in given)


def _numbers(*given: Tensor) -> bool:
    """The same, and that all are fp32."""
    return all(x.dtype == torch.float32 for x in given) and ready(*given)


def on_grid(latent: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Codes uint8 [R, G, g] of positions (fp32 of that shape; or codes themselves), and their values [R, G, g] in ``dtype``."""
    moving = latent.dtype == torch.float32
    if dtype not in TYPES or not (moving or latent.dtype == torch.uint8) or not ready(latent) or not _numbers(scale, zero):
        return None
    native = library.present()
    codes = _empty(latent.shape, torch.uint8) if moving else latent
    values = _empty(latent.shape, dtype)
    native.sordino_grid(
        latent.data_ptr() if moving else None, codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), bits,
        scale.numel(), latent.shape[-1], TYPES[dtype], values.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, values


def on_grid_back(
    grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, latent: bool, growth: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """Gradients fp32 of positions [R, G, g] and of scales [R, G], where they are wanted, from that of the values."""
    if grad.dtype not in TYPES or codes.dtype != torch.uint8 or not ready(grad, codes) or not _numbers(scale, zero):
        return None
    native = library.present()
    to_latent = _empty(codes.shape) if latent else None
    to_scale = _empty(scale.shape) if growth else None
    native.sordino_grid_back(
        grad.data_ptr(), TYPES[grad.dtype], codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), scale.numel(), codes.shape[-1],
        _address(to_latent), _address(to_scale), torch.get_num_threads(),
    )  # fmt: skip
    return to_latent, to_scale


def keep_near(latent: Tensor, zero: Tensor, bits: int, edge: float) -> bool:
    """Bring positions fp32 [R, G, g] to within ``edge`` of a code, in place."""
    if not _numbers(latent, zero):
        return False
    native = library.present()
    native.sordino_keep_near(
        latent.data_ptr(), zero.data_ptr(), bits, edge, zero.numel(), latent.shape[-1], torch.get_num_threads()
    )
    return True


def norm_back(how: library.Norm, x: Tensor, grad: Tensor, gain: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [..., n] and, if wanted, of the gain fp32 [n]; :func:`ready` has to hold for both."""
    native = library.present()
    rows, n = x.numel() // x.shape[-1], x.shape[-1]
    out = torch.empty_like(x)
    sums = _empty((-(-rows // _ROWS), n)) if gain else None
    native.sordino_norm_back(
        ctypes.addressof(how), x.data_ptr(), grad.data_ptr(), TYPES[x.dtype], rows, n, out.data_ptr(), _address(sums), _ROWS,
        torch.get_num_threads(),
    )  # fmt: skip
    return out, None if sums is None else sums.sum(0)


def glu_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from that of ``silu(gate) * up``; :func:`ready` has to hold for all."""
    native = library.present()
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    native.sordino_glu_back(
        gate.data_ptr(), up.data_ptr(), grad.data_ptr(), TYPES[gate.dtype], gate.numel(), to_gate.data_ptr(), to_up.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return to_gate, to_up


class Rows(NamedTuple):
    """How the rows of a tensor [..., n] are rounded: scale, least and largest code, fp32, one for all or one a row."""

    bounds: tuple[Tensor, Tensor, Tensor]
    apart: bool
    rows: int
    length: int

    @property
    def given(self) -> tuple[int, int, int, int]:
        """In the order of the kernels' arguments."""
        scale, low, high = (b.data_ptr() for b in self.bounds)
        return scale, low, high, int(self.apart)


def rows_of(x: Tensor, scale: Tensor, low: Any, high: Any) -> Rows | None:
    """Rows of x, if the kernels can round them; see numerics/straight.py for the arguments."""
    if x.dtype not in TYPES or x.dim() == 0 or scale.dtype != torch.float32 or scale.device != x.device or not ready(x):
        return None
    bounds = [torch.as_tensor(b, dtype=torch.float32, device="cpu") for b in (scale.detach(), low, high)]
    apart = not all(b.numel() == 1 for b in bounds)
    if apart and any(b.dim() and b.shape[-1] != 1 for b in bounds):  # they differ inside a row
        return None
    shape = (*x.shape[:-1], 1) if apart else (1,)
    a, b, c = (t.expand(shape).contiguous() if apart else t.reshape(shape) for t in bounds)
    return Rows((a, b, c), apart, x.numel() // x.shape[-1], x.shape[-1])


def rounded(x: Tensor, how: Rows) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale`` in the dtype of x."""
    native = library.present()
    out = torch.empty_like(x)
    native.sordino_round(
        x.data_ptr(), *how.given, TYPES[x.dtype], how.rows, how.length, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def rounded_back(x: Tensor, grad: Tensor, how: Rows) -> tuple[Tensor, Tensor]:
    """Gradients straight through the rounding, of x, and what each row pulls at its scale, fp32 [..., 1]."""
    native = library.present()
    to_x, pulls = torch.empty_like(x), _empty((*x.shape[:-1], 1))
    native.sordino_round_back(
        x.data_ptr(), grad.data_ptr(), *how.given, TYPES[x.dtype], how.rows, how.length, to_x.data_ptr(),
        pulls.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return to_x, pulls


def weigh(scores: Tensor, first: int, scaling: float) -> Tensor | None:
    """Causal softmax of ``scaling * scores`` fp32 [..., T, S], which are overwritten: bf16. Query t sees ``first + t`` keys."""
    if not _numbers(scores):
        return None
    native = library.present()
    out = _empty(scores.shape, torch.bfloat16)
    native.sordino_weigh(scores.data_ptr(), *_heads(scores), first, scaling, out.data_ptr(), torch.get_num_threads())
    return out


def weigh_back(grad: Tensor, weights: Tensor, inner: Tensor, first: int, scaling: float) -> Tensor | None:
    """Gradient bf16 [..., T, S] of the scores, from that of the weights bf16 and ``sum(grad * weights)`` fp32 [..., T]."""
    if not grad.dtype == weights.dtype == torch.bfloat16 or not ready(grad, weights) or not _numbers(inner):
        return None
    native = library.present()
    out = torch.empty_like(weights)
    native.sordino_weigh_back(
        grad.data_ptr(), weights.data_ptr(), inner.data_ptr(), *_heads(weights), first, scaling, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that the kernels write, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _heads(x: Tensor) -> tuple[int, int, int]:
    return x[..., 0, 0].numel(), x.shape[-2], x.shape[-1]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
